"""The reference of `startup` and `memory`: transformers alone in a fresh process, without a line of Shoal.

Run as `python alone.py FOLDER NEW_TOKENS`: says `ready` once it has generated, and ends when its stdin does.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PROMPT = list(range(1000, 1033))


@contextlib.contextmanager
def generated_alone(folder: Path, new_tokens: int) -> Iterator[int]:
    """Such a process, once it has generated so much; its process id."""
    command = [sys.executable, __file__, str(folder), str(new_tokens)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with process:  # closes its stdin and waits
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != b"ready":
                raise RuntimeError("transformers alone failed; what it says is above")
            yield process.pid
        except BaseException:
            process.kill()
            raise


def main() -> None:
    """Load, generate, say so, wait."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    ids = torch.tensor([_PROMPT])
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=int(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
