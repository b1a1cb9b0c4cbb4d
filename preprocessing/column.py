"""The base class of the column kinds: the methods of a column, with defaults for what a simple kind does not need."""

import math
from collections.abc import Callable
from datetime import date
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from config import DataConfig
from preprocessing.number_format import Numbers, find_numbers
from preprocessing.parsing import to_text
from preprocessing.ragged import Ragged

Encoded = Tensor | Ragged  # a column's records: (N, …), or token ids of different lengths


def evenly_spaced(records: pd.DataFrame | Tensor, count: int):
    """Return up to `count` evenly spaced records: tables are often sorted by class."""
    count = min(count, len(records))
    rows = [i * len(records) // count for i in range(count)]
    return records.iloc[rows] if isinstance(records, pd.DataFrame) else records[rows]


def to_tensor(values: np.ndarray) -> Tensor:
    """Return an array as a tensor that shares its memory, copied only if it is read-only (as arrays of Arrow are)."""
    return torch.from_numpy(np.require(values, requirements="W"))


def hash_cells(values: pd.Series) -> np.ndarray:
    """Return a 64-bit hash of each cell: 1 and 1.0 are equal, texts only if all their characters are."""
    if pd.api.types.is_numeric_dtype(values.dtype):
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
        if np.nanmax(np.abs(numbers), initial=0) < 2**53:  # larger whole numbers would lose their last digits
            return pd.util.hash_array(numbers + 0.0)  # -0.0 is 0.0
    elif isinstance(values.dtype, pd.StringDtype):
        return pd.util.hash_pandas_object(values, index=False).to_numpy()
    return pd.util.hash_pandas_object(values.map(str, na_action="ignore").astype("str"), index=False).to_numpy()


class Cells:
    """The training cells of one column, with what several kinds need to recognise themselves, computed once."""

    def __init__(self, values: pd.Series):
        self.values, self.name = values, str(values.name)

    @cached_property
    def text(self) -> pd.Series:
        """Stripped text; missing cells are missing. Bytes of files are represented by their hash."""
        values = self.values
        if values.dtype == object:
            values = values.map(lambda cell: f"bytes {hash(cell)}" if isinstance(cell, bytes) else cell)
        return to_text(values)

    @cached_property
    def present(self) -> pd.Series:
        return self.text.dropna()

    @cached_property
    def distinct(self) -> int:
        return self.present.nunique()

    @cached_property
    def words(self) -> float:
        """Mean number of words in a cell."""
        return float(self.present.str.count(r"\s+").mean()) + 1

    @cached_property
    def numbers(self) -> Numbers | None:
        """How the numbers of the column are written; None if most cells are not numbers."""
        return find_numbers(self.values)


class Column:
    """A fitted column: the base of one frozen dataclass per kind.

    A kind's fields are plain values (str, int, float, list), so `dataclasses.asdict` is its whole state. Only fitting
    makes one, so an unfitted column cannot exist. All kinds share two steps: `encode` turns cells into tensors, once
    per record; `batch` completes a batch on its device. A simple kind has `detect`, `fit`, `parse`, `transform`,
    `model_args`, `summary` and `json_schema`; `number.py` is an example.
    """

    name: str
    kind: ClassVar[str]
    input: ClassVar[str]  # the named tensor that it feeds: numbers, categories, text or image
    eval_batch_size: ClassVar[int] = 1024  # records in a forward pass without gradients; more leave the caches
    read_rows: ClassVar[int] = 65_536  # records that predict.py holds in memory at once
    file_endings: ClassVar[tuple[str, ...]] = ()  # of files that can be one cell each
    path_cells: ClassVar[bool] = False  # cells may be file names, relative to the folder of their table
    long_cells: ClassVar[bool] = False  # a cell may be as long as a book
    is_content: ClassVar[bool] = False  # equal cells are copies rather than a coincidence
    encodes_outside_graph: ClassVar[bool] = False  # an exported graph takes ids that only `encode` can make
    max_examples: int = 16  # records that a checkpoint keeps for its self-check
    onnx_keys: tuple | list = ()  # strings that an exported graph maps to 1, 2, …
    unknown_cells: ClassVar[str] = "values unknown (unseen or too rare in training)"  # what `unknown` marks
    near: ClassVar[float] = 1.0  # similarity of `fingerprints` from which on two cells are nearly the same
    own_ids: int = 0  # number of token ids that only this column uses, starting at 2 + `offset`

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        """Tell whether training cells are of this kind. Kinds are tried in the order of the registry."""
        raise NotImplementedError

    @classmethod
    def id_reason(cls, cells: Cells, config: DataConfig) -> str:
        """Tell why a column of this kind is only an identifier, from which nothing can be learned; "" if it is not."""
        return ""

    @classmethod
    def keys(cls, values: pd.Series) -> np.ndarray:
        """Return a hash of each cell, uint64 (N,), equal for equal cells."""
        return hash_cells(values)

    @classmethod
    def fit(cls, values: pd.Series, config: DataConfig) -> Self:
        """Fit to training cells. Raises UserError if they are not of this kind."""
        return cls.fit_encode(values, config)[0]

    @classmethod
    def fit_encode(
        cls, values: pd.Series, config: DataConfig, labels: np.ndarray | None = None
    ) -> tuple[Self, Encoded]:
        """Fit to training cells and encode them; a kind that is slow to read overrides this, to read each cell once.

        labels: class index of each row (N,); None for regression.
        """
        column = cls.fit(values, config)
        return column, column.encode(values)

    def parse(self, values: pd.Series) -> np.ndarray:
        """Return the cells as numbers, strings, ids or pixels (N, …): what an exported graph takes for this column.

        Raises UserError, naming row and column, for a cell that cannot be read.
        """
        raise NotImplementedError

    def transform(self, x: Tensor) -> Tensor:
        """Turn parsed cells into this column's part of its input (N, …), in operations that ONNX has as well."""
        raise NotImplementedError

    def encode(self, values: pd.Series) -> Encoded:
        """Encode cells. Raises UserError, naming row and column, for a cell that cannot be read."""
        return self.transform(to_tensor(self.parse(values)))

    def batch(self, x: Tensor, *, training: bool = False) -> Tensor:
        """Complete a batch of encoded records on its device; only `training` batches may be augmented."""
        return x

    @classmethod
    def model_args(cls, columns: list[Self]) -> dict:
        """Return the constructor arguments that all columns of one input give a network."""
        raise NotImplementedError

    @classmethod
    def comparable(cls, train: pd.Series, config: DataConfig) -> Callable[[pd.Series], np.ndarray]:
        """Return a function from cells to values (N,) that are equal if the cells are, however they are written."""
        return cls.fit(train, config).parse

    def summary(self) -> str:
        """Say in a few words what becomes of the cells."""
        raise NotImplementedError

    def json_schema(self, profile: dict, examples: list) -> dict:
        """Describe one cell of a request as JSON schema.

        profile: the training distribution of this column (see evaluation/drift.py).  examples: some cells to show.
        """
        raise NotImplementedError

    def profile_values(self, values: pd.Series, encoded: Encoded) -> dict[str, np.ndarray]:
        """Return what drift is measured on, by name: floats with NaN, or words with "" for a missing cell."""
        return {self.name: self.parse(values)}

    def unknown(self, values: pd.Series, encoded: Encoded) -> Tensor | None:
        """Return a mask (N,) of the cells whose value training did not know; None for a kind that knows every value."""
        return None

    def why_unknown(self, cell) -> str:
        """Say what is unknown about a cell that `unknown` marks."""
        return f"{shorten(cell)} was not seen in training (or too rarely)"

    def fingerprints(self, values: pd.Series, encoded: Encoded) -> Tensor | None:
        """Return a unit vector for each cell, (N, D): products are similarities. None for a kind without copies that
        are slightly changed."""
        return None

    def shortcuts(self, parts: list[pd.Series]) -> pd.DataFrame | None:
        """Return numbers that could tell classes apart for the wrong reason, a row for each cell of all parts: names of
        columns say what they are. None for a kind that has none."""
        return None

    def occlusions(self, cell) -> list[tuple[str | tuple, object]]:
        """Return parts of a cell, each with the cell without it. Parts are words, or squares of a picture (left, top,
        side) as shares of its side. Empty for a kind without parts."""
        return []

    def times(self, values: pd.Series) -> np.ndarray | None:
        """Return when each record was, as float64 (N,) with NaN; None for a kind that is no time."""
        return None

    def made_up(self, profile: dict, position: float | None = None):
        """Return a cell that is plausible, but of no training record.

        profile: as in `json_schema`.  position: 0 … 1, where in the range of the training cells; None = a usual cell.
        """
        raise NotImplementedError

    def examples(self, values: pd.Series) -> list:
        """Return cells as values that JSON can hold."""
        return [_plain(value) for value in values]

    # For columns whose cells are files (path_cells):

    def check_pixels(self, values: pd.Series, limit: int) -> None:
        """Raise UserError for cells that would take more than `limit` pixels of memory."""

    def sample_files(self, values: pd.Series) -> list[tuple[str, bytes]]:
        """Return (file name, bytes) of each cell."""
        raise NotImplementedError

    def preview(self, x: Tensor):
        """Return a picture (PIL) of a batch as the network sees it; None for a kind that nobody can look at."""
        return None


def shorten(cell) -> str:
    """Return a cell in quotes, cut to a few words."""
    text = str(cell)
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def _plain(value):
    """Return a cell as JSON can hold it: None for a missing one, dates in ISO format."""
    if isinstance(value, str):
        return value
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float)) else str(value)
