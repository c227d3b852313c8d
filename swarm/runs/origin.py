"""What a run begins with: the model's config, the tokenizer, and the weights of a stage before the first round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.agreement.assignments import Plan
from swarm.cutting.skeleton import Skeleton, num_blocks
from swarm.errors import UsageError
from swarm.files.checkpoint import Checkpoint, Progress, silent
from swarm.files.hub import resolve, tokenizer_in
from swarm.runs.run import BYTES, Run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from swarm.runs.trainable import TrainableStage

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def tokenizer_of(run: Run, progress: Progress = silent) -> PreTrainedTokenizerBase:
    """The run's tokenizer: its own, else the pretrained model's, else one token for each byte.

    Raises `UsageError` where there is none, or as `hub.resolve`.
    """
    name = run.tokenizer or run.model.pretrained or BYTES
    if name == BYTES:
        return byte_tokenizer()
    return tokenizer_in(Path(name) if Path(name).is_dir() else resolve(name, progress))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each of the 256 bytes, and three that are special: nothing to download, nothing to learn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerBase = fast(tokenizer_object=tokenizer, **_SPECIAL)
    return made


def config_of(run: Run, tokenizer: PreTrainedTokenizerBase, progress: Progress = silent) -> PreTrainedConfig:
    """The config of the run's model, checked against the run and its tokenizer.

    Raises `UsageError` naming the field that does not fit, or as `hub.resolve`.
    """
    if run.model.pretrained is not None:
        config = Checkpoint(resolve(run.model.pretrained, progress)).config()
    else:
        config = _config_from_scratch(run, tokenizer)
    _check(run, config, tokenizer)
    return config


def _config_from_scratch(run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    from transformers import AutoConfig

    architecture = run.model.architecture or ""
    given = copy.deepcopy(run.model.config)
    given.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given.setdefault(name, getattr(tokenizer, name))
    try:
        usual = AutoConfig.for_model(architecture)
    except ValueError:
        raise UsageError(f"model.architecture: transformers knows no {architecture!r}") from None
    for name in run.model.config:
        if not hasattr(usual, name):
            raise UsageError(f"model.config.{name}: a {architecture} has no such field")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(architecture, **given)
    except Exception as error:  # noqa: BLE001 - whatever a family raises for sizes that do not fit together
        raise UsageError(f"model.config: {architecture} refuses it: {error}") from None
    return config


def _check(run: Run, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    count, vocabulary = num_blocks(config), config.vocab_size
    if run.num_blocks != count:
        raise UsageError(f"stages: they cover blocks 0:{run.num_blocks}, the model has blocks 0:{count}")
    if len(tokenizer) > vocabulary:
        raise UsageError(f"tokenizer: it has {len(tokenizer)} tokens, the model's vocabulary has {vocabulary}")
    context: Any = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and run.batch.sequence_length > context:
        raise UsageError(
            f"batch.sequence_length: {run.batch.sequence_length} is beyond the model's context of {context}"
        )


def plan_of(run: Run, config: PreTrainedConfig) -> Plan:
    """What the rounds have to know of a run."""
    import torch

    ties = Skeleton(config, torch.float32).top.all_tied_weights_keys
    return Plan(
        run=bytes.fromhex(run.id)[:16],
        stages=len(run.stages),
        samples=run.batch.target,
        micro_batch=run.batch.micro,
        tied=bool(ties) and len(run.stages) > 1,
        clip=run.optimizer.clip_norm,
        scaled=run.precision.compute == "float16",
        robust=run.averaging.robust,
        dtype=run.averaging.dtype,
        overlap=run.averaging.overlap,
        rounds=run.rounds,
    )


def stage_of(run: Run, config: PreTrainedConfig, index: int, device: str | torch.device = "cpu") -> TrainableStage:
    """Stage `index` as it is before the first round. Raises `CannotCut`, or as `hub.resolve`."""
    from swarm.runs.trainable import fresh_stage, load_stage

    if run.model.pretrained is not None:
        return load_stage(resolve(run.model.pretrained), run.spans[index], device)
    return fresh_stage(config, run.spans[index], run.seed, device)
