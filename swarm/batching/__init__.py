"""Many sessions in one forward of the model's own, each attending to its own past."""
