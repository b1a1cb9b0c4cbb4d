"""Records → train, validation and test splits → batches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import BUNDLED, DataConfig
from errors import BrokenRecords, UserError, did_you_mean, error_prefix
from preprocessing import KINDS, Preprocessor, gather
from preprocessing.additions import fix_kinds, is_held_out, match_columns
from preprocessing.column import Cells, Encoded
from preprocessing.file_formats import settle_formats
from preprocessing.parsing import check_flat, without_words
from preprocessing.preprocessor import layout_of
from preprocessing.splitting import count_rows, leave_out_rows, split_rows
from preprocessing.targets import infer_kind, is_missing, numbers_form, stratify_labels, words_that_are_classes
from scaling.device import keep_on_device, move
from scaling.processes import part, shared_work
from sources import LABEL, load_bundled, log_kinds, read_folder, read_table, resolve_paths, separator_of, split_folders
from sources.disk import take_rows
from sources.tables import table_files
from task import Task

# ---------------------------------------------------------------- records → splits


@dataclass(frozen=True)
class Splits:
    """The records of each split, target included, and the kind of problem that all targets together make."""

    train: pd.DataFrame
    val: pd.DataFrame
    test: pd.DataFrame
    target: str
    kind: str  # binary, multiclass or regression
    config: DataConfig  # with the kinds of columns that the source knows
    sources: list[str]  # where the records of each split come from
    notes: list[str]  # what a person should know about the data


def load_splits(config: DataConfig, seed: int, table: pd.DataFrame | None = None) -> Splits:
    """Read what `config` names (or take `table`), leave out unusable rows and split. Nothing is fitted here.

    Raises UserError for every kind of bad data, naming the file, row or column.
    """
    notes: list[str] = []
    tables, sources, target, config = _read_all(config, table, notes)
    for i, source in enumerate(sources):
        if tables[i] is not None:
            missing = [c for c in tables[0] if c not in tables[i] and config.column_kinds().get(c) != "drop"]
            if missing:
                hint = did_you_mean(missing[0], tables[i].columns)
                raise UserError(f"{source}: column {missing[0]!r} is missing.{hint}")
            tables[i] = without_words(tables[i].reindex(columns=tables[0].columns), config.missing)
    check_flat(tables[0][target])
    separator = "" if table is not None else separator_of(sources[0], _layout(config, config.column_kinds()))
    config = settle_formats(tables[0], config, separator, notes)
    is_number = config.task not in ("binary", "multiclass") and bool(numbers_form(tables[0][target]))
    classes = set() if is_number else words_that_are_classes(tables[0][target])
    notes += [f"{target}: {word!r} is frequent, so it is a class; --missing '{word}' otherwise" for word in classes]
    for i, source in enumerate(sources):
        if tables[i] is not None:
            missing = is_missing(tables[i][target], is_number, classes)
            tables[i] = leave_out_rows(tables[i], target, missing, config, notes, source)
    test, val, table = tables.pop(), tables.pop(), tables.pop()
    form = config.column_formats().get(target, "")
    kind = infer_kind(table[target], form) if config.task == "auto" else config.task
    shares = {"val": config.val_split if val is None else 0.0, "test": config.test_split if test is None else 0.0}
    sizes = count_rows(len(table), shares)
    labels = stratify_labels(table[target], kind, 1 + sum(size > 0 for size in sizes.values()), form)
    train_rows, val_rows, test_rows = split_rows(table, target, labels, config, sizes, seed, notes)
    # Reordered column by column to avoid a second copy in memory; the splits are views
    table = table.copy(deep=False)
    table = take_rows(table, np.concatenate([train_rows, val_rows, test_rows]))
    ends = len(train_rows), len(train_rows) + len(val_rows)
    splits = Splits(
        train=table.iloc[: ends[0]],
        val=table.iloc[ends[0] : ends[1]] if val is None else val,
        test=table.iloc[ends[1] :] if test is None else test,
        target=target,
        kind=kind,
        config=config,
        sources=sources,
        notes=notes,
    )
    return _with_added(splits, is_number, classes) if config.add else splits


def _with_added(splits: Splits, is_number: bool, classes: set[str]) -> Splits:
    """Append the records of --add to the training split, apart from those that another split holds as well."""
    train, target, notes, parts = splits.train, splits.target, splits.notes, [splits.train]
    config, held_out = fix_kinds(train, target, splits.config, notes), pd.concat([splits.val, splits.test])
    task = Task.fit(train[target], splits.kind, form=config.column_formats().get(target, ""))
    for path in config.add:
        added, _ = _read(path, config, config.column_kinds(), notes)
        with error_prefix(path):
            added = without_words(match_columns(added, train, target, config), config.missing)
            added = leave_out_rows(added, target, is_missing(added[target], is_number, classes), config, notes, path)
            task.encode(added[target])  # raises UserError for a class that the table does not have
            find = partial(is_held_out, held_out=held_out, train=train, config=config)
            known, added = _without_broken(find, added, config.skip_broken, notes)
        notes.append(f"{path}: {(~known).sum()} rows added to train; {known.sum()} of validation or test left out")
        parts.append(added[~known].set_axis([f"{row} of {path}" for row in added.index[~known]]))
    return replace(splits, train=pd.concat(parts), config=config)


def _read_all(config: DataConfig, table: pd.DataFrame | None, notes: list[str]):
    """Return (tables, sources, target, config): a table for each split, None where it is split off later, and the flags
    with the kinds of columns that the source knows."""
    paths, target, kinds = [config.data, config.val_data, config.test_data], config.target, {}
    if table is not None:
        paths[0] = "table"
        table = table.set_axis([str(name) for name in table.columns], axis=1)
        table = table.reset_index(drop=True) if isinstance(table.index, pd.MultiIndex) else table
    elif config.data in BUNDLED:
        table, usual_target, kinds = load_bundled(config.data)
        target = target or usual_target
    else:
        config.check_files()
        if Path(config.data).is_dir() and not table_files(config.data):
            target = target or LABEL
            paths = [given or found for given, found in zip(("", *paths[1:]), split_folders(config.data), strict=True)]
        table, kinds = _read(paths[0], config, config.column_kinds(), notes)
        if not target and paths[0].endswith(".db"):
            target = str(table.columns[-1])  # the log of a service keeps its target last
    kinds = kinds | config.column_kinds()
    formats = {name: f":{form}" for name, form in config.column_formats().items()}
    known = tuple(f"{name}={kind}{formats.pop(name, '')}" for name, kind in kinds.items() if name != target)
    known += tuple(f"{name}={form}" for name, form in formats.items())
    if target in config.column_formats() and config.task == "auto":
        config = replace(config, task="regression")
    tables = [table, *(_read(path, config, kinds, notes)[0] if path else None for path in paths[1:])]
    sources = [path or paths[0] for path in paths]
    for each, source in zip(tables, sources, strict=True):
        if each is not None:
            _check_columns(each, config, target, source)
    return tables, sources, target, replace(config, text=(), image="", columns=known)


def _read(
    path: str, config: DataConfig, kinds: dict[str, str], notes: list[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the records of a file or folder, and the kinds of columns that the source knows, `kinds` among them."""
    if Path(path).is_dir() and not table_files(path):
        return read_folder(path, notes, config.encoding)
    if path.endswith(".db"):
        kinds = log_kinds(path) | kinds
    table = read_table(path, _layout(config, kinds), notes)
    found = {}
    for name in table:
        cells = Cells(table[name].head(100))
        for column in KINDS.values():
            if column.path_cells and name not in kinds and column.detect(cells, DataConfig()):
                found[name] = column.kind
    if found:  # their file names start from the folder of the table
        table = resolve_paths(table, layout_of(found), path)
    return table, kinds | found


