"""Columns of categories: one code per value that training saw often enough."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from config import DataConfig
from preprocessing.column import Cells, Column
from preprocessing.parsing import canonical, canonical_codes


@dataclass(frozen=True)
class CategoryColumn(Column):
    """A code from 1 up for each known value, the empty cell among them; 0 for unknown and rare values."""

    name: str
    values: list[str]  # in canonical spelling, sorted; "" is the empty cell

    kind: ClassVar[str] = "category"
    input: ClassVar[str] = "categories"

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        return True  # the last kind of the registry: whatever no other kind has recognised

    @classmethod
    def id_reason(cls, cells: Cells, config: DataConfig) -> str:
        if cells.distinct > 0.5 * len(cells.present) and cells.distinct > 10:
            return "a different value in nearly every row"
        if cells.present.value_counts().iloc[0] < config.min_freq:
            return f"no value in {config.min_freq} rows or more (--min-freq)"
        return ""

    @classmethod
    def fit(cls, values: pd.Series, config: DataConfig) -> "CategoryColumn":
        codes, keys = canonical_codes(values)
        frequent = np.bincount(codes, minlength=len(keys)) >= config.min_freq
        return cls(str(values.name), sorted(key for key, keep in zip(keys, frequent, strict=True) if keep))

    def encode(self, values: pd.Series) -> Tensor:
        """Return codes, int64 (N, 1)."""
        codes, keys = canonical_codes(values)
        known = np.array([self._code_of.get(key, 0) for key in keys], dtype=np.int64)
        return torch.from_numpy(known[codes] if len(keys) else known)[:, None]

    @cached_property
    def _code_of(self) -> dict[str, int]:
        return {value: code for code, value in enumerate(self.values, start=1)}

    @classmethod
    def model_args(cls, columns: list[Column]) -> dict:
        """category_sizes: number of codes of each column of the tensor `categories`."""
        return {"category_sizes": [len(column.values) + 1 for column in columns]}

    def summary(self) -> str:
        empty = ", including the empty cell" if "" in self.values else ""
        return f"{len(self.values)} known values{empty}; all others share one code"

    def json_schema(self, profile: dict, examples: list) -> dict:
        known = [value for value in self.values if value][:100]
        return {"type": ["string", "number", "boolean", "null"], "examples": known, "x-kind": self.kind}

    def unknown(self, values: pd.Series, encoded: Tensor) -> Tensor:
        return encoded[:, 0] == 0

    def why_unknown(self, cell) -> str:
        return super().why_unknown(cell) if canonical(cell) else "the cell is empty, as (almost) none was in training"

    def made_up(self, profile: dict, position: float | None = None) -> str | None:
        """Return the most frequent value, or a known one by its place in the alphabet."""
        known = [value for value in self.values if value]
        if known and position is not None:
            return known[round(position * (len(known) - 1))]
        count_of = dict(zip(profile.get("values", []), profile.get("counts", []), strict=False))
        return max(known, key=lambda value: count_of.get(value, 0), default=None)

    @property
    def onnx_keys(self) -> list[str]:
        return self.values or ["\0"]  # ONNX does not allow an empty list

    def parse(self, values: pd.Series) -> np.ndarray:
        """Strings (N,) in canonical spelling, "" for a missing cell."""
        codes, keys = canonical_codes(values)
        return np.array(keys, dtype=object)[codes]

    def transform(self, x: Tensor) -> Tensor:
        """x: int64 codes (N,), which a LabelEncoder in the graph finds for the strings."""
        return x[:, None]
