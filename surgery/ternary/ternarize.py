"""Make a packed ternary checkpoint of one with floating-point weights, as a value: 2 bits a weight, which stock transformers loads.

Each linear map that a rule takes becomes codes (`packing`) and a scale. The model keeps its class; config.json says how to read it.
A norm of its own before each map (`rms_norm`), if it was trained with one, is copied, as transformers' classes have it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..adapter.lowrank import FLOATS, cast
from ..adapter.names import HEADS, is_tied
from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError
from ..families import CONV1D
from ..lineage import TERNARY, descend
from ..quantizer import packed_by
from ..weights import BITNET, FOUR, scaled_bias
from .packing import Scale, Tell, packed, scale_tensor
from .record import EPSILON, NORM, read_record
from .rule import Rule

LINEAR = ("bitlinear", "autobitlinear")  # transformers' two classes; they read the scale as 1 / s and as s
STORED = "stored"
DTYPES = {STORED: "", "bf16": "BF16", "f16": "F16"}  # of what stays floating-point, as safetensors spells it
EXPERT = re.compile(r"(\.experts)\.[0-9]+\..*")  # one of many, with all below it


def ternarize(
    model: Checkpoint, *, linear: str = "bitlinear", rule: Rule | None = None, dtype: str = STORED, tell: Tell | None = None
) -> Checkpoint:
    """Return the model with 2-bit weights and a scale in the place of each matrix that the rule takes.

    Args:
        linear: the class of transformers that runs it. rule: which maps become ternary; where None is given, those that learnt to be, as
            the config says, or all of the decoder layers.
        dtype: of what stays floating-point: stored, as it is; bf16 or f16, rounded.
        tell: is told the name and the tally of each matrix, whenever it is packed.
    Raises:
        DowncycleError: packed already; a matrix or a norm that transformers cannot read so; none that the rule takes.
    """
    record, rule = read_record(model.config, model.name), rule or rule_of(model)
    if linear not in LINEAR:
        raise DowncycleError(f"--linear {linear}: no such class; choose {' or '.join(LINEAR)}")
    if dtype not in DTYPES:
        raise DowncycleError(f"--dtype {dtype}: no such dtype; choose one of {', '.join(DTYPES)}")
    if quantiser := packed_by(model.config):
        raise DowncycleError(f"{model.name}: its weights are packed by {quantiser} already; give the model as it was before")
    if model.config.get("model_type") in CONV1D:
        raise DowncycleError(f"{model.name}: {model.config['model_type']} has no linear maps that transformers runs with ternary weights")
    modules = ternary_modules(model, rule)
    if linear == "autobitlinear" and (biased := scaled_bias(model, modules)):
        raise DowncycleError(
            f"{model.name}: {biased} has a bias, which transformers multiplies with the scale under --linear autobitlinear; take bitlinear"
        )
    normed = _norms(model, modules, record is not None and record.norm)
    tensors = {new: tensor for name, old in model.tensors.items() for new, tensor in _converted(name, old, name in modules, linear, tell)}
    kept = _kept(model, modules)
    _check_kept(model, kept, modules)
    head = () if "lm_head.weight" in modules else ("lm_head",)  # which files of tied models lack
    how: dict[str, Any] = {"quant_method": BITNET, "modules_to_not_convert": sorted({*head, *kept})}
    if linear == "autobitlinear":
        how |= {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    if normed:
        how |= {"use_rms_norm": True, "rms_norm_eps": EPSILON}
    config = {**model.config, "quantization_config": how}
    if dtype != STORED:
        floats = {name: tensor for name, tensor in model.tensors.items() if name not in modules and tensor.dtype in FLOATS}
        tensors |= {name: cast(tensor, DTYPES[dtype], name) for name, tensor in floats.items()}
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = FLOATS[DTYPES[dtype]]
    lineage = descend(model, TERNARY, linear=linear, include=list(rule.include), exclude=list(rule.exclude), dtype=dtype)
    return replace(model, config=config, tensors=tensors, lineage=lineage)


def rule_of(model: Checkpoint) -> Rule:
    """Return the rule by which a model learnt ternary weights, as its config says; that of all decoder layers where it says nothing."""
    record = read_record(model.config, model.name)
    return record.rule if record else Rule()


def linear_names(model: Checkpoint) -> list[str]:
    """Name the matrices of a model."""
    return [name.removesuffix(".weight") for name, tensor in model.tensors.items() if _is_matrix(name, tensor)]


def ternary_names(model: Checkpoint, rule: Rule) -> list[str]:
    """Name the linear maps that a rule takes."""
    return [name for name in linear_names(model) if rule.takes(name)]


def check_patterns(model: Checkpoint, rule: Rule) -> None:
    """Refuse patterns that take or leave out nothing: they were meant to."""
    if idle := rule.idle(names := linear_names(model)):
        raise DowncycleError(
            f"{idle[0]!r}: no linear map that this pattern takes or leaves out; their names are like {names[-1]}; embeddings, routers and "
            "experts in one tensor are never ternary"
        )


def ternary_modules(model: Checkpoint, rule: Rule) -> dict[str, Tensor]:
    """Return the matrices that a rule takes, [outputs, inputs], by their names.

    Raises:
        DowncycleError: none, or one that cannot be packed: what is wrong with it, and how to leave it out.
    """
    found = {name: one for name, one in model.tensors.items() if _is_matrix(name, one) and rule.takes(name.removesuffix(".weight"))}
    _check_head(model, rule)
    if not found:
        raise DowncycleError(f"{model.name}: no linear map that becomes ternary; change the patterns of --include and --exclude")
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS:
            raise DowncycleError(f"{model.name}: {name} holds {tensor.dtype} and no floating-point numbers; leave it out with --exclude")
        if tensor.shape[0] % FOUR:
            raise DowncycleError(
                f"{model.name}: {name} has {tensor.shape[0]} outputs, and transformers reads multiples of {FOUR} only; leave it out with "
                f"--exclude '{name.removesuffix('.weight').rpartition('.')[2]}$'"
            )
    return found


def _check_head(model: Checkpoint, rule: Rule) -> None:
    """Refuse a head that is tied to the embeddings."""
    if is_tied(model) and any(rule.takes(head) for head in HEADS):
        raise DowncycleError(
            f"{model.name}: its head has the weights of the embeddings, which stay floats; let no pattern of --include take it"
        )


def norms(model: Checkpoint) -> dict[str, Tensor]:
    """Return the norms that linear maps have of their own, by the names of the maps' weights."""
    found = {f"{name.removesuffix(NORM)}.weight": tensor for name, tensor in model.tensors.items() if name.endswith(NORM)}
    return {name: tensor for name, tensor in found.items() if name in model.tensors and _is_matrix(name, model.tensors[name])}


