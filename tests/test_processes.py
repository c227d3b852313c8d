"""The product as its users run it: processes, sockets, signals, terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import COMMAND_SECONDS, command, environment, refused, run
from hosts import BLOCKS, SLACK, Model, alive, clean_swarm, family, generated, make_model, offered, p2pd_of, until
from processes import LocalSwarm, PeerProcess

from swarm import SwarmCache, SwarmModelForCausalLM
from swarm.errors import NoRoom

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another model, for the peer with a small cache."""
    return make_model(tmp_path_factory.mktemp("small"), 1)


@pytest.fixture(scope="module")
def swarm(model: Model, small: Model) -> Iterator[LocalSwarm]:
    """Two peers for each half of `model`, and one with a cache of 96 tokens for `small`."""
    with clean_swarm(popen=subprocess.Popen) as swarm:
        for blocks in ("0:3", "3:6", "3:6"):
            swarm.serve(str(model.folder), "--blocks", blocks)
        swarm.serve(str(small.folder), "--cache-tokens", "96", "--lease-seconds", "2")
        swarm.wait_online(model.id, BLOCKS, 3)
        swarm.wait_online(small.id, BLOCKS, 1)
        yield swarm


def connected(swarm: LocalSwarm, model: Model) -> Any:
    return SwarmModelForCausalLM.from_pretrained(model.folder, initial_peers=[swarm.address], wait=20)


def answer(swarm: LocalSwarm, model: Model) -> list[int]:
    """What the swarm says, through a client of this process."""
    with connected(swarm, model) as client:
        output = generated(client, 8)
    assert output == model.continues(8)
    return output


