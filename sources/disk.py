"""Tables and arrays that are too large for memory: columns in temporary files, which are mapped into memory.

The system reads mapped pages when they are used, and drops them when memory is short. The files have no name: they
vanish with the process, however that ends.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from errors import UserError

LARGE = 0.15  # of the memory: tables and arrays from here on are kept on disk
PIECE = 0.02, 32 << 20  # of the memory, and at most so many bytes: rows that are read before they are written to disk
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache  # asked for each column of each request
def memory() -> int:
    """Return the bytes of memory that this process may use: of the machine, its container and its `ulimit`."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30]
    for path in CGROUPS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    try:
        import resource
    except ImportError:  # Windows
        return min(limits)
    found = [resource.getrlimit(name)[0] for name in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return min([*limits, *(limit for limit in found if limit != resource.RLIM_INFINITY)])


def is_large(size: int) -> bool:
    """Return whether a table or an array of so many bytes is to be kept on disk."""
    return size > LARGE * memory()


def folder_with_room(size: int, what: str, advice: str) -> str:
    """Return a folder on a disk for a temporary file. Raises UserError, from `what` and `advice`, if it has not enough
    space."""
    # /var/tmp is on disk, where /tmp can be in memory
    folder = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
    if size > shutil.disk_usage(folder).free:  # writing to a map would kill the process
        raise UserError(f"{what}, more than {folder} has: {advice}.")
    return folder


def temporary_file(size: int):
    """Return a file without a name, on a disk. Raises UserError if the disk has not enough space."""
    _allow_many_files()
    return tempfile.TemporaryFile(dir=folder_with_room(size, f"{size:,} bytes are needed on disk", "make room there"))


@cache
def _allow_many_files() -> None:
    """Allow as many open files as the system does: a map keeps its file open, and each column is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows; macOS takes no more than it can
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def release_memory() -> None:
    """Give memory that is free back to the system; the allocators keep it otherwise."""
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def on_disk(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return an array in a file."""
    return np.memmap(temporary_file(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype, "w+", shape=shape)


# ---------------------------------------------------------------- tables


def is_on_disk(table: pd.DataFrame) -> bool:
    return bool(table.attrs.get("on_disk"))


def join_on_disk(chunks: Iterable[pd.DataFrame]) -> pd.DataFrame | None:
    """Return the rows of all chunks as one table whose columns are on disk; None if there are no chunks."""
    parts, waiting, size = [], [], 0
    for chunk in chunks:
        waiting.append(chunk)
        size += int(chunk.memory_usage(index=False, deep=True).sum())
        if size > min(PIECE[0] * memory(), PIECE[1]):
            parts.append(_part_on_disk(waiting))
            waiting, size = [], 0
    if waiting:
        parts.append(_part_on_disk(waiting))
    if not parts:
        return None
    rows, columns = [len(next(iter(part.values()))) for part in parts], {}
    for name in dict.fromkeys(name for part in parts for name in part):  # json records may lack some
        cells = [part.pop(name, pd.Series([None] * count)) for part, count in zip(parts, rows, strict=True)]
        columns[name] = to_disk(pd.concat(cells, ignore_index=True)) if len(cells) > 1 else cells[0]
    del waiting
    release_memory()
    return _mark(pd.DataFrame(columns, copy=False))


def _part_on_disk(chunks: list[pd.DataFrame]) -> dict[str, pd.Series]:
    return _columns_to_disk(dict(pd.concat(chunks, ignore_index=True).items()))


def take_rows(table: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return some rows of a table, in this order. The table may be changed: each column is replaced by its rows, one
    after the other, so that there is never a second table in memory."""
    index, on_disk = table.index[rows], is_on_disk(table)
    columns = {}
    for name in list(table.columns):
        taken = pd.Series(table[name].array.take(rows), copy=False)
        columns[name] = to_disk(taken) if on_disk else taken
        if not on_disk:
            del table[name]
    found = pd.DataFrame(columns, copy=False).set_axis(index)
    return _mark(found) if on_disk else found


def _mark(table: pd.DataFrame) -> pd.DataFrame:
    table.attrs["on_disk"] = True
    return table


def to_disk(cells: pd.Series) -> pd.Series:
    """Return a column whose cells are in a file. Cells of several types stay in memory."""
    return _columns_to_disk({0: cells})[0]


def _columns_to_disk(columns: dict) -> dict:
    """Return columns of a table whose cells are in one file, as `to_disk` does."""
    import pyarrow as pa

    found = {name: array for name, cells in columns.items() if (array := _as_arrow(cells)) is not None}
    if not found:
        return columns
    table = pa.table(list(found.values()), names=[str(i) for i in range(len(found))])
    with temporary_file(table.nbytes) as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    for name, column in zip(found, table.columns, strict=True):
        cells = columns[name]
        found[name] = pd.Series(_from_arrow(column, cells.dtype), cells.index, name=cells.name, copy=False)
    return columns | found


def _as_arrow(cells: pd.Series):
    """Return cells as one Arrow array, numbers by their bits; None for cells of several types."""
    import pyarrow as pa

    if isinstance(cells.dtype, pd.StringDtype) and cells.dtype.storage == "pyarrow":
        column = pa.array(cells.array, type=pa.large_string())
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(cells.dtype, np.dtype) and cells.dtype.kind in "iufbmM" and cells.dtype.itemsize <= 8:
        return pa.array(np.ascontiguousarray(cells.to_numpy()).view(f"u{cells.dtype.itemsize}"))
    return None


def _from_arrow(column, dtype):
    """Undo `_as_arrow`, without a copy."""
    return (
        pd.array(column, dtype=dtype)
        if isinstance(dtype, pd.StringDtype)
        else column.combine_chunks().to_numpy().view(dtype)
    )
