"""Find records that are copies of others, and tell copies from rows that are equal by coincidence."""

from contextlib import suppress

import numpy as np
import pandas as pd

from config import DataConfig
from errors import UserError
from preprocessing.column import Column
from preprocessing.infer import KINDS, infer_kind

SAMPLE = 200_000  # records that decide whether equal rows are a coincidence
DISTINCT = 0.2  # of the records: where fewer are distinct, equal records are no copies
CHANCE = 3  # copies are this many times as many as coincidences would be


def find_copies(records: pd.DataFrame, config: DataConfig) -> np.ndarray | None:
    """Return a code for each record (N,), from 0 up and equal for equal records; None if there are no copies.

    Compared are all columns but those that --columns drops and row numbers and the like, which differ between copies
    as well. Images are compared by the content of their files.
    """
    kinds, keys = config.column_kinds(), {}
    for name in records:
        kind = kinds.get(name, "")
        if not name or kind == "drop":
            continue
        keys[name] = KINDS.get(kind, Column).keys(records[name])
        if not kind and _differs(keys[name]) and not _has_fractions(records[name]):
            with suppress(UserError):  # a broken cell is reported when the column is fitted
                kind = kinds[name] = infer_kind(records[name], config)[0]
            if kind == "id":
                del keys[name]
    content = any(name in keys and kind in KINDS and KINDS[kind].is_content for name, kind in kinds.items())
    if not keys:
        return None
    codes, counts = np.unique(combine(keys), return_inverse=True, return_counts=True)[1:]
    return None if (counts == 1).all() or are_coincidences(list(keys.values()), content) else codes


def _differs(keys: np.ndarray) -> bool:
    return len(np.unique(keys)) > 0.5 * len(keys)


def _has_fractions(values: pd.Series) -> bool:
    """Return whether a column holds measured numbers, which are no ids."""
    return pd.api.types.is_float_dtype(values.dtype) and bool((values.dropna() % 1 != 0).any())


def combine(keys: dict[str, np.ndarray]) -> np.ndarray:
    """Return a 64-bit hash of each record, from those of its cells."""
    factors = np.random.default_rng(0).integers(0, 2**63, len(keys), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return sum((column * factor for column, factor in zip(keys.values(), factors, strict=True)), np.uint64(0))


def are_coincidences(columns: list[np.ndarray], content: bool) -> bool:
    """Return whether equal rows are no surprise, because there are few possible rows.

    Two independent rows that agree in all columns but one agree in that column, too, with the chance s that two
    distinct rows of the table do: of the pairs of rows that agree elsewhere, d that differ there let s / (1 - s) · d
    equal pairs be expected. This holds for correlated columns as well, unlike the product of the chances of all
    columns. Copies add equal pairs, but no pairs that differ in one column.
    columns: the hashes of the cells of each column (N,).  content: some column is one of texts or images; without one,
    a single column of repeated values has no copies.
    """
    count = len(columns[0])
    rows = np.random.default_rng(0).permutation(count)[:SAMPLE] if count > SAMPLE else slice(None)
    columns = [column for column in (column[rows] for column in columns) if (column != column[0]).any()]
    if not columns or (len(columns) == 1 and not content):
        return True
    mixed = [column * np.uint64(2 * i + 3) for i, column in enumerate(columns)]
    total = sum(mixed, np.uint64(0))
    distinct = np.unique(total, return_index=True)[1]
    if len(distinct) < DISTINCT * len(total):
        return True
    equal, expected = _equal_pairs(total), 0.0
    for column, own in zip(columns, mixed, strict=True):
        agree = _equal_pairs(column[distinct]) / max(1, len(distinct) * (len(distinct) - 1) / 2)
        differ = _equal_pairs(total - own) - equal
        expected = max(expected, differ * agree / max(1 - agree, 1e-9))
    return equal <= CHANCE * expected


def _equal_pairs(keys: np.ndarray) -> float:
    counts = np.unique(keys, return_counts=True)[1].astype(float)
    return float((counts * (counts - 1)).sum() / 2)
