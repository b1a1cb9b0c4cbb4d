"""Columns of numbers: parsed, filled where missing, scaled."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from config import DataConfig
from errors import UserError
from preprocessing.column import Cells, Column, to_tensor
from preprocessing.parsing import date_format, decimal_sign, name_cell, name_wrong_number, to_numbers
from preprocessing.quantiles import normal_scores, onnx_normal_scores

# A number with a currency, a unit, a percent sign or thousands separators: 1,234 · $12 · 12 kg · 45% · 3 000 €
DRESSED_NUMBER = re.compile(r"[^\w\s.+-]?\s*[+-]?\d[\d,. ']*\s*([^\W\d_]{1,6}[²³]?|%|[$€£¥₩])?")
FEW_VALUES = 20  # with no more values than this it is a category, even if some of them look like numbers


@dataclass(frozen=True)
class NumberColumn(Column):
    """A number: the median where it is missing (with a flag, if training had missing cells), then scaled."""

    name: str
    fill: float  # median of the training cells
    flag: bool  # training had missing cells: a second feature tells them apart
    mean: float = 0.0  # scaled to (x - mean) / std, unless there are quantiles
    std: float = 1.0
    quantiles: list[float] | None = None  # scaled by rank to a normal distribution
    decimal: str = "."  # decimal sign of numbers in text

    kind: ClassVar[str] = "number"
    input: ClassVar[str] = "numbers"

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        """Raises UserError for a column of numbers in which some cells carry units or thousands separators."""
        if cells.numbers is not None:
            return True
        _refuse_dressed_numbers(cells)
        return False

    @classmethod
    def id_reason(cls, cells: Cells, config: DataConfig) -> str:
        numbers = cells.numbers
        if numbers is None or len(numbers) < 20 or not np.isfinite(numbers).all() or (numbers % 1 != 0).any():
            return ""
        # Row numbers run without large gaps, whichever of the rows the training split holds.
        running = float(np.ptp(numbers)) < 4 * len(numbers)
        named = re.search(r"(^|[\W_])id$|[a-z]I[dD]$|uuid", cells.name)
        is_id = (running or named) and len(np.unique(numbers)) == len(numbers)
        return "a different whole number in every row" if is_id else ""

    @classmethod
    def fit(cls, values: pd.Series, config: DataConfig) -> "NumberColumn":
        from sklearn.preprocessing import QuantileTransformer, StandardScaler

        decimal = decimal_sign(values)
        raw = to_numbers(values, f"Fix it, or give --columns {values.name}=category (or =drop).", decimal)
        missing = np.isnan(raw)
        if missing.all():
            raise UserError(f"column {values.name!r} is empty in the training rows: give --columns {values.name}=drop.")
        fill = float(np.median(raw[~missing]))
        numbers, scale = np.where(missing, fill, raw)[:, None], {}
        if config.scaling == "quantile":
            count = min(256, len(numbers))
            grid = QuantileTransformer(n_quantiles=count, subsample=100_000, random_state=0).fit(numbers)
            scale = {"quantiles": grid.quantiles_[:, 0].tolist()}
        elif config.scaling == "standard":
            scaler = StandardScaler().fit(numbers)
            scale = {"mean": float(scaler.mean_[0]), "std": float(scaler.scale_[0])}
        return cls(str(values.name), fill, bool(missing.any()), decimal=decimal, **scale)

    def encode(self, values: pd.Series) -> Tensor:
        x = self._scaled(to_tensor(self.parse(values)), normal_scores)
        finite = np.isfinite(x.numpy())
        if not finite.all():
            raise UserError(f"{name_cell(values, ~finite.all(axis=1))}: the number is too large.")
        return x

    @cached_property
    def _constants(self) -> tuple[Tensor, ...]:
        """fill, mean and std as tensors: the ONNX exporter turns Python numbers into float32."""
        return torch.tensor([self.fill, self.mean, self.std], dtype=torch.float64).unbind()

    def _scaled(self, raw: Tensor, scores) -> Tensor:
        """Turn float64 numbers (N,) with NaN into float32 features (N, 1 or 2)."""
        fill, mean, std = self._constants
        missing = torch.isnan(raw)
        numbers = torch.where(missing, fill, raw)
        x = scores(numbers, self.quantiles) if self.quantiles else (numbers - mean) / std
        return torch.stack([x.float(), missing.float()], dim=1) if self.flag else x.float()[:, None]

    @property
    def features(self) -> list[str]:
        """Names of the features that it gives."""
        return [self.name, f"{self.name} missing"] if self.flag else [self.name]

    @classmethod
    def model_args(cls, columns: list[Column]) -> dict:
        """in_features: width of the tensor `numbers`."""
        return {"in_features": sum(len(column.features) for column in columns)}

    def summary(self) -> str:
        if self.quantiles:
            how = "scaled by rank to a normal distribution"
        elif (self.mean, self.std) == (0.0, 1.0):
            how = "unchanged"
        else:
            how = f"standardised (mean {self.mean:.4g}, std {self.std:.4g})"
        written = "; decimal comma" if self.decimal == "," else ""
        return how + written + (f"; missing: the median {self.fill:.4g} and a flag" if self.flag else "")

    def json_schema(self, profile: dict, examples: list) -> dict:
        schema = {"type": ["number", "string", "null"], "x-kind": self.kind}
        if "low" in profile:
            schema["description"] = f"{profile['low']:g} to {profile['high']:g} in training"
        return schema

    def examples(self, values: pd.Series) -> list:
        numbers = self.parse(values).tolist()
        return [None if x != x else int(x) if x.is_integer() and abs(x) < 2**53 else x for x in numbers]

    def parse(self, values: pd.Series) -> np.ndarray:
        """float64 (N,), NaN for a missing cell."""
        return to_numbers(values, "Fix the cell or empty it.", self.decimal)

    def transform(self, x: Tensor) -> Tensor:
        return self._scaled(x, onnx_normal_scores)


def _refuse_dressed_numbers(cells: Cells) -> None:
    """Raise UserError if the cells are numbers except for a unit, a currency or a thousands separator."""
    present = cells.present
    rest = present[pd.to_numeric(present, errors="coerce").isna()]
    plain = 1 - len(rest) / len(present)
    dressed = rest.drop_duplicates().map(lambda text: DRESSED_NUMBER.fullmatch(text) is not None).mean()
    many = cells.distinct > FEW_VALUES  # few are categories: "36 months" and "60 months", or 0, 1, 2, 3+
    stray_words = plain >= 0.9 and many
    all_dressed = dressed >= 0.8 and many and not date_format(present)
    if (plain >= 0.5 and dressed == 1) or stray_words or all_dressed:
        wrong = cells.values.index.isin(rest.index)
        raise UserError(
            f"{name_wrong_number(cells.values, wrong)} is not a plain number: write it without units and thousands "
            f"separators, or give --columns {cells.name}=category (or =drop)."
        )