# --- commands of a client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [False, True])
def test_generate_says_what_the_whole_model_says(swarm: LocalSwarm, model: Model, draft: bool) -> None:
    ended = run(
        "swarm", "generate", model.folder, "-", "--max-new-tokens", 12,
        "--speculate", f"draft:{model.folder}" if draft else "off",
        "--initial-peers", swarm.address, swarm.address, stdin="Who are you?",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == model.says("Who are you?", 12) + "\n"
    (summary,) = ended.stderr.splitlines()  # and nothing from any library
    speculated = r"(, [\d.]+ tokens a trip)?, (\d+) of \2 drafted tokens accepted" if draft else ""
    speed = r"12 tokens, [\d.]+ tokens/s, first after [\d.]+ s"
    assert re.fullmatch(rf"{speed}{speculated}, by \S+\[0:3\] -> \S+\[3:6\]", summary)


def test_status_for_people_and_for_programs(swarm: LocalSwarm, model: Model, small: Model) -> None:
    ended = run("swarm", "status", model.folder, "--initial-peers", swarm.address)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "replicas of blocks 0:6  111222  every block is online" in ended.stdout
    ended = run("swarm", "status", "--json", SHOAL_INITIAL_PEERS=swarm.address)
    told = {each["model"]: each for each in json.loads(ended.stdout)}
    assert told.keys() == {model.id, small.id}
    assert told[small.id]["coverage"] == [1] * 6
    assert told[small.id]["peers"][0]["cache_tokens"] == 96
    assert told[model.id]["complete"] is True
    assert {peer["peer"] for peer in told[model.id]["peers"]} == offered(swarm, model).keys()


def test_blocks_that_nobody_hosts_are_named_and_waited_for(swarm: LocalSwarm, tmp_path: Path) -> None:
    other = make_model(tmp_path, 2)
    first = swarm.serve(str(other.folder), "--blocks", "0:2")
    assert until(lambda: [each for each in offered(swarm, other).values() if each.state == "online"], 30)
    generate = ("swarm", "generate", other.folder, "hi", "--max-new-tokens", 5, "--initial-peers", swarm.address)
    assert refused(*generate).startswith("error: no online peer for blocks 2:6 of ")
    with started(*generate, "--wait", 60) as waiting:
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == "waiting for a peer that hosts blocks 2:6\n"
        second = swarm.serve(str(other.folder), "--num-blocks", "4")  # it finds out which are missing
        told, _ = waiting.communicate(timeout=COMMAND_SECONDS)
    assert (waiting.returncode, told) == (0, other.says("hi", 5) + "\n")
    for peer in (first, second):
        assert peer.stop(signal.SIGINT) == 0


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command that runs; killed at the end if it still does."""
    name, *rest = map(str, arguments)
    line = [command(name), *rest]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# --- chat, in a terminal ----------------------------------------------------------------------------------------------


KEYS_ARE_READ, KEYS_WERE_READ = r"\x1b\[\?2004h", r"\x1b\[\?2004l"  # a terminal is told how to send what is pasted


class Terminal:
    """A program in a terminal of its own; what it shows is read, and keys are pressed."""

    def __init__(self, file: str, *arguments: object) -> None:
        line = [file, *map(str, arguments)]
        variables = environment(TERM="xterm", COLUMNS="200", PROMPT_TOOLKIT_NO_CPR="1")  # nobody answers where it is
        self.pid, self._handle = pty.fork()
        if self.pid == 0:
            os.execve(file, line, variables)
        self.shown = ""
        self._read = 0

    def until(self, pattern: str) -> None:
        """Read on until `pattern` is shown after what the last call waited for."""
        deadline = time.monotonic() + COMMAND_SECONDS
        while (found := re.compile(pattern, re.DOTALL).search(self.shown, self._read)) is None:
            ready, _, _ = select.select([self._handle], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} was not shown: {self.shown}"
            try:
                read = os.read(self._handle, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                read = b""
            assert read, f"it ended before it showed {pattern!r}: {self.shown}"
            self.shown += read.decode(errors="replace")
        self._read = found.end()

    def press(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def ended(self) -> int:
        """The exit code, when it has ended."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._handle)
        return os.waitstatus_to_exitcode(status)


def test_chat_in_a_terminal(swarm: LocalSwarm, model: Model) -> None:
    options = ("--initial-peers", swarm.address, "--max-new-tokens", 4000, "--seed", 1)
    terminal = Terminal(command("swarm"), "chat", model.folder, *options)
    terminal.until(KEYS_ARE_READ)
    terminal.press("Tell me all!\n")
    terminal.until(f"{KEYS_WERE_READ}.{{3}}")  # the answer begins
    terminal.press("\x03")  # Ctrl-C: the answer ends, the program does not
    terminal.until(r"\(stopped\)")
    terminal.until(KEYS_ARE_READ)
    terminal.press("\x03")  # with nothing to stop, nothing happens
    terminal.until(KEYS_ARE_READ)
    terminal.press("/new\n")
    terminal.until(KEYS_ARE_READ)
    terminal.press("\x04")
    assert terminal.ended() == 0
    assert "Traceback" not in terminal.shown


BUSY_PROMPT = """
import threading, warnings
from swarm.console.talk import Questions

def compute():
    while not asked.is_set():
        sum(range(100))

warnings.simplefilter("ignore")
asked = threading.Event()
threading.Thread(target=compute).start()
for line in Questions():
    print("typed", line)
asked.set()
"""


def test_ctrl_c_at_the_prompt_is_not_lost_while_another_thread_computes() -> None:
    terminal = Terminal(sys.executable, "-c", BUSY_PROMPT)
    for _ in range(20):
        terminal.until(KEYS_ARE_READ)
        terminal.press("half a line\x03")
    terminal.until(KEYS_ARE_READ)
    terminal.press("a line\n")
    terminal.until("typed a line\r\n")
    terminal.until(KEYS_ARE_READ)
    terminal.press("\x04")
    assert terminal.ended() == 0


# --- a peer's life and death ------------------------------------------------------------------------------------------


def test_one_name_in_the_dht_and_on_the_data_plane(swarm: LocalSwarm, model: Model) -> None:
    served = offered(swarm, model)
    for peer in swarm.peers[1:4]:
        assert stat.S_IMODE(peer.identity.stat().st_mode) == 0o600
        assert peer.peer in served
    assert swarm.address.endswith(f"/p2p/{swarm.bootstrap_process.peer}")
    answer(swarm, model)  # the data plane checks the names of offers against the keys of those who answer


def test_ctrl_c_withdraws_the_offer(swarm: LocalSwarm, model: Model) -> None:
    leaving = swarm.peers[2]
    processes = family(leaving)
    began = time.monotonic()
    leaving.process.send_signal(signal.SIGINT)
    code = leaving.process.wait(2.0 + SLACK)
    took = time.monotonic() - began
    assert leaving.peer not in offered(swarm, model), "a client that looks right after still sees it"
    assert code == 0, leaving.output()
    assert took < 2.0 + SLACK
    assert not [each for each in processes if alive(each)]
    assert "Traceback" not in leaving.output()
    answer(swarm, model)


def test_ctrl_c_while_it_starts(model: Model, tmp_path: Path) -> None:
    peer = PeerProcess(["serve", str(model.folder)], tmp_path / "log", tmp_path / "key")
    try:
        assert until(lambda: len(family(peer)) > 1, COMMAND_SECONDS)  # its p2pd is there; torch is being imported
        processes = family(peer)
        peer.process.send_signal(signal.SIGINT)
        assert peer.process.wait(2.0 + SLACK) == 0
        assert not [each for each in processes if alive(each)]
        assert peer.output() == ""
    finally:
        peer.stop()


def test_a_killed_daemon_is_replaced(swarm: LocalSwarm, model: Model) -> None:
    peer = swarm.peers[3]
    before = p2pd_of(peer)
    before.kill()
    assert until(lambda: not alive(before) and [p for p in family(peer) if p.name() == "p2pd" and p != before], 15)
    assert until(lambda: peer.peer in offered(swarm, model), 15)
    answer(swarm, model)
    assert "the DHT daemon died" in peer.output()


def test_nothing_outlives_a_peer_that_was_killed(swarm: LocalSwarm, model: Model) -> None:
    peer = swarm.serve(str(model.folder), "--blocks", "0:3")
    peer.address()
    processes = family(peer)
    assert len(processes) > 1
    peer.process.kill()
    assert until(lambda: not [each for each in processes if alive(each)], 5.0 + SLACK)
    assert peer.stop() == -signal.SIGKILL
    answer(swarm, model)  # its offer is still there; a client goes on without it


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_full_cache_is_told_at_once_and_a_vanished_client_frees_it(swarm: LocalSwarm, small: Model) -> None:
    generate = ("swarm", "generate", small.folder, "hi", "--initial-peers", swarm.address, "--max-new-tokens")
    ids = torch.tensor([[5, 6, 7]])
    with connected(swarm, small) as client:
        held = SwarmCache(max_length=95)
        client(ids, past_key_values=held)
        with repeated(lambda: go_on(client, held)):  # an idle session would make room
            assert re.search(r"asks for \d+ tokens of cache, 0 of 96 are free", refused(*generate, 5))
        held.close()
        with started(*generate, 80) as vanishing:
            assert vanishing.stdout is not None
            assert vanishing.stdout.read(1)  # it has a session
            vanishing.kill()
        assert until(lambda: fits(client, ids, 95), 2.0 + 3 * SLACK)


def go_on(client: Any, cache: SwarmCache) -> None:
    """A step, and back to where the session was."""
    client(torch.tensor([[8]]), past_key_values=cache)
    cache.crop(-1)


@contextmanager
def repeated(work: Callable[[], None]) -> Iterator[None]:
    """Do `work` over and over in a thread."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def fits(client: Any, ids: torch.Tensor, count: int) -> bool:
    """Whether there is room for a session of so many tokens."""
    cache = SwarmCache(max_length=count)
    try:
        client(ids, past_key_values=cache)
    except NoRoom:
        return False
    finally:
        cache.close()
    return True


# --- scripts ----------------------------------------------------------------------------------------------------------

_SCRIPT = """
import sys, threading
import torch
from swarm import SwarmCache, SwarmModelForCausalLM
model = SwarmModelForCausalLM.from_pretrained(sys.argv[1], initial_peers=[sys.argv[2]])
ids = torch.tensor([[5, 6, 7]])
def generate(count, streamer=None):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                          pad_token_id=0, streamer=streamer)
class Told:
    began = threading.Event()
    count = 0
    def put(self, value):
        self.count += 1
        if self.count == 3:
            print("began", flush=True)
            self.began.set()
    def end(self):
        pass