def _layout(config: DataConfig, kinds: dict[str, str]):
    """Return how the files are read: what the kinds of columns need, and what the flags say."""
    return replace(layout_of(kinds), encoding=config.encoding, sheet=config.sheet, skip_rows=config.skip_rows)


def _check_columns(table: pd.DataFrame, config: DataConfig, target: str, source: str) -> None:
    names = [str(c) for c in table.columns]
    if not target:
        raise UserError(f"--target is missing: which column of {source} is to be predicted?{did_you_mean('', names)}")
    if table.columns.has_duplicates:
        raise UserError(f"{source}: column {table.columns[table.columns.duplicated()][0]!r} occurs twice.")
    kinds, splitters = config.column_kinds(), {"--group": config.group, "--time": config.time}
    flags = dict.fromkeys(kinds, "--columns") | dict.fromkeys(config.text, "--text") | {config.image: "--image"}
    for flag, name in [("--target", target), *splitters.items(), *((flag, name) for name, flag in flags.items())]:
        if name and name not in names:
            raise UserError(f"{flag} {name}: no such column in {source}.{did_you_mean(name, names)}")
    if target in flags and target not in config.column_formats():
        given = f"{target}={kinds[target]}" if flags[target] == "--columns" else target
        raise UserError(f"{flags[target]} {given}: {target} is the target; --task gives its kind.")
    for flag, name in splitters.items():
        if name == target:
            raise UserError(f"{flag} {target}: the target cannot be used to split.")
    if len(names) == 1:
        raise UserError(f"{source} has only the column {names[0]!r}: there is nothing to predict it from.")


# ---------------------------------------------------------------- splits → batches


