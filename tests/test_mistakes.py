"""Users' mistakes, by running the commands: one line each that says what to do, and no stack trace."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from commands import COMMAND_SECONDS, environment, refused, run, save_talking
from nursery import Forked
from processes import LocalSwarm

from swarm.identity import Identity

pytestmark = pytest.mark.slow

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWBzPTxnLRtQrUsYkzxnBQBGkjjRnCNZB2UYbBbGnqjnF5"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_talking(folder, max_position_embeddings=64)
    return folder


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[LocalSwarm]:
    """A swarm of one, which hosts nothing."""
    with LocalSwarm(popen=Forked) as alone:
        yield alone
        begun, said = "A new swarm begins. Others join with:\n", alone.bootstrap_process.output()
        assert said.startswith(begun)
        assert said.removeprefix(begun).startswith("on this machine; for others to reach it, start it with --listen ")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return tmp_path / "key"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("peer serve --device tpu", "--device: .*'cpu', 'cuda' or 'mps', not 'tpu'"),
        ("peer serve --dtype int8", "--dtype: .*'float32', 'bfloat16' or 'float16', not 'int8'"),
        ("peer serve --blocks 4:4", "--blocks: '4:4' is no range of blocks; write START:END"),
        ("peer serve --config /none.toml", "no configuration file /none.toml"),
        ("peer serve --cache-tokens few", "'--cache-tokens': .* valid integer.*; peer serve --help tells more"),
        ("peer serve --blocs 0:4", "No such option: --blocs .*--blocks"),
        ("peer run", "No such command 'run'"),
        ("swarm status", "Missing option '--initial-peers'"),
        ("swarm generate --initial-peers x", r"Missing argument '\[MODEL\] PROMPT"),
        ("swarm generate a b c --initial-peers x", "put the prompt in quotes"),
    ],
)
def test_what_cannot_be_meant(arguments: str, complaint: str) -> None:
    assert re.search(complaint, refused(*arguments.split()))


def test_an_empty_prompt() -> None:
    assert refused("swarm", "generate", "  ", "--initial-peers", NOBODY) == "error: the prompt is empty"
    assert refused("swarm", "generate", "-", "--initial-peers", NOBODY, stdin="\n") == "error: the prompt is empty"


def test_a_file_with_an_option_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "peer.toml"
    file.write_text("blokcs = '0:3'\n")
    complaint = f"error: {file}: no option is called blokcs; did you mean blocks?"
    assert refused("peer", "serve", "--config", file) == complaint


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_device_that_is_not_there(key: Path) -> None:
    complaint = "error: --device cuda: torch finds none on this machine; use cpu"
    assert refused("peer", "serve", "--device", "cuda", "--identity", key) == complaint


@pytest.mark.parametrize("name", ["./none", "no such model", "org/none"])
def test_a_model_that_is_none(key: Path, name: str) -> None:
    line = refused("peer", "serve", name, "--identity", key, HF_ENDPOINT="http://127.0.0.1:9")
    assert name in line


@pytest.mark.parametrize("harm", ["missing", "short", "corrupt"])
def test_a_model_that_is_damaged(key: Path, model: Path, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if harm == "missing":
        weights.unlink()
    elif harm == "short":
        weights.write_bytes(content[: len(content) // 2])
    else:
        weights.write_bytes(b"\xff" * 100 + content[100:])
    assert str(folder) in refused("peer", "serve", folder, "--identity", key)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--blocks=4:7", "--blocks 4:7: the model has blocks 0:6"),
        ("--num-blocks=7", "--num-blocks 7: the model has 6"),
    ],
)
def test_blocks_that_the_model_has_not(key: Path, model: Path, option: str, complaint: str) -> None:
    assert refused("peer", "serve", model, option, "--identity", key) == f"error: {complaint}"


@pytest.mark.parametrize("offset", [0, 1], ids=["data", "dht"])
def test_a_port_in_use(key: Path, model: Path, offset: int) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        line = refused("peer", "serve", model, "--listen", f"127.0.0.1:{port - offset}", "--identity", key)
    assert str(port) in line
    assert "in use" in line


def test_an_initial_peer_that_nobody_is_at(key: Path, model: Path) -> None:
    assert "/ip4/127.0.0.1/tcp/9" in refused("peer", "serve", model, "--initial-peers", NOBODY, "--identity", key)
    assert "/ip4/127.0.0.1/tcp/9" in refused("swarm", "status", "--initial-peers", NOBODY)


def test_an_initial_peer_that_is_no_address(key: Path) -> None:
    for arguments in (("peer", "bootstrap", "--identity", key), ("swarm", "status")):
        line = refused(*arguments, "--initial-peers", "127.0.0.1:4000")
        assert "'127.0.0.1:4000'" in line
        assert "/p2p/12D3KooW" in line  # what one looks like


def test_a_key_for_all_to_read(key: Path) -> None:
    Identity.generate().save(key)
    key.chmod(0o644)
    line = refused("peer", "bootstrap", "--identity", key)
    assert str(key) in line
    assert "chmod 600" in line


def test_a_key_that_is_none(key: Path) -> None:
    key.touch(mode=0o600)
    key.write_bytes(b"garbage")
    assert str(key) in refused("peer", "bootstrap", "--identity", key)


def test_two_peers_with_one_key(bootstrap: LocalSwarm) -> None:
    line = refused("peer", "bootstrap", "--identity", bootstrap.bootstrap_process.identity)
    assert str(bootstrap.bootstrap_process.identity) in line
    assert "another peer on this machine" in line


def test_a_prompt_longer_than_the_context(bootstrap: LocalSwarm, model: Path) -> None:
    line = refused("swarm", "generate", model, "x" * 64, "--initial-peers", bootstrap.address)
    assert "the model's context is 64" in line


def test_status_of_a_swarm_that_hosts_nothing(bootstrap: LocalSwarm) -> None:
    ended = run("swarm", "status", "some", "--initial-peers", bootstrap.address)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "nobody hosts some\n", "")
    assert run("swarm", "status", "--json", SHOAL_INITIAL_PEERS=bootstrap.address).stdout == "[]\n"


def test_a_pipe_that_ends_early(bootstrap: LocalSwarm) -> None:
    """As in `swarm status --json --watch | head -1`: no trace, no hang."""
    command = [
        str(Path(sys.executable).with_name("swarm")),
        "status",
        "--json",
        "--watch",
        "--initial-peers",
        bootstrap.address,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "[]\n"
        process.stdout.close()
        assert process.wait(COMMAND_SECONDS) != 0
        assert process.stderr.read() == ""
