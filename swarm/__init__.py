"""Shoal: the protocol, and everything that a client needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.client import SwarmModelForCausalLM
    from swarm.swarm_cache import SwarmCache

__version__ = "0.1.0"
__all__ = ["SwarmCache", "SwarmModelForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    """The client is imported when it is asked for: it needs torch, and a peer or `--help` starts faster without."""
    if name in ("SwarmCache", "SwarmModelForCausalLM"):
        import swarm.client

        return getattr(swarm.client, name)
    raise AttributeError(f"module 'swarm' has no attribute {name!r}")
