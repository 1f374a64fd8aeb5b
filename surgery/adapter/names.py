"""Which tensor of a checkpoint a module of the loaded model is: adapters name modules, and files have names of their own.

Works on names and shapes; reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint import Checkpoint, Tensor
from ..families import TEXT_SECTIONS

HEADS = ("lm_head", "embed_out", "output_layer", "output")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed")
RENAMED = (".mlp.", ".block_sparse_moe.")  # the first in the model, the second in the files of Mixtral and its kin
# Parameters that hold all experts of a layer in the model, in the model's order, and what their rows are called in the files.
EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
FUSED = {row: whole for whole, spellings in EXPERT_PARTS.items() for rows in spellings for row in rows}


class Names:
    """The names of a checkpoint's tensors, and by which ends each can be told from the others."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self._swapped = False  # whether the model has the first of RENAMED where the files have the second, as far as find() has seen
        self._beginnings: dict[str, str] = {}  # of the files' names, and what the model has in their place, as far as find() has seen
        self._by_end: dict[str, str] = {}
        for name in tensors:
            for end in _ends(name):
                self._by_end[end] = "" if end in self._by_end else name

    def find(self, wanted: str) -> str:
        """Return the tensor that the model calls so: the one of that name, or the only one whose name ends alike; "" if there is none.

        An end must reach back to the word before the layer's number, so that no other layer or tower is taken for it.
        """
        if wanted in self.tensors:
            return wanted
        if renamed := next((name for one, other in (RENAMED, RENAMED[::-1]) if (name := wanted.replace(one, other)) in self.tensors), ""):
            self._swapped = True
            return renamed
        end = next((end for end in _ends(wanted) if end in self._by_end), "")
        found = self._by_end.get(end, "")
        if found:
            self._beginnings[found.removesuffix(end)] = wanted.removesuffix(end)
        return found

    def in_model(self, name: str) -> str:
        """Return what the model calls a tensor of the files, as far as find() has seen; of an expert's part, what holds it."""
        part = re.fullmatch(r"(.+\.experts)\.\d+\.(\w+)\.weight", name)
        fused = part is not None and part[2] in FUSED
        if part and fused:
            name = f"{part[1]}.{FUSED[part[2]]}"
        if fused or self._swapped:
            name = name.replace(*RENAMED[::-1])
        begins = [beginning for beginning in self._beginnings if name.startswith(beginning)]
        return name.replace(begin := max(begins, key=len), self._beginnings[begin], 1) if begins else name

    def find_experts(self, container: str, parameter: str) -> list[list[str]]:
        """Return the names of a fused parameter's parts, by expert, as the files hold them one by one; nothing where they do not."""
        for place in (container, container.replace(*RENAMED)):
            for parts in EXPERT_PARTS.get(parameter, ()):
                experts: list[list[str]] = []
                while (names := [f"{place}.{len(experts)}.{part}.weight" for part in parts]) and all(
                    name in self.tensors for name in names
                ):
                    experts.append(names)
                if experts:
                    return experts
        return []


def layer_number(module: str) -> int | None:
    """Return the number of the layer that a module belongs to: the first in its name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(match[1]) if match else None


def is_head(module: str) -> bool:
    """Whether a module is the one that gives logits, by its name."""
    return module.rpartition(".")[2] in HEADS


def is_embedding(module: str) -> bool:
    """Whether a module embeds tokens, by its name."""
    return module.rpartition(".")[2] in EMBEDDINGS


def is_tied(base: Checkpoint) -> bool:
    """Whether the head is the embedding: as the config says, or because the files hold no head."""
    stated = next((value for value in _tie_fields(base.config) if isinstance(value, bool)), None)
    return stated if stated is not None else not any(is_head(name.removesuffix(".weight")) for name in base.tensors)


def _tie_fields(config: dict[str, Any]) -> Iterator[Any]:
    yield config.get("tie_word_embeddings")
    for name in TEXT_SECTIONS:
        if isinstance(config.get(name), dict):
            yield from _tie_fields(config[name])


def _ends(name: str) -> Iterator[str]:
    """Yield a name and what is left of it without its first words, down to the one before the first number, or to two words."""
    words = name.split(".")
    number = next((at for at, word in enumerate(words) if word.isdecimal()), len(words) - 1)
    for start in range(max(number, 1)):
        yield ".".join(words[start:])
