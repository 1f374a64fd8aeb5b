"""What an adapter's parts make of the base's tensors, module by module.

Knows peft's kinds of parts and the base's tensors; computes nothing before the result is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import NoReturn

from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError
from ..families import CONV1D
from .config import AdapterConfig
from .lowrank import FLOATS, Update, added, cast, merged, stacked, to_torch, with_rows
from .names import EXPERT_PARTS, Names, is_embedding, is_head, is_tied, layer_number

TRANSPOSED_EXPERTS = ("gpt_oss", "openai_privacy_filter")  # families whose stacks of experts are [expert, in, out]
TOKENS = "token_adapter.trainable_tokens_delta"
MAGNITUDE, BIAS = "lora_magnitude_vector", "lora_B.bias"
OPTIONAL = (("use_dora", MAGNITUDE, "DoRA magnitude"), ("lora_bias", BIAS, "bias of its own"))
PAIR, EMBEDDING_PAIR = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
INNER = ".base_layer"  # how peft names the inner one of two adapters on parameters of one module
ABSENT = "no module of {} is called so, or several are; the adapter was trained on another model"
GROW = "give the base as many first, with its resize_token_embeddings() and the adapter's tokenizer, and merge into that"

Parts = dict[str, Tensor]  # by kind: "lora_A.weight", ...


class Merge:
    """The base's tensors while an adapter is put into them, module by module.

    done: the names of the tensors that have been changed or replaced.
    """

    def __init__(self, base: Checkpoint, config: AdapterConfig, where: str):
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise DowncycleError("merging an adapter needs torch: pip install 'downcycle[score]'") from error
        self.base, self.config, self.where = base, config, where
        self.tensors = dict(base.tensors)
        self.names = Names(base.tensors)
        self.done: set[str] = set()
        self._tied = [name for name in base.tensors if _is_end(name) and layer_number(name) is None] if is_tied(base) else []
        self._read = lru_cache(maxsize=4)(to_torch)  # the experts of a layer share their factors
        self._nested: defaultdict[str, list[tuple[int, Parts]]] = defaultdict(list)

    def has(self, module: str) -> bool:
        """Whether the base has a module of this name."""
        container = module.replace(INNER, "")
        return any(self.names.find(f"{container}.{last}") for last in ("weight", "bias", *EXPERT_PARTS)) or any(
            self.names.find_experts(container, name) for name in EXPERT_PARTS
        )

    def check_tied(self, parts: Mapping[str, Parts], saved: Mapping[str, Tensor]) -> None:
        """Refuse to change only one of a head and an embedding that are the same tensor in the base."""
        if not is_tied(self.base):
            return
        for module, its in parts.items():
            if is_head(module) or is_embedding(module) and TOKENS not in its:
                self._refuse_tied(module)
        whole = [name for name in saved if _is_end(name)]
        if len(whole) == 1 and not (self.config.fields.get("ensure_weight_tying") and is_embedding(whole[0][:-7])):
            self._refuse_tied(whole[0])
        if len(whole) > 1 and len({b"".join(saved[name].chunks()) for name in whole}) > 1:
            self._refuse_tied(" and ".join(whole))

    def put_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Let tensors that the adapter holds whole take the place of the base's."""
        tied = is_tied(self.base)
        for name, tensor in saved.items():
            found = self.names.find(name)
            if not found and tied and is_head(name.removesuffix(".weight")):
                continue  # the embedding, which is saved too and equal, stands for it
            if not found:
                self._refuse(name, f"no tensor of {self.base.name} is called so; the adapter was trained on another model")
            base = self.tensors[found]
            self._check_shape(name, tensor.shape, base.shape)
            if tensor.dtype != base.dtype and not {tensor.dtype, base.dtype} <= FLOATS.keys():
                self._refuse(name, f"is {tensor.dtype}, and {base.dtype} in {self.base.name}; save it in that dtype")
            self._set(found, cast(tensor, base.dtype, found))

    def put(self, module: str, parts: Parts) -> None:
        """Put the adapter of one module into its weight, its bias or its rows."""
        for kind, tensor in parts.items():
            if tensor.dtype not in FLOATS:
                self._refuse(f"{module}.{kind}", f"is {tensor.dtype}, which no adapter is; save it in F32 or BF16")
        if TOKENS in parts:
            self._put_tokens(module, parts[TOKENS])
            return
        embeds = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        for field, kind, what in OPTIONAL:
            if (kind in parts) != bool(self.config.fields.get(field)) and not (embeds and kind == BIAS):
                fault = f"has a {what}, and {field} is not set" if kind in parts else f"has no {what}, and {field} is set"
                self._refuse(module, f"{fault}; config and tensors are two adapters', or damaged: save the adapter again")
        a, b = (self._factor(module, parts, kind) for kind in (EMBEDDING_PAIR if embeds else PAIR))
        found = self.names.find(f"{module}.weight")
        if found:
            self._put_matrix(module, found, a, b, parts, embeds)
        else:
            self._nested[module.replace(INNER, "")].append((module.count(INNER), parts))

    def finish(self) -> None:
        """Put in the adapters of parameters that hold all experts of a layer; peft nests them, the model's first parameter innermost."""
        for container, nested in self._nested.items():
            names = [name for name in EXPERT_PARTS if self.config.targets_parameter(f"{container}.{name}")]
            if len(names) != len(nested):
                self._refuse(container, ABSENT.format(self.base.name))
            for name, (_, parts) in zip(names, sorted(nested, key=lambda item: -item[0]), strict=True):
                self._put_experts(f"{container}.{name}", container, name, *(parts[kind] for kind in PAIR))

    def _put_matrix(self, module: str, found: str, a: Tensor, b: Tensor, parts: Parts, embeds: bool) -> None:
        base, magnitude = self._weight(found), parts.get(MAGNITUDE)
        into, out = a.shape[1], b.shape[0]
        parameter = self.config.targets_parameter(f"{module}.weight")  # then patterns speak of it by its whole name
        scale = self._scale(f"{module}.weight" if parameter else module, a, b)
        transposed = embeds or (self._is_conv1d(module) if into == out else base.shape == (into, out))
        self._check_shape(module, (into, out) if transposed else (out, into), base.shape)
        if magnitude:
            self._check_shape(f"{module}.{MAGNITUDE}", magnitude.shape, (out,))
        self._set(found, merged(base, Update(a, b, scale, transposed, magnitude), self._read, found))
        if addend := parts.get(BIAS):
            bias = self.names.find(f"{module}.bias")
            if not bias:
                self._refuse(module, f"has a bias in its adapter (lora_bias), and none in {self.base.name}, which cannot hold it")
            self._check_shape(f"{module}.bias", addend.shape, self.tensors[bias].shape)
            self._set(bias, added(self._weight(bias), addend, scale, bias))

    def _put_experts(self, key: str, container: str, parameter: str, a: Tensor, b: Tensor) -> None:
        found, listed = self.names.find(key), self.names.find_experts(container, parameter)
        if not found and not listed:
            self._refuse(key, f"{self.base.name} stores its experts in a way that is not known here; merge with peft's merge_and_unload()")
        experts = self._weight(found).shape[0] if found else len(listed)
        scale = self._scale(key, a, b, experts)
        if found:
            base = self._weight(found)
            into, out = a.shape[1], b.shape[0]
            named = self.base.config.get("model_type") in TRANSPOSED_EXPERTS
            transposed = named if into == out else base.shape[1:] == (into, out)
            self._check_shape(key, (experts, into, out) if transposed else (experts, out, into), base.shape)
            self._set(found, stacked(base, Update(a, b, scale, transposed, experts=experts), self._read, found))
        for expert, names in enumerate(listed):
            first = 0
            for name in names:
                base = self._weight(name)
                self._check_shape(key, (b.shape[0] // len(names), a.shape[1]), base.shape)
                update = Update(a, b, scale, expert=expert, experts=experts, first=first)
                self._set(name, merged(base, update, self._read, name))
                first += base.shape[0]

    def _put_tokens(self, module: str, rows: Tensor) -> None:
        found, indices = self.names.find(f"{module}.weight"), self.config.token_indices(module)
        if not found:
            self._refuse(module, ABSENT.format(self.base.name))
        if not indices:
            self._refuse(module, "has trained tokens, and trainable_token_indices names none; config and tensors are two adapters'")
        base = self._weight(found)
        self._check_shape(f"{module}.{TOKENS}", rows.shape, (len(indices), *base.shape[1:]))
        if max(indices) >= base.shape[0]:
            self._refuse(module, f"trained token {max(indices)}, and {self.base.name} has {base.shape[0]}; {GROW}")
        self._set(found, with_rows(base, rows, indices, found))

    def _factor(self, module: str, parts: Parts, kind: str) -> Tensor:
        if kind not in parts:
            self._refuse(module, f"{kind} is missing; the file is damaged: save the adapter again")
        if len(parts[kind].shape) != 2:
            self._refuse(module, "adapts a convolution, which is not merged here; merge it with peft's merge_and_unload()")
        return parts[kind]

    def _scale(self, module: str, a: Tensor, b: Tensor, experts: int = 1) -> float:
        """Return the scale of a module; its rank, as the config says it, must be that of its factors."""
        rank, scale = self.config.rank_and_scale(module)
        if not a.shape[0] == b.shape[1] == rank * experts:
            each = f" for each of {experts} experts" if experts > 1 else ""
            self._refuse(
                module,
                f"has factors of rank {a.shape[0]} and {b.shape[1]}; {self.config.where} says {rank}{each}: they do not belong together",
            )
        return scale

    def _is_conv1d(self, module: str) -> bool:
        """Whether a square weight is stored [in, out]; of others the shape tells it."""
        own_code = bool(self.base.config.get("auto_map")) and bool(self.config.fields.get("fan_in_fan_out"))
        return (own_code or self.base.config.get("model_type") in CONV1D) and not is_head(module)

    def _weight(self, name: str) -> Tensor:
        if self.tensors[name].dtype not in FLOATS:
            self._refuse(
                name, f"is {self.tensors[name].dtype} in {self.base.name}; merge into the unquantised model, and quantise the result"
            )
        return self.tensors[name]

    def _set(self, name: str, tensor: Tensor) -> None:
        same = [one for one in self._tied if name in self._tied and self.tensors[one].shape == tensor.shape]
        for one in same or [name]:  # some files hold both of two that are tied
            self.tensors[one] = tensor
            self.done.add(one)

    def _check_shape(self, name: str, given: tuple[int, ...], needed: tuple[int, ...]) -> None:
        if given == needed:
            return
        module = name.removesuffix(".weight")
        if (is_head(module) or is_embedding(module)) and given[1:] == needed[1:] and given[0] > needed[0]:
            self._refuse(name, f"has {given[0]} rows, and {needed[0]} in {self.base.name}: the vocabulary grew in training; {GROW}")
        self._refuse(name, f"is for {list(given)}, and {self.base.name} has {list(needed)}; the adapter was trained on another model")

    def _refuse_tied(self, what: str) -> NoReturn:
        self._refuse(
            what,
            f"{self.base.name} ties its head to its embedding, and the adapter trained them apart; untie the base first: "
            "save it with tie_word_embeddings false and an lm_head.weight of its own, and merge into that",
        )

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise DowncycleError(
            f"{self.where}: {name} {why}" if why.startswith(("is ", "has ", "adapts ", "trained ")) else f"{self.where}: {name}: {why}"
        )


def _is_end(name: str) -> bool:
    """Whether a tensor is the weight of a head or an embedding."""
    module = name.removesuffix(".weight")
    return module != name and (is_head(module) or is_embedding(module))
