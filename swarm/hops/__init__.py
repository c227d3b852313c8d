"""The hops of a live route: timed, blamed, replaced and followed by spares."""
