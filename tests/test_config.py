"""What a peer is told: a file, the environment, the command line, each stronger than the one before."""

from __future__ import annotations

import contextlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.config import BootstrapSettings, ServeSettings, load, parse_address, parse_span
from swarm.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = {"peer.toml": ServeSettings, "bootstrap.toml": BootstrapSettings}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"SHOAL_{name.upper()}", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.toml"


def test_defaults() -> None:
    settings = load(ServeSettings, None, {})
    assert (settings.blocks, settings.device, settings.initial_peers) == (None, "cpu", [])


def test_each_source_wins_over_the_weaker_ones(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('threads = 1\ncache_tokens = 100\ndtype = "float16"\n')
    monkeypatch.setenv("SHOAL_THREADS", "2")
    monkeypatch.setenv("SHOAL_CACHE_TOKENS", "200")
    settings = load(ServeSettings, file, {"threads": 3, "cache_tokens": None})
    assert (settings.threads, settings.cache_tokens, settings.dtype) == (3, 200, "float16")


VALUES: dict[str, tuple[str, Any]] = {
    "model": ("org/model", "org/model"),
    "blocks": ("0:4", "0:4"),
    "num_blocks": ("4", 4),
    "memory": ("2MiB", 2 * 1024 * 1024),
    "look_seconds": ("60", 60.0),
    "stay_seconds": ("0", 0.0),
    "initial_peers": ("/ip4/1.2.3.4/tcp/5/p2p/Qm, /ip4/1.2.3.4/tcp/6/p2p/Qm", None),
    "listen": ("0.0.0.0:4000", "0.0.0.0:4000"),
    "announce": ("[::1]:4000", "[::1]:4000"),
    "identity": ("/tmp/key", Path("/tmp/key")),
    "device": ("cuda", "cuda"),
    "dtype": ("bfloat16", "bfloat16"),
    "wire_dtype": ("int8", "int8"),
    "quantize": ("int4", "int4"),
    "cache_tokens": ("4096", 4096),
    "cache_dtype": ("bfloat16", "bfloat16"),
    "lease_seconds": ("2.5", 2.5),
    "drain_timeout": ("5", 5.0),
    "threads": ("3", 3),
    "nice": ("5", 5),
}


def test_every_option_is_tried_below() -> None:
    assert VALUES.keys() == ServeSettings.model_fields.keys()


@pytest.mark.parametrize("name", VALUES)
def test_every_option_from_every_source(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VALUES[name]
    expected = text.replace(",", "").split() if name == "initial_peers" else value
    assert getattr(load(ServeSettings, None, {name: expected}), name) == expected
    file.write_text(f"{name} = {value if isinstance(value, (int, float)) else repr(text)}\n")
    assert getattr(load(ServeSettings, file, {}), name) == expected
    file.write_text("")
    monkeypatch.setenv(f"SHOAL_{name.upper()}", text)
    assert getattr(load(ServeSettings, file, {}), name) == expected


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_BLOCKS", "")
    assert load(ServeSettings, None, {}).blocks is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("cache_token = 3", "no option is called cache_token; did you mean cache_tokens?"),
        ("colour = 3", "no option is called colour; there are initial_peers, listen"),
        ("num_blocks = 'three'", "num_blocks: input should be a valid integer.* not 'three'"),
        ("num_blocks = 0", "num_blocks: input should be greater than or equal to 1, not 0"),
        ("model = 5", "model: input should be a valid string, not 5"),
        ("initial_peers = 5", "initial_peers: input should be a valid list, not 5"),
        ("initial_peers = [5]", "initial_peers: input should be a valid string, not 5"),
        ("device = 'tpu'", "device: input should be 'cpu', 'cuda' or 'mps', not 'tpu'"),
        ("blocks = '7'", "blocks: '7' is no range of blocks; write START:END"),
        ("blocks = '4:4'", "blocks: '4:4' is no range of blocks"),
        ("listen = 'here'", "listen: 'here' is no address; write HOST:PORT"),
        ("listen = '1.2.3.4:65536'", "listen: '1.2.3.4:65536' is no address"),
        ("threads =", "Invalid value"),
        ("\x80", "some.toml"),
        ("lease_seconds = 0", "lease_seconds: input should be greater than or equal to 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(file: Path, content: str, complaint: str) -> None:
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=complaint) as caught:
        load(ServeSettings, file, {})
    assert str(file) in str(caught.value)


def test_what_is_wrong_elsewhere_is_named_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^--num-blocks: .*, not 0$"):
        load(ServeSettings, None, {"num_blocks": 0})
    monkeypatch.setenv("SHOAL_NUM_BLOCKS", "no")
    with pytest.raises(UsageError, match=r"^SHOAL_NUM_BLOCKS: .*, not 'no'$"):
        load(ServeSettings, None, {})


def test_two_mistakes_are_both_told() -> None:
    with pytest.raises(UsageError, match=r"--device: .*; --dtype: "):
        load(ServeSettings, None, {"device": "tpu", "dtype": "int8"})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match=f"no configuration file {missing}"):
            load(ServeSettings, missing, {})


@pytest.mark.parametrize("name", KINDS)
def test_the_example_has_every_option_and_its_default(name: str, tmp_path: Path) -> None:
    kind, text = KINDS[name], (CONFIGS / name).read_text()
    assert load(kind, CONFIGS / name, {}).model_dump() == kind().model_dump()
    shown = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    assert tomllib.loads(shown).keys() == kind.model_fields.keys()
    (tmp_path / name).write_text(shown)
    load(kind, tmp_path / name, {})  # the examples in comments are valid as well


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_span_is_read_as_it_is_written(start: int, length: int) -> None:
    span = parse_span(f"{start}:{start + length}")
    assert (span.start, span.end) == (start, start + length)
    assert parse_span(str(span)) == span


@given(st.ip_addresses(), st.integers(0, 65535))
def test_an_address_is_read_as_it_is_written(host: Any, port: int) -> None:
    text = f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
    address = parse_address(text)
    assert (address.host, address.port) == (str(host), port)
    assert str(address) == text


@given(st.text(max_size=12))
def test_what_is_neither_is_refused_by_value_error_alone(text: str) -> None:
    for parse in (parse_span, parse_address):
        with contextlib.suppress(ValueError):
            assert str(parse(text))
