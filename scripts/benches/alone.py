"""The reference of `startup` and `memory`: transformers alone in a fresh process, without a line of Shoal.

Run as `python alone.py FOLDER NEW_TOKENS`: prints a line once it has generated, and ends when its stdin does.
"""

from __future__ import annotations

import sys

_PROMPT = list(range(1000, 1033))


def main() -> None:
    """Load, generate, say so, wait."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    ids = torch.tensor([_PROMPT])
    count = int(sys.argv[2])
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    print("generated", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
