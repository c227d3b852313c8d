"""A training run: its file, its data, its weights, its micro-batches on their way."""
