"""Split rows into train, validation and test: at random with the shares of classes, by groups, or by time.

Copies of a record stay in the same split.
"""

import math

import numpy as np
import pandas as pd

from config import DataConfig
from errors import UserError
from preprocessing.copies import find_copies
from preprocessing.file_formats import to_moments
from preprocessing.infer import KINDS
from preprocessing.parsing import canonical_codes, has_value
from preprocessing.preprocessor import layout_of
from sources.disk import take_rows

GROUP_DRAWS = 100  # of whole groups; the best is taken


def leave_out_rows(
    table: pd.DataFrame, target: str, missing: np.ndarray, config: DataConfig, notes: list[str], source: str
) -> pd.DataFrame:
    """Leave out rows without a target and, with --drop-nulls, all rows with a missing cell that would be used."""
    if missing.all():
        raise UserError(f"{source}: target {target!r} has no value in any row.")
    if missing.any():
        words = table[target][missing & table[target].notna()].astype("str").str.strip().value_counts()
        words = ", ".join(f"{word} {count}×" for word, count in words.items() if word)
        notes.append(f"{source}: {missing.sum()} rows without {target} left out{f' ({words})' if words else ''}")
        table = take_rows(table.copy(deep=False), np.flatnonzero(~missing))
    if config.drop_nulls:
        kinds = config.column_kinds()
        texts = layout_of(kinds).texts
        present = {name: has_value(table[name]) for name in table if kinds.get(name, "") in ("", *KINDS)}
        present = {name: mask for name, mask in present.items() if mask.any()}  # other columns are left out
        for name in texts & present.keys():
            present[name] = (table[name].notna() & table[name].ne("")).to_numpy()  # in a text "NA" is a word
        complete = np.all(list(present.values()), axis=0)
        notes.append(f"{source}: {(~complete).sum()} rows with a missing cell left out (--drop-nulls)")
        table = take_rows(table.copy(deep=False), np.flatnonzero(complete))
    if table.empty:
        raise UserError(f"{source}: every row has a missing cell, so --drop-nulls leaves no rows.")
    return table


def count_rows(count: int, shares: dict[str, float]) -> dict[str, int]:
    """Return how many of `count` rows each split gets by its share; 0 = none, because a file is given.

    Raises UserError if they leave fewer than 2 for training.
    """
    sizes = {name: math.ceil(share * count) if share else 0 for name, share in shares.items()}
    if count - sum(sizes.values()) < 2:
        raise UserError(
            f"{count} rows are too few to split into train, validation and test: give more rows, "
            "or --val-data and --test-data."
        )
    return sizes


