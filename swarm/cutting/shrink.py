"""A config made small, to try on random weights what the real model is too large for.

The copy keeps what a block is made of and loses only size: every width is divided alike, so that what has to divide
something else still does, and there are as many blocks as it takes to have one of every kind.
"""

from __future__ import annotations

import copy
import enum
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm.cutting.skeleton import Skeleton, num_blocks, per_block_lists, slice_config
from swarm.types import Span

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig


class Rule(enum.Enum):
    """How an integer of a config shrinks."""

    KEEP = enum.auto()
    VOCABULARY = enum.auto()
    EXPERTS = enum.auto()
    WINDOW = enum.auto()
    HEADS = enum.auto()
    HEAD_WIDTH = enum.auto()
    WIDTH = enum.auto()


_RULES = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"^(?!type_)(\w+_)?vocab_size(_\w+)?$", Rule.VOCABULARY),
        (r"^(num_local_experts|num_experts|n_routed_experts|moe_num_experts)$", Rule.EXPERTS),
        (r"^(sliding_window|window_size|attention_window_size|\w*chunk_size|sliding_window_size)$", Rule.WINDOW),
        (r"(kernel|conv|chunk|patch|group|block|type_vocab|state)_?(size|dim)$", Rule.KEEP),
        (r"^(n_heads?|(\w+_)?(num|n)_(\w+_)?heads|(\w+_)?attention_heads|(mamba_)?n_groups)$", Rule.HEADS),
        (r"(head_dim|head_size|d_head|rotary_dim|rope_dim|rotary_ndims)$", Rule.HEAD_WIDTH),
        (r"(hidden|intermediate|inner|ffn|model|mlp|embed|proj|lru|ssm)\w*_(size|dim|width|dims)$", Rule.WIDTH),
        (r"^(n_embd|n_inner|d_model|d_ff|ffn_dim|dim|d_inner|d_ssm|mamba_d_ssm|lru_width)$", Rule.WIDTH),
        (r"_rank$", Rule.WIDTH),
    )
)
"""By name: the first pattern that fits. What fits none is kept."""

_HEAD_WIDTH_AFTER = 8
_HEADS_AFTER = 4
_VOCABULARY_AFTER = 96
_WINDOW_AFTER = 4
_EXPERTS_AFTER = 16
_MOST_BLOCKS = 24


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small copy of `config`, with at least one block of every kind that the model has (up to 24 blocks)."""
    small = copy.deepcopy(config)
    narrow, fewer = _factors(config)
    for part in _with_parts(small):
        for name, value in list(vars(part).items()):
            if type(value) is int:
                vars(part)[name] = _shrunken(name, value, narrow, fewer)
        _shrink_rope(vars(part).get("rope_parameters"), narrow)
        _keep_tokens_in_vocabulary(vars(part))
    return fewer_blocks(small)


def fewer_blocks(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` with the first blocks only, so many that every kind is among them; a small vocabulary."""
    config = copy.deepcopy(config)
    vars(config)["vocab_size"] = min(config.vocab_size, _VOCABULARY_AFTER)
    _keep_tokens_in_vocabulary(vars(config))
    count = num_blocks(config)
    slice_config(config, Span(0, min(count, max(3, _blocks_for_all_kinds(config)), _MOST_BLOCKS)), count)
    return config


def _factors(config: PreTrainedConfig) -> tuple[int, int]:
    """By how much the width of a head and the number of heads are divided."""
    counts = {name: value for name, value in vars(config).items() if type(value) is int and _rule(name) is Rule.HEADS}
    heads = [value for value in counts.values() if value > 0] or [1]
    width = vars(config).get("head_dim")
    width = width if type(width) is int else config.hidden_size // heads[0]
    return _divisor(width, _HEAD_WIDTH_AFTER), _divisor(math.gcd(*heads), _HEADS_AFTER)


def _divisor(value: int, least: int) -> int:
    """The largest divisor of `value` that leaves an even number of at least `least`; 1 if there is none."""
    return next((by for by in range(value // least, 1, -1) if value % by == 0 and value // by % 2 == 0), 1)


def _rule(name: str) -> Rule:
    return next((rule for pattern, rule in _RULES if pattern.search(name)), Rule.KEEP)


def _shrunken(name: str, value: int, narrow: int, fewer: int) -> int:
    if value <= 0:
        return value
    match _rule(name):
        case Rule.VOCABULARY:
            return min(value, _VOCABULARY_AFTER)
        case Rule.EXPERTS:
            return min(value, _EXPERTS_AFTER)
        case Rule.WINDOW:
            return min(value, _WINDOW_AFTER)
        case Rule.HEADS:
            return _divided(value, fewer)
        case Rule.HEAD_WIDTH:
            return _divided(value, narrow)
        case Rule.WIDTH:
            return -(-value // (narrow * fewer * 8)) * 8  # some kernels want multiples of 16 bytes
        case Rule.KEEP:
            return value


def _divided(value: int, by: int) -> int:
    return value // by if value % by == 0 else value


def _with_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config and those nested in it (the attention's of MPT, the feed-forward's of DBRX)."""
    from transformers.configuration_utils import PreTrainedConfig

    return [config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))]


def _shrink_rope(rope: Any, narrow: int) -> None:
    """Long-context rotary tables have a factor per pair of dimensions of a head."""
    for name, value in list(rope.items()) if isinstance(rope, dict) else []:
        if name == "mrope_section":
            rope[name] = [part // narrow for part in value]
        elif isinstance(value, list):
            rope[name] = value[: len(value) // narrow]


def _keep_tokens_in_vocabulary(values: dict[str, Any]) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(values.get(name), int) and values[name] >= values.get("vocab_size", math.inf):
            values[name] = values["vocab_size"] - 1


def _blocks_for_all_kinds(config: PreTrainedConfig) -> int:
    """How many of the first blocks have one of every kind among them."""
    lists = per_block_lists(config, num_blocks(config))
    blocks = Skeleton(config, torch.float32).blocks
    kinds = [(_kind(block), [value[index] for value in lists.values()]) for index, block in enumerate(blocks)]
    return 1 + max(kinds.index(kind) for kind in kinds)


def _kind(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks that are made alike: of the same modules and shapes, with the same switches."""
    shapes = tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    switches = tuple(
        (name, value)
        for module in block.modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | str) or name == "sliding_window"
    )
    return shapes, modules, switches