"""


@contextmanager
def script(swarm: LocalSwarm, model: Model, lines: str) -> Iterator[subprocess.Popen[str]]:
    """A user's script; killed at the end if it still runs."""
    arguments = [sys.executable, "-c", _SCRIPT + lines, str(model.folder), swarm.address]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


_ENDINGS = {  # what follows, the exit code, the last line on stderr
    "closed": ("model.close()", 0, ""),
    "not closed": ("", 0, ""),
    "exception": ("raise RuntimeError('mine')", 1, "RuntimeError: mine"),
    "exit": ("sys.exit(3)", 3, ""),
    "thread": (
        "threading.Thread(target=generate, args=(7000, Told()), daemon=True).start(); Told.began.wait()",
        0,
        None,
    ),
}


def test_a_script_ends_when_it_ends(swarm: LocalSwarm, model: Model) -> None:
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(script(swarm, model, f"print(generate(4).shape[1]); {lines}"))
            for name, (lines, _, _) in _ENDINGS.items()
        }
        for name, (_, code, said) in _ENDINGS.items():
            told, errors = running[name].communicate(timeout=COMMAND_SECONDS)
            assert running[name].returncode == code, (name, errors)
            assert told.splitlines()[0] == "7", name
            if said is not None:
                assert (errors.splitlines() or [""])[-1] == said, name
            assert "Fatal" not in errors, name


def test_ctrl_c_in_a_script(swarm: LocalSwarm, model: Model) -> None:
    lines = """
try:
    generate(7000, Told())
except KeyboardInterrupt:
    print("stopped", generate(4).shape[1])
"""
    with script(swarm, model, lines) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "began\n"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.stdout.readline() == "stopped 7\n"  # and the model can still be used
        assert time.monotonic() - began < SLACK
        _, errors = process.communicate(timeout=COMMAND_SECONDS)
    assert (process.returncode, errors) == (0, "")
