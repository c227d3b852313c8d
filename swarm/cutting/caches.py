"""What a session remembers: at a stage, the keys and values of its blocks; at the client, only how long it is."""

from __future__ import annotations

import torch
from transformers import cache_utils
from transformers.configuration_utils import PreTrainedConfig

from swarm.types import Span

_WHOLE: dict[type, type] = {
    cache_utils.DynamicSlidingWindowLayer: cache_utils.DynamicLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer: cache_utils.LinearAttentionAndFullAttentionLayer,
}
"""A layer that keeps only its window cannot go back beyond it; what keeps all can, and the masks do the windowing."""


class SessionCache(cache_utils.DynamicCache):
    """One session's cache for the blocks of `span`: what has keys and values keeps those of all positions.

    Which blocks have which cache is asked of the whole model's config, since it can follow from a block's index.

    Attributes:
        length: how many positions it has seen. Blocks that fold the past into a state could not tell.
    """

    def __init__(self, config: PreTrainedConfig, span: Span) -> None:
        super().__init__(config=config)
        self.length = 0
        self.layers = self.layers[span.start : span.end]
        for index, layer in enumerate(self.layers):
            if type(layer) in _WHOLE:
                states = getattr(layer, "number_of_states", 1)
                self.layers[index] = _WHOLE[type(layer)](number_of_states=states)

    def __repr__(self) -> str:
        return f"<SessionCache layers={len(self.layers)} length={self.length}>"

    @property
    def is_stateful(self) -> bool:
        """Whether some layer folds the past into a state, from which no position can be taken away again."""
        plain = cache_utils.DynamicLayer, cache_utils.DummyLayer
        folds = cache_utils.LinearAttentionCacheLayerMixin
        return any(isinstance(layer, folds) or not isinstance(layer, plain) for layer in self.layers)

    def nbytes(self) -> int:
        """What the tensors of all layers take, in bytes."""
        tensors = (value for layer in self.layers for value in vars(layer).values())
        return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], cache_utils.DynamicLayer):
            return int(super().get_seq_length(layer_idx))
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0


class LengthCache(cache_utils.DynamicCache):
    """The cache of a model whose blocks are elsewhere: it holds nothing, and says how much they hold.

    The model's forward asks for it to place its masks and positions.

    Attributes:
        length: how many positions came before this forward; for the caller to keep.
    """

    def __init__(self, length: int = 0) -> None:
        super().__init__()
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.length > 0
