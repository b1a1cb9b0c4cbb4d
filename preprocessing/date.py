"""Columns of dates and times: the day, the season, the weekday and the hour."""

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from config import DataConfig
from errors import UserError
from preprocessing.column import Cells, Column
from preprocessing.date_format import ISO, JOINT, check_form, find_dates, to_days
from preprocessing.number import NumberColumn
from preprocessing.number_format import MANY, NEARLY_ALL, missing_hint
from preprocessing.parsing import count_missing_words, has_value, missing_label

PERIODS = {"year": 365.2425, "weekday": 7.0, "hour": 1.0}  # days after which a feature of a date repeats


@dataclass(frozen=True)
class DateColumn(Column):
    """A date: scaled days since 1970, and a point on a circle for each period, so that December is next to January."""

    name: str
    form: str  # how it is written: a format of strptime, or ISO8601; several are joined by " | "
    mean: float  # of the training days
    std: float
    flag: bool  # training had missing cells: another feature tells them apart
    clock: bool  # training had times of day
    words: dict[str, int] = field(default_factory=dict)  # training cells that said that the date is missing

    kind: ClassVar[str] = "date"
    input: ClassVar[str] = "numbers"
    model_args = NumberColumn.model_args

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        """Raises BrokenRecords for a column of dates in which some cells are words."""
        found = find_dates(cells.values)
        if found and NEARLY_ALL <= found.share < 1 and cells.distinct > MANY:
            to_days(cells.values, found.form, missing_hint)
        return found is not None and found.share == 1

    def times(self, values: pd.Series) -> np.ndarray:
        return self.parse(values)

    @classmethod
    def fit(cls, values: pd.Series, config: DataConfig) -> "DateColumn":
        if not has_value(values).any():
            raise UserError(f"column {values.name!r} is empty in the training rows: give --columns {values.name}=drop.")
        form = check_form(config.column_formats().get(str(values.name), ""))
        if not form and not (found := find_dates(values)):
            raise UserError(
                f"column {values.name!r}: no date format fits its cells: give one, such as "
                f"--columns {values.name}=date:%d/%m/%Y, or --columns {values.name}=category."
            )
        form = form or found.form
        days = to_days(values, form, missing_hint)
        known = days[~np.isnan(days)]
        std, clock = float(known.std()) or 1.0, bool((known % 1 != 0).any())
        return cls(
            str(values.name),
            form,
            float(known.mean()),
            std,
            bool(np.isnan(days).any()),
            clock,
            count_missing_words(values),
        )

    @property
    def periods(self) -> dict[str, float]:
        return {name: days for name, days in PERIODS.items() if name != "hour" or self.clock}

    @property
    def features(self) -> list[str]:
        """Names of the features that it gives."""
        circles = [f"{self.name} {period} {part}" for period in self.periods for part in ("sin", "cos")]
        return [f"{self.name} day", *circles, *([f"{self.name} missing"] if self.flag else [])]

    @cached_property
    def _constants(self) -> tuple[Tensor, ...]:
        """mean, std and periods as tensors: the ONNX exporter turns Python numbers into float32."""
        return torch.tensor([self.mean, self.std, *self.periods.values()], dtype=torch.float64).unbind()

    def summary(self) -> str:
        hour = ", hour" if self.clock else ""
        missing = f"; {missing_label(self.words)}: the mean date and a flag" if self.flag else ""
        mixed = f"{self.form.count(JOINT) + 1} formats, " if JOINT in self.form else ""
        century = ", two-digit years are 1969 to 2068" if "%y" in self.form else ""
        return f"written {mixed}{self.form}{century} → day, season, weekday{hour}{missing}"

    def json_schema(self, profile: dict, examples: list) -> dict:
        examples = [value for value in examples if value]
        schema = {"type": ["string", "null"], "description": f"date, written as {self.form}", "examples": examples[:1]}
        if self.form == ISO and all(re.fullmatch(r"\d{4}-\d\d-\d\d", str(value)) for value in examples):
            schema["format"] = "date"
        return schema | {"x-kind": self.kind}

    def made_up(self, profile: dict, position: float | None = None) -> str:
        """Return a date of the training range in ISO format, by default the mean of the training dates."""
        low, high = (float(profile.get(name, self.mean)) for name in ("low", "high"))
        days = self.mean if position is None else low + position * (high - low)
        moment = datetime(1970, 1, 1) + timedelta(days=round(days))
        return moment.isoformat(timespec="minutes") if self.clock else moment.date().isoformat()

    def parse(self, values: pd.Series) -> np.ndarray:
        """float64 (N,): days since 1970, NaN for a missing cell."""
        return to_days(values, self.form)

    def transform(self, x: Tensor) -> Tensor:
        mean, std, *periods = self._constants
        missing = torch.isnan(x)
        days = torch.where(missing, mean, x)
        features = [((days - mean) / std).float()]
        for period in periods:
            # The fraction first: a float32 sine, all that ONNX runtimes have, is then exact enough.
            turns = days / period
            angle = (2 * np.pi * (turns - torch.floor(turns))).float()
            features += [part.masked_fill(missing, 0.0) for part in (torch.sin(angle), torch.cos(angle))]
        return torch.stack([*features, missing.float()] if self.flag else features, dim=1)
