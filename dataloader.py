"""Records → train, validation and test splits → batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cells import canonical_codes, date_format, hold_values, to_days
from config import BUNDLED, DataConfig
from errors import UserError, did_you_mean, naming
from images import ENDINGS, digits_folder, is_image_file, resolve_paths
from preprocessing import infer_kind as infer_column
from preprocessing import rows_per_pass
from reader import FILE, LABEL, is_text_file, log_kind, read_class_folders, read_table, read_text_file
from task import Task, check_classes, class_counts, infer_kind
from text import load_docstrings


def load_bundled(name: str) -> tuple[pd.DataFrame, str]:
    """Return a table that scikit-learn ships, and the name of its target."""
    from sklearn import datasets

    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(as_frame=True, **options)
    table = bunch.frame
    if name != "diabetes":
        table["target"] = [str(bunch.target_names[i]) for i in table["target"]]
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table, "target"


# ---------------------------------------------------------------- records → splits


@dataclass(frozen=True)
class Splits:
    """The records of each split, target included, and the kind of problem that all targets together make."""

    train: pd.DataFrame
    val: pd.DataFrame
    test: pd.DataFrame
    target: str
    kind: str
    image: str  # the column that holds images, "" for a table
    text: str  # the column that holds texts, "" for a table
    sources: list[str]  # where the records of each split come from
    notes: list[str]


def load_splits(config: DataConfig, seed: int, table: pd.DataFrame | None = None) -> Splits:
    """Read what `config` names (or take `table`), leave out unusable rows and split. Nothing is fitted here.

    Raises UserError for every kind of bad data, naming file, row or column.
    """
    notes: list[str] = []
    tables, sources, target, image, text = _read_all(config, table, notes)
    first = tables[0]
    for name in first:
        if name != target and config.column_kinds().get(name) != "drop" and first[name].isna().all():
            raise UserError(
                f"{sources[0]}: column {name!r} has no value in any row: leave it out with --columns {name}=drop."
            )
    for i in (1, 2):
        if tables[i] is not None:
            missing = [c for c in first if c not in tables[i]]
            if missing:
                hint = did_you_mean(missing[0], tables[i].columns)
                raise UserError(f"{sources[i]}: column {missing[0]!r} is missing.{hint}")
            tables[i] = _usable(tables[i][first.columns], target, config, notes, sources[i])
    del first
    test, val, table = tables.pop(), tables.pop(), _usable(tables.pop(), target, config, notes, sources[0])
    kind = infer_kind(table[target]) if config.task == "auto" else config.task
    shares = {"val": config.val_split if val is None else 0.0, "test": config.test_split if test is None else 0.0}
    train_rows, val_rows, test_rows = split_rows(table, target, kind, config, shares, seed)
    # Rearranged column by column, a large table is not in memory twice; slices of it are then free.
    table, order = table.copy(deep=False), np.concatenate([train_rows, val_rows, test_rows])
    for i, name in enumerate(table.columns):
        table.isetitem(i, table[name].array.take(order))
    table.index = table.index[order]
    ends = len(train_rows), len(train_rows) + len(val_rows)
    return Splits(
        train=table.iloc[: ends[0]],
        val=table.iloc[ends[0] : ends[1]] if val is None else val,
        test=table.iloc[ends[1] :] if test is None else test,
        target=target,
        kind=kind,
        image=image,
        text=text,
        sources=sources,
        notes=notes,
    )


def _read_all(config: DataConfig, table: pd.DataFrame | None, notes: list[str]):
    """Read what the flags name: ([all or train records, validation or None, test or None], what each is called,
    the target, the column of images or "", the column of texts or "")."""
    paths = [config.data, config.val_data, config.test_data]
    target, image, text = config.target, config.image, config.text
    if table is not None:
        paths[0] = "table"
        table = table.set_axis([str(name) for name in table.columns], axis=1)
        table = table.reset_index(drop=True) if isinstance(table.index, pd.MultiIndex) else table
    elif config.data == "digits":
        table, target, image = read_class_folders(digits_folder(), is_image_file, notes), target or LABEL, FILE
    elif config.data == "docstrings":
        table, target, text = load_docstrings(), target or "package", text or "docstring"
    elif config.data in BUNDLED:
        table, usual_target = load_bundled(config.data)
        target = target or usual_target
    else:
        config.check_files()
        if Path(config.data).is_dir():
            target = target or LABEL
            paths = [given or found for given, found in zip(("", *paths[1:]), _split_folders(config.data), strict=True)]
            image, text = _what_is_in(paths[0])

    def read(path: str) -> pd.DataFrame:
        if Path(path).is_dir():
            records = read_class_folders(path, is_image_file if image else is_text_file, notes)
            return records if image else records.assign(**{text: list(map(read_text_file, records[FILE]))})
        records = read_table(path, text, image)
        return resolve_paths(records, image, path) if image else records

    from_file = table is None
    table = read(paths[0]) if from_file else table
    if not target and paths[0].endswith(".db"):
        target = str(table.columns[-1])  # a log knows what it was told
    if not (image or text):
        kind = log_kind(paths[0]) if from_file and paths[0].endswith(".db") else ""
        image, text = _find_input(table, target, config, kind)
        if image or text:
            notes.append(f"--{'image' if image else 'text'} {image or text}: it is all that there is to learn from")
            table = read(paths[0]) if from_file else table  # once more, its cells letter by letter
    tables = [table, *(read(path) if path else None for path in paths[1:])]
    sources = [path or paths[0] for path in paths]
    for part, source in zip(tables, sources, strict=True):
        if part is not None:
            _check_columns(part, config, target, source, image, text)
    if image or text:
        kept = {image, text, target, config.group, config.time}
        if others := [c for c in table if c not in kept and c != FILE]:
            notes.append(f"beside the {'images' if image else 'text'} left out: {', '.join(others)}")
        tables = [part if part is None else part[[c for c in part if c in kept]] for part in tables]
    return tables, sources, target, image, text


def _find_input(table: pd.DataFrame, target: str, config: DataConfig, kind: str) -> tuple[str, str]:
    """Return (column of images, column of texts), one of them or both "": the one column of a log of that kind, or that
    of free text where there is no more of it and nothing else to learn from."""
    names = [name for name in table if name != target]
    if kind in ("image", "text") and len(names) == 1:
        return (names[0], "") if kind == "image" else ("", names[0])
    kinds = config.column_kinds()
    found = []
    for name in table:
        if name in (target, config.group, config.time) or kinds.get(name) == "drop":
            continue
        try:
            kind = kinds.get(name) or infer_column(table[name].head(10_000), config.min_freq)[0]
        except UserError:  # it is said when the table is learned from
            kind = "number"
        if kind == "text":
            found.append(name)
        elif kind not in ("id", "constant"):
            return "", ""
    return "", found[0] if len(found) == 1 else ""


def _what_is_in(folder: str) -> tuple[str, str]:
    """Return (column of images, column of texts) of a folder of class folders, one of them "".

    Raises UserError where there are neither images nor texts.
    """
    for path in Path(folder).glob("*/**/*"):
        if is_image_file(path):
            return FILE, ""
        if is_text_file(path):
            return "", "text"
    raise UserError(
        f"{folder}: no images and no texts in folders by class. What is needed: {folder}/<class>/*.png "
        f"(or {', '.join(ENDINGS[1:])}), or {folder}/<class>/*.txt."
    )


def _split_folders(folder: str) -> list[str]:
    """Return folder/train, val and test where these hold classes, else the folder alone ("train" may be a class)."""
    parts = [Path(folder) / name for name in ("train", "val", "test")]
    holds_classes = parts[0].is_dir() and any(p.is_dir() for p in parts[0].iterdir())
    if not (holds_classes and (parts[1].is_dir() or parts[2].is_dir())):
        return [folder, "", ""]
    return [str(part) if part.is_dir() else "" for part in parts]


def _check_columns(table: pd.DataFrame, config: DataConfig, target: str, source: str, image: str, text: str) -> None:
    names = [str(c) for c in table.columns]
    if not target:
        raise UserError(f"--target is needed: which column of {source} is to be predicted?{did_you_mean('', names)}")
    if table.columns.has_duplicates:
        raise UserError(f"{source}: column {table.columns[table.columns.duplicated()][0]!r} is there twice.")
    used = {f"--{flag}": getattr(config, flag) for flag in ("image", "text", "group", "time")}
    kinds = config.column_kinds()
    for flag, name in [("--target", target), *used.items(), *(("--columns", name) for name in kinds)]:
        if name and name not in names:
            raise UserError(f"{flag} {name}: no such column in {source}.{did_you_mean(name, names)}")
    if target in kinds:
        raise UserError(f"--columns {target}=…: {target} is the target; its kind is given with --task.")
    for name, kind in kinds.items():
        if (image or text) and (kind != "drop" or name in (image, text)):
            flag = f"--image {image}" if image else f"--text {text}"
            raise UserError(f"--columns {name}={kind}: with {flag} that column is learned from as it is, and no other.")
    for flag, name in used.items():
        if name == target:
            raise UserError(f"{flag} {target} is the target: it cannot be used in another way as well.")
    if len(names) == 1:
        raise UserError(f"{source} has the one column {names[0]!r}: there is nothing to predict it from.")


def _usable(table: pd.DataFrame, target: str, config: DataConfig, notes: list[str], source: str) -> pd.DataFrame:
    """Leave out rows without a target, and with --drop-nulls all rows with an empty cell that would be used."""
    has_target = hold_values(table[target])
    if not has_target.any():
        raise UserError(f"{source}: target {target!r} has no value in any row.")
    if not has_target.all():
        notes.append(f"{source}: {(~has_target).sum()} rows without {target} left out")
        table = table[has_target]
    if config.drop_nulls:
        dropped = {name for name, kind in config.column_kinds().items() if kind == "drop"}
        used = table[[c for c in table if c not in dropped]]
        whole = (used.notna() & used.ne("")).all(axis=1)  # a text is empty, never missing
        notes.append(f"{source}: {(~whole).sum()} rows with an empty cell left out (--drop-nulls)")
        table = table[whole]
    if table.empty:
        raise UserError(f"{source}: no row is left once rows with an empty cell are left out (--drop-nulls).")
    return table


def split_rows(
    table: pd.DataFrame, target: str, kind: str, config: DataConfig, shares: dict[str, float], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions of train, validation and test rows: disjoint, and together all rows.

    Classes keep their shares in every split. A --group stays whole; --time puts the newest rows in the test.
    shares: {"val", "test"} of all rows, 0 where a file is given. Raises UserError where there are too few rows.
    """
    count = len(table)
    sizes = {name: math.ceil(share * count) if share else 0 for name, share in shares.items()}
    if count - sum(sizes.values()) < 2:
        raise UserError(
            f"{count} rows are too few to split into train, validation and test: give more rows, "
            "or --val-data and --test-data."
        )
    if kind == "regression":
        labels = None
    else:
        labels, keys = canonical_codes(table[target])
        counts = class_counts(labels, keys)
        check_classes(counts, target, kind, fewest=1 + sum(size > 0 for size in sizes.values()))
        if not (config.group or config.time) and any(0 < size < len(counts) for size in sizes.values()):
            raise UserError(f"{count} rows are too few to show each of {len(counts)} classes in every split.")
    train = np.arange(count)
    if config.time:
        return _split_by_time(table[config.time], sizes)
    groups = canonical_codes(table[config.group])[0] if config.group else None
    train, test = _split_off(train, sizes["test"], labels, groups, seed)
    train, val = _split_off(train, sizes["val"], labels, groups, seed)
    return train, val, test


