"""What `swarm generate` and `swarm chat` do with a model: open it, have it answer, show what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from swarm.console.terminal import ProgressBars, console, error_line
from swarm.errors import ShoalError, UsageError
from swarm.files.hub import DEFAULT_MODEL
from swarm.imports import import_lightly
from swarm.runs.run import load as load_run
from swarm.types import Span

if TYPE_CHECKING:
    from swarm.console.conversation import Answer, Conversation
    from swarm.speculation.tuning import Counts


@contextmanager
def talking_to(
    model_name: str,
    initial_peers: list[str],
    wait: float,
    standby: int,
    speculate: str,
    of_run: Path | None = None,
    **terms: Any,
) -> Iterator[Conversation]:
    """A conversation with the model, and everything taken down after it."""
    from swarm.speculation.tuning import Speculate

    Speculate.parse(speculate)  # before anything is fetched
    bars = ProgressBars()
    try:
        if of_run is not None:
            if model_name != DEFAULT_MODEL:
                raise UsageError(f"--run names the model; {model_name} is another")
            conversation = _with_run(of_run, initial_peers, wait, standby, speculate, bars, **terms)
        else:
            conversation = _with_model(model_name, initial_peers, wait, standby, speculate, bars, **terms)
    finally:
        bars.stop()
    try:
        yield conversation
    finally:
        page.end_line()  # for an error, or the shell's prompt after Ctrl-C
        conversation.forget()
        conversation.model.close()


def _with_run(
    file: Path,
    initial_peers: list[str],
    wait: float,
    standby: int,
    speculate: str,
    bars: ProgressBars,
    **terms: Any,
) -> Conversation:
    if terms.get("mix"):
        raise UsageError("--mix is not for a run: its members keep all weights in full precision")
    described = load_run(file)
    bars(f"joining the swarm of {described.name}", 0, 0)
    import_lightly("swarm.runmodel")
    from swarm.chain import Terms
    from swarm.console.conversation import Conversation
    from swarm.network import Waiting
    from swarm.runmodel import open_run

    waiting, wanted = Waiting(wait, max(wait, 10.0), _tell_missing), Terms.parse(**terms)
    model, tokenizer = open_run(described, initial_peers, waiting, standby, speculate, wanted)
    return Conversation(model, tokenizer)


def _with_model(
    model_name: str,
    initial_peers: list[str],
    wait: float,
    standby: int,
    speculate: str,
    bars: ProgressBars,
    **terms: Any,
) -> Conversation:
    bars(f"joining the swarm of {model_name}", 0, 0)
    from swarm.files.hub import resolve

    folder = resolve(model_name, bars)
    import_lightly("swarm.client")
    from swarm.client import SwarmModelForCausalLM
    from swarm.console.conversation import Conversation, load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    model: Any = SwarmModelForCausalLM.from_pretrained(
        folder,
        initial_peers=initial_peers,
        wait=wait,
        standby=standby,
        speculate=speculate,
        **terms,
        on_quantized=_tell_quantized,
        on_missing=_tell_missing,
    )
    return Conversation(model, tokenizer)


def _tell_missing(missing: tuple[Span, ...]) -> None:
    page.end_line()
    console.print(f"waiting for a peer that hosts blocks {', '.join(map(str, missing))}")


def _tell_quantized(blocks: dict[str, list[Span]]) -> None:
    for kind, spans in blocks.items():
        console.print(
            f"blocks {', '.join(map(str, spans))} are run with {kind} weights; --exact does without", style="dim"
        )


def sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    if temperature == 0.0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p}


def turn(conversation: Conversation, messages: list[dict[str, str]], said: str, options: dict[str, Any]) -> None:
    """One question and its answer; the history keeps what was said of it, whole or stopped."""
    messages.append({"role": "user", "content": said})
    pieces: list[str] = []

    def told(text: str) -> None:
        pieces.append(text)
        page.write(text)

    try:
        answer = conversation.answer(conversation.encode(messages), told, **options)
        page.write("\n")
        print_summary(answer)
    except ShoalError as error:  # the next question may well be answered
        messages.pop()
        page.end_line()
        console.print(error_line(str(error)), soft_wrap=True)
        return
    except KeyboardInterrupt:
        page.write("\n")
        console.print("(stopped)", style="dim")
    messages.append({"role": "assistant", "content": "".join(pieces)})


class Questions:
    """What the user types, line by line; iteration ends when it is enough."""

    def __init__(self) -> None:
        self._ask: Callable[[str], str] = input
        if sys.stdin.isatty():
            # Not `readline`: with it, Ctrl-C is lost when it comes while another thread has the interpreter.
            from prompt_toolkit import PromptSession

            self._ask = PromptSession[str]().prompt

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                line = self._ask("> ").strip()
            except EOFError:
                page.write("\n")
                return
            except KeyboardInterrupt:
                page.write("\n")
                continue
            if line in ("/quit", "/exit"):
                return
            yield line


class _Page:
    """What is streamed to stdout."""

    _open = False  # whether its last line has begun and not ended

    def write(self, text: str) -> None:
        """At once, whatever comes after it."""
        sys.stdout.write(text)
        sys.stdout.flush()
        self._open = not text.endswith("\n") if text else self._open

    def end_line(self) -> None:
        """Before something else is shown: on a terminal it would stand in the middle of an answer's line."""
        if self._open and sys.stdout.isatty():
            self.write("\n")


page = _Page()


def print_summary(answer: Answer) -> None:
    count = len(answer.tokens)
    speed = f", {answer.tokens_per_second:.1f} tokens/s" if count > 1 else ""
    first = f", first after {answer.first_seconds:.2f} s"
    text = f"{count} tokens{speed}{first}{_speculated(answer.counts)}, by {answer.route}"
    console.print(Text(text, style="dim"), soft_wrap=True)


def _speculated(counts: Counts) -> str:
    """What drafts were worth; nothing where there were none."""
    if not counts.drafted:
        return ""
    trip = f", {counts.tokens / counts.trips:.1f} tokens a trip" if counts.trips else ""
    return f"{trip}, {counts.accepted} of {counts.drafted} drafted tokens accepted"
