"""The `swarm` command, and `python -m swarm`: Ctrl-C ends it quietly while it is still being imported, too."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    try:
        from swarm.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)  # as `swarm.console.terminal` has it


if __name__ == "__main__":
    main()
