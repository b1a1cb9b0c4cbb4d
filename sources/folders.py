"""Folders and globs of files, each of which is one record."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from errors import UserError
from preprocessing.parsing import canonical
from sources.encodings import HEAD, find_encoding, guess_note, reading
from sources.layout import FILE, IMAGE_ENDINGS, LABEL, TEXT_ENDINGS, UNREAD_IMAGE_ENDINGS, Layout


def read_text_file(path: str | Path, encoding: str = "", notes: list[str] | None = None) -> str:
    """Return the text in a file, whatever its encoding unless one is given. Raises UserError if it cannot be read.

    notes: gets a line if the encoding is a guess.
    """
    with reading(path):
        raw = Path(path).read_bytes()
        found = find_encoding(path, raw[:HEAD], named=encoding)
        if notes is not None:
            notes += guess_note(path, found, encoding)
        return raw.decode(found).removeprefix("\ufeff")


def _is_wanted(path: Path, endings: tuple[str, ...]) -> bool:
    return path.is_file() and path.suffix.lower() in endings and not path.name.startswith(".")


def _as_text(path: Path) -> str:
    """Return a path as text. Raises UserError if it is not valid UTF-8: no file of predictions could hold it."""
    if (name := str(path)) != name.encode("utf-8", "replace").decode():
        raise UserError(f"{os.fsencode(path)!r}: this file name is not valid UTF-8: rename the file.")
    return name


def read_folder(folder: str | Path, notes: list[str], encoding: str = "") -> tuple[pd.DataFrame, dict[str, str]]:
    """Return a record for each image or text in folder/<class>/, and the kinds of its columns.

    Images give the columns file and label; texts give text, file and label. If there are both, the more frequent are
    read. Files that are hidden or of another kind are counted in `notes`.
    encoding: of the texts; "" = detect.
    Raises UserError if there are neither images nor texts, or if a folder's name cannot be a label.
    """
    classes = sorted(p for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(p, path.name) for path in classes for p in sorted(path.rglob("*")) if p.is_file()]
    images, texts = ([f for f in files if _is_wanted(f[0], endings)] for endings in (IMAGE_ENDINGS, TEXT_ENDINGS))
    wanted = images if len(images) >= len(texts) else texts
    unread = sum(_is_wanted(path, UNREAD_IMAGE_ENDINGS) for path, _ in files)
    hint = f"{unread} HEIC or AVIF images: convert them to JPEG or PNG" if unread else ""
    if not wanted:
        raise UserError(
            f"{folder}: no images and no texts in class folders. Expected {folder}/<class>/*.png "
            f"(or {', '.join(IMAGE_ENDINGS[1:])}), or {folder}/<class>/*.txt.{hint and f' There are {hint}.'}"
        )
    if ignored := len(files) - len(wanted):
        others = f"{folder}: {ignored} files that are hidden or of another kind left out"
        notes.append(others + (f", among them {hint}" if hint else ""))
    seen = {"": "an empty cell"}
    for name in dict.fromkeys(name for _, name in wanted):
        if (same := seen.setdefault(canonical(name), repr(name))) != repr(name):
            raise UserError(f"{folder}: the class {name!r} is read as {same}: rename the folder.")
    rows = [(_as_text(path), name) for path, name in wanted]
    records = pd.DataFrame(rows, columns=[FILE, LABEL], index=pd.RangeIndex(1, len(rows) + 1, name="row"))
    if wanted is images:
        return records, {FILE: "image"}
    guesses: list[str] = []
    records.insert(0, "text", [read_text_file(path, encoding, guesses) for path in records[FILE]])
    notes += guesses[:1] + ([f"{folder}: so are {len(guesses) - 1} more files"] if len(guesses) > 1 else [])
    return records, {"text": "text", FILE: "drop"}


def split_folders(folder: str) -> list[str]:
    """Return folder/train, val and test if these hold classes, else the folder alone ("train" may be a class)."""
    parts = [Path(folder) / name for name in ("train", "val", "test")]
    holds_classes = parts[0].is_dir() and any(p.is_dir() for p in parts[0].iterdir())
    if not (holds_classes and (parts[1].is_dir() or parts[2].is_dir())):
        return [folder, "", ""]
    return [str(part) if part.is_dir() else "" for part in parts]


def find_files(source: str, layout: Layout) -> list[str] | None:
    """Return the files that `source` names: one image, or all images or texts in a folder, below it or in a glob.

    Returns None if it names a table instead, or a file with one value per line. Raises UserError if nothing is found.
    """
    path = Path(source)
    endings, what = (TEXT_ENDINGS, "texts")
    if layout.lone in layout.paths:  # each photo gets a row, if only to say that it cannot be read
        endings, what = (IMAGE_ENDINGS + UNREAD_IMAGE_ENDINGS, "images")
    if path.is_dir():
        found = path.rglob("*")
    elif glob.has_magic(source) and not path.exists():
        found = map(Path, glob.glob(source, recursive=True))
    else:
        return [source] if layout.lone in layout.paths and _is_wanted(path, endings) else None
    files = sorted(p for p in found if _is_wanted(p, endings))
    if not files:
        shown = IMAGE_ENDINGS if what == "images" else TEXT_ENDINGS
        raise UserError(f"{source}: no {what} ({', '.join(shown)}) found.")
    return [_as_text(p) for p in files]


def read_files(files: list[str], layout: Layout, rows: int) -> Iterator[pd.DataFrame]:
    """Yield a record for each file, `rows` at a time: its name as FILE, and its name or text as the lone column."""
    for start in range(0, len(files), rows):
        part = files[start : start + rows]
        cells = part if layout.lone in layout.paths else [read_text_file(path, layout.encoding) for path in part]
        index = pd.RangeIndex(start + 1, start + len(part) + 1, name="row")
        yield pd.DataFrame({FILE: part} | {layout.lone: cells}, index=index)
