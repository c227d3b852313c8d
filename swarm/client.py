"""A Hugging Face model whose blocks are the swarm: `generate()` and everything built on it just works.

The model is the family's own class with its two ends loaded here and one "block" that sends the hidden states along
a session's route. Its cache holds no keys and values: only how long the session is, and which rows come next.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swarm.background import BackgroundLoop
from swarm.chain import Chain, Terms
from swarm.errors import SessionLost, ShoalError, UsageError, WeightsChanged
from swarm.files.checkpoint import Checkpoint
from swarm.files.hub import resolve
from swarm.model import load_ends
from swarm.network import Network, Quantized, Waiting, warn_missing, warn_quantized
from swarm.quantization.weights import KINDS
from swarm.speculation.decoding import SpeculatingMixin
from swarm.speculation.drafting import load_draft_model
from swarm.speculation.tuning import Speculate
from swarm.swarm_cache import SwarmCache
from swarm.types import Span
from swarm.wire import Priority, Rounding

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


MAX_RESTARTS = 32  # of one forward, while a run goes on
STRICT_RESTARTS = 4  # of these because weights changed while a session began; where rounds are as short, they always do


class SwarmMixin(SpeculatingMixin):
    """What a family's class gets when its blocks are the swarm. Not for use on its own."""

    chain: Chain

    @property
    def speculate(self) -> Speculate:
        """Whether tokens are drafted, and with what."""
        return self.chain.speculate

    @property
    def draft_model(self) -> PreTrainedModel | None:
        """With what they are, where that is a model."""
        return self.chain.draft_model

    @property
    def rewindable(self) -> bool:
        """Whether positions can be taken back: not where blocks fold the past into a state."""
        return self.chain.rewindable

    def _bind(self, given: dict[str, Any]) -> dict[str, Any]:
        """Note what the blocks have to know of a forward's arguments; returns the arguments with a cache in them."""
        cache = given.get("past_key_values")
        if cache is None:
            cache = SwarmCache()
        elif not isinstance(cache, SwarmCache):
            raise UsageError(f"past_key_values is a {type(cache).__name__}; pass a SwarmCache, new or used, or none")
        call = self.chain.call
        call.cache = cache
        call.attention_mask = given.get("attention_mask")
        call.position_ids = given.get("position_ids")
        keep = given.get("logits_to_keep", 0)
        cache.note(given.get("input_ids"))
        call.keep = keep if isinstance(keep, int) and not given.get("output_hidden_states") else 0
        return {**given, "past_key_values": cache}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, and more than it where the swarm knows better.

        A cache that holds another text than the one that is given goes back to where the two part (as in a chat whose
        answers were decoded and encoded again); and a streamer is told that it is over where an error is all that
        comes, or whoever reads from it would wait for ever.
        """
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if isinstance(cache, SwarmCache) and ids is not None and (mask is None or mask.shape == ids.shape):
            cache.keep_beginning(ids, self.rewindable)
        whole: Any = super().generate  # type: ignore[misc]
        try:
            return whole(*args, **kwargs)
        except ShoalError:
            if (streamer := kwargs.get("streamer")) is not None:
                streamer.end()
            raise

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, max_cache_length: int
    ) -> None:
        """Called by `generate()`: the session's cache, sized for the whole answer."""
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SwarmCache(max_cache_length + 1)
        elif isinstance(cache, SwarmCache):
            cache.max_length = max(cache.max_length, max_cache_length + 1)

    def _supports_default_dynamic_cache(self) -> bool:
        return True

    @property
    def background(self) -> BackgroundLoop:
        """Where the network lives."""
        return self.chain.background

    @property
    def network(self) -> Network:
        """The client's place in the swarm; for use in the background loop."""
        return self.chain.network

    def close(self) -> None:
        """Leave the swarm. The model can not be used after that."""
        self.chain.background.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SwarmModelForCausalLM:
    """Makes Hugging Face models whose blocks are the swarm."""

    def __init__(self) -> None:
        raise UsageError("use SwarmModelForCausalLM.from_pretrained(NAME, initial_peers=[...])")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        initial_peers: str | Sequence[str],
        dtype: torch.dtype | str = torch.float32,
        device: str = "cpu",
        wait: float = 0.0,
        failover_wait: float = 10.0,
        standby: int = 0,
        speculate: str = "off",
        exact: bool = False,
        mix: bool = False,
        wire_dtype: Rounding = "auto",
        priority: Priority = "normal",
        quantize: str = "none",
        on_quantized: Quantized = warn_quantized,
        on_missing: Callable[[tuple[Span, ...]], None] = warn_missing,
    ) -> PreTrainedModel:
        """The model `name` (a folder, a short name or a hub id), its blocks at the peers of the swarm.

        Args:
            initial_peers: addresses of any peers of the swarm, as `peer serve` prints them; in one string, too.
            dtype: what the embeddings and the head compute in, or its name; the peers' own is in their offers.
            wait: seconds to wait for blocks that nobody hosts, before `NoRoute` is raised.
            failover_wait: the same, in the middle of an answer whose host has gone; at least `wait`.
            standby: how many spares follow at each hop, so that a failover costs no prefill.
            speculate: "auto" drafts tokens from the text where that is worth it, so that a trip along the chain may
                bring several; "lookup" whenever it can; "draft:NAME" with the small model NAME, here; "off" never.
                The tokens are the same, sampled ones with the same seed too.
            exact: use no peer that keeps its weights quantized. Without this, exact ones are used wherever there are
                any, quantized ones for the blocks that would be missing otherwise, and in the middle of an answer only
                peers of the same kind take over from those that fail.
            mix: use whoever is fastest, and let peers take over from those of another kind.
            wire_dtype: how hidden states travel: "float32" as they are; "bfloat16" in half of the bytes or "int8" in a
                quarter, rounded; "auto" rounded only on links to other networks that are slow, of which the log tells,
                and not at all with `exact`.
            priority: "low" for what nobody waits for: peers run it where others leave room, and when it has waited for
                a while. Nobody can ask for more than "normal".
            quantize: how to keep the head's weight here: "int8" or "int4", which on a CPU takes a quarter of its time
                for each token, or "none". The peers' own is in their offers.
            on_quantized: told which blocks quantized peers run, each time that changes; by default, the log is.
            on_missing: told which blocks are waited for, each time they change; by default, the log is.

        Raises:
            ModelNotFound, ModelCorrupt, CannotCut: the model cannot be had or cannot be cut.
            CannotJoin: none of the initial peers can be reached.
            UsageError: `speculate` is none of these, NAME reads another tokenizer's tokens, or `dtype` is no dtype.
        """
        peers = initial_peers.replace(",", " ").split() if isinstance(initial_peers, str) else list(initial_peers)
        if not isinstance(dtype, torch.dtype):
            dtype = _dtype_named(dtype)
        drafts = Speculate.parse(speculate)
        terms = Terms.parse(exact, mix, wire_dtype, priority)
        kind = next((each for each in KINDS if each == quantize), None)
        if kind is None and quantize != "none":
            raise UsageError(f"quantize={quantize!r}: there are none, {', '.join(KINDS)}")
        folder = resolve(str(name))
        checkpoint = Checkpoint(folder)
        background = BackgroundLoop()
        try:
            network = background.run(Network.start(peers))
            background.at_close(network.close)
            waiting = Waiting(wait, failover_wait, on_missing)
            config = checkpoint.config()
            chain = Chain(background, network, checkpoint.model_id, config, waiting, standby, drafts, terms)
            chain.on_quantized = on_quantized
            if drafts.name:
                chain.draft_model = load_draft_model(drafts.name, folder, dtype, device)
            model = load_ends(folder, chain, dtype=dtype, device=device, mixin=mixin(), quantize=kind, packed=True)
        except BaseException:
            background.close()
            raise
        return connect(model, chain)


