"""What the `swarm` command shows."""
