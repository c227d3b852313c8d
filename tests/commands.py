"""The commands as users run them, in processes of their own, and a tiny model that can talk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from inprocess import TINY, save_llama
from nursery import Forked
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

COMMAND_SECONDS = 90.0  # what no command takes, on a machine as busy as may be

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>")  # 0, 1 and 2, as in `TINY`


def save_talking(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """A tiny random Llama and a tokenizer: one token for each byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, begin, end = _SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end, chat_template=_TEMPLATE
    )
    fast.save_pretrained(folder)
    size = len(vocabulary)
    assert size > TINY["vocab_size"]
    return save_llama(folder, seed, vocab_size=size, **changes)


def command(name: str) -> str:
    """Where `peer` or `swarm` is installed."""
    return str(Path(sys.executable).with_name(name))


def environment(**changes: str) -> dict[str, str]:
    """This process's own, without what would configure a command behind the test's back."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    return {**kept, **changes}


def run(*arguments: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `peer ...` or `swarm ...` to its end."""
    name, *rest = map(str, arguments)
    popen = Forked if all(name.startswith("SHOAL_") for name in variables) else subprocess.Popen
    with popen(
        [command(name), *rest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    ) as process:
        try:
            told, complained = process.communicate(stdin, COMMAND_SECONDS)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, told, complained)


def refused(*arguments: object, **options: Any) -> str:
    """Run a command that must fail, by one line on stderr; returns that line."""
    ended = run(*arguments, **options)
    assert ended.returncode not in (0, None), ended
    assert "Traceback" not in ended.stderr, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: "), ended.stderr
    return lines[0]
