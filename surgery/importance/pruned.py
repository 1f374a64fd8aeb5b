"""Classes of transformers models of which only a part is left: stock `from_pretrained` loads that, and reads no other weights.

Knows no checkpoint and runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import copy, deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import DowncycleError
from ..stack import OTHER_TOWERS

if TYPE_CHECKING:
    from torch import nn


def find_stack(model: nn.Module, depth: int) -> str:
    """Return the name of the list of decoder layers: of those as long as the model is deep, in no other tower, the one that weighs most."""
    from torch.nn import ModuleList

    lists = {name: module for name, module in model.named_modules() if isinstance(module, ModuleList) and len(module) == depth}
    text = {name: module for name, module in lists.items() if not OTHER_TOWERS.search(name)} or lists
    if not text:
        raise DowncycleError(f"{type(model).__name__}: has no list of {depth} decoder layers, and so cannot be run layer by layer")
    return max(text, key=lambda name: sum(weight.numel() for weight in text[name].parameters()))


def frame_class(model_class: Any, depth: int) -> Any:
    """Derive the class of a model whose decoder layers are empty; the real ones, without weights, lie in `stand_ins`."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        self.stack_name = find_stack(self, depth)
        self.ties = dict(self.get_expanded_tied_weights_keys(all_submodels=True))
        stack = self.get_submodule(self.stack_name)
        object.__setattr__(self, "stand_ins", list(stack))  # no submodules, so that nothing is loaded into them
        stack._modules.clear()
        self.all_tied_weights_keys = {name: source for name, source in self.ties.items() if _has(self, name) and _has(self, source)}

    return _derive(model_class, __init__=__init__)


def layer_class(model_class: Any, depth: int, number: int, bare: list[Any]) -> Any:
    """Derive the class of a model of which nothing but one decoder layer is left.

    Args:
        bare: for the whole model without weights, which is made once, as that takes longer than loading a layer.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not bare:
            bare.append(model_class(*args, **kwargs))
            bare[0].stack_name = find_stack(bare[0], depth)
        part = _only(bare[0], f"{bare[0].stack_name}.{number}")
        self.__dict__.update(part.__dict__, all_tied_weights_keys={})
        part.__dict__.pop("_init_weights", None)  # it refers back to the part, which would outlive its last use

    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        pass

    return _derive(model_class, __init__=__init__, tie_weights=tie_weights)


def _derive(model_class: Any, **methods: Any) -> Any:
    """Derive a class that transformers takes for the original."""
    body = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "config_class")}
    return type(model_class.__name__, (model_class,), body | methods)


def _only(module: nn.Module, path: str) -> nn.Module:
    """Copy a module that has no weights, with none in it but those that lead to the one at `path`, and that one."""
    from torch import nn

    if not path:
        return deepcopy(module)
    name, _, rest = path.partition(".")
    part: Any = copy(module)
    gone = nn.Module()
    part.__dict__.update({key: copy(value) for key, value in vars(module).items() if isinstance(value, dict | set)})
    others = {} if isinstance(module, nn.ModuleList) else {key: child and gone for key, child in module._modules.items()}
    part._modules = others | {name: _only(module.get_submodule(name), rest)}
    part._parameters = dict.fromkeys(module._parameters)
    if own := getattr(part, "_init_weights", None):
        part._init_weights = partial(_init_what_is_left, own)
    return part


def _init_what_is_left(own: Callable[[Any], None], module: Any) -> None:
    """Fill what no file holds, such as rotary frequencies; what is gone cannot be."""
    with suppress(AttributeError):
        own(module)


def _has(model: Any, name: str) -> bool:
    with suppress(AttributeError):
        return model.get_parameter_or_buffer(name) is not None
    return False
