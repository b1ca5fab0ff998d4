"""Find the parts of a causal LM by structure, not by name: blocks, MLP down-projections, final norm and head."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sphere_edit.files import tensor_bytes


class StructureError(ValueError):
    """A model that cannot be edited; the message lists the parts seen."""


@dataclass(frozen=True)
class LinearMap:
    """A linear map of one block's MLP.

    ``weight`` is always ``[n, d]``, neurons (outputs) in rows. ``nn.Linear`` stores this layout; ``Conv1D`` (GPT-2)
    stores the transpose, and ``weight`` is a view of it. Writing into ``weight`` in place changes the model.
    """

    layer: int
    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if isinstance(self.module, Conv1D) else weight.detach()


@dataclass(frozen=True)
class ModelStructure:
    """Parts of a model. ``blocks[i]`` is decoder block ``i``, ``down[i]`` its MLP down-projection, ``edited[i]`` the
    edited map of its MLP, of the kind ``modules``."""

    blocks: tuple[nn.Module, ...]
    down: tuple[LinearMap, ...]
    edited: tuple[LinearMap, ...]
    modules: str
    final_norm: nn.Module
    head: nn.Module
    hidden_size: int
    heads: int
    scale: float = 1.0  # Cohere, Granite, HyperCLOVA X and Falcon-H1 scale their logits
    softcap: float | None = None  # Gemma 2 squashes them: softcap * tanh(logits / softcap)

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.edited[0].weight.dtype

    @property
    def head_weights(self) -> int:
        """Number of weights in the head."""
        return sum(parameter.numel() for parameter in self.head.parameters())

    @cached_property
    def block_weights(self) -> tuple[int, ...]:
        """Number of weights in the linear maps of each block."""
        return tuple(sum(inputs * outputs for *_, inputs, outputs in _linears(block)) for block in self.blocks)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of the last block's output ``[..., hidden]``."""
        out: Tensor = self.head(self.final_norm(hidden)) * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def check_layers(self, layers: tuple[int, ...], last: bool = False) -> None:
        """Raise unless layers are distinct, ascending and in the model; only ``last`` allows the last block."""
        if not layers:
            raise StructureError("layers is empty; expected at least one layer to edit")
        bad = [i for i in layers if not 0 <= i < len(self.blocks)]
        if bad:
            raise StructureError(f"layers {list(layers)}: {bad[0]} is out of range, the model has {len(self.blocks)}")
        if list(layers) != sorted(set(layers)):
            raise StructureError(f"layers {list(layers)} must be ascending without repeats")
        if layers[-1] == len(self.blocks) - 1 and not last:
            raise StructureError(
                f"layers {list(layers)}: the last block ({layers[-1]}) leaves nothing above it that could read the edit"
            )


def find_structure(model: Any, modules: str = "down") -> ModelStructure:
    """Find blocks, MLP down-projections, final norm and head of a Hugging Face causal LM.

    The blocks are the longest ``ModuleList`` of like modules beside the input embeddings, so an image tower does not
    count. In each block, the MLP down-projection is the linear map onto the hidden size with the widest input that
    another linear map of the block feeds: the up-projection has that width, or twice that where gate and up are fused.
    Maps inside modules that take a mask or a cache (attention, convolutions, recurrences) are not the MLP's.

    Args:
        modules: the map of each MLP to edit: ``down``; ``up``, whose output enters the down-projection, times the gate
            if there is one; ``gate``, whose output passes the activation; ``fused``, gate and up in one map.

    Raises:
        StructureError: MLPs without such a map, an encoder-decoder, no or several candidates (a mixture of experts),
            weights shared by blocks, quantised, meta or offloaded weights. The message lists the linear maps seen.
    """
    check_usable(model)
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise StructureError(f"{type(model).__name__} is an encoder-decoder; expected a decoder-only causal LM")
    _check_storage(model)
    head = model.get_output_embeddings()
    if head is None:
        raise StructureError(f"{type(model).__name__} has no output embeddings; expected a causal LM with a head")
    hidden = int(config.hidden_size)
    path, blocks = _find_blocks(model)
    down = tuple(_find_down(f"{path}.{i}", block, i, hidden) for i, block in enumerate(blocks))
    norm = _find_final_norm(model, path, hidden)
    softcap = getattr(config, "final_logit_softcapping", None)
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    edited = down
    if modules != "down":
        edited = tuple(_find_feeding(block, found, modules) for block, found in zip(blocks, down, strict=True))
    _check_own(blocks, edited)
    return ModelStructure(tuple(blocks), down, edited, modules, norm, head, hidden, heads, _scale(config), softcap)


