"""Memory for what large messages carry, used again: new pages from the kernel cost as much as decrypting into them."""

from __future__ import annotations

from collections import deque

import numpy as np

_SIZES = [1 << bits for bits in range(18, 23)]  # bytes; what is larger is rare, and what is smaller costs little
_KEPT = 1 << 25  # bytes of each size
_spare: dict[int, deque[np.ndarray]] = {size: deque(maxlen=_KEPT // size) for size in _SIZES}


class _Lent(np.ndarray):
    """Goes back when nobody looks at it any more, in whichever thread that is."""

    def __del__(self) -> None:
        assert isinstance(self.base, np.ndarray)
        _spare[len(self.base)].append(self.base)


def body_of(length: int) -> memoryview:
    """Memory of `length` bytes. What is in it is whatever was."""
    size = next((size for size in _SIZES if size >= length), 0)
    if not size:
        return np.empty(length, np.uint8).data  # not zeroed: memory is used as bytes come, not as announced
    try:
        memory = _spare[size].pop()
    except IndexError:
        memory = np.empty(size, np.uint8)
    return memory.view(_Lent).data[:length]


def forget_spare() -> None:
    """Give back what nobody uses at the moment."""
    for each in _spare.values():
        each.clear()
