"""The `swarm` command, and `python -m swarm`: Ctrl-C ends it quietly while it is still being imported, too."""

from __future__ import annotations

import importlib
import sys


def begin(module: str) -> None:
    """The command whose `main` is in `module`, from its import on."""
    try:
        importlib.import_module(module).main()
    except KeyboardInterrupt:
        sys.exit(130)  # as `swarm.console.terminal` has it


def main() -> None:
    """The console script."""
    begin("swarm.cli")


if __name__ == "__main__":
    main()
