"""The registry of column kinds, and the choice of a kind from a column's training cells."""

import pandas as pd

from config import DataConfig
from preprocessing.boolean import BooleanColumn
from preprocessing.category import CategoryColumn
from preprocessing.column import Cells, Column
from preprocessing.date import DateColumn
from preprocessing.image import ImageColumn
from preprocessing.number import NumberColumn
from preprocessing.text import TextColumn

# In the order in which they are tried; a new kind is one line here.
KINDS: dict[str, type[Column]] = {
    column.kind: column for column in (ImageColumn, BooleanColumn, NumberColumn, DateColumn, TextColumn, CategoryColumn)
}


def infer_kind(values: pd.Series, config: DataConfig) -> tuple[str, str]:
    """Return (kind, why) of a column. The kinds "id" and "constant" are left out; for them `why` is the reason.

    Raises UserError for a column of numbers or dates in which a few cells are something else.
    """
    cells = Cells(values)
    if cells.distinct == 0:
        return "constant", "no values in the training rows"
    if cells.distinct == 1 and len(cells.present) == len(values):
        return "constant", "one value only"
    column = next(column for column in KINDS.values() if column.detect(cells, config))
    reason = column.id_reason(cells, config)
    return ("id", reason) if reason else (column.kind, "")
