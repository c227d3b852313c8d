"""A model's own forward with other hidden states before its first block, and what its last block gives taken out.

So it does not matter what the model does before its blocks (scaled or positional embeddings) or after them. Forwards
are replaced on the instances: no hook, no wrapper, and what the model reads from a block is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_NOTHING = torch.empty(0)


class Splice:
    """What goes into blocks, and what comes out of them. Not for two threads at a time.

    Attributes:
        output: what the last block gave, since `given` was entered.
    """

    def __init__(self) -> None:
        self._input = self.output = _NOTHING

    def enter_at(self, block: nn.Module) -> None:
        """From now on, `block` is given the hidden states of the moment, whatever its model gives it."""
        forward = block.forward

        def enter(*args: Any, **kwargs: Any) -> Any:
            if args:
                return forward(self._input, *args[1:], **kwargs)
            return forward(**{**kwargs, "hidden_states": self._input})

        block.forward = enter

    def leave_at(self, block: nn.Module) -> None:
        """From now on, what `block` gives is kept as the `output`."""
        forward: Callable[..., Any] = block.forward

        def leave(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            self.output = result if isinstance(result, torch.Tensor) else result[0]
            return result

        block.forward = leave

    @contextmanager
    def given(self, hidden: torch.Tensor) -> Iterator[None]:
        """Meanwhile `hidden` [B, N, H] goes in; neither it nor the output is kept after that."""
        self._input = hidden
        try:
            yield
        finally:
            self._input = self.output = _NOTHING
