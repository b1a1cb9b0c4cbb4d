"""Uploaded files → records: each file is one record, or one file is a table of them."""

import asyncio
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from errors import UserError
from preprocessing.cleaning import replace_surrogates
from serving.batching import Model, Service
from serving.schema import MAX_RECORDS, MAX_WARNINGS, first_warnings
from sources import FORMATS, file_format, is_gzip, open_unpacked, read_records, whole_again

MAX_ROWS = 100_000  # of an uploaded table
MAX_UNPACKED = 256 << 20  # bytes of an uploaded table once it is unpacked, and of its predictions
CHUNK_ROWS = 500  # that are predicted at once, so that other requests get their turn
CHUNK_FILES = 50  # the same for records that hold files, such as images
CELL_TYPES = (str, int, float, bytes, list, dict, datetime, type(None))  # others, such as decimals, become text


async def read_files(request: Request) -> list[UploadFile]:
    """Return the files of a multipart form, whatever its fields are called. Raises UserError if there is none."""
    try:
        form = await request.form(max_files=MAX_RECORDS, max_fields=0)
    except HTTPException as error:
        if error.status_code != 400:  # 400 is a malformed form, others come from the guard
            raise
        raise UserError(f"the form cannot be read: {error.detail}") from None
    except (ValueError, LookupError):  # of a name in another charset
        raise UserError("the form cannot be read: the charset must be utf-8.") from None
    files = [file for _, file in form.multi_items()]
    if not files:
        raise UserError("the form has no file.")
    return files


def is_cell(file: UploadFile, model: Model) -> bool:
    """Return whether a file is the only cell of one record, rather than a table of records."""
    lone = model.pipeline.preprocessor.lone
    name = (file.filename or "").lower().removesuffix(".gz")
    return lone is not None and lone.path_cells and not name.endswith(tuple(FORMATS))


async def predict_table(request: Request, file: UploadFile, service: Service, model: Model) -> str:
    """Return the response for a file of records as JSON, predicted in chunks under one request id.

    Raises UserError, naming the file's row, if it cannot be read, or it or its predictions are too large.
    """
    async with service.one_file:
        return await _predict_table(request, file, service, model)


async def _predict_table(request: Request, file: UploadFile, service: Service, model: Model) -> str:
    name, path, request_id, parts, size = replace_surrogates(file.filename), "", "", [], 0
    keep, warnings, warned = request.query_params.get("keep", "").lower() in ("true", "1"), [], 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = await asyncio.to_thread(_save, file.file, name, folder)
            chunks = _read_chunks(path, model, keep, request.query_params.get("sheet", ""))
            while chunk := await asyncio.to_thread(next, chunks, None):
                first, records, kept = chunk
                if await request.is_disconnected():
                    raise ClientDisconnect
                if first + len(records) - 1 > MAX_ROWS:
                    raise UserError(f"{name}: more than {MAX_ROWS:,} rows: split the file, or use predict.py.")
                request_id, predictions, unknown = await service.predict(records, model, first, request_id)
                warnings, warned = (warnings + unknown)[:MAX_WARNINGS], warned + len(unknown)
                if keep:
                    predictions = [p | {"record": record} for p, record in zip(predictions, kept, strict=True)]
                parts.append(json.dumps(predictions, ensure_ascii=False)[1:-1])
                size += len(parts[-1])
                if size > MAX_UNPACKED:
                    raise UserError(f"{name}: more than {MAX_UNPACKED:,} bytes of predictions: split the file.")
        except UserError as error:
            raise UserError(str(error).replace(path or name, name)) from None
    if not parts:
        raise UserError(f"{name}: there are no rows below the header.")
    shown = json.dumps(first_warnings(warnings, warned), ensure_ascii=False)
    end = f', "warnings": {shown}}}' if warned else "}"
    return f'{{"id": "{request_id}", "predictions": [{", ".join(parts)}]{end}'