def connect(model: PreTrainedModel, chain: Chain) -> PreTrainedModel:
    """Let a model that was loaded with `chain` for its blocks, and with `mixin`, use it."""
    model.chain = chain  # type: ignore[assignment]
    if model.generation_config is not None:
        model.generation_config.use_cache = True  # without one, every token would send the whole text again
    _wrap_forward(model)
    model.train(False)
    return model


def _dtype_named(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype: {name!r} is none to compute in; float32, bfloat16 and float16 are")
    return found


def _carrying(cache: SwarmCache, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except ShoalError as error:
        error.generated = cache.tokens
        raise


def _run(chain: Chain, inner: Callable[..., Any], bound: dict[str, Any]) -> Any:
    """The model's forward; where the weights have changed since the session began, all of the text again."""
    cache: SwarmCache = bound["past_key_values"]
    for attempt in range(MAX_RESTARTS):
        refresh = chain.refresh if cache.session is None else None
        try:
            if refresh is not None:
                refresh()
            output = inner(**bound)
            if refresh is not None and attempt < STRICT_RESTARTS and refresh():
                raise WeightsChanged("the weights have changed while the session began")
            return output
        except WeightsChanged:
            if chain.refresh is None or (tokens := cache.restart()) is None:
                raise
            cache.note(tokens)
            bound = _from_the_beginning(bound, tokens)
            chain.call.position_ids, chain.call.keep = bound["position_ids"], bound["logits_to_keep"]
    raise SessionLost(f"the weights changed {MAX_RESTARTS} times while one token was computed")


def _from_the_beginning(bound: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """The arguments of a forward over `tokens` [B, N], of which the last are those of `bound`."""
    positions, mask = torch.arange(tokens.shape[1]).expand(tokens.shape), bound.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    count = bound["input_ids"].shape[1]
    keep = bound.get("logits_to_keep") or count
    again = {"input_ids": tokens, "position_ids": positions.to(tokens.device), "logits_to_keep": keep}
    return {name: value for name, value in bound.items() if name != "cache_position"} | again


def mixin() -> type:
    """A fresh subclass, so that what is put on it is this model's alone."""
    return type("SwarmMixin", (SwarmMixin,), {})


def _wrap_forward(model: Any) -> None:
    """Let the model's forward, whatever its arguments, note what the swarm has to know of them."""
    inner = model.forward
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args).arguments | kwargs if args else kwargs
        throwaway = given.get("past_key_values") is None and given.get("use_cache") is False
        bound = model._bind(given)
        try:
            with torch.no_grad():
                output = _carrying(bound["past_key_values"], lambda: _run(model.chain, inner, bound))
            if throwaway:
                output.past_key_values = None  # or generate() would go on with it
            return output
        finally:
            model.chain.call.cache = None
            if throwaway:
                bound["past_key_values"].close()

    forward.__signature__ = signature  # type: ignore[attr-defined]
    model.forward = forward
