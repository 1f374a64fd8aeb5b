"""Make a packed ternary checkpoint of one with floating-point weights, as a value: 2 bits a weight, which stock transformers loads.

Each linear map that a rule takes becomes codes (`packing`) and a scale. The model keeps its class; config.json says how to read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..adapter.lowrank import FLOATS
from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError
from ..families import CONV1D
from ..lineage import TERNARY, descend
from ..quantizer import packed_by
from .packing import FOUR, Scale, packed, scale_tensor
from .rule import Rule

LINEAR = ("bitlinear", "autobitlinear")  # transformers' two classes; they read the scale as 1 / s and as s


def ternarize(model: Checkpoint, *, linear: str = "bitlinear", rule: Rule | None = None) -> Checkpoint:
    """Return the model with 2-bit weights and a scale in the place of each matrix that the rule takes.

    Args:
        linear: the class of transformers that runs it. rule: which maps become ternary; all of the decoder layers, where None is given.
    Raises:
        DowncycleError: packed already; a matrix that transformers cannot read so; none that the rule takes.
    """
    rule = rule or Rule()
    if linear not in LINEAR:
        raise DowncycleError(f"--linear {linear}: no such class; choose {' or '.join(LINEAR)}")
    if quantiser := packed_by(model.config):
        raise DowncycleError(f"{model.name}: its weights are packed by {quantiser} already; give the model as it was before")
    if model.config.get("model_type") in CONV1D:
        raise DowncycleError(f"{model.name}: {model.config['model_type']} has no linear maps that transformers runs with ternary weights")
    modules = ternary_modules(model, rule)
    tensors = {new: tensor for name, old in model.tensors.items() for new, tensor in _converted(name, old, name in modules, linear)}
    kept = [name.removesuffix(".weight") for name, tensor in model.tensors.items() if _is_matrix(name, tensor) and name not in modules]
    _check_kept(model, kept, modules)
    how = {"quant_method": "bitnet", "modules_to_not_convert": sorted({"lm_head", *kept})}
    if linear == "autobitlinear":
        how |= {"linear_class": "autobitlinear", "quantization_mode": "offline"}
    lineage = descend(model, TERNARY, linear=linear, include=list(rule.include), exclude=list(rule.exclude))
    return replace(model, config={**model.config, "quantization_config": how}, tensors=tensors, lineage=lineage)


def ternary_modules(model: Checkpoint, rule: Rule) -> dict[str, Tensor]:
    """Return the matrices that a rule takes, [outputs, inputs], by their names.

    Raises:
        DowncycleError: none, or one that cannot be packed: what is wrong with it, and how to leave it out.
    """
    found = {name: one for name, one in model.tensors.items() if _is_matrix(name, one) and rule.takes(name.removesuffix(".weight"))}
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


def _converted(name: str, tensor: Tensor, ternary: bool, linear: str) -> Iterator[tuple[str, Tensor]]:
    if not ternary:
        yield name, tensor
        return
    scale = Scale(tensor, name)
    yield name, packed(scale)
    yield f"{name}_scale", scale_tensor(scale, inverse=linear == "bitlinear")


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and len(tensor.shape) == 2


def _check_kept(model: Checkpoint, kept: list[str], modules: dict[str, Tensor]) -> None:
    """Refuse names that stay floating-point and that transformers would take for the beginning or the end of others, which do not."""
    for name in kept:
        for other in (one.removesuffix(".weight") for one in modules):
            if other.startswith(name) or other.endswith(name):
                raise DowncycleError(f"{model.name}: {name} cannot stay as it is where {other} becomes ternary; --exclude both, or neither")
