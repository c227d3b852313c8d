"""Any Hugging Face model, cut: spans, their blocks and caches, and the proof that a cut is right."""
