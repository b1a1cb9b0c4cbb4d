"""Map numbers to a standard normal distribution by rank, in numpy and in operations that ONNX has."""

import numpy as np
import torch
from torch import Tensor

LOWEST_RANK = 1e-4  # beyond the training values it stops at ±3.7, where scikit-learn stops at ±5.2


def normal_scores(numbers: Tensor, quantiles: list[float]) -> Tensor:
    """Return normal scores (N,) of float64 numbers (N,), as scikit-learn's QuantileTransformer defines them.

    Interpolating from both sides and averaging puts a value that fills several quantiles in their middle.
    """
    grid, levels, x = np.asarray(quantiles), np.linspace(0, 1, len(quantiles)), numbers.numpy()
    rank = 0.5 * (np.interp(x, grid, levels) - np.interp(-x, -grid[::-1], -levels[::-1]))
    return torch.special.ndtri(torch.from_numpy(rank.clip(LOWEST_RANK, 1 - LOWEST_RANK)))


def onnx_normal_scores(numbers: Tensor, quantiles: list[float]) -> Tensor:
    """Compute `normal_scores` in operations that ONNX has."""
    levels = np.linspace(0, 1, len(quantiles))
    values, first, count = np.unique(quantiles, return_index=True, return_counts=True)
    # Between two values the rank rises in a ramp; at a value that fills several quantiles it jumps, and the value
    # itself lies in the middle of the jump.
    jumps = torch.from_numpy(levels[first + count - 1] - levels[first])
    rises = torch.from_numpy(levels[first[1:]] - levels[first[1:] - 1])
    points, numbers = torch.from_numpy(values), numbers[:, None]
    ramps = ((numbers - points[:-1]) / points.diff()).clamp(0, 1)
    steps = ((numbers > points).double() + (numbers >= points).double()) / 2
    rank = (ramps * rises).sum(dim=1) + (steps * jumps).sum(dim=1)
    return _normal_quantile(rank.clamp(LOWEST_RANK, 1 - LOWEST_RANK))


def _normal_quantile(p: Tensor) -> Tensor:
    """The quantile function of the standard normal distribution, to 7 digits (Wichura, "Algorithm AS 241", 1988)."""
    a, b = (3.3871327179, 50.434271938, 159.29113202, 59.10937472), (1.0, 17.895169469, 78.757757664, 67.1875636)
    c, d = (1.4234372777, 2.75681539, 1.3067284816, 0.17023821103), (1.0, 0.7370016425, 0.12021132975)

    def ratio(numerator: tuple, denominator: tuple, x: Tensor) -> Tensor:
        top, bottom = (sum(k * x**i for i, k in enumerate(terms)) for terms in (numerator, denominator))
        return top / bottom

    q = p - 0.5
    tail = torch.sqrt(-torch.log(torch.minimum(p, 1 - p))) - 1.6
    outside = ratio(c, d, tail)
    return torch.where(q.abs() <= 0.425, q * ratio(a, b, 0.180625 - q * q), torch.where(q < 0, -outside, outside))
