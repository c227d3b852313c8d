"""What is simulated: models, and machines that volunteers bring, as they are drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from peer.placement import Policy
from simulation.geography import Place, draw_place
from swarm.types import ModelId, PeerId

SECONDS_PER_BLOCK = 0.002  # of a decode, the median machine; log-normal with sigma 0.6
SPEED_SIGMA = 0.6
MEMORY = ((4, 0.15), (8, 0.25), (12, 0.25), (16, 0.2), (24, 0.1), (32, 0.05))  # blocks that fit, share of machines


@dataclass(frozen=True, slots=True)
class Model:
    """A model that some of the peers host."""

    name: str
    num_blocks: int
    share: float  # of the peers, 0 to 1

    @property
    def id(self) -> ModelId:
        """As in offers."""
        return ModelId(self.name)


MODELS = (Model("large", 64, 0.7), Model("medium", 32, 0.2), Model("small", 24, 0.1))


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is. Times are in seconds unless named otherwise."""

    peers: int = 1000
    models: tuple[Model, ...] = MODELS
    churn: float = 0.1  # of the peers that leave in an hour; as many come
    deaths: float = 0.5  # of those who leave, the share that says nothing
    warm_up: float = 3600.0
    measured: float = 3 * 3600.0
    clients: int = 200  # for each model, in the time that is measured
    loads: int = 1  # how often each model is crowded
    seed: int = 0
    policy: Policy = field(default_factory=Policy)

    @property
    def end(self) -> float:
        """When it is over."""
        return self.warm_up + self.measured


@dataclass(frozen=True, slots=True)
class Machine:
    """What a volunteer brings."""

    peer: PeerId
    place: Place
    seconds_per_block: float
    blocks: int  # that fit into its memory


def draw_machine(number: int, model: Model, chance: random.Random) -> Machine:
    """The next volunteer."""
    speed = SECONDS_PER_BLOCK * chance.lognormvariate(0.0, SPEED_SIGMA)
    blocks = chance.choices([blocks for blocks, _ in MEMORY], [share for _, share in MEMORY])[0]
    return Machine(PeerId(f"peer-{number}"), draw_place(chance), speed, min(blocks, model.num_blocks))
