"""Everything about x: raw records → one float tensor per record, fitted on the training split alone.

Scikit-learn finds the statistics; what is kept of it are plain numbers, and a few lines apply them.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cells import BOOLEANS, canonical_codes, date_format, frame_of, name_cell, to_booleans, to_days, to_numbers, to_text
from errors import UserError, did_you_mean

# A number that says more than its value: 1,234 · $12 · 12 kg · 45% · 3 000 €
DRESSED_NUMBER = re.compile(r"[^\w\s.+-]?\s*[+-]?\d[\d,. ']*\s*([^\W\d_]{1,6}[²³]?|%|[$€£¥₩])?")
PERIODS = {"year": 365.2425, "weekday": 7.0, "hour": 1.0}  # days after which features of a date repeat
DISTINCT_FEW = 20  # a column with no more values than this is a category even where some look like numbers


def rows_per_pass(x) -> int:
    """Return how many records go through a network at once where no gradient is kept: about 64 MB of a table's
    numbers, and fewer images and texts, which a network makes larger."""
    is_table = isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()
    return max(1, min(8192, 2**24 // max(1, x.shape[1]))) if is_table else 256


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(records: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return `count` records from all over a table (a file is often sorted by class)."""
    return records.iloc[:: max(1, len(records) // count)].head(count)


def as_frame(records, column: str = "") -> pd.DataFrame:
    """Return records as a DataFrame: a DataFrame, a dict or a list of dicts, or the bare cells of one `column` (texts,
    or images as paths or bytes). Rows of a list count from 1. Raises UserError where that column is missing, or any
    column is there twice."""
    frame = records
    if not isinstance(records, pd.DataFrame):
        records = [records] if isinstance(records, (dict, str, bytes)) else list(records)
        frame = frame_of([{column: r} if column and not isinstance(r, dict) else r for r in records])
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="row")
        if column and not records:
            frame[column] = []  # no record lacks it
    if frame.columns.has_duplicates:
        raise UserError(f"column {frame.columns[frame.columns.duplicated()][0]!r} is there twice: rename one of them.")
    if column and column not in frame:
        raise UserError(f"column {column!r} is missing.{did_you_mean(column, frame.columns)}")
    return frame


def infer_kind(values: pd.Series, min_freq: int) -> tuple[str, str]:
    """Work out the kind of a column from its training rows.

    Returns (kind, why): kind is number, category, boolean, date, text, id or constant; the last three are left out.
    Raises UserError for a number column in which some cells carry units or thousands separators.
    """
    present = values.dropna()
    if pd.api.types.is_bool_dtype(values.dtype):
        return ("boolean", "") if present.nunique() > 1 else ("constant", "one value only")
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        return ("date", "") if present.nunique() > 1 else ("constant", "one value only")
    if pd.api.types.is_numeric_dtype(values.dtype):
        return _infer_number(values, to_numbers(values))
    text = to_text(values)
    present = text.dropna()
    distinct = present.nunique()
    if distinct == 0 or (distinct == 1 and len(present) == len(text)):
        return "constant", "one value only" if distinct else "no values in the training rows"
    words = set(present.str.lower().unique())
    if words <= set(BOOLEANS) and sorted(BOOLEANS[word] for word in words) == [0.0, 1.0]:
        return "boolean", ""
    numbers = pd.to_numeric(present, errors="coerce")
    if numbers.notna().all():
        return _infer_number(text, numbers.to_numpy(dtype=np.float64))
    _refuse_dressed_numbers(values, present, numbers)
    if form := date_format(present):
        return "date", form
    return _infer_words(present, distinct, min_freq)


def _infer_number(values: pd.Series, numbers: np.ndarray) -> tuple[str, str]:
    numbers = numbers[~np.isnan(numbers)]
    if len(numbers) == 0:
        return "constant", "no values in the training rows"
    spread = float(np.ptp(numbers))
    if spread == 0 and len(numbers) == len(values):
        return "constant", "one value only"
    # Row numbers run without large gaps, whichever of their rows the training split got.
    like_an_id = spread < 4 * len(numbers) or re.search(r"(^|[\W_])id$|[a-z]I[dD]$|uuid", str(values.name))
    if len(numbers) >= 20 and like_an_id and (numbers % 1 == 0).all() and len(np.unique(numbers)) == len(numbers):
        return "id", "a different whole number in every row"
    return "number", ""


def _refuse_dressed_numbers(values: pd.Series, present: pd.Series, numbers: pd.Series) -> None:
    """Raise UserError where the cells are numbers but for a unit, a currency or a thousands separator."""
    rest = present[numbers.isna()]
    plain = 1 - len(rest) / len(present)
    dressed = rest.drop_duplicates().map(lambda t: DRESSED_NUMBER.fullmatch(t) is not None).mean()
    many = present.nunique() > DISTINCT_FEW  # few are categories: "36 months" and "60 months", or 0, 1, 2, 3+
    stray_words = plain >= 0.9 and many
    all_dressed = dressed >= 0.8 and many and not date_format(present)
    if (plain >= 0.5 and dressed == 1) or stray_words or all_dressed:
        wrong = values.index.isin(rest.index[:1])
        raise UserError(
            f"{name_cell(values, wrong)} is not a plain number: write it without units and thousands separators, "
            f"or give --columns {values.name}=category (or =drop)."
        )


def _infer_words(present: pd.Series, distinct: int, min_freq: int) -> tuple[str, str]:
    varied = distinct > 0.5 * len(present) and distinct > DISTINCT_FEW / 2
    words = present.str.count(r"\s+").mean() + 1
    if varied and (words >= 3 or present.str.len().mean() > 40):
        return "text", f"free text of {words:.0f} words"
    if varied:
        return "id", f"{distinct} values in {len(present)} rows"
    if present.value_counts().iloc[0] < min_freq:
        return "id", f"no value in {min_freq} rows or more (--min-freq)"
    return "category", ""


def _fit_number(values: pd.Series, scaling: str) -> dict:
    """Statistics of a number column: the median for missing cells, and what its scaling needs."""
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import QuantileTransformer, StandardScaler

    numbers = to_numbers(values, f"Mend it or give --columns {values.name}=category (or =drop).")[:, None]
    flag = bool(np.isnan(numbers).any())
    if np.isnan(numbers).all():
        raise UserError(f"column {values.name!r} is empty in the training rows: give --columns {values.name}=drop.")
    imputer = SimpleImputer(strategy="median").fit(numbers)
    numbers = imputer.transform(numbers)
    state = {"fill": float(imputer.statistics_[0]), "flag": flag}
    if scaling == "quantile":
        grid = QuantileTransformer(n_quantiles=min(256, len(numbers)), subsample=100_000, random_state=0).fit(numbers)
        state["quantiles"] = grid.quantiles_[:, 0].tolist()
    elif scaling == "standard":
        scaler = StandardScaler().fit(numbers)
        state |= {"mean": float(scaler.mean_[0]), "std": float(scaler.scale_[0])}
    return state


def _fit_category(values: pd.Series, min_freq: int) -> dict:
    codes, keys = canonical_codes(values)
    return {"values": sorted(key for key, n in zip(keys, np.bincount(codes).tolist(), strict=True) if n >= min_freq)}


def _fit_date(values: pd.Series) -> dict:
    form = date_format(values)
    if not form:
        raise UserError(f"column {values.name!r} is no date in any one form: give --columns {values.name}=category.")
    days = to_days(values, form)
    known = days[~np.isnan(days)]
    return {
        "form": form,
        "flag": bool(np.isnan(days).any()),
        "clock": bool((known % 1 != 0).any()),
        "mean": float(known.mean()),
        "std": float(known.std()) or 1.0,
    }


def _quantile_scale(numbers: np.ndarray, quantiles: list[float]) -> np.ndarray:
    """Map numbers to a standard normal distribution by rank, after scikit-learn's QuantileTransformer.

    Interpolating from both sides and averaging puts a value that fills several quantiles in their middle. Beyond the
    training values it stops at ±3.7, where scikit-learn stops at ±5.2.
    """
    grid, levels = np.asarray(quantiles), np.linspace(0, 1, len(quantiles))
    rank = 0.5 * (np.interp(numbers, grid, levels) - np.interp(-numbers, -grid[::-1], -levels[::-1]))
    return torch.special.ndtri(torch.from_numpy(rank.clip(1e-4, 1 - 1e-4))).numpy()


def _raw(values: pd.Series, state: dict) -> np.ndarray:
    """Return a column as numbers (dates as days since 1970, booleans as 0 and 1; NaN where missing), or as the
    canonical words of a category ("" where missing)."""
    match state["kind"]:
        case "category":
            codes, keys = canonical_codes(values)
            return np.array(keys, dtype=object)[codes]
        case "date":
            return to_days(values, state["form"])
        case "boolean":
            return to_booleans(values)
    return to_numbers(values, "Mend the cell or empty it.")


@dataclass(frozen=True)
class TabularPreprocessor:
    """What was learned of a table's columns; `__call__` applies it.

    `columns` maps each name to {"kind": …} and the plain values that its kind needs, left-out columns included.
    """

    columns: dict[str, dict]

    @classmethod
    def fit(cls, records: pd.DataFrame, *, kinds: dict[str, str], scaling: str, min_freq: int) -> "TabularPreprocessor":
        """Learn from training records, without the target.

        kinds: name → kind, where the user overrules (number, category, boolean, date, drop).
        scaling: standard, quantile or none.  min_freq: rarer categories share the unknown code.
        Raises UserError where a column cannot be read as its kind, or none is left.
        """
        columns = {}
        for name in records:
            values = records[name]
            kind, why = (kinds[name], "as told") if name in kinds else infer_kind(values, min_freq)
            numeric = pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)
            state = {"kind": kind, "why": why, "numeric": numeric}
            if kind == "number":
                state |= _fit_number(values, scaling)
            elif kind == "category":
                state |= _fit_category(values, min_freq)
            elif kind == "boolean":
                known = to_booleans(values)
                fill = float(np.nanmean(known) >= 0.5) if not np.isnan(known).all() else 0.0
                state |= {"fill": fill, "flag": bool(np.isnan(known).any())}
            elif kind == "date":
                state |= _fit_date(values)
            columns[str(name)] = state
        fitted = cls(columns)
        if not fitted.used:
            raise UserError(
                "no column is left to learn from: "
                + "; ".join(f"{n}: {s['kind']}" for n, s in columns.items())
                + ". (Is one of them text? --text COLUMN reads it.)"
            )
        return fitted

    @property
    def used(self) -> dict[str, dict]:
        """The columns that reach the network, in the order of `columns`."""
        return {n: s for n, s in self.columns.items() if s["kind"] in ("number", "category", "boolean", "date")}

    @property
    def categories(self) -> dict[str, dict]:
        return {n: s for n, s in self.used.items() if s["kind"] == "category"}

    @cached_property
    def feature_names(self) -> list[str]:
        """Name of each column of the tensor: the numbers, then the category codes."""
        return [name for name, _ in self.features(lambda *_: np.empty(0))] + list(self.categories)

    @property
    def model_args(self) -> dict:
        """in_features: width of the tensor.  category_sizes: codes of each of its last columns."""
        return {
            "in_features": len(self.feature_names),
            "category_sizes": [len(s["values"]) + 1 for s in self.categories.values()],
        }

    def __call__(self, records) -> Tensor:
        """Turn records (DataFrame, dict or list of dicts) into a float32 tensor (N, in_features).

        A category's code is 1 … n by its value, 0 where training did not know it or saw it too rarely.
        Raises UserError, naming row and column, for a missing column or a cell of the wrong kind.
        """
        frame = as_frame(records)
        self.check_columns(frame)
        x = np.empty((len(frame), len(self.feature_names)), dtype=np.float32)
        with np.errstate(over="ignore"):  # refused below
            for at, (_, feature) in enumerate(self.features(lambda name, state: _raw(frame[name], state))):
                x[:, at] = feature
        for at, (name, state) in enumerate(self.categories.items(), start=-len(self.categories)):
            x[:, at] = self._codes(frame[name], state)
        finite = np.isfinite(x)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise UserError(f"row {frame.index[row]}, column {self.feature_names[column]!r}: the number is too large.")
        return torch.from_numpy(x)

    def check_columns(self, frame: pd.DataFrame) -> None:
        """Raise UserError where a column is missing."""
        for name in self.used:
            if name not in frame:
                others = [c for c in frame if c not in self.used]
                raise UserError(f"column {name!r} is missing.{did_you_mean(name, others, frame.columns)}")

    def features(
        self, raw_column: Callable[[str, dict], np.ndarray], xp=np, quantile_scale=_quantile_scale
    ) -> Iterator:
        """Yield (name, floats (N,)) of all that number, boolean and date columns become, from what `raw_column` gives
        for a name and its state, as float64. xp: the library of arrays, numpy, or torch for a graph to be exported."""
        for name, state in self.used.items():
            if state["kind"] == "category":
                continue
            is_date = state["kind"] == "date"
            raw = raw_column(name, state)
            missing = xp.isnan(raw)
            # As arrays: the exporter makes float32 of a Python number
            facts = {k: xp.asarray(state[k], dtype=xp.float64) for k in ("mean", "std", "fill") if k in state}
            numbers = xp.where(missing, facts["mean" if is_date else "fill"], raw)
            if "quantiles" in state:
                yield name, quantile_scale(numbers, state["quantiles"])
            else:
                scaled = (numbers - facts["mean"]) / facts["std"] if "std" in state else numbers
                yield f"{name} day" if is_date else name, scaled
            for part, days in PERIODS.items() if is_date else ():
                if part == "hour" and not state["clock"]:
                    continue
                # The turn's fraction first: float32, which is all that ONNX runtimes have for sines, then suffices
                turns = numbers / xp.asarray(days, dtype=xp.float64)
                angle = xp.asarray(2 * np.pi * (turns - xp.floor(turns)), dtype=xp.float32)
                yield f"{name} {part} sin", xp.where(missing, 0.0, xp.sin(angle))
                yield f"{name} {part} cos", xp.where(missing, 0.0, xp.cos(angle))
            if state["flag"]:
                yield f"{name} missing", missing

    @staticmethod
    def _codes(values: pd.Series, state: dict) -> np.ndarray:
        lookup = {value: code for code, value in enumerate(state["values"], start=1)}
        codes, keys = canonical_codes(values)
        return np.array([lookup.get(key, 0) for key in keys], dtype=np.float32)[codes]

    def count_unknown(self, x: Tensor) -> dict[str, int]:
        """Count the unknown codes of each category column in a tensor that `__call__` returned."""
        names = list(self.categories)
        counts = (x[:, x.shape[1] - len(names) :] == 0).sum(dim=0).tolist() if names else []
        return {name: count for name, count in zip(names, counts, strict=True) if count}

    def measure(self, records, x: Tensor) -> dict[str, np.ndarray]:
        """Return what a profile of data is made of: the numbers or words of each column."""
        frame = as_frame(records)
        return {name: _raw(frame[name], state) for name, state in self.used.items()}

    @property
    def number_columns(self) -> set[str]:
        """The columns whose cells came as numbers: a text table is to be read the same way at prediction."""
        return {name for name, state in self.used.items() if state["numeric"]}

    def examples(self, records: pd.DataFrame, count: int) -> list[dict]:
        """Return some records as dicts that JSON can hold; empty cells are None, dates ISO text."""
        records = spread(records[list(self.used)], count)
        return json.loads(records.to_json(orient="records", date_format="iso", double_precision=15, force_ascii=False))

    def decisions(self) -> list[tuple[str, str, str]]:
        """(column, kind, what becomes of it) for each column, to show to a person."""
        rows = []
        for name, state in self.columns.items():
            kind = state["kind"]
            if name not in self.used:
                what = "left out" + (f": {state['why']}" if state["why"] else "")
            elif kind == "category":
                empty = ", one of them the empty cell" if "" in state["values"] else ""
                what = f"{len(state['values'])} known values{empty}, a code for all others"
            elif kind == "date":
                what = f"read as {state['form']}: day, season, weekday" + (", hour" if state["clock"] else "")
            elif kind == "boolean":
                what = "0 or 1"
            else:
                what = (
                    "by rank to a normal distribution" if "quantiles" in state
                    else f"mean {state['mean']:.4g}, deviation {state['std']:.4g} → 0, 1" if "std" in state
                    else "as it is"
                )  # fmt: skip
            if state.get("flag"):
                fill = "the mean date" if kind == "date" else f"{state['fill']:.4g}"
                what += f"; missing → {fill}, with a flag"
            rows.append((name, kind, what))
        return rows
