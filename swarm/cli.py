"""The `swarm` command: generate, chat, look."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

import swarm
from swarm.errors import RemoteError, ShoalError, UsageError
from swarm.hub import DEFAULT_MODEL
from swarm.run import load as load_run
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
from swarm.trainshow import Training, gather_held, gather_saved, train_and_show
from swarm.types import Span

if TYPE_CHECKING:
    from swarm.conversation import Answer, Conversation
    from swarm.outlook import Outlook, Sight
    from swarm.speculation import Counts

app = typer.Typer(
    name="swarm",
    help="Use a model that a [bold]Shoal[/] swarm of volunteers holds together.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

evaluating = typer.Typer(no_args_is_help=True, help="Measure how good a swarm's answers are.")
app.add_typer(evaluating, name="evaluate")

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
StandbyCount = Annotated[
    int, typer.Option("--standby", min=0, help="Spares that follow at each hop, so that a death there costs nothing.")
]
SpeculateHow = Annotated[
    str,
    typer.Option(
        "--speculate",
        metavar="HOW",
        help="Draft tokens here, and have several checked in one trip along the chain; the answer stays the same. "
        "auto: from the text itself, where that is worth it; lookup: whenever that can be; draft:NAME: with the small "
        "model NAME; off: never.",
    ),
]
Wait = Annotated[
    float, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for blocks that nobody hosts yet.")
]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run: see configs/train-demo.toml.")]
OfRun = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN.toml", help="Talk to the model of a training run, as it is at the moment."),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact", metavar="", help="Use no peer with quantized weights. Else such peers serve what nobody else does."
    ),
]
Mix = Annotated[
    bool,
    typer.Option(
        "--mix", metavar="", help="Let exact and quantized peers take over from each other in the middle of an answer."
    ),
]
WireDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How hidden states travel: float32; bfloat16 or int8, rounded; auto: rounded only on slow links to other "
        "networks.",
    ),
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
    standby: StandbyCount = 0,
    speculate: SpeculateHow = "auto",
    exact: Exact = False,
    mix: Mix = False,
    wire_dtype: WireDtype = "auto",
    of_run: OfRun = None,
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
        precision = {"exact": exact, "mix": mix, "wire_dtype": wire_dtype}
        with _talking_to(model_name, initial_peers, wait, standby, speculate, of_run, **precision) as conversation:
            options = _options(max_new_tokens, temperature, top_p, seed) | {"num_beams": num_beams}
            answer = conversation.answer(conversation.encode(text, raw), _page.write, **options)
            _page.write("\n")
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
    standby: StandbyCount = 0,
    speculate: SpeculateHow = "auto",
    exact: Exact = False,
    mix: Mix = False,
    wire_dtype: WireDtype = "auto",
    of_run: OfRun = None,
    verbose: Verbose = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /new forgets the talk, /quit or Ctrl-D ends it."""
    set_up_logging(verbose)
    with suppress(ImportError):  # there is none for Windows
        importlib.import_module("readline")  # lets `input` know the arrow keys and what was typed before
    with (
        errors_told(),
        _talking_to(
            model_name, initial_peers, wait, standby, speculate, of_run, exact=exact, mix=mix, wire_dtype=wire_dtype
        ) as conversation,
    ):
        console.print("Ctrl-C stops an answer, /new forgets the talk, /quit or Ctrl-D ends it.", style="dim")
        begin = [{"role": "system", "content": system}] if system else []
        messages = list(begin)
        options = _options(max_new_tokens, temperature, top_p, seed)
        while (said := _read_line()) is not None:
            if said == "/new":
                messages = list(begin)
            elif said:
                _turn(conversation, messages, said, options)


