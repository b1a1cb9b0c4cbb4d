"""Read spreadsheets (xlsx, xls, ods, …): every cell keeps its type."""

import datetime
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from errors import UserError, did_you_mean
from sources.encodings import open_unpacked, reading
from sources.headers import as_note, find_header
from sources.layout import Layout
from sources.workbook import load_cells, load_cells_within

SAMPLE = 200  # rows that are looked at to find the header


def read_sheet(path: str | Path, layout: Layout, rows: int, notes: list[str]) -> Iterator[pd.DataFrame]:
    """Yield a sheet in frames of at most `rows`. Numbers, dates, booleans and text stay so; empty cells are missing.

    notes: gets a line if there are several sheets, and if rows above the header are skipped.
    Raises UserError if the file is damaged or protected, or there is no such sheet, header or name of a column.
    """
    name, names, cells = _cells(path, layout)
    if len(names) > 1 and not layout.sheet:
        notes.append(f"{path}: sheet {name!r} read, of {', '.join(map(repr, names))}")
    cells = _without_empty_edges(cells)
    if not cells:
        others = f" --sheet reads another one:{did_you_mean('', [n for n in names if n != name])[11:]}"
        raise UserError(f"{path}: the sheet {name!r} is empty.{others if len(names) > 1 else ''}")
    texts = [[_as_name(cell) for cell in row] if any(map(_is_filled, row)) else [] for row in cells[:SAMPLE]]
    first = find_header(texts) if layout.skip_rows < 0 else layout.skip_rows
    first += next((i for i, row in enumerate(cells[first:]) if any(map(_is_filled, row))), 0)
    if first >= len(cells):
        raise UserError(f"{path}: --skip-rows {layout.skip_rows} leaves no header.")
    if any(map(any, texts[:first])):
        notes.append(f"{path}: {as_note(texts[:first], first)}")
    header = [_as_name(cell) or f"Unnamed: {i}" for i, cell in enumerate(cells[first])]
    for i, column in enumerate(header):
        if column in header[:i]:
            raise UserError(f"{path}: column {column!r} occurs twice: rename one of them.")
    records = [row for row in cells[first + 1 :] if any(map(_is_filled, row))]
    columns = list(zip(*records, strict=True)) or [()] * len(header)
    table = {
        name: _as_column(column)
        for name, column in zip(header, columns, strict=True)
        if not name.startswith("Unnamed: ") or any(map(_is_filled, column))
    }
    frame = pd.DataFrame(table)
    for start in range(0, len(frame), rows):
        yield frame.iloc[start : start + rows]


def _cells(path: str | Path, layout: Layout) -> tuple[str, list[str], list[list]]:
    """Return the name of the sheet that is read, the names of all, and the rows of cells; "" is an empty cell."""
    with reading(path):
        try:
            if layout.max_bytes:
                return load_cells_within(str(path), layout.sheet, layout.max_bytes)
            with open_unpacked(path) as file:
                return load_cells(file, layout.sheet)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        except KeyError as error:
            hint = did_you_mean(layout.sheet, error.args)
            raise UserError(f"{path}: there is no sheet {layout.sheet!r}.{hint}") from None


def _is_filled(cell) -> bool:
    return cell != "" and not (isinstance(cell, str) and not cell.strip())


def _without_empty_edges(cells: list[list]) -> list[list]:
    """Leave out empty columns before the first and after the last filled one, and empty rows at the end."""
    while cells and not any(map(_is_filled, cells[-1])):
        cells.pop()
    filled = [i for i, column in enumerate(zip(*cells, strict=True)) if any(map(_is_filled, column))]
    return [row[filled[0] : filled[-1] + 1] for row in cells]


def _as_name(cell) -> str:
    """Return a cell as the name of a column."""
    return str(_as_value(cell)).removesuffix(" 00:00:00").strip()


def _as_value(cell):
    """Return an integer for a float that is one, a datetime for a date, and text for a time or a duration."""
    if isinstance(cell, float):
        return int(cell) if cell.is_integer() else cell
    if isinstance(cell, datetime.date) and not isinstance(cell, datetime.datetime):
        return datetime.datetime.combine(cell, datetime.time())
    return str(cell) if isinstance(cell, (datetime.time, datetime.timedelta)) else cell


def _as_column(cells: tuple) -> pd.Series:
    values = [None if cell == "" else _as_value(cell) for cell in cells]
    return pd.Series(values, dtype=None if any(v is not None for v in values) else object)
