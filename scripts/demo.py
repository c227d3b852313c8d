"""A swarm on this machine: four peers hold a model, a client asks it, and every answer is checked."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from processes import Failed, LocalSwarm, terminated_like_interrupted
from rich.console import Console
from rich.markup import escape

from swarm.console.terminal import ProgressBars
from swarm.errors import ShoalError
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import DEFAULT_MODEL, resolve

QUESTIONS = (
    "What is a shoal of fish, in two sentences?",
    "Name three things that volunteers can do together which one of them can not.",
    "Write a haiku about the sea.",
)
SPANS = ("0:10", "10:20", "20:30", "10:20")
MAX_NEW_TOKENS = 64
KILL_IN, KILL_AFTER = 1, 12  # the question in whose answer the middle peer is killed, and after how many words

console = Console(highlight=False)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was measured.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer, at most.")] = MAX_NEW_TOKENS,
) -> None:
    """Start four peers on this machine, ask them three questions, kill one in mid-answer, and check every answer."""
    try:
        with terminated_like_interrupted():
            results = _run(max_new_tokens)
    except (ShoalError, Failed) as error:
        console.print(f"[bold red]error:[/] {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n")
    equal = all(answer["equal"] for answer in results["answers"])
    console.print("[green]all answers equal[/]" if equal else "[bold red]an answer differs from the whole model's[/]")
    raise typer.Exit(0 if equal else 1)


def _run(max_new_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    bars = ProgressBars()
    folder = resolve(DEFAULT_MODEL, bars)
    bars.stop()
    checkpoint = Checkpoint(folder)
    console.print(f"model    {DEFAULT_MODEL} in {folder}", soft_wrap=True)
    with LocalSwarm() as local:
        for span in SPANS:
            local.serve(str(folder), "--blocks", span)
        console.print(f"starting a bootstrap node and {len(SPANS)} peers with blocks {', '.join(SPANS)}")
        whole, tokenizer = _whole_model(folder)
        offers = local.wait_online(checkpoint.model_id, checkpoint.config().num_hidden_layers, len(SPANS))
        ready = time.perf_counter() - started
        console.print(f"online   every block after {ready:.1f} s, at {len(offers)} peers\n")
        answers = _ask(folder, local, whole, tokenizer, max_new_tokens)
    return {"machine": platform.platform(), "model": checkpoint.model_id, "online_seconds": ready, "answers": answers}


def _whole_model(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from swarm.console.conversation import load_tokenizer

    torch.set_num_threads(1)
    disable_progress_bar()  # its bars would tear ours
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(str(folder))


def _ask(folder: Path, local: LocalSwarm, whole: Any, tokenizer: Any, max_new_tokens: int) -> list[dict[str, Any]]:
    from swarm.client import SwarmModelForCausalLM
    from swarm.console.conversation import Conversation

    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[local.address]) as model:
        asker = _Asker(local, Conversation(model, tokenizer), whole, max_new_tokens)
        answers = [asker.ask(question, kill=number == KILL_IN) for number, question in enumerate(QUESTIONS)]
        asker.conversation.forget()
    return answers


class _Asker:
    """Asks the swarm and the whole model the same, and holds their answers side by side."""

    def __init__(self, local: LocalSwarm, conversation: Any, whole: Any, max_new_tokens: int) -> None:
        self.local = local
        self.conversation = conversation
        self.whole = whole
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self.pieces = 0

    def ask(self, question: str, kill: bool) -> dict[str, Any]:
        console.print(f"[bold]> {question}[/]")
        self.pieces = 0
        prompt = self.conversation.encode(question)
        answer = self.conversation.answer(prompt, lambda text: self._show(text, kill), **self.options)
        equal = answer.tokens == _alone(self.whole, prompt, self.options)
        mark = "[green]equal to the whole model's[/]" if equal else "[bold red]NOT the whole model's[/]"
        speed = f"{answer.tokens_per_second:.1f} tokens/s, first after {answer.first_seconds:.2f} s"
        console.print(
            f"\n[dim]route    {escape(answer.route)}\nspeed    {speed}\ntokens   {len(answer.tokens)},[/] {mark}\n"
        )
        return {
            "question": question,
            "answer": answer.text,
            "route": answer.route,
            "killed_a_peer": kill,
            "tokens": len(answer.tokens),
            "tokens_per_second": answer.tokens_per_second,
            "first_token_seconds": answer.first_seconds,
            "equal": equal,
        }

    def _show(self, text: str, kill: bool) -> None:
        console.print(escape(text), end="", soft_wrap=True)
        self.pieces += 1
        if kill and self.pieces == KILL_AFTER:
            victim = self.conversation.route.hops[1]
            next(peer for peer in self.local.peers if peer.peer == victim.peer).kill()
            console.print(f"[bold red] \\[{victim.peer[-6:]} killed] [/]", end="")


def _alone(whole: Any, prompt: list[int], options: dict[str, Any]) -> list[int]:
    """What the whole model, in this process, says to the same prompt."""
    import torch

    ids = torch.tensor([prompt])
    output: list[int] = whole.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return output[len(prompt) :]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
