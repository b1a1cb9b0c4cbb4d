"""Columns of two words, such as yes and no: 0 or 1."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from config import DataConfig
from preprocessing.column import Cells, Column
from preprocessing.number import NumberColumn
from preprocessing.parsing import BOOLEANS, to_booleans


@dataclass(frozen=True)
class BooleanColumn(Column):
    """0 or 1: the more frequent one where it is missing (with a flag, if training had missing cells)."""

    name: str
    fill: float
    flag: bool

    kind: ClassVar[str] = "boolean"
    input: ClassVar[str] = "numbers"
    model_args = NumberColumn.model_args
    features = NumberColumn.features

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        if pd.api.types.is_bool_dtype(cells.values.dtype):
            return True
        if pd.api.types.is_numeric_dtype(cells.values.dtype):
            return False
        words = set(cells.present.str.lower().unique())
        return words <= set(BOOLEANS) and sorted(BOOLEANS[word] for word in words) == [0.0, 1.0]

    @classmethod
    def fit(cls, values: pd.Series, config: DataConfig) -> "BooleanColumn":
        known = to_booleans(values)
        missing = np.isnan(known)
        fill = 0.0 if missing.all() else float(np.nanmean(known) >= 0.5)
        return cls(str(values.name), fill, bool(missing.any()))

    def summary(self) -> str:
        return "0 or 1" + (f"; missing: {self.fill:.0f} and a flag" if self.flag else "")

    def json_schema(self, profile: dict, examples: list) -> dict:
        words = [True, False, "yes", "no", 1, 0]
        return {"type": ["boolean", "string", "number", "null"], "examples": words, "x-kind": self.kind}

    def made_up(self, profile: dict, position: float | None = None) -> bool:
        return bool(self.fill) if position is None else position > 0.5

    def parse(self, values: pd.Series) -> np.ndarray:
        """float64 (N,): 0, 1, or NaN for a missing cell."""
        return to_booleans(values)

    def transform(self, x: Tensor) -> Tensor:
        missing = torch.isnan(x)
        filled = torch.where(missing, x.new_tensor(self.fill), x)
        return torch.stack([filled.float(), missing.float()] if self.flag else [filled.float()], dim=1)
