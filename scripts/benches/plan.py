"""How a bench goes about it: how many rounds, in what order, and telling how far it is."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benches.rows import Rounds

_QUICK_ROUNDS = 2
_PACKAGES = ("hivemind", "msgpack", "msgspec", "torch", "transformers", "uvloop")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for."""

    quick: bool
    tell: Callable[[str], None]  # what is being done now

    def rounds(self, thorough: int) -> int:
        """How many rounds: `thorough`, or few where it has to be quick."""
        return min(thorough, _QUICK_ROUNDS) if self.quick else thorough

    def repeat(self, what: str, rounds: int, measured: Callable[[], float]) -> Rounds:
        """Measure so many times."""
        values = []
        for number in range(1, rounds + 1):
            self.tell(f"{what}, round {number} of {rounds}")
            values.append(measured())
        return Rounds(values)

    def alternate(
        self, what: str, rounds: int, measured: Callable[[], float], reference: Callable[[], float]
    ) -> Rounds:
        """Measure and measure the reference, in turn; who goes first changes with every round."""
        values, references = [], []
        for number in range(1, rounds + 1):
            self.tell(f"{what}, round {number} of {rounds}")
            if number % 2:
                references.append(reference())
                values.append(measured())
            else:
                values.append(measured())
                references.append(reference())
        return Rounds(values, references)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    """Its model as Linux tells it; elsewhere what Python knows, which is less."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    return {"shoal": _revision(), "python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _revision() -> str:
    """The version, and the commit where this is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git here
        described = ""
    return f"{version('shoal')} {described}".strip()
