"""A model's files: names to folders, tensors found in shards, and a name by content."""
