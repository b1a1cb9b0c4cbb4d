"""Columns of numbers: parsed, filled where missing, scaled."""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from config import DataConfig
from errors import UserError
from preprocessing.column import Cells, Column, to_tensor
from preprocessing.date_format import are_calendar_dates
from preprocessing.number_format import (
    FEW_UNITS,
    MANY,
    NEARLY_ALL,
    PLAIN,
    find_numbers,
    form_of,
    missing_hint,
    parse_numbers,
    to_numbers,
)
from preprocessing.parsing import broken_cells, count_missing_words, missing_label
from preprocessing.quantiles import normal_scores, onnx_normal_scores


@dataclass(frozen=True)
class NumberColumn(Column):
    """A number: the median where it is missing (with a flag, if training had missing cells), then scaled."""

    name: str
    fill: float  # median of the training cells
    flag: bool  # training had missing cells: a second feature tells them apart
    mean: float = 0.0  # scaled to (x - mean) / std, unless there are quantiles
    std: float = 1.0
    quantiles: list[float] | None = None  # scaled by rank to a normal distribution
    form: str = PLAIN  # how numbers in text are written, as an example: see number_format.py
    words: dict[str, int] = field(default_factory=dict)  # training cells that said that the number is missing

    kind: ClassVar[str] = "number"
    input: ClassVar[str] = "numbers"

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        """Raises BrokenRecords for a column of numbers in which some cells are words, or have another unit."""
        found = cells.numbers
        if found is None or found.codes:
            return False
        if (found.letters and found.share < 1) or are_calendar_dates(cells.values):
            return False
        mixed = 1 < found.units <= FEW_UNITS and found.any_share >= NEARLY_ALL
        if found.share < 1 and cells.distinct > MANY and (mixed or found.share >= NEARLY_ALL):
            to_numbers(cells.values, str(found.form), missing_hint)
        return found.share == 1

    @classmethod
    def id_reason(cls, cells: Cells, config: DataConfig) -> str:
        numbers, _ = parse_numbers(cells.values, str(cells.numbers.form))
        numbers = numbers[~np.isnan(numbers)]
        if len(numbers) < 20 or not np.isfinite(numbers).all() or (numbers % 1 != 0).any():
            return ""
        # Row numbers run without large gaps, whichever of the rows the training split holds.
        running = float(np.ptp(numbers)) < 4 * len(numbers)
        named = re.search(r"(^|[\W_])id$|[a-z]I[dD]$|uuid", cells.name)
        is_id = (running or named) and len(np.unique(numbers)) == len(numbers)
        return "a different whole number in every row" if is_id else ""

    @classmethod
    def fit(cls, values: pd.Series, config: DataConfig) -> "NumberColumn":
        from sklearn.preprocessing import QuantileTransformer, StandardScaler

        found = find_numbers(values)
        form = config.column_formats().get(str(values.name), "") or str(found.form if found else PLAIN)
        if found and not form_of(form).unit:  # a person may give the signs alone
            form = str(replace(found.form, decimal=form_of(form).decimal, thousands=form_of(form).thousands))
        raw = to_numbers(values, form, missing_hint)
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
        return cls(str(values.name), fill, bool(missing.any()), form=form, words=count_missing_words(values), **scale)

    def encode(self, values: pd.Series) -> Tensor:
        x = self._scaled(to_tensor(self.parse(values)), normal_scores)
        finite = np.isfinite(x.numpy())
        if not finite.all():
            raise broken_cells(values, ~finite.all(axis=1), lambda _: "is too large a number.")
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
        written = "" if self.form == PLAIN else f"written {self.form}; "
        return (
            written
            + how
            + (f"; {missing_label(self.words)}: the median {self.fill:.4g} and a flag" if self.flag else "")
        )

    def json_schema(self, profile: dict, examples: list) -> dict:
        schema = {"type": ["number", "string", "null"], "x-kind": self.kind}
        if "low" in profile:
            schema["description"] = f"{profile['low']:g} to {profile['high']:g} in training"
        if self.form != PLAIN:
            schema["description"] = f"written {self.form}; {schema.get('description', '')}".removesuffix("; ")
        return schema

    def made_up(self, profile: dict, position: float | None = None) -> float | str:
        """Return a number in the training range, by default its middle, rounded to a tenth of the range or less."""
        low, high = (float(profile.get(name, self.fill)) for name in ("low", "high"))
        digits, position = 1 - math.floor(math.log10(high / 2 - low / 2 or 1.0)), 0.5 if position is None else position
        number = round(low * (1 - position) + high * position, digits) if abs(digits) < 300 else 0.0
        return self._plain(number)

    def examples(self, values: pd.Series) -> list:
        return [self._plain(x) for x in self.parse(values).tolist()]

    def _plain(self, x: float) -> float | str | None:
        """Return a number for JSON; a percentage keeps its sign, because without it 0.2 could be a share."""
        if x != x:
            return None
        number = int(x) if x.is_integer() and abs(x) < 2**53 else x
        return f"{number}%" if form_of(self.form).is_percent else number

    def parse(self, values: pd.Series) -> np.ndarray:
        """float64 (N,), NaN for a missing cell."""
        return to_numbers(values, self.form)

    def transform(self, x: Tensor) -> Tensor:
        return self._scaled(x, onnx_normal_scores)