def _split_off(rows, size: int, labels, groups, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `size` of the rows off, each part in its order in the file."""
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    if size == 0:
        return rows, rows[:0]
    if groups is not None:
        if len(set(groups[rows])) < 2:
            raise UserError("--group has too few groups: each split needs one of its own.")
        # sklearn takes a share of the groups here, and groups differ in size: the rows come out as near as they can
        splitter = GroupShuffleSplit(1, test_size=min(0.9, size / len(rows)), random_state=seed)
        kept, off = next(splitter.split(rows, groups=groups[rows]))
    else:
        stratify = None if labels is None else labels[rows]
        try:
            kept, off = train_test_split(np.arange(len(rows)), test_size=size, stratify=stratify, random_state=seed)
        except ValueError as error:  # a class, or all of them, with too few rows for its share
            raise UserError(
                f"{len(rows)} rows are too few to split {size} off with a share of each class: {error}"
            ) from None
    return rows[np.sort(kept)], rows[np.sort(off)]


def _split_by_time(values: pd.Series, sizes: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut at two moments: rows of the same moment are never on both sides."""
    if pd.api.types.is_numeric_dtype(values.dtype):
        moments = values.to_numpy(dtype=np.float64)
    else:
        form = date_format(values)
        if not form:
            raise UserError(
                f"--time {values.name}: row {values.index[0]} is {values.iloc[0]!r}, no date and no number."
            )
        moments = to_days(values, form)
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


# ---------------------------------------------------------------- splits → batches


class TensorBatches(Dataset):
    """Records as tensors in memory. `__getitems__` gathers a whole batch at once, where the usual item-by-item
    access and collation cost more than a small network's step."""

    def __init__(self, inputs, targets: Tensor):
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


class BatchIndices(Sampler):
    """Yield an index tensor for each batch, in random order (of torch's global generator) or in sequence.

    A last batch of one record joins the one before: batch norm cannot work on one, and no record is lost.
    With `lengths`, a batch holds records of about the same length: each window of random batches is sorted by it, and
    the sequence is that of the lengths.
    """

    WINDOW = 32  # batches

    def __init__(self, count: int, batch_size: int, *, shuffle: bool, lengths: Tensor | None = None):
        self.count, self.batch_size, self.shuffle, self.lengths = count, batch_size, shuffle, lengths

    def __len__(self) -> int:
        batches = math.ceil(self.count / self.batch_size)
        return batches - (batches > 1 and self.count % self.batch_size == 1)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.count) if self.shuffle else torch.arange(self.count)
        turns, last = range(len(self)), len(self) - 1
        if self.lengths is not None:
            windows = order.split(self.WINDOW * self.batch_size if self.shuffle else self.count)
            order = torch.cat([rows[self.lengths[rows].argsort(stable=True)] for rows in windows])
            turns = torch.randperm(len(self)).tolist() if self.shuffle else turns
        for i in turns:
            yield order[i * self.batch_size : (i + 1) * self.batch_size if i < last else self.count]


