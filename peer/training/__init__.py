"""A stage of a run: forward, backward, the averaging of its gradients, and state for newcomers."""