def _scale(config: Any) -> float:
    """Factor of the head's outputs, from the model's settings."""
    scaling = getattr(config, "logits_scaling", None) or 1
    scale = getattr(config, "logit_scale", None) or 1 / scaling
    if config.model_type == "hyperclovax":  # multiplies where all others divide
        scale = scaling
    return float(scale * (getattr(config, "lm_head_multiplier", None) or 1))


def check_weights_finite(model: Any) -> None:
    """Raise if a parameter holds NaN or Inf; the message names the parameter."""
    check_usable(model)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise StructureError(f"parameter {name} {list(parameter.shape)} holds NaN or Inf; expected finite weights")


def model_sha256(model: Any) -> str:
    """SHA-256 of a model's settings and parameters, without the model's name and the library's version."""
    settings = json.loads(model.config.to_json_string(use_diff=True))
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.dtype}{list(parameter.shape)}".encode())
        digest.update(tensor_bytes(parameter))
    return digest.hexdigest()


def check_usable(model: Any) -> None:
    """Raise unless ``model`` is a Hugging Face causal LM with every weight in memory."""
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        inner = " (its .module)" if hasattr(model, "module") else ""
        raise StructureError(f"{type(model).__name__} has no config; expected the Hugging Face causal LM itself{inner}")
    for name, module in model.named_modules():
        if _is_offloaded(module):
            named = f"module {name}" if name else type(model).__name__
            raise StructureError(f"{named} is offloaded; expected every weight in memory, on the device that computes")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise StructureError(f"parameter {name} is on the meta device (not loaded, or offloaded); load it first")
        if parameter.is_inference():
            raise StructureError(
                f"parameter {name} was made under torch.inference_mode(), which no gradient can pass; load the model "
                "outside it"
            )


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate fetches the module's weights for each call, or moves them at the first call."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(one, "offload", False) or type(one).__name__ == "CpuOffload" for one in hooks)


def _check_storage(model: Any) -> None:
    """Raise unless all weights are plain floating-point tensors."""
    quantised = getattr(model, "hf_quantizer", None) is not None and getattr(model, "is_quantized", True)
    for name, parameter in model.named_parameters():
        if quantised or not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            raise StructureError(
                f"parameter {name} is quantised ({parameter.dtype}); expected float16, bfloat16, float32 or float64"
            )


def _check_own(blocks: Sequence[nn.Module], edited: Sequence[LinearMap]) -> None:
    """Raise if blocks share an edited weight, for example where one block is used twice."""
    uses = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    for found in edited:
        if uses[id(found.module.weight)] > 1:
            raise StructureError(f"{found.name}: more than one block uses its weight; expected blocks of their own")


def _find_blocks(model: Any) -> tuple[str, list[nn.Module]]:
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _alike(module)
    ]
    lists = [(name, blocks) for name, blocks in lists if _linears(blocks[0])]
    if not lists:
        raise StructureError(f"{type(model).__name__} has no list of decoder blocks; seen: {_summary(model)}")
    beside = _embeddings_path(model)
    return max(lists, key=lambda item: (_shared(item[0], beside), len(item[1])))


def _alike(modules: nn.ModuleList) -> bool:
    """Whether modules are of one type, or all mix tokens (attention and recurrence in blocks of their own)."""
    return len({type(module) for module in modules}) == 1 or all(_mixes_tokens(module) for module in modules)


def _embeddings_path(model: Any) -> str:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return ""
    return next((name for name, module in model.named_modules() if module is embeddings), "")