@app.command()
def train(
    run_file: RunFile,
    initial_peers: InitialPeers,
    in_flight: Annotated[
        int | None,
        typer.Option(min=1, max=256, metavar="N", help="Micro-batches under way at once. Default: three a stage."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="At the end, write the model there: a folder that from_pretrained loads."),
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where each round becomes a line of JSON. Default NAME.jsonl.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the loss is drawn at the end. Default NAME.png.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Train: read the run's data and send it through the peers that hold its stages. Ctrl-C leaves."""
    set_up_logging(verbose)
    with errors_told():
        described = load_run(run_file)
    wanted = Training(
        described,
        initial_peers,
        in_flight or 3 * len(described.stages),
        output,
        metrics or Path(f"{described.name}.jsonl"),
        plot or Path(f"{described.name}.png"),
    )
    run(lambda stop: unless_stopped(train_and_show(wanted), stop))


@app.command()
def gather(
    run_file: RunFile,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the model.")],
    initial_peers: Annotated[
        list[str] | None,
        typer.Option("--initial-peers", metavar="ADDR...", help="Any peers of the swarm that trains it."),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Take what its stages have saved there, rather than what they hold now."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Put a run's stages together: an ordinary folder that `from_pretrained` loads."""
    set_up_logging(verbose)
    with errors_told():
        described = load_run(run_file)
        if (checkpoints is None) == (not initial_peers):
            raise UsageError("gather from a swarm (--initial-peers ADDR...) or from a folder (--checkpoints FOLDER)")
    if checkpoints is not None:
        with errors_told():
            gather_saved(described, checkpoints, folder)
        return
    peers = addresses_in(initial_peers or [])
    run(lambda stop: unless_stopped(gather_held(described, peers, folder), stop))


@app.command()
def status(
    initial_peers: InitialPeers,
    model_name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A name or the beginning of a model's id; all, if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="For programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", metavar="", help="Keep looking; Ctrl-C ends it.")] = False,
    route: Annotated[
        bool,
        typer.Option("--route", metavar="", help="Also the route that a client here would take, and why this one."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Show which blocks are online how many times, and the peers that host them."""
    set_up_logging(verbose)
    run(lambda stop: unless_stopped(_status(initial_peers, model_name, as_json, watch, route), stop))


@evaluating.command()
def perplexity(
    initial_peers: InitialPeers,
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a short name or a hub id.")
    ] = DEFAULT_MODEL,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to read. Default: the help texts that come with Python.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="How much of it, from the beginning; 0 for all.")
    ] = 8192,
    window: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens that are read at a time, each on its own.")
    ] = 512,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="For programs.")] = False,
    wait: Wait = 0.0,
    exact: Exact = False,
    mix: Mix = False,
    wire_dtype: WireDtype = "auto",
    verbose: Verbose = False,
) -> None:
    """How well the swarm predicts a text; lower is better. For comparing peers that keep weights differently."""
    set_up_logging(verbose)
    with (
        errors_told(),
        _talking_to(
            model_name, initial_peers, wait, 0, "off", exact=exact, mix=mix, wire_dtype=wire_dtype
        ) as conversation,
    ):
        from swarm.perplexity import default_text, measure, read_text, windows_of

        read: Any = conversation.tokenizer(default_text() if text is None else read_text(text), verbose=False)
        bars = ProgressBars()
        try:
            windows = windows_of(read["input_ids"], window, tokens)
            found = measure(conversation.model, windows, lambda done, total: bars("reading", done, total))
        finally:
            bars.stop()
        about = {"model": model_name, "text": str(text or "pydoc_data.topics"), "window": window}
        if as_json:
            print(json.dumps({**about, **asdict(found), "tokens_per_second": found.tokens_per_second}))
            return
        print(f"perplexity {found.perplexity:.4f}")
        summary = f"{found.predicted} tokens predicted in {found.windows} windows of {window}"
        speed = f"{found.tokens_per_second:.0f} tokens/s read, by {found.route}"
        console.print(Text(f"{summary}, {speed}", style="dim"), soft_wrap=True)


# --- generate and chat ---------------------------------------------------------------------------------------------


@contextmanager
def _talking_to(
    model_name: str,
    initial_peers: list[str],
    wait: float,
    standby: int,
    speculate: str,
    of_run: Path | None = None,
    **precision: Any,
) -> Iterator[Conversation]:
    """A conversation with the model, and everything taken down after it."""
    from swarm.speculation import Speculate

    Speculate.parse(speculate)  # before anything is fetched
    bars = ProgressBars()
    try:
        if of_run is not None:
            conversation = _with_run(of_run, initial_peers, wait, standby, bars)
        else:
            conversation = _with_model(model_name, initial_peers, wait, standby, speculate, bars, **precision)
    finally:
        bars.stop()
    try:
        yield conversation
    finally:
        _page.end_line()  # for an error, or the shell's prompt after Ctrl-C
        conversation.forget()
        conversation.model.close()


def _with_run(file: Path, initial_peers: list[str], wait: float, standby: int, bars: ProgressBars) -> Conversation:
    described = load_run(file)
    bars(f"joining the swarm of {described.name}", 0, 0)
    from swarm.conversation import Conversation
    from swarm.network import Waiting
    from swarm.runmodel import open_run

    model, tokenizer = open_run(described, initial_peers, Waiting(wait, max(wait, 10.0), _tell_missing), standby)
    return Conversation(model, tokenizer)


def _with_model(
    model_name: str,
    initial_peers: list[str],
    wait: float,
    standby: int,
    speculate: str,
    bars: ProgressBars,
    **precision: Any,
) -> Conversation:
    bars(f"joining the swarm of {model_name}", 0, 0)
    from swarm.hub import resolve

    folder = resolve(model_name, bars)
    from swarm.client import SwarmModelForCausalLM
    from swarm.conversation import Conversation, load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    model: Any = SwarmModelForCausalLM.from_pretrained(
        folder,
        initial_peers=initial_peers,
        wait=wait,
        standby=standby,
        speculate=speculate,
        **precision,
        on_quantized=_tell_quantized,
        on_missing=_tell_missing,
    )
    return Conversation(model, tokenizer)


def _tell_missing(missing: tuple[Span, ...]) -> None:
    _page.end_line()
    console.print(f"waiting for a peer that hosts blocks {', '.join(map(str, missing))}")


def _tell_quantized(blocks: dict[str, list[Span]]) -> None:
    for kind, spans in blocks.items():
        console.print(
            f"blocks {', '.join(map(str, spans))} are run with {kind} weights; --exact does without", style="dim"
        )


def _options(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    if temperature == 0.0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p}


def _turn(conversation: Conversation, messages: list[dict[str, str]], said: str, options: dict[str, Any]) -> None:
    """One question and its answer; the history keeps what was said of it, whole or stopped."""
    messages.append({"role": "user", "content": said})
    pieces: list[str] = []

    def told(text: str) -> None:
        pieces.append(text)
        _page.write(text)

    try:
        answer = conversation.answer(conversation.encode(messages), told, **options)
        _page.write("\n")
        _print_summary(answer)
    except ShoalError as error:  # the next question may well be answered
        messages.pop()
        _page.end_line()
        console.print(error_line(str(error)), soft_wrap=True)
        return
    except KeyboardInterrupt:
        _page.write("\n")
        console.print("(stopped)", style="dim")
    messages.append({"role": "assistant", "content": "".join(pieces)})


def _read_line() -> str | None:
    """What the user types; None when it is enough."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            _page.write("\n")
            return None
        except KeyboardInterrupt:
            _page.write("\n")
            continue
        return None if line in ("/quit", "/exit") else line


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


_page = _Page()


def _print_summary(answer: Answer) -> None:
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


# --- status --------------------------------------------------------------------------------------------------------


async def _status(initial_peers: list[str], model_name: str | None, as_json: bool, watch: bool, route: bool) -> None:
    from swarm.outlook import Outlook

    async with await Outlook.start(initial_peers, route) as outlook:
        if watch:
            await _watch(outlook, model_name, as_json)
        else:
            _show(await outlook.look(model_name), model_name, as_json)


async def _watch(outlook: Outlook, model_name: str | None, as_json: bool) -> None:
    screen = Console()
    live = Live(console=screen, auto_refresh=False) if screen.is_terminal and not as_json else None
    with live or nullcontext():
        while True:
            with suppress(RemoteError):  # the DHT did not answer in time: what was seen last stays
                sights = await outlook.look(model_name)
                if live is None:
                    _show(sights, model_name, as_json)
                else:
                    live.update(_tables(sights, model_name, screen), refresh=True)
            await asyncio.sleep(WATCH_SECONDS)


def _tables(sights: list[Sight], model_name: str | None, screen: Console) -> RenderableType:
    from swarm.status import WIDE, as_table, route_table

    if not sights:
        return f"nobody hosts {model_name or 'a model'}"
    wide = screen.width >= WIDE or not screen.is_terminal
    parts: list[RenderableType] = []
    for sight in sights:
        parts.append(as_table(sight.model, sight.offers, wide))
        if sight.route is not None:
            parts.append(route_table(sight.route))
        elif sight.problem:
            parts.append(Text(f"no route: {sight.problem}", style="red"))
    return Group(*parts)


def _show(sights: list[Sight], model_name: str | None, as_json: bool) -> None:
    from swarm.status import WIDE, route_json
    from swarm.status import as_json as described

    if as_json:
        print(json.dumps([described(s.model, s.offers) | route_json(s.route, s.problem) for s in sights]), flush=True)
        return
    screen = Console()
    if not screen.is_terminal:
        screen.width = WIDE  # a file has no edge
    screen.print(_tables(sights, model_name, screen))


def main() -> NoReturn:
    """The console script."""
    run_app(app)
