"""Rules that choose layers without data, and the reading of lists such as "0-19,28-31".

Every rule takes the parent's number of layers and how many to keep, and returns the kept layers in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .errors import DowncycleError


def first(layers: int, keep: int) -> list[int]:
    """Keep the first layers: the choice of Llama-3-6B, and of Inheritune (arXiv 2404.08634)."""
    check_keep(layers, keep)
    return list(range(keep))


def tail(layers: int, keep: int) -> list[int]:
    """Drop the block just before the last layer, and keep the last."""
    check_keep(layers, keep)
    return [*range(keep - 1), layers - 1]


def ends(layers: int, keep: int) -> list[int]:
    """Keep the first and the last half; the first gets the odd one."""
    check_keep(layers, keep)
    return [*range((keep + 1) // 2), *range(layers - keep // 2, layers)]


def even(layers: int, keep: int) -> list[int]:
    """Spread the kept layers evenly; the first and the last are among them."""
    check_keep(layers, keep)
    if keep == 1:
        return [0]
    return [(2 * index * (layers - 1) + keep - 1) // (2 * (keep - 1)) for index in range(keep)]


RULES: dict[str, Callable[[int, int], list[int]]] = {"first": first, "tail": tail, "ends": ends, "even": even}


def choose(layers: int, keep: int, rule: str = "first") -> list[int]:
    """Apply a rule by its name."""
    if rule not in RULES:
        raise DowncycleError(f"--select {rule}: no such rule; there are {', '.join(RULES)}")
    return RULES[rule](layers, keep)


def parse_layers(text: str, layers: int, option: str = "--layers") -> list[int]:
    """Read a list of layers and inclusive ranges; it may repeat and reorder ("0-23,8-31", as in SOLAR, arXiv 2312.15166).

    option: what the text was given to, as errors name it.
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        if not match:
            raise DowncycleError(f"{option} {text}: {part.strip()!r} is neither a layer nor a range; write them like 0-19,28-31")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise DowncycleError(f"{option} {text}: {low}-{high} runs backwards; write {high}-{low}, or list the layers one by one")
        if high >= layers:
            some = f"0-{layers - 1}" if option == "--layers" else f"0,{layers - 1}"
            raise DowncycleError(
                f"{option} {text}: layer {high} does not exist; the model has {layers} layers (0-{layers - 1}). "
                f"Try {option} {some}, or `downcycle inspect SRC`."
            )
        chosen.extend(range(low, high + 1))
    return chosen


def format_layers(chosen: list[int]) -> str:
    """Write a list of layers as `parse_layers` reads it."""
    runs: list[list[int]] = []
    for layer in chosen:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)


def check_keep(layers: int, keep: int) -> None:
    """Refuse to keep none of the layers, or more than there are."""
    if not 1 <= keep <= layers:
        raise DowncycleError(f"--keep {keep}: the model has {layers} layers; keep between 1 and {layers}")
