"""Least squares by normal equations that are summed while samples stream by. Pure linear algebra: knows no layer and no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1024  # that are in float64 at a time


class NormalEquations:
    """Find the change D of a linear map by which its outputs make up for errors: min |A D^T - E|^2 + ridge |D|^2.

    That is ridge regression (Hoerl and Kennard 1970) towards the old weight: a direction in which the samples say nothing stays as it is.
    Sums are float64.

    Args:
        inputs, outputs: of the map. device: where sums are.
    """

    def __init__(self, inputs: int, outputs: int, device: str = "cpu"):
        import torch

        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)  # A^T A
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)  # A^T E

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Add rows: what the map is given, [rows, inputs], and what its outputs lack, [rows, outputs]."""
        for some, lacking in zip(inputs.split(ROWS), errors.split(ROWS), strict=True):
            rows = some.double()
            self.gram.addmm_(rows.T, rows)
            self.cross.addmm_(rows.T, lacking.double())

    def solve(self, ridge: float) -> tuple[Tensor, str]:
        """Return the change, [outputs, inputs] float64, and, where the equations are ill-conditioned, what was done about it.

        By Cholesky; where that fails, with a ridge ten times as large, and so on; where all fail, no change.

        Args:
            ridge: of the mean diagonal of A^T A.
        """
        import torch

        own = self.gram.diagonal().clone()
        for times in (10**power for power in range(6)):
            self.gram.diagonal().copy_(own + ridge * times * own.mean())  # a second gram would take as much memory again
            factor, failed = torch.linalg.cholesky_ex(self.gram)
            self.gram.diagonal().copy_(own)
            if not int(failed):
                change = torch.cholesky_solve(self.cross, factor).T
                return change, "" if times == 1 else f"ill-conditioned; a ridge {times} times as large was taken"
        return torch.zeros_like(self.cross.T), "ill-conditioned; left as it was"


class ChannelEquations:
    """The same for a map that multiplies each channel: min (o d - e)^2 + ridge d^2, d being how much larger each factor becomes."""

    def __init__(self, channels: int, device: str = "cpu"):
        import torch

        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)  # <o, o>
        self.products = torch.zeros(channels, dtype=torch.float64, device=device)  # <o, e>

    def add(self, outputs: Tensor, errors: Tensor) -> None:
        """Add rows: what the map gives and what its outputs lack, both [rows, channels]."""
        self.squares += outputs.double().square().sum(0)
        self.products += (outputs.double() * errors.double()).sum(0)

    def solve(self, ridge: float) -> tuple[Tensor, str]:
        """Return the changes of the factors, [channels] float64. ridge: of the mean of <o, o>."""
        return self.products / (self.squares + ridge * self.squares.mean()).clamp_min(1e-300), ""
