"""Write tables piece by piece, as csv, tsv, jsonl or parquet."""

import csv
import io
import json

import pandas as pd

from errors import UserError


class Writer:
    """Write frames with the same columns one after the other. form: csv, tsv, jsonl or parquet."""

    def __init__(self, file, form: str):
        self.file, self.form, self.parquet = file, form, None
        self.first = True

    def write(self, frame: pd.DataFrame) -> None:
        """Raises UserError if a column cannot be stored in the type that it had in the first frame."""
        import pyarrow as pa
        from pyarrow import parquet

        if self.form == "jsonl":
            self.file.write(_json_lines(frame))
            return
        table = pa.table({name: _as_column(frame[name]) for name in frame})
        if self.form == "parquet":
            self.parquet = self.parquet or parquet.ParquetWriter(self.file, table.schema)
            self.parquet.write_table(_with_schema(table, self.parquet.schema))
        else:
            self._write_csv(table, "\t" if self.form == "tsv" else ",")

    def _write_csv(self, table, separator: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.csv as arrow

        if self.first:
            head = io.StringIO()
            csv.writer(head, delimiter=separator, lineterminator="\n").writerow(table.column_names)
            self.file.write(head.getvalue().encode())
        self.first = False
        # Arrow quotes either all strings or none
        words = [c for c in table.columns if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
        special = any(pc.any(pc.match_substring_regex(column, f'[{separator}"\r\n]')).as_py() for column in words)
        quoting = "needed" if special else "none"
        options = arrow.WriteOptions(include_header=False, delimiter=separator, quoting_style=quoting)
        arrow.write_csv(table, self.file, options)

    def close(self) -> None:
        if self.parquet:
            self.parquet.close()


def whole_again(frame: pd.DataFrame) -> pd.DataFrame:
    """Turn columns of whole numbers, which pandas makes floats where a cell is empty, back into integers."""
    whole = {
        name: frame[name].astype("Int64")
        for name in frame
        if frame[name].dtype == float and frame[name].hasnans and _are_whole(frame[name].dropna())
    }
    return frame.assign(**whole)


def _are_whole(numbers: pd.Series) -> bool:
    return bool((numbers % 1 == 0).all() and (numbers.abs() < 2**53).all())


def _json_lines(frame: pd.DataFrame) -> bytes:
    encode, names = json.JSONEncoder(ensure_ascii=False, default=str).encode, list(frame)
    cells = [c.astype(object).where(c.notna(), None) if c.hasnans else c for c in (frame[name] for name in names)]
    rows = zip(*(column.tolist() for column in cells), strict=True)
    return "".join(encode(dict(zip(names, row, strict=True))) + "\n" for row in rows).encode("utf-8", "replace")


def _as_column(cells: pd.Series):
    """Return cells as an Arrow array; those of several types, and lists and objects of JSON, as text."""
    import pyarrow as pa

    try:
        column = pa.array(cells, from_pandas=True)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not pa.types.is_nested(column.type):
            return column
    except (pa.ArrowException, OverflowError):
        pass
    cells = cells.astype(object).where(cells.notna(), None)
    text = [c if c is None or isinstance(c, str) else json.dumps(c, ensure_ascii=False, default=str) for c in cells]
    return pa.array(text, pa.string())


def _with_schema(table, schema):
    import pyarrow as pa

    try:
        return table.cast(schema)
    except (pa.ArrowException, ValueError):
        names = [field.name for field in table.schema if field.type != schema.field(field.name).type]
        raise UserError(
            f"column {names[0]!r} changes its type in the course of the input, which parquet cannot hold: "
            "write csv or jsonl."
        ) from None
