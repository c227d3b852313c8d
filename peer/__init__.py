"""A volunteer's node: it hosts a span of a model's blocks and serves it to the swarm."""
