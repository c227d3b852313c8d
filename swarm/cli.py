"""The `swarm` command: generate, chat, look."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.text import Text

import swarm
from swarm.console.talk import Questions, page, print_summary, sampling, talking_to, turn
from swarm.console.terminal import (
    ProgressBars,
    addresses_in,
    console,
    errors_told,
    run,
    run_app,
    set_up_logging,
    unless_stopped,
)
from swarm.console.trainshow import Training, gather_held, gather_saved, train_and_show
from swarm.console.watch import show_status
from swarm.errors import UsageError
from swarm.files.hub import DEFAULT_MODEL
from swarm.runs.run import load as load_run

if TYPE_CHECKING:
    pass

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
HowUrgent = Annotated[
    str,
    typer.Option(
        "--priority",
        metavar="NAME",
        help="normal; or low, for what nobody waits for: peers run it where others leave room.",
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
    priority: HowUrgent = "normal",
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
        terms: dict[str, Any] = {"exact": exact, "mix": mix, "wire_dtype": wire_dtype, "priority": priority}
        with talking_to(model_name, initial_peers, wait, standby, speculate, of_run, **terms) as conversation:
            options = sampling(max_new_tokens, temperature, top_p, seed) | {"num_beams": num_beams}
            answer = conversation.answer(conversation.encode(text, raw), page.write, **options)
            page.write("\n")
            print_summary(answer)


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
    priority: HowUrgent = "normal",
    of_run: OfRun = None,
    verbose: Verbose = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /new forgets the talk, /quit or Ctrl-D ends it."""
    set_up_logging(verbose)
    terms: dict[str, Any] = {"exact": exact, "mix": mix, "wire_dtype": wire_dtype, "priority": priority}
    with (
        errors_told(),
        talking_to(model_name, initial_peers, wait, standby, speculate, of_run, **terms) as conversation,
    ):
        console.print("Ctrl-C stops an answer, /new forgets the talk, /quit or Ctrl-D ends it.", style="dim")
        begin = [{"role": "system", "content": system}] if system else []
        messages = list(begin)
        options = sampling(max_new_tokens, temperature, top_p, seed)
        for said in Questions():
            if said == "/new":
                messages = list(begin)
            elif said:
                turn(conversation, messages, said, options)


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
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="At the end, write the model there: a folder that from_pretrained loads.",
        ),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", dir_okay=False, help="Where each round becomes a line of JSON. Default NAME.jsonl."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Where the loss is drawn at the end. Default NAME.png."),
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
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", file_okay=False, help="Where to write the model.")],
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
    run(lambda stop: unless_stopped(show_status(initial_peers, model_name, as_json, watch, route), stop))


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
    priority: HowUrgent = "low",
    verbose: Verbose = False,
) -> None:
    """How well the swarm predicts a text; lower is better. For comparing peers that keep weights differently."""
    set_up_logging(verbose)
    terms: dict[str, Any] = {"exact": exact, "mix": mix, "wire_dtype": wire_dtype, "priority": priority}
    with (
        errors_told(),
        talking_to(model_name, initial_peers, wait, 0, "off", **terms) as conversation,
    ):
        from swarm.console.perplexity import default_text, measure, read_text, windows_of

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


def main() -> NoReturn:
    """Run what was typed."""
    run_app(app)