def _norms(model: Checkpoint, modules: Mapping[str, Tensor], trained: bool) -> bool:
    """Whether ternary maps have norms of their own; refuse what transformers, where all of them have one or none, would read wrongly."""
    found = norms(model)
    if trained and not found:
        raise DowncycleError(f"{model.name}: by its config each ternary map has a norm (rms_norm), and there is none; fetch it again")
    for name in found:
        if name not in modules:
            raise DowncycleError(
                f"{model.name}: {name} has a norm of its own (rms_norm), which transformers loads with ternary maps only; --include it"
            )
    for name, weight in modules.items() if found else ():
        if name not in found:
            raise DowncycleError(
                f"{model.name}: {name} has no norm of its own (rms_norm), as other ternary maps have, and transformers loads all with one "
                "or none; leave it out with --exclude"
            )
        if found[name].shape != weight.shape[1:] or found[name].dtype not in FLOATS:
            raise DowncycleError(
                f"{model.name}: the norm of {name} holds {found[name].dtype} {list(found[name].shape)}, and its inputs are "
                f"{weight.shape[1]}; it is damaged, fetch it again"
            )
    return bool(found)


def _converted(name: str, tensor: Tensor, ternary: bool, linear: str, tell: Tell | None) -> Iterator[tuple[str, Tensor]]:
    if not ternary:
        yield name, tensor
        return
    scale = Scale(tensor, name)
    yield name, packed(scale, tell)
    yield f"{name}_scale", scale_tensor(scale, inverse=linear == "bitlinear")


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and len(tensor.shape) == 2


def _kept(model: Checkpoint, modules: Mapping[str, Tensor]) -> list[str]:
    """Name the matrices that stay as they are: experts together, as transformers reads a name as all below it, and slowly."""
    kept = (name.removesuffix(".weight") for name, tensor in model.tensors.items() if _is_matrix(name, tensor) and name not in modules)
    taken = {EXPERT.sub(r"\1", name) for name in modules if EXPERT.search(name)}
    return sorted({group if (group := EXPERT.sub(r"\1", name)) not in taken else name for name in kept})


def _check_kept(model: Checkpoint, kept: list[str], modules: dict[str, Tensor]) -> None:
    """Refuse names that stay floating-point and that transformers would take for the beginning or the end of others, which do not."""
    for name in kept:
        for other in (one.removesuffix(".weight") for one in modules):
            if other.startswith(name) or other.endswith(name):
                raise DowncycleError(f"{model.name}: {name} cannot stay as it is where {other} becomes ternary; --exclude both, or neither")
