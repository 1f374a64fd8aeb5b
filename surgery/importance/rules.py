"""Rules that choose layers by scores that were measured before. Knows no model, reads no tensors and imports no torch.

Layers are numbered from 0; a rule returns the kept ones in order. Rules without data are in surgery/choose.py.
Ties: of equal scores the later layer is dropped, and of equal blocks the later one: later layers are the more redundant (arXiv 2403.17887).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..choose import RULES as WITHOUT_DATA
from ..choose import check_keep, format_layers, parse_layers
from ..errors import DowncycleError

Scores = Sequence[float | None]
Triangle = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Rule:
    """A rule and what it needs. metric, unit: the importance it reads, one number per layer.

    first, last: how many layers stay at each end unless --protect says otherwise.
    choose: (rule's name, layers, keep, measured, protected layers) -> kept layers; None: the search itself drops layer after layer.
    """

    metric: str
    unit: str
    first: int
    last: int
    choose: Callable[[str, int, int, Sequence, Sequence[int]], list[int]] | None


def choose_by(rule: str, layers: int, keep: int, measured: Scores | Triangle, protect: Sequence[int] | None = None) -> list[int]:
    """Return the layers that a rule keeps.

    Args:
        measured: a score per layer, or for `angular` the whole triangle (see `angular_triangle`).
        protect: layers that must stay, in place of the rule's own; None: the rule's own.
    Raises:
        DowncycleError: no such rule, too few or too many layers to keep, `protect` cannot be kept, or a score is missing or no number.
    """
    choose = find_rule(rule).choose
    if choose is None:
        raise ValueError(f"{rule} is a search over models, not a choice among scores")
    if len(measured) != layers:
        raise ValueError(f"scores of {len(measured)} layers, for a model of {layers}")
    return choose(rule, layers, keep, measured, protected_layers(rule, layers, keep, protect))


def protected_layers(rule: str, layers: int, keep: int, protect: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the layers that a rule must keep, in order: `protect`, or the rule's own as in its paper, whatever the model's depth.

    Where fewer layers are kept than the rule protects, its own give way from the inside: of the first ones while these are more than the
    last ones, then by turns, so that the first layer stays longest.

    Raises:
        DowncycleError: no such rule, too few or too many layers to keep, or `protect` names layers that do not exist or more than `keep`.
    """
    ends = find_rule(rule)
    check_keep(layers, keep)
    if protect is None:
        first, last = ends.first, ends.last
        while first + last > keep:
            first, last = (first - 1, last) if first > last else (first, last - 1)
        return (*range(first), *range(layers - last, layers))
    chosen = sorted(set(protect))
    if chosen:
        parse_layers(format_layers(chosen), layers, "--protect")
    if len(chosen) > keep:
        text = format_layers(chosen)
        raise DowncycleError(
            f"--protect {text}: {len(chosen)} layers must stay, but --keep {keep} keeps fewer; protect fewer, or keep more"
        )
    return tuple(chosen)


def parse_protected(text: str, layers: int) -> tuple[int, ...]:
    """Read --protect: a list such as "0-3,30,31", or "none" for no layer."""
    return () if text.strip() == "none" else tuple(sorted(set(parse_layers(text, layers, "--protect"))))


def find_rule(rule: str) -> Rule:
    """Return a rule by its name."""
    if rule not in RULES:
        raise DowncycleError(f"--select {rule}: no such rule; there are {', '.join([*WITHOUT_DATA, *RULES])}")
    return RULES[rule]


def _keep_highest(rule: str, layers: int, keep: int, scores: Scores, protected: Sequence[int]) -> list[int]:
    """Drop the layers of the lowest scores among those that are not protected."""
    free = [(_number(rule, layer, scores[layer]), -layer) for layer in range(layers) if layer not in protected]
    dropped = {-layer for _, layer in sorted(free)[: layers - keep]}
    return [layer for layer in range(layers) if layer not in dropped]


def _drop_block(rule: str, layers: int, keep: int, triangle: Triangle, protected: Sequence[int]) -> list[int]:
    """Drop the layers i ... i + n - 1 for which d(i, n) is least, among blocks without a protected layer."""
    size = layers - keep
    if not size:
        return list(range(layers))
    starts = [start for start in range(keep + 1) if not any(start <= layer < start + size for layer in protected)]
    if not starts:
        raise DowncycleError(
            f"--select {rule}: no {size} layers in a row are free of the protected {format_layers(list(protected))}; "
            "--protect fewer layers, or keep more"
        )
    _, start = min((_number(rule, start, triangle[size - 1][start]), -start) for start in starts)
    return [*range(-start), *range(-start + size, layers)]


def _number(rule: str, layer: int, score: float | None) -> float:
    if score is None or not math.isfinite(score):
        raise DowncycleError(f"--select {rule}: layer {layer} has no score ({score}); choose by another rule, or --protect the layer")
    return score


# bi: ShortGPT (arXiv 2403.03853) orders all layers by their score and keeps none on principle.
# angular: Gromov et al. (arXiv 2403.17887, sec. 3.2) drop layers i ... i + n - 1 and give their input to layer i + n, which thus exists:
#   the last layer stays. d(i, n) with i + n = L, which compares with the input of the final norm, is shown but not chosen; they find it
#   to be about the largest and conclude that the final layer should never go. PruneMe does let a block reach the last layer.
# ppl: SLEB (arXiv 2402.09025); its program leaves the first and the last layer out of the search (early_barrier = latter_barrier = 1).
# taylor, magnitude: the "+" of Taylor+ and Mag+ (arXiv 2402.02834) is to keep the first 4 and last 2; their program does so for models of
#   18 layers as for those of 40, so the numbers are not scaled by depth here either.
RULES: dict[str, Rule] = {
    "bi": Rule("block influence", "1 - cosine", 0, 0, _keep_highest),
    "angular": Rule("angular distance", "angle / pi", 0, 1, _drop_block),
    "ppl": Rule("leave-one-out loss", "nats per token", 1, 1, None),
    "taylor": Rule("Taylor", "nats per token", 4, 2, _keep_highest),
    "magnitude": Rule("magnitude", "sum of |w|", 4, 2, _keep_highest),
}
