"""How much a layer matters, by its hidden states or by its weights: sums in float64 over tensors. Knows no model and loads none.

h_i is the state that enters layer i, and h_L the one that leaves the last of L layers, before the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 18  # numbers that are in float64 at a time: 2 MB, which stay in a cache, and add next to nothing to the peak memory


@dataclass(frozen=True)
class Influence:
    """Block influence of one layer, as a running sum (ShortGPT, arXiv 2403.03853, eq. 1): BI_i = 1 - E_t cos(h_i,t, h_i+1,t).

    Unit: 1 - cosine, 0 to 2. Every state of every sample weighs the same. A state of zeros is at right angles to any other.
    `dataclasses.asdict` saves one and `Influence(**saved)` goes on from there.

    total: sum of 1 - cosine. states: how many are in it.
    """

    total: float = 0.0
    states: int = 0

    def add(self, before: Tensor, after: Tensor) -> Influence:
        """Return the sum with h_i and h_i+1 of one more batch in it, both [..., d] of any floating type."""
        if before.shape != after.shape:
            raise ValueError(f"states of {tuple(before.shape)} before a layer and {tuple(after.shape)} after it")
        parts = [_cosines(*pair) for pair in zip(_rows(before), _rows(after), strict=True)]
        return Influence(self.total + float(sum((1 - part).sum() for part in parts)), self.states + sum(len(part) for part in parts))

    @property
    def score(self) -> float:
        """The mean over all states so far."""
        return self.total / self.states


def _rows(state: Tensor) -> Iterator[Tensor]:
    width = state.shape[-1]
    for rows in state.detach().reshape(-1, width).split(max(1, CHUNK // width)):
        yield rows.double()


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    """[n, d] twice, float64 -> [n]; of a row with itself exactly 1."""
    from torch.linalg import vecdot

    squares = vecdot(left, left) * vecdot(right, right)
    return (vecdot(left, right) / squares.sqrt().clamp_min(_tiny())).clamp(-1, 1)


def last_tokens(state: Tensor) -> Tensor:
    """Return what `angular_triangle` needs of one depth and batch: [..., tokens, d] -> [states, d] float32, on the CPU, a copy."""
    import torch

    last = state.detach()[..., -1, :]
    return last.reshape(-1, last.shape[-1]).to("cpu", torch.float32, copy=True)


def angular_triangle(states: Sequence[Tensor]) -> list[list[float]]:
    """Return the angular distance over every block of layers (Gromov et al., arXiv 2403.17887, sec. 3.2), averaged over samples.

    d(i, n) = arccos(cos(h_i, h_i+n)) / pi at the last token. Unit: angle / pi, 0 to 1. The first row, d(i, 1), is how much layer i alone
    matters. i + n = L compares with what enters the final norm. arccos loses half the digits near cosine 1, so angles are taken from the
    sum and the difference of the unit vectors instead, 2 atan2(|u - v|, |u + v|).

    Args:
        states: h_0 ... h_L at the last tokens, each [samples, d].
    Returns:
        row n - 1, entry i is d(i, n), for 1 <= n <= L and 0 <= i <= L - n.
    """
    import torch

    depths, samples = len(states), len(states[0])
    if depths < 2 or not samples or any(state.shape != states[0].shape for state in states):
        raise ValueError(f"states of {[tuple(state.shape) for state in states]}; they must be alike, of two depths or more, and not empty")
    total = torch.zeros(depths, depths, dtype=torch.float64)
    step = max(1, CHUNK // (depths * states[0].shape[-1]))
    for start in range(0, samples, step):
        some = torch.stack([state.detach()[start : start + step].double() for state in states], dim=1)
        total += _angles(some).sum(0).cpu()
    mean = (total / (samples * math.pi)).tolist()
    return [[mean[start][start + size] for start in range(depths - size)] for size in range(1, depths)]


def _angles(rows: Tensor) -> Tensor:
    """[samples, rows, d] float64 -> angles between any two rows of a sample, [samples, rows, rows]."""
    import torch

    units = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(_tiny())
    exactly = "donot_use_mm_for_euclid_dist"  # the fast way is 2 - 2 cos, which cancels
    return 2 * torch.atan2(torch.cdist(units, units, compute_mode=exactly), torch.cdist(units, -units, compute_mode=exactly))


def counts(weight: Tensor) -> bool:
    """Whether a weight is part of `taylor` and `magnitude`: it has two axes or more.

    The paper sums over linear weight matrices. The authors' program adds the norms' weights: 0.5-0.8% of the sums that they publish.
    Norms and biases are left out here, as a norm's scale means something else in each family (some store it less one).
    """
    return weight.ndim >= 2


def taylor(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return a layer's first-order Taylor importance (Shortened LLaMA, Kim et al., arXiv 2402.02834, sec. 3.1): sum of |w dL/dw|.

    Unit: that of the loss, nats per token. The sum is over all entries of the weights that count (see `counts`).

    Args:
        pairs: each weight with dL/dw, of one shape. L is the mean loss over all calibration samples: gradients of batches are added up
            before, as here comes the absolute value.
    """
    return math.fsum(_absolute_sum(weight, gradient) for weight, gradient in pairs if counts(weight))


def magnitude(weights: Iterable[Tensor]) -> float:
    """Return the sum of |w| over a layer's weights that count (see `counts`): the baseline of arXiv 2402.02834, sec. 3.1, without data."""
    return math.fsum(_absolute_sum(weight) for weight in weights if counts(weight))


def _absolute_sum(*factors: Tensor) -> float:
    """Sum of |product of the factors|, entry by entry."""
    import torch

    if any(factor.shape != factors[0].shape for factor in factors):
        raise ValueError(f"a weight of {tuple(factors[0].shape)} and a gradient of {tuple(factors[-1].shape)}")
    if packed := [factor.dtype for factor in factors if not factor.is_floating_point() or factor.element_size() < 2]:
        raise TypeError(f"{packed[0]} holds packed or scaled numbers; unpack them first")
    total = torch.zeros((), dtype=torch.float64, device=factors[0].device)
    for parts in zip(*(factor.detach().reshape(-1).split(CHUNK) for factor in factors), strict=True):
        product = parts[0].double()
        for part in parts[1:]:
            product = product * part.double()
        total += product.abs().sum()
    return float(total)


def _tiny() -> float:
    import torch

    return torch.finfo(torch.float64).tiny
