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
    """Return what `find_copies_in` does for one table."""
    return find_copies_in([records], config)


def find_copies_in(tables: list[pd.DataFrame], config: DataConfig) -> np.ndarray | None:
    """Return a code for each record of all tables (N,), from 0 up and equal for equal records; None without copies.

    Compared are all columns but those that --columns drops and row numbers and the like, which differ between copies
    as well. Images are compared by the content of their files.
    """
    kinds, count, total, columns, content = config.column_kinds(), sum(map(len, tables)), None, [], False
    rows = np.random.default_rng(0).permutation(count)[:SAMPLE] if count > SAMPLE else slice(None)
    for name in tables[0]:
        kind = kinds.get(name, "")
        if not name or kind == "drop":
            continue
        cells = pd.concat([table[name] for table in tables], ignore_index=True) if len(tables) > 1 else tables[0][name]
        keys = KINDS.get(kind, Column).keys(cells)
        if not kind and _differs(keys) and not _has_fractions(cells):
            with suppress(UserError):  # a broken cell is reported when the column is fitted
                kind = infer_kind(cells, config)[0]
            if kind == "id":
                continue
        content |= kind in KINDS and KINDS[kind].is_content
        total = combine(total, keys, len(columns))
        columns.append(keys[rows])
    if total is None:
        return None
    codes, counts = np.unique(total, return_inverse=True, return_counts=True)[1:]
    return None if (counts == 1).all() or are_coincidences(columns, content) else codes


def _differs(keys: np.ndarray) -> bool:
    return len(np.unique(keys)) > 0.5 * len(keys)


def _has_fractions(values: pd.Series) -> bool:
    """Return whether a column holds measured numbers, which are no ids."""
    return pd.api.types.is_float_dtype(values.dtype) and bool((values.dropna() % 1 != 0).any())


def combine(total: np.ndarray | None, keys: np.ndarray, number: int) -> np.ndarray:
    """Add the hashes of the cells of a column to the hashes of the records.  number: of the column, from 0 up."""
    factor = np.random.default_rng(number).integers(0, 2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return keys * factor if total is None else total + keys * factor


def are_coincidences(columns: list[np.ndarray], content: bool) -> bool:
    """Return whether equal rows are no surprise, because there are few possible rows.

    Two independent rows that agree in all columns but one agree in that column, too, with the chance s that two
    distinct rows of the table do: of the pairs of rows that agree elsewhere, d that differ there let s / (1 - s) · d
    equal pairs be expected. This holds for correlated columns as well, unlike the product of the chances of all
    columns. Copies add equal pairs, but no pairs that differ in one column.
    columns: the hashes of the cells of each column, of some records, (N,).  content: some column is one of texts or
    images; without one, a single column of repeated values has no copies.
    """
    columns = [column for column in columns if (column != column[0]).any()]
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
