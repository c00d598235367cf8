"""Scaling of states and actions by data-set statistics, kept in a JSON file beside the weights.

D: size of the vector. Its statistics are ``{"mean", "std", "min", "max"}``, D floats each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MODES = ("mean_std", "min_max", "none")
_WANTED = ("mean", "std", "min", "max")


class Normalizer(nn.Module):
    """Affine scaling a dimension: to zero mean and unit deviation, to [-1, 1], or not at all.

    A dimension that is constant in the data (max - min within ``eps`` of its size) maps to 0 and back to its
    constant: nothing is divided by zero, and a value that differs at evaluation is not blown up. The buffers
    stay out of the state dict: the policy saves the statistics as JSON and gives them to ``set_statistics``.
    """

    def __init__(
        self,
        mode: str,
        dim: int,
        name: str = "values",
        statistics: Mapping[str, Sequence[float]] | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"normalisation of {name}: unknown mode {mode!r}; modes: {', '.join(MODES)}")
        self.mode, self.dim, self.name, self.eps = mode, dim, name, eps
        self.ready = mode == "none"
        for buffer, value in (("offset", 0.0), ("scale", 1.0), ("inverse", 1.0)):
            self.register_buffer(buffer, torch.full((dim,), value), persistent=False)
        for buffer, value in (("low", -torch.inf), ("high", torch.inf)):
            self.register_buffer(buffer, torch.full((dim,), value), persistent=False)
        if statistics is not None:
            self.set_statistics(statistics)

    def set_statistics(self, statistics: Mapping[str, Sequence[float]]) -> None:
        """Use these statistics; ValueError when one is missing, not finite or not of D values."""
        values = {key: self._read(statistics, key) for key in _WANTED}
        low, high = values["min"], values["max"]
        constant = high - low <= self.eps * torch.maximum(low.abs(), high.abs()).clamp(min=1)
        if self.mode == "mean_std":
            # The mean of a constant carries rounding of its own, its minimum does not.
            offset, scale = torch.where(constant, low, values["mean"]), values["std"].clamp(min=self.eps)
        elif self.mode == "min_max":
            offset, scale = torch.where(constant, low, (low + high) / 2), (high - low) / 2
        else:
            offset, scale, constant = torch.zeros_like(low), torch.ones_like(low), torch.zeros_like(constant)
        self.offset.copy_(offset)
        self.scale.copy_(torch.where(constant, 0, scale))
        self.inverse.copy_(torch.where(constant, 0, 1 / scale))
        self.low.copy_(low)
        self.high.copy_(high)
        self.ready = True

    def normalize(self, x: Tensor) -> Tensor:
        """x (..., D) in its own units to the scale of the network."""
        self._check(x)
        return (x - self.offset) * self.inverse

    def unnormalize(self, x: Tensor) -> Tensor:
        """x (..., D) from the scale of the network to its own units."""
        self._check(x)
        return x * self.scale + self.offset

    def out_of_range(self, x: Tensor, margin: float = 0.01) -> Tensor:
        """Share of the values of x (..., D) outside the data's [min, max], a dimension: (D,).

        ``margin`` widens the range on both sides by that part of its width. Not-a-numbers count as outside.
        """
        self._check(x)
        slack = margin * (self.high - self.low) + self.eps
        inside = (x >= self.low - slack) & (x <= self.high + slack)
        return (~inside).reshape(-1, self.dim).float().mean(0)

    def extra_repr(self) -> str:
        return f"{self.mode}, dim={self.dim}, ready={self.ready}"

    def _check(self, x: Tensor) -> None:
        if not self.ready:
            raise ValueError(
                f"there are no statistics for {self.name} ({self.mode}): build the policy with "
                "stats=dataset.statistics(), call set_statistics, or choose the mode 'none'"
            )
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{self.name}: the last dimension must be {self.dim}, got shape {tuple(x.shape)}"
            )

    def _read(self, statistics: Mapping[str, Any], key: str) -> Tensor:
        if key not in statistics:
            raise ValueError(f"the statistics of {self.name} lack {key!r}; wanted {', '.join(_WANTED)}")
        value = torch.as_tensor(statistics[key], dtype=torch.float64, device="cpu")
        if value.shape != (self.dim,):
            raise ValueError(
                f"{key} of {self.name} must hold {self.dim} values, got shape {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{key} of {self.name} is not finite: {value.tolist()}; check the data set")
        return value