def fit_splits(
    splits: Splits, config: DataConfig, task: Task, *, text_ids: bool = False
) -> tuple[Splits, Preprocessor, list[dict[str, Encoded]]]:
    """Fit the preprocessor to the training records and encode each split, once.

    text_ids: texts stay ids, for a network that reads them, instead of becoming numbers.
    Returns (splits, preprocessor, [encoded columns of train, validation, test]). With --skip-broken the splits come
    back without the records that cannot be read; otherwise the first of them raises UserError.
    """
    parts, fitted = {}, None

    def fit(records: pd.DataFrame):
        labels = task.labels(task.encode(records[splits.target]))
        return Preprocessor.fit_encode(records.drop(columns=splits.target), config, labels)

    for name, source in zip(("train", "val", "test"), splits.sources, strict=True):
        encode = fit if fitted is None else fitted.encode_columns
        with error_prefix(source), shared_work():
            encoded, records = _without_broken(encode, getattr(splits, name), config.skip_broken, splits.notes)
        if fitted is None:
            fitted, encoded = encoded
            if not text_ids:
                fitted, encoded = fitted.derive(encoded, task.scores(task.encode(records[splits.target])))
        parts[name], splits = encoded, replace(splits, **{name: records})
    return splits, fitted, list(parts.values())


def _without_broken(encode: Callable, records: pd.DataFrame, skip: bool, notes: list[str]):
    """Return (encode(records), records); with `skip`, of the records that can be read."""
    while True:  # each column has its own broken records
        try:
            return encode(records), records
        except BrokenRecords as error:
            if not skip:
                raise
            notes.append(f"{len(error.messages)} broken records left out, the first: {error}")
            records = records.iloc[np.setdiff1d(np.arange(len(records)), list(error.messages))]
            if records.empty:
                raise UserError(f"all records are broken; the first: {error}") from None


class TensorBatches(Dataset):
    """Encoded records in memory: a tensor, or named tensors. `__getitems__` gathers a whole batch at once; the usual
    access and collation, item by item, costs more than a small network's step.

    Each of several processes gathers the inputs of its part of a batch; the targets belong to the whole batch.
    features: what batches hold in place of inputs, see `cache_features` of backbones/pretrained.py.
    """

    def __init__(self, inputs: Tensor | dict[str, Encoded], targets: Tensor):
        self.inputs, self.targets = inputs, targets
        self.features: dict[str, Tensor] = {}
        self.device, self.on_device = torch.device("cpu"), {}

    def keep_on(self, device: torch.device) -> None:
        """Keep the inputs on a GPU as well, if they fit: batches are then gathered there."""
        is_dict = isinstance(self.inputs, dict)
        self.device, self.on_device = device, keep_on_device(self.inputs | self.features, device) if is_dict else {}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        inputs, targets = self.__getitems__(torch.tensor([index]))
        return {k: x[0] for k, x in inputs.items()} if isinstance(inputs, dict) else inputs[0], targets[0]

    def __getitems__(self, rows: Tensor):
        own = part(rows)
        if not isinstance(self.inputs, dict):
            return self.inputs[own], self.targets[rows]
        others = {name: x for name, x in (self.inputs | self.features).items() if name not in self.on_device}
        inputs = gather(others, own)
        if self.on_device:
            inputs |= gather(self.on_device, move(own, self.device))
        return inputs, self.targets[rows]


class LengthBatchSampler(Sampler):
    """Yield an index tensor for each batch, in random order (of torch's global generator) or in sequence.

    A last batch of one record joins the one before: batch norm needs two, and no record is lost.
    lengths: ids of each text. A batch then holds records of similar length, so that little is padded: each window of
    random batches is sorted by length; without `shuffle` all records are.
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


def make_loader(inputs, targets: Tensor, batch_size: int, *, shuffle: bool) -> DataLoader:
    """Return a DataLoader of (inputs, targets) batches over records in memory.

    inputs: a tensor (N, …), or named tensors as `Preprocessor.encode` returns them.
    """
    columns = inputs.values() if isinstance(inputs, dict) else ()
    lengths = next((x.lengths for x in columns if hasattr(x, "lengths")), None)
    sampler = LengthBatchSampler(len(targets), batch_size, shuffle=shuffle, lengths=lengths)
    return DataLoader(TensorBatches(inputs, targets), batch_sampler=sampler, collate_fn=_as_is)


def choose_batch_size(rows: int) -> int:
    """Return about a twentieth of the training rows, between 32 and 1024."""
    return min(1024, max(32, 2 ** round(math.log2(max(1, rows / 20)))))


def make_loaders(
    splits: Splits, preprocessor: Preprocessor, encoded: list[dict[str, Encoded]], task: Task, batch_size: int = 0
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Return the loaders of the train (shuffled), validation and test splits.

    encoded: the columns of each split, as `fit_splits` returns them; they are used up.  batch_size: 0 = see
    `choose_batch_size`.
    """
    batch_size = batch_size or choose_batch_size(len(splits.train))
    loaders = []
    for records, source, columns in zip((splits.train, splits.val, splits.test), splits.sources, encoded, strict=True):
        with error_prefix(source):
            targets = task.encode(records[splits.target])
        is_training = not loaders
        size = batch_size if is_training else preprocessor.eval_batch_size
        loaders.append(make_loader(preprocessor.join(columns), targets, size, shuffle=is_training))
        columns.clear()  # numbers are copied when they are joined
    return tuple(loaders)
