"""A Hugging Face causal LM without its weights: built on the meta device, cut, then loaded with only what is left.

One way for every family. The model is built from its full config, because what a block is can depend on its absolute
index (which are dense in DeepSeek-V3, the initial lambda of DiffLlama). Then everything but the wanted part is taken
out, and transformers' own loader fills the rest: it knows how names and layouts in a checkpoint map to parameters
(fused experts, missing prefixes), which parameters are tied, and how buffers that no checkpoint holds are computed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from swarm.errors import CannotCut, ModelCorrupt
from swarm.types import Span

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

_BLOCK_INDEX = ("layer_idx", "layer_id")
"""What modules call their block's index, which is their place in the cache."""

_NOT_PER_BLOCK = frozenset({"architectures", "eos_token_id", "bos_token_id", "pad_token_id"})
"""Lists of a config that are not one item per block, even where their length is the number of blocks."""

_COUNT_NAMES = ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of blocks. An encoder-decoder has two, of which the decoder's is meant."""


patching = threading.RLock()
"""Transformers patches itself and torch while it builds and loads a model, and two threads would undo each other's."""


def num_blocks(config: PreTrainedConfig) -> int:
    """How many blocks the model has.

    Raises:
        CannotCut: the config does not say.
    """
    for name in _COUNT_NAMES:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 0:
            return count
    raise CannotCut(f"{config.model_type}: its config does not say how many blocks it has")


class Elsewhere(nn.Module):
    """Stands for a module whose weights another part of the chain holds.

    What it returns never reaches a block, since the input of the first block is put in its place; it only has to let
    the model's forward pass through: the hidden states that it was given or, for an embedding, something to add.
    """

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3:
                return value
        return torch.zeros(())


