"""Make a built model's linear maps ternary, so that what is trained can be packed and loaded again. Knows no trainer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ...surgery.adapter.lowrank import pieces
from ...surgery.checkpoint import Checkpoint, open_checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.ternary.bitlinear import BitLinear, convert, set_strength
from ...surgery.ternary.record import NORM, read_record
from ...surgery.weights import FOUR
from .settings import SECTION, TernarySettings


def make_ternary(model: PreTrainedModel, chosen: TernarySettings, source: str, revision: str | None = None) -> None:
    """Convert a model in place. lambda is that of the training which `source` came out of; 0 where none did.

    Args:
        source: folder or Hub id that the model was loaded from: norms that it holds already are read there.
    Raises:
        DowncycleError: no map that becomes ternary, or one that no packed checkpoint can hold.
    """
    rule, linear = chosen.rule(), {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    maps = {name: module for name, module in linear.items() if rule.takes(name)}
    if not maps:
        raise DowncycleError(f"{source}: has no linear map that becomes ternary; change include and exclude under {SECTION}")
    if idle := rule.idle(linear):
        raise DowncycleError(f"{source}: {SECTION}: {idle[0]!r} takes or leaves out no linear map; mend the pattern, or take it out")
    _check_head(model, maps, source)
    _check_outputs(source, maps)
    for module in maps.values():
        convert(module, norm=chosen.norm)
    if before := read_record(model.config.to_dict(), source):
        set_strength(model, before.strength)
        if before.norm:
            _load_norms(maps, open_checkpoint(source, revision))


def _check_head(model: PreTrainedModel, maps: Mapping[str, nn.Linear], source: str) -> None:
    """Refuse a head that has the weights of the embeddings: packed, they could not be both."""
    for name, module in maps.items():
        if module.weight is model.get_input_embeddings().weight:
            raise DowncycleError(f"{source}: {name} has the weights of the embeddings, which stay floats; {_leave_out(name)}")


def _leave_out(name: str) -> str:
    return f"leave it out: exclude: ['{name.rpartition('.')[2]}$'] under {SECTION}"


def _check_outputs(source: str, maps: Mapping[str, nn.Linear]) -> None:
    for name, module in maps.items():
        if module.out_features % FOUR:
            raise DowncycleError(
                f"{source}: {name} has {module.out_features} outputs, and transformers reads ternary maps with multiples of {FOUR} only; "
                f"{_leave_out(name)}"
            )


@torch.no_grad()
def _load_norms(maps: Mapping[str, nn.Linear], source: Checkpoint) -> None:
    """Read the norms' weights, which transformers passes over: the model's class has no place for them."""
    for name, module in maps.items():
        key = f"{name}{NORM}"
        if key not in source.tensors:
            raise DowncycleError(f"{source.name}: its config speaks of norms, and there is no {key}; give the folder that training wrote")
        assert isinstance(module, BitLinear) and module.rms_norm
        weight = module.rms_norm.weight
        if weight.is_meta:
            continue  # another process has it, and passes it on
        stored = torch.cat(list(pieces(source.tensors[key])))
        if stored.shape != weight.shape:
            raise DowncycleError(f"{source.name}: {key} has {len(stored)} numbers, and the map has {len(weight)} inputs; fetch it again")
        weight.copy_(stored)