def _shared(path: str, other: str) -> int:
    """Number of modules that contain both."""
    pairs = zip(path.split(".")[:-1], other.split(".")[:-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _linears(block: nn.Module) -> list[tuple[str, nn.Module, int, int]]:
    """Every linear map of a block as (name, module, inputs, outputs)."""
    out: list[tuple[str, nn.Module, int, int]] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            out.append((name, module, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            out.append((name, module, module.weight.shape[0], module.weight.shape[1]))
    return out


def _find_down(path: str, block: nn.Module, layer: int, hidden: int) -> LinearMap:
    linears = _linears(block)
    mixers = tuple(f"{name}." for name, module in block.named_modules() if name and _mixes_tokens(module))
    stacked = [
        name for name, parameter in block.named_parameters() if parameter.ndim > 2 and not name.startswith(mixers)
    ]
    if stacked:
        raise StructureError(
            f"{path} ({type(block).__name__}): {stacked[0]} has more than two dimensions (stacked experts, or a "
            "convolution); expected attention and one dense MLP per block"
        )
    widths = {outputs for _, _, inputs, outputs in linears if inputs == hidden}
    onto = [item for item in linears if item[3] == hidden and (item[2] in widths or 2 * item[2] in widths)]
    fed = [item for item in onto if not item[0].startswith(mixers)]
    widest = max((item[2] for item in fed), default=0)
    found = [item for item in fed if item[2] == widest]
    if len(found) == 1 and (mixers or len(fed) > 1):
        if not isinstance(found[0][1].weight, nn.Parameter):
            raise StructureError(
                f"{path}.{found[0][0]}: its weight is computed (parametrised), not a parameter; bake it in"
            )
        return LinearMap(layer, f"{path}.{found[0][0]}", found[0][1])
    seen = ", ".join(f"{name} {inputs}→{outputs}" for name, _, inputs, outputs in linears) or _summary(block)
    why = f"{len(found)} candidates for the MLP down-projection (experts?)"
    if len(found) < 2:
        why = "no MLP down-projection beside the attention's output" if onto else "no MLP down-projection"
    raise StructureError(f"{path} ({type(block).__name__}): {why}; hidden size {hidden}; linear maps seen: {seen}")


def _mixes_tokens(module: nn.Module) -> bool:
    """Whether a module takes a mask, a past or a cache, as an MLP never does."""
    parameters = inspect.signature(type(module).forward).parameters
    return any("mask" in name or "past" in name or "cache" in name for name in parameters)


def _find_feeding(block: nn.Module, down: LinearMap, kind: str) -> LinearMap:
    """The map of kind ``up``, ``gate`` or ``fused`` that feeds the down-projection of a block."""
    name_in_block = next(name for name, module, *_ in _linears(block) if module is down.module)
    inside, width = name_in_block.rpartition(".")[0], down.weight.shape[1]
    path = down.name.removesuffix(name_in_block)
    siblings = [(name, m, outputs) for name, m, _, outputs in _linears(block) if name.rpartition(".")[0] == inside]
    single = [(name, module) for name, module, outputs in siblings if outputs == width and module is not down.module]
    found = {"fused": [(name, module) for name, module, outputs in siblings if outputs == 2 * width]}
    if len(single) == 1:
        found["up"] = single
    elif len(single) == 2:
        linear = [_is_linear_in(block.get_submodule(inside), module, down) for _, module in single]
        if linear.count(True) == 1:
            found["up"], found["gate"] = [single[linear.index(True)]], [single[linear.index(False)]]
    if len(found.get(kind, [])) == 1:
        (name, module), *_ = found[kind]
        return LinearMap(down.layer, path + name, module)
    has = ", ".join(["down", *(name for name, maps in found.items() if len(maps) == 1)])
    raise StructureError(f"{down.name}: its MLP has no map of the kind {kind!r}; expected modules of {has}")


@torch.no_grad()
def _is_linear_in(mlp: nn.Module, module: nn.Module, down: LinearMap) -> bool:
    """Whether negating the output of ``module`` negates the down-projection's input; a gate passes an activation."""
    seen: list[Tensor] = []
    hidden = torch.linspace(-1, 1, 2 * _inputs(module), dtype=torch.float32).view(1, 2, -1).to(down.weight)
    handle = down.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        mlp(hidden)
        negated = module.register_forward_hook(lambda _, args, out: -out)
        try:
            mlp(hidden)
        finally:
            negated.remove()
    finally:
        handle.remove()
    return torch.allclose(seen[0], -seen[1], rtol=1e-2, atol=1e-3 * float(seen[0].abs().max()))


def _inputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]


def _find_final_norm(model: nn.Module, blocks_path: str, hidden: int) -> nn.Module:
    """The last childless module beside the blocks whose weight is one vector of the hidden size; if there is none, the
    last one that normalises without a weight."""
    parent = model.get_submodule(blocks_path.rpartition(".")[0])
    childless = [child for child in parent.children() if not list(child.children())]
    norms = [child for child in childless if _shape(getattr(child, "weight", None)) == (hidden,)]
    norms = norms or [child for child in childless if not child.state_dict() and _normalises(child, hidden)]
    if not norms:
        raise StructureError(f"no final norm of size {hidden} beside {blocks_path}; seen: {_summary(parent)}")
    return norms[-1]


@torch.no_grad()
def _normalises(module: nn.Module, hidden: int) -> bool:
    """Whether the outputs have a mean square of 1, whatever the inputs."""
    given = torch.linspace(-4, 6, hidden, dtype=torch.float32).expand(1, 1, hidden)
    try:
        out = module(given)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # a rotary table takes more than vectors
        return False
    return isinstance(out, Tensor) and out.shape == given.shape and abs(float(out.square().mean()) - 1) < 0.01


def _shape(weight: object) -> tuple[int, ...] | None:
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _summary(module: nn.Module) -> str:
    return ", ".join(f"{count}×{name}" for name, count in Counter(type(m).__name__ for m in module.modules()).items())