def split_rows(
    table: pd.DataFrame,
    target: str,
    labels: np.ndarray | None,
    config: DataConfig,
    sizes: dict[str, int],
    seed: int,
    notes: list[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions of train, validation and test rows: disjoint, and together all rows.

    Classes keep their shares in every split, and copies of a record are in the same one. A --group stays whole; --time
    puts the newest rows in the test split.
    labels: the class of each row as an integer from 0; None for regression.  sizes: see `count_rows`.  notes: gets a
    line if there are copies. Raises UserError if there are too few rows.
    """
    count = len(table)
    if labels is not None and not (config.group or config.time):
        classes = labels.max() + 1
        if any(0 < size < classes for size in sizes.values()):
            raise UserError(f"{count} rows are too few for each of {classes} classes to be in every split.")
    train = np.arange(count)
    if config.time:
        return _split_by_time(table[config.time], config, sizes)
    if config.group:
        return _split_by_group(table[config.group], table[target], labels, sizes, seed)
    train, test = _split_off(train, sizes["test"], labels, seed)
    train, val = _split_off(train, sizes["val"], labels, seed)
    copies = None
    if any(sizes.values()) and not config.keep_duplicates:
        copies = find_copies(table.drop(columns=target), config)
    return (train, val, test) if copies is None else _keep_together((train, val, test), copies, labels, seed, notes)


def _keep_together(parts: tuple, copies: np.ndarray, labels: np.ndarray | None, seed: int, notes: list[str]) -> tuple:
    """Move rows between splits until equal ones are in the same split; classes keep their numbers of rows.

    A group of equal rows goes where its first row is. What exceeds a class's rows of validation and test goes to
    training, the largest groups first; what is then lacking there comes from training, the smallest groups first.
    copies: a code per row, equal for equal rows.
    """
    split_of = np.concatenate([np.full(len(rows), i) for i, rows in enumerate(parts)])[
        np.argsort(np.concatenate(parts))
    ]
    labels = np.zeros(len(copies), int) if labels is None else labels
    classes, sizes, random = labels.max() + 1, np.bincount(copies), np.random.default_rng(seed)
    quota = np.bincount(split_of * classes + labels, minlength=3 * classes)
    home = split_of[np.unique(copies, return_index=True)[1]]  # the split of each group
    pairs, rows = np.unique(copies * classes + labels, return_counts=True)
    group, label = np.divmod(pairs, classes)
    is_pure, tie = np.bincount(group)[group] == 1, random.permutation(len(sizes))[group]
    size, cell = sizes[group], home[group] * classes + label
    order = np.lexsort((tie, np.where(size == 1, len(copies), size), cell))
    exceeds = (_running(rows[order], cell[order]) > quota[cell[order]]) & (home[group[order]] > 0)
    home[group[order[exceeds]]] = 0
    for split in (2, 1):
        there = home[group] == split
        lacking = quota[split * classes + np.arange(classes)] - np.bincount(label[there], rows[there], classes)
        free = np.flatnonzero((home[group] == 0) & is_pure)
        order = free[np.lexsort((tie[free], size[free], label[free]))]
        home[group[order[_running(rows[order], label[order]) <= lacking[label[order]]]]] = split
    found = tuple(np.flatnonzero(home[copies] == split) for split in range(3))
    if any(len(rows) and not len(kept) for rows, kept in zip(parts, found, strict=True)):
        return parts  # a few large groups cannot fill the splits
    notes.append(
        f"{(sizes[copies] > 1).sum()} rows equal another one: equal rows are in the same split (--keep-duplicates "
        "splits them as they come)"
    )
    return found


def _running(rows: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Return the running sum of `rows` within each cell; equal cells stand together."""
    total = rows.cumsum()
    start = np.flatnonzero(np.r_[True, cell[1:] != cell[:-1]]) if len(cell) else np.zeros(0, int)
    before = (total - rows)[start]
    return total - np.repeat(before, np.diff(np.r_[start, len(cell)]))


def _split_off(rows, size: int, labels, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `size` of the rows off, each part in its order in the file."""
    from sklearn.model_selection import train_test_split

    if size == 0:
        return rows, rows[:0]
    stratify = None if labels is None else labels[rows]
    try:
        kept, off = train_test_split(np.arange(len(rows)), test_size=size, stratify=stratify, random_state=seed)
    except ValueError as error:  # some class has too few rows for its share
        raise UserError(
            f"{len(rows)} rows are too few to split off {size} with a share of each class: {error}"
        ) from None
    return rows[np.sort(kept)], rows[np.sort(off)]


def _split_by_group(
    values: pd.Series, targets: pd.Series, labels: np.ndarray | None, sizes: dict[str, int], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep groups whole, and a group of each class in training. Of several draws, take the one whose other splits lack
    the fewest classes; among these, the one whose classes come closest to their shares."""
    groups, labels = canonical_codes(values)[0], np.zeros(len(values), int) if labels is None else labels
    of_group, of_class = np.bincount(groups), np.bincount(labels)
    pairs, rows = np.unique(groups * len(of_class) + labels, return_counts=True)
    group, label = np.divmod(pairs, len(of_class))
    wanted = [(split, size) for split, size in ((2, sizes["test"]), (1, sizes["val"])) if size]
    random, best, best_cost = np.random.default_rng(seed), None, (math.inf, math.inf)
    for _ in range(GROUP_DRAWS if len(pairs) < 100_000 else 3):
        order = random.permutation(len(of_group))
        last_place = np.zeros(len(of_class), int)
        np.maximum.at(last_place, label, order.argsort()[group])
        free, split_of, lacking, distance = np.delete(order, last_place), np.zeros(len(of_group), int), 0, 0.0
        if len(free) < len(wanted):
            continue
        for later, (split, size) in zip(reversed(range(len(wanted))), wanted, strict=True):
            counts = of_group[free[: len(free) - later]].cumsum()
            end = int(abs(counts - size).argmin()) + 1
            split_of[free[:end]], free = split, free[end:]
            found = np.bincount(label, rows * (split_of[group] == split), len(of_class))
            lacking += int((found == 0).sum())
            distance += float(abs(found - of_class * size / len(labels)).sum())
        if (lacking, distance) < best_cost:
            best, best_cost = split_of[groups], (lacking, distance)
    if best is None:
        alone = int(np.bincount(label).argmin())
        row = int((labels == alone).argmax())
        raise UserError(
            f"--group {values.name}: too few groups, each split needs one and training one of each class"
            + (f" (class {targets.iloc[row]!r} is in group {values.iloc[row]!r})." if labels.any() else ".")
        )
    return tuple(np.flatnonzero(best == split) for split in range(3))


def _split_by_time(
    values: pd.Series, config: DataConfig, sizes: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut at two moments: rows of the same moment are in the same split."""
    form = config.column_formats().get(config.time, "")
    if (moments := to_moments(values, config.column_kinds().get(config.time, ""), form)) is None:
        raise UserError(
            f"--time {values.name}: row {values.index[0]} is {values.iloc[0]!r}, neither a date nor a number."
        )
    if np.isnan(moments).any():
        raise UserError(f"--time {values.name}: row {values.index[np.isnan(moments).argmax()]} has no value.")
    ordered, count = np.sort(moments), len(moments)
    test_from = ordered[count - sizes["test"]] if sizes["test"] else np.inf
    before = ordered[ordered < test_from]
    val_from = before[max(0, len(before) - sizes["val"])] if sizes["val"] and len(before) else test_from
    parts = moments < val_from, (moments >= val_from) & (moments < test_from), moments >= test_from
    wanted = (True, sizes["val"] > 0, sizes["test"] > 0)
    if any(want and not part.any() for want, part in zip(wanted, parts, strict=True)):
        raise UserError(f"--time {values.name}: too few different moments to cut train, validation and test apart.")
    return tuple(np.flatnonzero(part) for part in parts)