def _as_is(batch):
    return batch


def make_loader(inputs, targets: Tensor, batch_size: int, *, shuffle: bool, finish=_as_is) -> DataLoader:
    """Return a DataLoader of (inputs, targets) batches over tensors (or Ragged texts) in memory, each batch passed
    through `finish`."""
    sampler = BatchIndices(len(targets), batch_size, shuffle=shuffle, lengths=getattr(inputs, "lengths", None))
    return DataLoader(TensorBatches(inputs, targets), batch_sampler=sampler, collate_fn=finish)


def choose_batch_size(rows: int) -> int:
    """Return about a twentieth of the training rows, between 32 and 1024."""
    return min(1024, max(32, 2 ** round(math.log2(max(1, rows / 20)))))


def make_loaders(
    splits: Splits, inputs_of, task: Task, batch_size: int, *, finish_training=_as_is, finish=_as_is
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return the loaders of the train (shuffled), validation and test splits.

    inputs_of: records → a tensor, or Ragged texts.  batch_size: 0 = see `choose_batch_size`.
    finish_training, finish: complete a batch of (inputs, targets) of the training split, and of the others.
    """
    batch_size = batch_size or choose_batch_size(len(splits.train))
    loaders = []
    parts = zip((splits.train, splits.val, splits.test), splits.sources, (True, False, False), strict=True)
    for records, source, training in parts:
        with naming(source):
            inputs, targets = inputs_of(records), task.encode(records[splits.target])
        size, last = (batch_size, finish_training) if training else (rows_per_pass(inputs), finish)
        loaders.append(make_loader(inputs, targets, size, shuffle=training, finish=last))
    return tuple(loaders)