class Skeleton:
    """A model on the meta device and where its list of blocks is.

    Attributes:
        config: of the whole model, as it was given.
        top: the causal LM.
        owner: the innermost `PreTrainedModel` around the blocks, whose forward takes `inputs_embeds`.
        blocks: the list of blocks, at its full length until `compact`.
    """

    def __init__(
        self, config: PreTrainedConfig, dtype: torch.dtype, mixin: type | None = None, device: str = "meta"
    ) -> None:
        self.top = _build(config, dtype, mixin, device)
        self.config = config
        self.count = num_blocks(config)
        self.path = _find_blocks(self.top, self.count)
        self.owner = _owner(self.top, self.path)
        self.dtype = dtype

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.top.get_submodule(self.path))

    def keep_span(self, span: Span, beside: Container[str] = frozenset()) -> None:
        """Take out everything that has weights but the blocks of `span`, and the modules `beside` the list of blocks.

        The blocks keep their names until `compact`.
        """
        for name in self.beside():
            if name not in beside:
                parent, _, child = name.rpartition(".")
                self.top.get_submodule(parent).register_module(child, Elsewhere())
        for index in range(self.count):
            if index not in span:
                self.blocks[index] = Elsewhere()
        self._forget_ties()

    def beside(self) -> list[str]:
        """The paths of the modules that have weights and lie beside the blocks, or beside what they lie in."""
        found = []
        module: nn.Module = self.top
        above = ""
        for part in self.path.split("."):
            for name, child in module.named_children():
                if name != part and next(child.parameters(), None) is not None:
                    found.append(f"{above}{name}")
            module, above = module.get_submodule(part), f"{above}{part}."
        return found

    def compact(self, span: Span) -> None:
        """Leave only the blocks of `span`, numbered from 0, and of every list with an item per block their items."""
        self._put_blocks([self.blocks[index] for index in span])
        for module in self.blocks.modules():
            for attribute in _BLOCK_INDEX:
                index = vars(module).get(attribute)
                if isinstance(index, int):
                    setattr(module, attribute, index - span.start)
        _slice_properties(self.owner.config, span, self.count)
        slice_config(self.owner.config, span, self.count)
        self.count = len(span)

    def keep_ends(self, chain: Callable[[torch.Tensor], torch.Tensor], returns: int) -> None:
        """Put one block in place of all, which has no weights and passes what comes in through `chain`.

        It keeps the plain attributes of the first block: some families' forwards look at them, to pick a mask.

        Args:
            chain: from hidden states to hidden states.
            returns: how long a tuple a block of this family returns, 0 if it returns a tensor.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = chain(args[0] if args else kwargs["hidden_states"])
            return (hidden, *[None] * (returns - 1)) if returns else hidden

        block = self.blocks[0]
        for content in (block._modules, block._parameters, block._buffers):
            content.clear()
        block.forward = forward
        self._put_blocks([block])
        if self.owner is not self.top:  # `generate` goes on seeing the whole config
            self.owner.config = copy.deepcopy(self.owner.config)
            slice_config(self.owner.config, Span(0, 1), self.count)
        self._forget_ties()

    def _put_blocks(self, blocks: Iterable[nn.Module]) -> None:
        parent, _, name = self.path.rpartition(".")
        self.top.get_submodule(parent).register_module(name, nn.ModuleList(blocks))

    def _forget_ties(self) -> None:
        """Drop the ties between weights of which one is not here any more."""
        here = {name for name, _ in self.top.named_parameters(remove_duplicate=False)}
        ties = self.top.all_tied_weights_keys
        self.top.all_tied_weights_keys = {to: of for to, of in ties.items() if to in here and of in here}

    def needed(self, names: Iterable[str]) -> list[str]:
        """Those of the checkpoint's `names` that make up the parameters that are left, by the loader's own rules."""
        keys = self.resolver()
        return [name for name in names if keys(name)]

    def resolver(self) -> Callable[[str], set[str]]:
        """What tells which of the parameters that are left a checkpoint's name means, by the loader's own rules."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.top)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        here = self.top.state_dict()

        def keys(name: str) -> set[str]:
            rules: tuple[tuple[Any, Any], ...] = ((renamings, converters), ([], []))
            prefix = self.top.base_model_prefix
            return {rename_source_key(name, *each, prefix, here)[0] for each in rules} & here.keys()

        return keys

    def load(
        self, source: Mapping[str, Callable[[], torch.Tensor]], device: str | torch.device, within: str = ""
    ) -> None:
        """Load the parameters that are left, from `source`: the checkpoint's names, each with what reads the tensor.

        Where a part is loaded at a time, `within` is what its parameters' names begin with.

        Raises:
            ModelCorrupt: a weight is missing or has the wrong shape.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        settings = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.top._get_dtype_plan(self.dtype),
            device_map={"": torch.device(device)},
            weight_mapping=cast(Any, get_model_conversion_mapping(self.top)),
        )
        tensors = {name: _Lazy(read) for name, read in source.items()}
        with patching, without_progress_bars():
            info, _ = convert_and_load_state_dict_in_model(self.top, tensors, settings)
            _refuse_damage(self.top, info, within)
            self.top.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)

    @torch.no_grad()
    def settle(self, device: str | torch.device) -> None:
        """Compute the buffers that no checkpoint holds (rotary frequencies, slopes), and make the model ready to run.

        They are what the family's own initialisation makes of them. It is asked only of the modules that have such
        buffers, since that of a whole model may look for parts that are not here.

        Raises:
            CannotCut: it leaves some untouched.
        """
        from transformers.initialization import guard_torch_init_functions

        waiting = [module for module in self.top.modules() if _unset_buffers(module, device)]
        with patching, guard_torch_init_functions():
            for module in waiting:
                self.top._initialize_weights(module)
            if any(map(_has_unset, waiting)):
                self.top._initialize_weights(self.owner)
        if any(map(_has_unset, waiting)):
            raise CannotCut(f"{type(self.top).__name__}: its buffers cannot be computed for a part of it")
        self.top.train(False)


def _unset_buffers(module: nn.Module, device: str | torch.device) -> bool:
    """Replace the module's own buffers on the meta device by real ones of NaN; whether there were any."""
    unset = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
    for name, buffer in unset.items():
        value = torch.zeros_like(buffer, device=device)
        module._buffers[name] = value.fill_(torch.nan) if value.is_floating_point() else value
    return bool(unset)


