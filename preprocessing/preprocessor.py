"""The fitted columns of a record: records → named tensors."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from config import DataConfig, from_plain
from errors import BrokenRecords, UserError, did_you_mean
from preprocessing.column import Column, Encoded, evenly_spaced
from preprocessing.infer import KINDS, infer_kind
from preprocessing.parsing import check_flat, frame_of, without_words
from preprocessing.ragged import Ragged, RaggedColumns
from preprocessing.text_features import TextFeatures
from sources.disk import is_large, on_disk

INPUTS = ("numbers", "categories", "text", "image")  # the named tensors, in the order of a network's arguments


def as_frame(records, lone: str = "") -> pd.DataFrame:
    """Return records as a DataFrame: a DataFrame, a dict, a list of dicts, or bare cells of the `lone` column.

    Rows of a list are numbered from 1. Raises UserError if a column occurs twice or the lone column is missing.
    """
    frame = records
    if not isinstance(records, pd.DataFrame):
        records = [records] if isinstance(records, (dict, str, bytes)) else list(records)
        frame = frame_of([{lone: record} if lone and not isinstance(record, dict) else record for record in records])
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="row")
        if lone and not records:
            frame[lone] = []
    if not all(isinstance(name, str) for name in frame.columns):
        frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    if frame.columns.has_duplicates:
        raise UserError(f"column {frame.columns[frame.columns.duplicated()][0]!r} occurs twice: rename one of them.")
    return frame


def gather(encoded: dict[str, Encoded], rows: Tensor) -> dict[str, Tensor]:
    """Return the named tensors of some rows; texts are padded to the longest of them."""
    return {name: part[rows] for name, part in encoded.items()}


def take(part: Encoded, rows: Tensor) -> Encoded:
    """Return some records of an encoded column."""
    return part[rows] if isinstance(part, Tensor) else part.take(rows)


def _keep(part: Encoded, columns: int) -> Encoded:
    """Return an encoded column; if all the `columns` of its table are too large for memory, as a file."""
    if not isinstance(part, Tensor) or part.dim() != 2 or not is_large(columns * part.nbytes):
        return part
    return _side_by_side([part], columns)


def _side_by_side(parts: list[Tensor], columns: int = 1) -> Tensor:
    """Return tensors (N, …) joined along the second dimension, in a file if `columns` of them are large."""
    if torch.compiler.is_compiling() or not is_large(columns * sum(part.nbytes for part in parts)):
        return torch.cat(parts, dim=1)
    count, width = len(parts[0]), sum(part.shape[1] for part in parts)
    joined, start = torch.from_numpy(on_disk((count, width), parts[0].numpy().dtype)), 0
    for part in parts:
        joined[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return joined


def layout_of(kinds: dict[str, str]):
    """Return the `sources.Layout` of columns of these kinds (name → kind); columns that are left out do not count."""
    from sources.layout import Layout  # here, because sources imports preprocessing.parsing

    columns = {name: KINDS[kind] for name, kind in kinds.items() if kind in KINDS}
    return Layout(
        paths=frozenset(name for name, column in columns.items() if column.path_cells),
        texts=frozenset(name for name, column in columns.items() if column.long_cells),
        lone=next((name for name, column in columns.items() if column.file_endings), "") if len(columns) == 1 else "",
    )


@dataclass(frozen=True)
class Preprocessor:
    """The fitted columns of a record, and what was left out and why.

    `preprocessor(records)` is `batch(encode(records))`; training, prediction, serving and export use these two steps.
    """

    columns: tuple[Column, ...]
    left_out: dict[str, tuple[str, str]]  # name → (kind, why)
    missing: tuple[str, ...] = ()  # words that stand for a missing value in any column (--missing)
    derived: tuple[TextFeatures, ...] = ()  # numbers made from other columns with the help of the targets

    @classmethod
    def fit(cls, records: pd.DataFrame, config: DataConfig, labels: np.ndarray | None = None) -> "Preprocessor":
        """Fit to training records without the target.

        labels: class index of each row (N,); None for regression.
        Raises UserError for a column that cannot be read as its kind, or if no column is left.
        """
        return cls.fit_encode(records, config, labels)[0]

    @classmethod
    def fit_encode(
        cls, records: pd.DataFrame, config: DataConfig, labels: np.ndarray | None = None
    ) -> tuple["Preprocessor", dict[str, Encoded]]:
        """Fit as `fit` does, and return the training records encoded as well, as `encode_columns` does."""
        records = without_words(records, config.missing)
        overruled, columns, parts, left_out = config.column_kinds(), [], {}, {}
        splitters = {config.group: "rows are grouped by it", config.time: "rows are split by it"}
        for name in map(str, records.columns):
            if name in overruled and not (name in splitters and name in config.column_formats()):
                kind, why = overruled[name], "by --columns"
            elif name and name in splitters:
                kind, why = "drop", splitters[name]
            else:
                check_flat(records[name], f" or give --columns {name}=drop.")
                kind, why = infer_kind(records[name], config)
            if kind in KINDS:
                column, encoded = KINDS[kind].fit_encode(records[name], config, labels)
                columns.append(column)
                parts[name] = _keep(encoded, len(records.columns))
            else:
                left_out[name] = (kind, why)
        if not columns:
            reasons = "; ".join(f"{name}: {kind}, {why}" for name, (kind, why) in left_out.items())
            raise UserError(f"no column is left to learn from ({reasons}). Override with --columns NAME=KIND.")
        preprocessor = cls(_with_disjoint_ids(columns), left_out, config.missing)
        for column, fitted in zip(preprocessor.columns, columns, strict=True):
            if column is not fitted:  # its ids have moved
                parts[column.name] = parts[column.name].shift(column.offset)
        return preprocessor, parts

    def derive(self, parts: dict[str, Encoded], targets: np.ndarray) -> tuple["Preprocessor", dict[str, Encoded]]:
        """Fit numbers that take the place of the ids of texts; return (a preprocessor with them, encoded columns).

        parts: the encoded columns of the training records.  targets: float32 (N, scores), see `Task.scores`.
        """
        derived, parts = [], dict(parts)
        for column in self.inputs.get("text", ()):
            features, numbers = TextFeatures.fit_encode(column, parts[column.name], targets)
            while features.name in parts:  # a column may have any name
                features = replace(features, name=f"{features.name}'")
            derived.append(features)
            parts[features.name] = numbers
        return replace(self, derived=tuple(derived)), parts

    # ------------------------------------------------------------ records → tensors

    def __call__(self, records) -> dict[str, Tensor]:
        """Turn records (DataFrame, dict, list of dicts, or bare cells of the only column) into named tensors (N, …).

        Raises UserError, naming row and column, for a missing column or a cell that cannot be read.
        """
        encoded = self.encode(records)
        return self.batch(gather(encoded, torch.arange(len(next(iter(encoded.values()))))))

    def encode(self, records) -> dict[str, Encoded]:
        """Encode records, once; a batch is a `gather` of rows from the result."""
        return self.join(self.encode_columns(records))

    def encode_columns(self, records) -> dict[str, Encoded]:
        """Encode records, each column on its own."""
        cells = dict(self.as_frame(records).items())
        for column in self.columns:
            check_flat(cells[column.name])
        count = len(self.columns)
        parts = {column.name: _keep(column.encode(cells[column.name]), count) for column in self.columns}
        return parts | {features.name: features.encode(parts[features.source]) for features in self.derived}

    def encode_readable(self, records: pd.DataFrame, encode: Callable | None = None):
        """Return (encoded columns, positions of the records that can be read, position → what is wrong with others).

        encode: what to do with the records instead of `encode_columns`, such as `Pipeline.predict_logits`.
        """
        rows, broken = np.arange(len(records)), {}
        while True:  # each pass finds the broken cells of one column
            try:
                return (encode or self.encode_columns)(records.iloc[rows]), rows, broken
            except BrokenRecords as error:
                broken |= {int(rows[i]): message for i, message in error.messages.items()}
                rows = np.delete(rows, list(error.messages))

    def too_large(self, records, parts: dict[str, Encoded], overflowed: Tensor) -> BrokenRecords:
        """Return the error for records whose logits overflow; it names the number that is farthest from training.

        parts: their encoded columns.  overflowed: a mask (N,).
        """
        frame, messages = self.as_frame(records), {}
        for i in overflowed.nonzero()[:, 0].tolist():
            numbers = [column.name for column in self.columns if column.input == "numbers"]
            sizes = {name: float(parts[name][i].abs().max()) for name in numbers}
            name = max(sizes, key=sizes.get, default=self.names[0])
            why = f"{str(frame[name].iloc[i])!r} is too large a number" if sizes else "the logits are not finite"
            messages[i] = f"row {frame.index[i]}, column {name!r}: {why}."
        return BrokenRecords(messages)

    def join(self, parts: dict[str, Encoded]) -> dict[str, Encoded]:
        """Put the columns of each input side by side."""
        joined = {}
        for name, columns in self.inputs.items():
            of_input = [parts[column.name] for column in columns]
            if len(of_input) == 1:
                joined[name] = of_input[0]
            elif isinstance(of_input[0], Ragged):
                joined[name] = RaggedColumns(of_input)
            else:
                joined[name] = _side_by_side(of_input)
        return joined

    def batch(self, inputs: dict[str, Tensor], *, training: bool = False) -> dict[str, Tensor]:
        """Complete a batch of encoded records on its device: augment (if `training`) and normalise.

        Floats are complete: numbers, and the cached features of a frozen network.
        """
        return {
            name: x if x.is_floating_point() else self.inputs[name][0].batch(x, training=training)
            for name, x in inputs.items()
        }

    def as_frame(self, records) -> pd.DataFrame:
        """Return records as a DataFrame. Raises UserError for a missing column."""
        frame = as_frame(records, self.lone.name if self.lone else "")
        if frame.empty and not len(frame.columns):  # an empty list has every column
            frame = frame.reindex(columns=self.names)
        for name in self.names:
            if name not in frame:
                others = [other for other in frame if other not in self.names]
                raise UserError(f"column {name!r} is missing.{did_you_mean(name, others, frame.columns)}")
        return without_words(frame, self.missing)

    # ------------------------------------------------------------ what it holds

    @cached_property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    @cached_property
    def kinds(self) -> dict[str, str]:
        return {column.name: column.kind for column in self.columns}

    @cached_property
    def inputs(self) -> dict[str, list[Column]]:
        """The columns of each named tensor, in the order of INPUTS."""
        replaced = {features.source for features in self.derived}
        columns = [*(column for column in self.columns if column.name not in replaced), *self.derived]
        found = {name: [column for column in columns if column.input == name] for name in INPUTS}
        return {name: columns for name, columns in found.items() if columns}

    @property
    def lone(self) -> Column | None:
        """The column, if there is only one: then a record may be a bare cell."""
        return self.columns[0] if len(self.columns) == 1 else None

    @property
    def model_args(self) -> dict:
        """Constructor arguments that the data give a network."""
        return {k: v for columns in self.inputs.values() for k, v in columns[0].model_args(columns).items()}

    @property
    def eval_batch_size(self) -> int:
        """Records in a forward pass without gradients: about 64 MB of numbers, fewer texts and images."""
        width = self.model_args.get("in_features", 0)
        return max(1, min(2**24 // max(1, width), *(column.eval_batch_size for column in self.columns)))

    @property
    def read_rows(self) -> int:
        """Records that a stream of predictions holds in memory at once."""
        return min(column.read_rows for column in self.columns)

    @property
    def layout(self):
        """What a reader needs to know about the columns (a `sources.Layout`)."""
        return layout_of(self.kinds)

    def summary(self) -> list[tuple[str, str, str]]:
        """(column, kind, what becomes of it), for the decision table."""
        used = [(column.name, column.kind, column.summary()) for column in self.columns]
        left_out = [
            (name, kind, f"left out{' ' if why.startswith('by') else ': '}{why}")
            for name, (kind, why) in self.left_out.items()
        ]
        return used + left_out

    # ------------------------------------------------------------ what is kept of the records

    def examples(self, records: pd.DataFrame, count: int) -> list[dict]:
        """Return some records, evenly spaced, as dicts that JSON can hold."""
        chosen = evenly_spaced(records, min(count, *(column.max_examples for column in self.columns)))
        cells = {column.name: column.examples(chosen[column.name]) for column in self.columns}
        return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]

    def made_up(self, profile: dict, count: int) -> list[dict]:
        """Return records of which no cell is copied from a training record, for a self-check that keeps none.

        profile: the distribution of the training data. The cells of each column are spread over its range, in an order
        that differs from column to column.
        """
        count = min(count, *(column.max_examples for column in self.columns))

        def cell(row: int, i: int, column: Column):
            position = (row * (2 * i + 1) % count + 0.5) / count
            return column.made_up(profile.get(column.name, {}), position)

        return [{column.name: cell(row, i, column) for i, column in enumerate(self.columns)} for row in range(count)]

    def profile_values(self, records, parts: dict[str, Encoded]) -> dict[str, np.ndarray]:
        """Return what drift is measured on. parts: what `encode_columns` made of these records."""
        frame, values = self.as_frame(records), {}
        for column in self.columns:
            values |= column.profile_values(frame[column.name], parts[column.name])
        return values

    def unknown(self, records, parts: dict[str, Encoded]) -> dict[str, Tensor]:
        """Return masks (N,) of cells whose value training did not know, for the columns that have any.

        parts: what `encode_columns` made of these records.
        """
        columns = [column for column in self.columns if type(column).unknown is not Column.unknown]
        if not columns:
            return {}
        frame = self.as_frame(records)
        masks = {column.name: column.unknown(frame[column.name], parts[column.name]) for column in columns}
        return {name: mask for name, mask in masks.items() if mask is not None and bool(mask.any())}

    def why_unknown(self, records, masks: dict[str, Tensor]) -> list[tuple[int, str]]:
        """Return (position, what is unknown about it) of the cells that `unknown` marked, record by record."""
        frame = self.as_frame(records)
        found = [
            (i, f"column {column.name!r}: {column.why_unknown(frame[column.name].iat[i])}")
            for column in self.columns
            if column.name in masks
            for i in masks[column.name].nonzero().squeeze(1).tolist()
        ]
        return sorted(found, key=lambda item: item[0])

    def state(self) -> dict:
        """Return plain containers, from which `from_state` makes an equal preprocessor."""
        columns = [{"kind": column.kind, **asdict(column)} for column in self.columns]
        left_out = {name: list(why) for name, why in self.left_out.items()}
        derived = [asdict(features) for features in self.derived]
        return {"columns": columns, "left_out": left_out, "missing": list(self.missing), "derived": derived}

    @classmethod
    def from_state(cls, state: dict) -> "Preprocessor":
        columns = tuple(from_plain(KINDS[column["kind"]], column) for column in state["columns"])
        left_out = {name: tuple(why) for name, why in state.get("left_out", {}).items()}
        derived = tuple(from_plain(TextFeatures, features) for features in state.get("derived", ()))
        return cls(columns, left_out, tuple(state.get("missing", ())), derived)


def _with_disjoint_ids(columns: list[Column]) -> tuple[Column, ...]:
    """Give each text column its own range of ids."""
    numbered, offset = [], 0
    for column in columns:
        numbered.append(replace(column, offset=offset) if column.own_ids and offset else column)
        offset += column.own_ids
    return tuple(numbered)
