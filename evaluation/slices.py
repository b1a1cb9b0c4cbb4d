"""Where a model is worst: slices of the test records by the values of each column."""

import itertools
import math

import numpy as np
import pandas as pd

from preprocessing.column import evenly_spaced

ROWS = 5_000  # test records that are read
LEAST = 20  # records of a slice
BEYOND = 3.0  # standard errors by which the loss in a slice is higher: there are many slices
MAX_VALUES, MAX_SLICES = 10, 10


def worst_slices(pipeline, records: pd.DataFrame, losses: np.ndarray, errors: np.ndarray) -> list[list]:
    """Return [column, slice, records, mean error in it, mean error of the others] of the slices in which the loss is
    higher beyond noise, the worst first.

    records: the test split.  losses, errors: of each record, (N,); the error is 0 or 1, or an absolute difference.
    """
    rows = evenly_spaced(pd.DataFrame({"row": range(len(records))}), ROWS)["row"].to_numpy()
    records, losses, errors, found = records.iloc[rows], losses[rows], errors[rows], []
    for column in pipeline.preprocessor.columns:
        if column.path_cells:  # files would be read again
            continue
        cells = records[column.name]
        are_days = column.times(cells) is not None
        for name, values in column.profile_values(cells, column.encode(cells)).items():
            for label, mask in _slices(values, are_days):
                if LEAST <= mask.sum() <= len(mask) - LEAST:
                    inside, outside = losses[mask], losses[~mask]
                    noise = math.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside))
                    if (excess := inside.mean() - outside.mean()) > BEYOND * noise:
                        row = [name, label, int(mask.sum()), float(errors[mask].mean()), float(errors[~mask].mean())]
                        found.append((excess, row))
    return [row for _, row in sorted(found, key=lambda each: -each[0])[:MAX_SLICES]]


def _slices(values: np.ndarray, are_days: bool) -> list[tuple[str, np.ndarray]]:
    """Return (name, mask (N,)) of each slice: quarters of numbers, frequent values of words, and missing cells."""
    if values.dtype == object:
        counts = pd.Series(values).value_counts()
        return [(str(value) or "missing", values == value) for value in counts.index[:MAX_VALUES]]
    missing = np.isnan(values)
    found = [("missing", missing)]
    distinct = np.unique(values[~missing])
    if len(distinct) <= MAX_VALUES:
        return found + [(_show(value, are_days), values == value) for value in distinct]
    ends = np.unique(np.quantile(values[~missing], [0, 0.25, 0.5, 0.75, 1]))
    for i, (low, high) in enumerate(itertools.pairwise(ends)):
        mask = (values >= low) & ((values < high) | ((i == len(ends) - 2) & (values == high)))
        found.append((f"{_show(low, are_days)} to {_show(high, are_days)}", mask))
    return found


def _show(value: float, is_day: bool) -> str:
    return str(pd.Timestamp(value, unit="D").date()) if is_day else f"{value:.4g}"