def _save(file, name: str, folder: str) -> str:
    """Write a file into a folder, unpacked, under a name with the same ending, and return its path.

    Raises UserError if the name is not the name of a table, or the file is damaged or too large.
    """
    if file_format(name) == "log":
        raise UserError(f"{name}: a file of records must be csv, tsv, txt, jsonl, parquet or a spreadsheet.")
    path = Path(folder, "file" + next(s for s in reversed(Path(name.lower()).suffixes) if s in FORMATS))
    raw = Path(folder, "raw")
    try:
        with open(raw, "wb") as copy:
            shutil.copyfileobj(file, copy)
        with open(path, "wb") as copy, open_unpacked(raw) as source:
            while block := source.read(1 << 20):
                if copy.tell() > MAX_UNPACKED:  # a few bytes of gzip can be gigabytes
                    raise UserError(f"{name}: more than {MAX_UNPACKED:,} bytes when unpacked.")
                copy.write(block)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({error}).") from None
    if is_gzip(path):
        raise UserError(f"{name}: compressed twice.")
    return str(path)


def _read_chunks(path: str, model: Model, keep: bool, sheet: str) -> Iterator[tuple[int, list[dict], list[dict]]]:
    """Yield (number of the first row, validated records, all cells if they are to be kept) of each chunk of a file.

    Raises UserError, naming row or column, if the file cannot be read or its cells take too many bytes.
    """
    preprocessor, size = model.pipeline.preprocessor, 0
    rows = CHUNK_FILES if model.file_columns else CHUNK_ROWS
    layout = replace(preprocessor.layout, sheet=sheet, max_bytes=MAX_UNPACKED)
    try:
        if file_format(path) == "parquet":
            _check_parquet(path)
        for frame in read_records(path, layout, rows):
            everything, frame = frame, preprocessor.as_frame(frame)[preprocessor.names]
            size += (everything if keep else frame).memory_usage(deep=True).sum()
            if size > MAX_UNPACKED:
                raise UserError(f"{path}: more than {MAX_UNPACKED:,} bytes when unpacked.")
            first = int(frame.index[0])
            kept = everything.drop(columns=[column.name for column in model.file_columns])
            yield first, model.schema.validate(_cells(frame), first), _shown(_cells(whole_again(kept))) if keep else []
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # cells that pandas cannot hold
        raise UserError(f"{path}: cannot be read ({error}).") from None


def _check_parquet(path: str) -> None:
    """Refuse a few bytes of parquet that would be gigabytes, from the sizes it states and the lengths of its texts.

    Texts stay dictionary-encoded for that. Raises UserError if the file is too large or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    too_large = UserError(f"{path}: more than {MAX_UNPACKED:,} bytes when unpacked.")
    try:
        with parquet.ParquetFile(path) as file:
            about, columns = file.metadata, range(file.metadata.num_columns)
            parts = [about.row_group(i).column(j) for i in range(about.num_row_groups) for j in columns]
            if sum(part.total_uncompressed_size + 4 * part.num_values for part in parts) > MAX_UNPACKED:
                raise too_large
            texts = [file.schema.column(j).path for j in columns if file.schema.column(j).physical_type == "BYTE_ARRAY"]
        size = 0
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(CHUNK_ROWS, columns=texts):
                for column in _flat(batch.columns):
                    if pa.types.is_dictionary(column.type):
                        column = pc.take(pc.binary_length(column.dictionary), column.indices)
                    else:
                        column = pc.binary_length(column)
                    size += pc.sum(column).as_py() or 0
                if size > MAX_UNPACKED:
                    raise too_large
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as parquet: {error}.") from None


def _flat(arrays: list) -> Iterator:
    """Yield the arrays of plain values in nested ones."""
    import pyarrow as pa

    for array in arrays:
        if pa.types.is_nested(array.type):
            yield from _flat(array.flatten() if pa.types.is_struct(array.type) else [array.flatten()])
        else:
            yield array


def _cells(frame) -> list[dict]:
    """Return the rows of a table with cells of plain types, None for a missing one."""
    return [
        {name: _plain(cell) for name, cell in record.items()}
        for record in frame.astype(object).where(frame.notna(), None).to_dict("records")
    ]


def _plain(cell):
    if isinstance(cell, str):
        return replace_surrogates(cell)
    return cell if isinstance(cell, CELL_TYPES) else str(cell)


def _shown(records: list[dict]) -> list[dict]:
    """Return cells as JSON can return them: bytes, lists, objects and infinite numbers as text."""
    plain = (str, int, type(None))
    return [
        {
            name: cell if isinstance(cell, plain) or (isinstance(cell, float) and math.isfinite(cell)) else str(cell)
            for name, cell in record.items()
        }
        for record in records
    ]
