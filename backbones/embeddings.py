"""Learned vectors for the numbers and categories of a table."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocessing.column import evenly_spaced

LEVEL_GAP = 1e-3  # between two values; a tenth of it is rounding
MOST = 0.6  # share of the rows
BIN_ROWS = 100_000  # that bins and frequent values are found in


class CategoryEmbedding(nn.Module):
    """A learned vector for each category code of each column, side by side.

    Code 0 stands for every unknown category. In training a few known codes are replaced by it, so that its vector is
    trained even if the training rows hold no rare category.
    """

    UNK_DROPOUT = 0.02

    def __init__(self, sizes: list[int]):
        super().__init__()
        # The usual rule of thumb for the width: half the number of categories, up to 32.
        self.tables = nn.ModuleList(nn.Embedding(size, min(32, (size + 1) // 2)) for size in sizes)
        self.width = sum(table.embedding_dim for table in self.tables)

    def forward(self, codes: Tensor) -> Tensor:  # (N, columns) → (N, width)
        if self.training:
            codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < self.UNK_DROPOUT, 0)
        return torch.cat([table(codes[:, i]) for i, table in enumerate(self.tables)], dim=1)


class NumberEmbedding(nn.Module):
    """A learned vector for each number: a piecewise linear function of it, with bins of about equally many rows.

    A bin counts 0 for numbers below it, 1 above, and rises from 0 to 1 inside; the outer bins go on to OUTSIDE
    (Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning", 2022). A linear part is added,
    because most functions are nearly linear. Numbers that are codes or counts have a vector for each frequent value
    as well, which is sometimes left out in training.

    bins: the edges of the bins of each number, see `quantile_bins`.  levels: its values, see `frequent_values`.
    """

    WIDTH, OUTSIDE, LEVEL_DROPOUT = 8, 3.0, 0.05

    def __init__(self, bins: list[list[float]], levels: list[list[float]] | None = None):
        super().__init__()
        most = max(len(edges) for edges in bins) - 1
        rows = [[*edges, *[math.inf] * (most + 1 - len(edges))] for edges in bins]
        # On the CPU, here and below: arithmetic without memory, in `outline`, would import torch's compiler.
        table = torch.tensor(rows, device="cpu")
        left, right = table[:, :-1], table[:, 1:]
        is_bin = right < math.inf
        left, size = torch.where(is_bin, left, 0.0), torch.where(is_bin, right - left, 1.0)
        low, high = torch.zeros_like(left), is_bin.float()
        low[:, 0] = 1 - self.OUTSIDE
        high[is_bin & ~F.pad(is_bin[:, 1:], (0, 1))] = self.OUTSIDE
        for name, constant in (("left", left), ("size", size), ("low", low), ("high", high)):
            self.register_buffer(name, constant, persistent=False)
        self.weight = nn.Parameter(
            torch.empty(len(bins), most, self.WIDTH, device="cpu").uniform_(-1, 1) / math.sqrt(most)
        )
        self.linear = nn.Parameter(0.3 * torch.randn(len(bins), self.WIDTH, device="cpu"))
        self.bias = nn.Parameter(torch.zeros(len(bins), self.WIDTH))
        self.with_levels = [i for i, values in enumerate(levels or []) if values]
        self.width = (len(bins) + len(self.with_levels)) * self.WIDTH
        if self.with_levels:
            most = max(len(values) for values in levels)
            rows = [[*levels[i], *[math.inf] * (most - len(levels[i]))] for i in self.with_levels]
            self.register_buffer("levels", torch.tensor(rows, device="cpu"), persistent=False)
            self.level_weight = nn.Parameter(torch.zeros(len(rows), most, self.WIDTH))

    def forward(self, numbers: Tensor) -> Tensor:  # (N, F) → (N, F · WIDTH)
        numbers = numbers[:, :, None]
        vectors = [self._piecewise(numbers)]
        if self.with_levels:
            is_level = ((numbers[:, self.with_levels] - self.levels).abs() < LEVEL_GAP / 10).float()  # (N, F, levels)
            if self.training:
                is_level = is_level * (torch.rand_like(is_level[:, :, :1]) >= self.LEVEL_DROPOUT)
            vectors.append(torch.einsum("nfl,flw->nfw", is_level, self.level_weight))
        return torch.cat(vectors, dim=1).flatten(1)

    def _piecewise(self, numbers: Tensor) -> Tensor:  # (N, F, 1) → (N, F, WIDTH)
        inside = torch.minimum(torch.maximum((numbers - self.left) / self.size, self.low), self.high)  # (N, F, bins)
        return torch.einsum("nfb,fbw->nfw", inside, self.weight) + numbers * self.linear + self.bias


def quantile_bins(numbers: Tensor) -> list[list[float]]:
    """Return the edges of at most 48 bins for each of F numbers (N, F), with about equally many rows in each bin, and
    at least 50. A number with one value only has one bin."""
    count = min(48, max(4, len(numbers) // 50))
    levels = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    distinct = []
    for column in evenly_spaced(numbers, BIN_ROWS).T:  # one by one, to save memory
        values = torch.quantile(column.double(), levels, interpolation="nearest").float().unique()
        # Values that differ by rounding alone, as of a sine, would make a bin so narrow that it enlarges rounding.
        apart = values.diff(prepend=values[:1] - 1) > 1e-5 * (values[-1] - values[0])
        distinct.append(values[apart].tolist())
    return [each if len(each) > 1 else [each[0], each[0] + 1] for each in distinct]


def frequent_values(numbers: Tensor) -> list[list[float]]:
    """Return the frequent values of each of F numbers (N, F) that looks like a code or a count: 11 to 512 values that
    at least 30 rows have, and that most rows have one of. Other numbers have none."""
    rows = evenly_spaced(numbers, BIN_ROWS)
    found = []
    for column in rows.T:
        values, counts = column.unique(return_counts=True)
        frequent = counts >= max(30, len(rows) // 2000)
        covers = counts[frequent].sum() >= MOST * len(rows)
        values = values[frequent]
        is_code = covers and 10 < len(values) <= 512 and values.diff().min() > LEVEL_GAP
        found.append(values.tolist() if is_code else [])
    return found
