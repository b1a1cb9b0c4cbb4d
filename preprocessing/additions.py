"""Fit more training records (--add), such as a service's log, to a table, and find those not to be trained on."""

from dataclasses import replace

import numpy as np
import pandas as pd

from config import DataConfig
from errors import UserError, did_you_mean
from preprocessing.infer import KINDS, infer_kind
from preprocessing.parsing import check_flat

RICH = 0.2  # share of distinct held-out records: where it is lower, equal records are no surprise


def fix_kinds(train: pd.DataFrame, target: str, config: DataConfig, notes: list[str]) -> DataConfig:
    """Return the configuration with the kind of each column as the table's own training rows have it, so that added
    records do not change it."""
    kinds = {}
    for name in train.columns.difference([target, config.group, config.time, *config.column_kinds()], sort=False):
        check_flat(train[name], f" or give --columns {name}=drop.")
        kinds[name] = infer_kind(train[name], config)[0]
    left_out = {name: kind for name, kind in kinds.items() if kind not in KINDS}
    if left_out:
        notes.append(f"left out: {', '.join(f'{name} ({kind})' for name, kind in left_out.items())}")
    kinds |= dict.fromkeys(left_out, "drop")
    return replace(config, columns=(*config.columns, *(f"{name}={kind}" for name, kind in kinds.items())))


def match_columns(added: pd.DataFrame, train: pd.DataFrame, target: str, config: DataConfig) -> pd.DataFrame:
    """Return added records with the columns of the table. Columns that are left out may be missing: a log lacks them.

    Raises UserError for another missing column, or one that occurs twice.
    """
    if added.columns.has_duplicates:
        raise UserError(f"column {added.columns[added.columns.duplicated()][0]!r} occurs twice.")
    kinds = config.column_kinds()
    for name in train.columns.difference(added.columns, sort=False):
        if name == target or kinds.get(name) in KINDS:
            raise UserError(f"column {name!r} is missing.{did_you_mean(name, added.columns)}")
    return added.reindex(columns=train.columns)


def is_held_out(added: pd.DataFrame, held_out: pd.DataFrame, train: pd.DataFrame, config: DataConfig) -> np.ndarray:
    """Return a mask of the added records that the validation or test split holds as well, or that are of its groups.

    Records are equal if all their features are, whatever the target. Raises BrokenRecords if a cell cannot be read.
    """
    kinds = config.column_kinds()
    read = {name: KINDS[kinds[name]].comparable(train[name], config) for name in train if kinds.get(name) in KINDS}

    def keys(part: pd.DataFrame) -> pd.Series:
        cells = pd.DataFrame({name: comparable(part[name]) for name, comparable in read.items()})
        floats = dict.fromkeys(cells.select_dtypes("float"), np.float32)  # some programs write fewer digits
        return pd.util.hash_pandas_object(cells.astype(floats), index=False)

    theirs, ours = keys(held_out), keys(added)
    known = ours.isin(theirs if theirs.nunique() > RICH * len(theirs) else []).to_numpy()
    if config.group:
        groups, known_groups = (part[config.group].astype("str") for part in (added, held_out))
        known = known | (groups.notna() & groups.isin(known_groups)).to_numpy()
    return known