def _has_unset(module: nn.Module) -> bool:
    return any(buffer.isnan().any() for buffer in module.buffers(recurse=False))


class _Lazy:
    """What transformers' loader takes for a tensor in a file: read when sliced with `[...]`."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


def per_block_lists(config: PreTrainedConfig, count: int) -> dict[str, Any]:
    """The lists of `config` that have an item per block, of `count` blocks."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count and name not in _NOT_PER_BLOCK
    }


def slice_config(config: PreTrainedConfig, span: Span, count: int) -> None:
    """Make `config` that of a model of only the blocks of `span`, of `count`: in place."""
    for name, value in per_block_lists(config, count).items():
        vars(config)[name] = value[span.start : span.end]
    for name in _COUNT_NAMES:
        if getattr(config, name, None) == count:
            setattr(config, name, len(span))


def _slice_properties(config: PreTrainedConfig, span: Span, count: int) -> None:
    """Some configs work their lists out from a block's index (Jamba: every eighth is attention): fix the items."""
    from transformers.configuration_utils import PreTrainedConfig

    own = [vars(base) for base in type(config).__mro__ if issubclass(base, PreTrainedConfig)]
    names = {name for base in own[:-1] for name, value in base.items() if isinstance(value, property)}
    values = {name: getattr(config, name) for name in names}
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == count}
    if lists:
        fixed = {name: value[span.start : span.end] for name, value in lists.items()}
        config.__class__ = type(type(config).__name__, (type(config),), fixed)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The family's causal LM class; imports only that family's module.

    Raises:
        CannotCut: transformers has none for this config.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.sub_configs and config.get_text_config(decoder=True) is not config:
        raise CannotCut(f"{config.model_type}: a model of more than text; only plain causal language models are cut")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CannotCut(f"{config.model_type or 'this model'}: transformers has no causal language model of this type")
    return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _build(config: PreTrainedConfig, dtype: torch.dtype, mixin: type | None, device: str) -> PreTrainedModel:
    """The whole model, as `from_pretrained` would build it before it loads weights."""
    found = model_class(config)
    if mixin is not None:  # under the family's name, by which pipelines and others look it up
        found = type(found.__name__, (mixin, found), {"__module__": found.__module__})
    config = copy.deepcopy(config)
    config.dtype = dtype
    with patching, ExitStack() as stack:
        for context in found.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        stack.enter_context(torch.device(device))
        return found(config)


def _find_blocks(top: nn.Module, count: int) -> str:
    """The path of the list of `count` blocks: the outermost one, if several lists are as long."""
    lists = ((path, module) for path, module in top.named_modules() if isinstance(module, nn.ModuleList))
    paths: list[str] = [path for path, module in lists if len(module) == count]
    if not paths:
        raise CannotCut(f"{type(top).__name__} has no list of its {count} blocks")
    return min(paths, key=lambda path: path.count("."))


def _owner(top: PreTrainedModel, path: str) -> PreTrainedModel:
    from transformers.modeling_utils import PreTrainedModel

    owner: nn.Module = top
    module: nn.Module = top
    for part in path.split(".")[:-1]:
        module = module.get_submodule(part)
        if isinstance(module, PreTrainedModel):
            owner = module
    return cast(PreTrainedModel, owner)


def _refuse_damage(top: PreTrainedModel, info: Any, within: str) -> None:
    parameters = {name for name, weight in top.named_parameters() if weight.is_meta and name.startswith(within)}
    missing = sorted((info.missing_keys & parameters) - top.all_tied_weights_keys.keys())
    if missing:
        raise ModelCorrupt(f"the checkpoint lacks {len(missing)} weights, the first is {missing[0]}")
    for name, found, expected in info.mismatched_keys:
        raise ModelCorrupt(f"{name} has shape {tuple(found)}, the config says {tuple(expected)}")
    for name, trouble in info.conversion_errors.items():
        raise ModelCorrupt(f"{name} cannot be made from the checkpoint's tensors: {trouble.splitlines()[-1]}")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing over what the terminal shows."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
