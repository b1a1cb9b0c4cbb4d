"""Token ids of texts of different lengths, stored without padding."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING, UNKNOWN = 0, 1  # the first ids; known parts of texts follow, the most frequent first


class Ragged:
    """The ids of many texts, stored one after the other.

    flat: int32, the ids of all texts.  lengths: int64 (N,).  padding: the id that fills shorter texts of a batch.
    """

    def __init__(self, flat: Tensor, lengths: Tensor, padding: int = PADDING):
        self.lengths, self.padding = lengths, padding
        self.starts = lengths.cumsum(0) - lengths
        longest = max(1, int(lengths.max())) if len(lengths) else 1
        # Padding at the end, so that a window as long as the longest text fits at the start of every text
        self.flat = torch.cat([flat, flat.new_full((longest,), padding)])

    @classmethod
    def from_rows(cls, rows: list[list[int]], padding: int = PADDING) -> "Ragged":
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        flat = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=lengths.sum())
        return cls(torch.from_numpy(flat), torch.from_numpy(lengths), padding)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the texts of a batch, padded at the end to the longest of them: (rows, ids)."""
        lengths = self.lengths[rows]
        longest = int(lengths.max()) if len(rows) else 0
        windows = self.flat.unfold(0, max(1, longest), 1)[:, :longest]  # a view: (all positions, longest)
        ids = windows.index_select(0, self.starts[rows])
        return ids.masked_fill_(torch.arange(longest) >= lengths[:, None], self.padding)

    def take(self, rows: Tensor) -> "Ragged":
        """Return some texts."""
        starts, lengths = self.starts[rows].tolist(), self.lengths[rows].tolist()
        parts = [self.flat[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return Ragged(torch.cat(parts), self.lengths[rows], self.padding)

    def count(self, selected: Tensor) -> Tensor:
        """Return how many ids of each text are selected, int64 (N,). selected: bool, as long as `flat`."""
        totals = F.pad(selected.cumsum(0), (1, 0))
        return totals[self.starts + self.lengths] - totals[self.starts]

    def shift(self, offset: int) -> "Ragged":
        """Return the same texts with `offset` added to the known ids; padding and unknown ids stay."""
        flat = self.flat[: int(self.lengths.sum())]
        return Ragged(torch.where(flat > UNKNOWN, flat + offset, flat), self.lengths, self.padding) if offset else self


class RaggedColumns:
    """Several text columns of the same records, side by side."""

    def __init__(self, parts: list[Ragged]):
        self.parts = parts
        self.lengths = torch.stack([part.lengths for part in parts]).sum(dim=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the texts of a batch, each column padded on its own: (rows, ids of all columns)."""
        return torch.cat([part[rows] for part in self.parts], dim=1)
