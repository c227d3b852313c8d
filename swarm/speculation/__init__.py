"""Several tokens in one trip along the chain: what to draft, how much, and the loop that checks it."""
