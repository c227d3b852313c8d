"""One name, one run: whoever comes with another file is told which field differs, before anything else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

from swarm.discovery import Discovery
from swarm.errors import Malformed, Oversized, RemoteError, UsageError
from swarm.rpc import Link, Reply, Rpc
from swarm.runs.run import MAX_TERMS, Run, differences
from swarm.runs.wire_passes import Agreement, Terms
from swarm.types import ModelId, Offer

ASKED = 3  # peers of another run of this name, that are asked for its terms
ASK_SECONDS = 5.0


def answer_terms(rpc: Rpc, run: Run) -> None:
    """Tell whoever asks what the members of `run` agree on."""
    body = json.dumps(run.terms).encode()

    async def answer(link: Link, message: Terms, _: memoryview) -> Reply:
        return Agreement(), [body]

    rpc.answer(Terms, answer)


async def refuse_another_file(discovery: Discovery, rpc: Rpc, run: Run) -> None:
    """Raise `UsageError`, naming the fields, where a run of this name goes on that was begun with another file."""
    for model, listing in (await discovery.models()).items():
        if listing.name == run.name and model != run.id:
            offers = await discovery.offers(model, listing.num_blocks)
            if (theirs := await _ask(rpc, model, offers)) is not None:
                what = "; ".join(differences(run.terms, theirs)) or "its format differs"
                raise UsageError(f"the run {run.name} goes on in this swarm with another file: {what}")


async def _ask(rpc: Rpc, model: ModelId, offers: Sequence[Offer]) -> dict[str, Any] | None:
    """The terms of another run; None where nobody of it lives."""
    for offer in offers[:ASKED]:
        with contextlib.suppress(RemoteError):
            link = await rpc.connect(offer.peer, offer.addresses)
            message = Terms(bytes.fromhex(model)[:16])
            answer, body = await link.call(message, timeout=ASK_SECONDS)
            return read_terms(answer, body)
    return None


def read_terms(answer: object, body: memoryview) -> dict[str, Any]:
    """What a stranger says its run's terms are. Raises `Malformed` or `Oversized`."""
    if not isinstance(answer, Agreement):
        raise Malformed("an answer to Terms that is none")
    if len(body) > MAX_TERMS:
        raise Oversized(f"terms of {len(body)} bytes; {MAX_TERMS} are taken")
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise Malformed(f"terms that are no JSON: {error}") from None
