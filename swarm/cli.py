"""The `swarm` command: generate, chat, look."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

import swarm
from swarm.errors import NoRoute, RemoteError, UsageError
from swarm.hub import DEFAULT_MODEL
from swarm.terminal import (
    ProgressBars,
    addresses_in,
    console,
    error_line,
    errors_told,
    run,
    run_app,
    set_up_logging,
    unless_stopped,
)
from swarm.types import ModelId, Offer, Span

if TYPE_CHECKING:
    from swarm.conversation import Answer, Conversation
    from swarm.discovery import Discovery

app = typer.Typer(
    name="swarm",
    help="Use a model that a [bold]Shoal[/] swarm of volunteers holds together.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

WATCH_SECONDS = 1.0

InitialPeers = Annotated[
    list[str],
    typer.Option(
        "--initial-peers",
        metavar="ADDR...",
        envvar="SHOAL_INITIAL_PEERS",
        callback=addresses_in,
        help="Any peers of the swarm, by the addresses that `peer serve` prints.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to generate, at most.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token each time; above, it samples.")
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="P", help="Sample among the likeliest tokens of this total share.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")]
Wait = Annotated[
    float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for blocks that nobody hosts yet.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", metavar="", help="Log what happens, not warnings alone.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {swarm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Generate text through the peers of a swarm, chat with it, look at it."""


@app.command()
def generate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help=f"The model, {DEFAULT_MODEL} if left out, and what to say to it; - reads that from stdin.",
        ),
    ],
    initial_peers: InitialPeers,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, metavar="N", help="Beams to search with.")] = 1,
    seed: Seed = None,
    raw: Annotated[
        bool, typer.Option("--raw", metavar="", help="Continue the text as it is, without the chat template.")
    ] = False,
    wait: Wait = 0.0,
    verbose: Verbose = False,
) -> None:
    """Answer one prompt, streamed to stdout."""
    set_up_logging(verbose)
    with errors_told():
        if len(arguments) > 2:
            raise UsageError(f"one MODEL and one PROMPT are taken, not {len(arguments)}; put the prompt in quotes")
        model_name, prompt = arguments if len(arguments) == 2 else (DEFAULT_MODEL, arguments[0])
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text.strip():
            raise UsageError("the prompt is empty")
        with _talking_to(model_name, initial_peers, wait) as conversation:
            options = _options(max_new_tokens, temperature, top_p, seed) | {"num_beams": num_beams}
            answer = conversation.answer(conversation.encode(text, raw), _write, **options)
            _write("\n")
            _print_summary(answer)


@app.command()
def chat(
    initial_peers: InitialPeers,
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a short name or a hub id.")
    ] = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before you speak.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = None,
    wait: Wait = 0.0,
    verbose: Verbose = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /new forgets the talk, /quit or Ctrl-D ends it."""
    set_up_logging(verbose)
    with errors_told(), _talking_to(model_name, initial_peers, wait) as conversation:
        console.print("[dim]Ctrl-C stops an answer, /new forgets the talk, /quit or Ctrl-D ends it.[/]")
        begin = [{"role": "system", "content": system}] if system else []
        messages = list(begin)
        while (said := _read_line()) is not None:
            if said == "/new":
                messages = list(begin)
            elif said:
                _turn(conversation, messages, said, _options(max_new_tokens, temperature, top_p, seed))


@app.command()
def status(
    initial_peers: InitialPeers,
    model_name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A name or the beginning of a model's id; all, if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="For programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", metavar="", help="Keep looking; Ctrl-C ends it.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show which blocks are online how many times, and the peers that host them."""
    set_up_logging(verbose)
    run(lambda stop: _status(initial_peers, model_name, as_json, watch, stop))


# --- generate and chat ---------------------------------------------------------------------------------------------


@contextmanager
def _talking_to(model_name: str, initial_peers: list[str], wait: float) -> Iterator[Any]:
    """A conversation with the model, and everything taken down after it."""
    bars = ProgressBars()
    with console.status("joining the swarm") as spinner:
        from swarm.hub import resolve

        folder = resolve(model_name, bars)
        bars.stop()
        from swarm.client import SwarmModelForCausalLM
        from swarm.conversation import Conversation, load_tokenizer

        def waiting(missing: tuple[Span, ...]) -> None:
            console.print(f"waiting for a peer that hosts blocks {', '.join(map(str, missing))}")

        model: Any = SwarmModelForCausalLM.from_pretrained(
            folder, initial_peers=initial_peers, wait=wait, on_missing=waiting
        )
        spinner.update("loading the tokenizer")
        conversation = Conversation(model, load_tokenizer(str(folder)))
    try:
        yield conversation
    finally:
        conversation.forget()
        model.close()


def _options(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    if temperature == 0.0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p}


def _turn(conversation: Any, messages: list[dict[str, str]], said: str, options: dict[str, Any]) -> None:
    """One question and its answer; the history keeps what was said of it, whole or stopped."""
    messages.append({"role": "user", "content": said})
    pieces: list[str] = []

    def told(text: str) -> None:
        pieces.append(text)
        _write(text)

    try:
        answer = conversation.answer(conversation.encode(messages), told, **options)
    except (UsageError, NoRoute) as error:
        messages.pop()
        console.print(f"[bold red]error:[/] {error}")
        return
    except KeyboardInterrupt:
        console.print("\n[dim](stopped)[/]")
    else:
        _write("\n")
        _print_summary(answer)
    messages.append({"role": "assistant", "content": "".join(pieces)})


def _read_line() -> str | None:
    """What the user types; None when it is enough."""
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            console.print()
            continue
        return None if line in ("/quit", "/exit") else line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_summary(answer: Any) -> None:
    console.print(
        f"[dim]{len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} tokens/s, "
        f"first after {answer.first_seconds:.2f} s, by {answer.route.replace('[', chr(92) + '[')}[/]"
    )


# --- status --------------------------------------------------------------------------------------------------------


async def _status(
    initial_peers: list[str], model_name: str | None, as_json: bool, watch: bool, stop: asyncio.Event
) -> None:
    from swarm.discovery import Discovery
    from swarm.identity import Identity

    discovery = await Discovery.start(Identity.generate(), initial_peers, client_mode=True)
    try:
        if not watch:
            _show(await _look(discovery, model_name), as_json)
            return
        with Live(auto_refresh=False, screen=False) as live:
            while not stop.is_set():
                found = await _look(discovery, model_name)
                if as_json:
                    _show(found, as_json)
                else:
                    live.update(_tables(found), refresh=True)
                await asyncio.wait({asyncio.ensure_future(stop.wait())}, timeout=WATCH_SECONDS)
    finally:
        await discovery.close()


async def _look(discovery: Any, model_name: str | None) -> dict[ModelId, list[Offer]]:
    found: dict[ModelId, list[Offer]] = {}
    for model, listing in (await discovery.models()).items():
        if model_name is None or model.startswith(model_name) or listing.name == model_name.rstrip("/").split("/")[-1]:
            found[model] = await discovery.offers(model, listing.num_blocks)
    return {model: offers for model, offers in found.items() if offers}


def _tables(found: dict[ModelId, list[Offer]]) -> Any:
    from swarm.status import as_table

    return Group(*(as_table(model, offers) for model, offers in found.items())) if found else "nobody hosts a model"


def _show(found: dict[ModelId, list[Offer]], as_json: bool) -> None:
    from rich import print as show

    from swarm.status import as_json as described

    if as_json:
        print(json.dumps([described(model, offers) for model, offers in found.items()]))
    else:
        show(_tables(found))


def main() -> None:
    """The console script."""
    app(spread(sys.argv[1:]))
