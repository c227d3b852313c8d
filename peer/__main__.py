"""The `peer` command, and `python -m peer`."""

from __future__ import annotations

from swarm.__main__ import begin


def main() -> None:
    """The console script."""
    begin("peer.cli")


if __name__ == "__main__":
    main()
