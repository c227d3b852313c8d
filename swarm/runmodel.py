"""The model of a training run, used while it is trained: its blocks at the run's members, its ends fetched from them.

When the weights change, the members of a session say so; then the text is read again. With every session that begins,
the ends are fetched anew if they are old, so that every token comes of weights of one moment; where rounds are as short
as a session takes to begin, a first token may come of two that follow each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

from swarm.background import BackgroundLoop
from swarm.chain import Chain, Terms
from swarm.client import connect, mixin
from swarm.cutting.skeleton import Skeleton
from swarm.cutting.verdict import examine
from swarm.errors import NoRoute, RemoteError, UsageError
from swarm.network import POLL_SECONDS, Network, Waiting, warn_missing
from swarm.runs.origin import config_of, tokenizer_of
from swarm.runs.run import Run
from swarm.runs.weights import Fetcher, stage_plans
from swarm.speculation.tuning import Speculate
from swarm.types import Offer, Span

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.modeling_utils import PreTrainedModel

T = TypeVar("T")

_NOT_AT_ALL = Waiting(on_missing=warn_missing)
_NO_DRAFTS = Speculate()
_USUAL = Terms()


class Loop(Protocol):
    """Runs what is async for those who are not."""

    def run(self, work: Coroutine[Any, Any, T]) -> T: ...

    def post(self, work: Coroutine[Any, Any, Any]) -> None: ...


def model_of_run(
    run: Run,
    config: PreTrainedConfig,
    network: Network,
    loop: Loop,
    waiting: Waiting = _NOT_AT_ALL,
    standby: int = 0,
    speculate: Speculate = _NO_DRAFTS,
    terms: Terms = _USUAL,
) -> PreTrainedModel:
    """A Hugging Face model whose blocks are the members of `run`, at the weights of the moment.

    Args:
        network: lives in `loop`.
        speculate: whether tokens are drafted from the text.

    Raises:
        NoRoute: some stage has no member that is online, nor gets one in time.
        CannotCut: the model cannot be cut.
    """
    chain = Chain(cast("BackgroundLoop", loop), network, run.id, config, waiting, standby, speculate, terms)
    skeleton = Skeleton(config, torch.float32, mixin())
    skeleton.keep_ends(chain, examine(config).returns)
    fetcher = Fetcher(run, network.rpc, stage_plans(run, config))

    async def offers() -> list[Offer]:
        return await network.offers(run.id, run.num_blocks)

    async def fetch() -> tuple[int, dict[str, torch.Tensor]]:
        return await fetcher.ends(await offers())

    async def newest() -> int | None:
        return await fetcher.newest(await offers())

    held, ends = loop.run(_patiently(fetch, waiting))
    skeleton.load({name: _giving(weight) for name, weight in ends.items()}, "cpu")
    skeleton.settle("cpu")
    model = skeleton.top

    def refresh() -> bool:
        nonlocal held
        if loop.run(newest()) == held:
            return False
        held, fresh = loop.run(fetch())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(fresh[name])
        return True

    chain.refresh = refresh
    return connect(model, chain)


def open_run(
    run: Run,
    initial_peers: Sequence[str],
    waiting: Waiting = _NOT_AT_ALL,
    standby: int = 0,
    speculate: str = "off",
    terms: Terms = _USUAL,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a run and its tokenizer, for scripts: joins the swarm in a loop of its own, which the model closes.

    `speculate` is "auto", "lookup" or "off": a draft model would have to be trained along.

    Raises as `model_of_run`, `CannotJoin`, and `UsageError` for what `speculate` cannot be.
    """
    drafts = Speculate.parse(speculate)
    if drafts.name:
        raise UsageError(f"speculate: {speculate} is for a model that exists; there are auto, lookup and off for a run")
    tokenizer = tokenizer_of(run)
    config = config_of(run, tokenizer)
    background = BackgroundLoop()
    try:
        network = background.run(Network.start(list(initial_peers)))
        background.at_close(network.close)
        return model_of_run(run, config, network, background, waiting, standby, drafts, terms), tokenizer
    except BaseException:
        background.close()
        raise


async def _patiently(fetch: Callable[[], Awaitable[T]], waiting: Waiting) -> T:
    """What `fetch` fetches, once there is somebody to fetch it from. Raises what it raises when that takes too long."""
    clock, told = asyncio.get_running_loop().time, tuple[Span, ...]()
    deadline = clock() + waiting.first
    while True:
        try:
            return await fetch()
        except (NoRoute, RemoteError) as error:
            if clock() >= deadline:
                raise
            missing = tuple(Span(*each) for each in error.missing) if isinstance(error, NoRoute) else ()
        if missing != told and missing and waiting.on_missing is not None:
            waiting.on_missing(missing)
        told = missing
        await asyncio.sleep(POLL_SECONDS)


def _giving(weight: torch.Tensor) -> Any:
    return lambda: weight
