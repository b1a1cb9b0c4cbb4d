"""Open a spreadsheet with calamine. Also runs as a script, so that a service can read uploads with limited memory.

Imports nothing of this project: it starts faster.
"""

import pickle
import subprocess
import sys
import zipfile

SECONDS, MEMORY, MAX_CELLS = 60, 2 << 30, 10_000_000  # that a file may take, in a process of its own


def load_cells(file, sheet: str) -> tuple[str, list[str], list[list]]:
    """Return the name of a sheet ("" = the first one that is visible), the names of all, and the rows of cells.

    An empty cell, and an error such as #DIV/0!, is "". Raises ValueError if the file is not a spreadsheet, and KeyError
    with the names of the sheets if none has this name.
    """
    import python_calamine as calamine

    try:
        workbook = calamine.CalamineWorkbook.from_filelike(file)
        cells, visible = calamine.SheetTypeEnum.WorkSheet, calamine.SheetVisibleEnum.Visible
        sheets = [s for s in workbook.sheets_metadata if s.typ == cells]
        names = [s.name for s in sheets if s.visible == visible] or [s.name for s in sheets]
        if not names:
            raise ValueError("there is no sheet of cells.")
        if sheet and sheet not in (s.name for s in sheets):
            raise KeyError(*names)
        name = sheet or names[0]
        return name, names, workbook.get_sheet_by_name(name).to_python(skip_empty_area=False)
    except (calamine.CalamineError, calamine.PasswordError, calamine.ZipError, calamine.XmlError) as error:
        raise ValueError(_what_is_wrong(file, error)) from None


def _what_is_wrong(file, error: Exception) -> str:
    file.seek(0)
    content = file.read()
    if "EncryptedPackage".encode("utf-16-le") in content or "assword" in str(error):
        return "the file is protected by a password: save it without one."
    if content[:2] not in (b"PK", b"\xd0\xcf"):
        return "this is not a spreadsheet. If it is a text table, rename it to .csv."
    return f"the spreadsheet is damaged, of an unknown kind, or protected by a password ({error})."


def load_cells_within(path: str, sheet: str, limit: int) -> tuple[str, list[str], list[list]]:
    """Call `load_cells` in a process of limited memory. limit: bytes of the unpacked file, at most.

    A few bytes can be very many cells, and a process that runs out of memory within calamine ends at once.
    """
    with open(path, "rb") as file:
        packed = zipfile.is_zipfile(file)
    try:
        if packed:
            with zipfile.ZipFile(path) as parts:
                if sum(part.file_size for part in parts.infolist()) > limit:
                    raise ValueError(f"more than {limit:,} bytes when unpacked.")
        command = [sys.executable, "-P", __file__, path, sheet]
        done = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
    except (subprocess.SubprocessError, zipfile.BadZipFile):
        raise ValueError("the spreadsheet is damaged, or its cells take too much memory or time.") from None
    found = pickle.loads(done.stdout)
    if isinstance(found, Exception):
        raise found
    return found


def main(path: str, sheet: str) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except ImportError:  # Windows
        pass
    try:
        with open(path, "rb") as file:
            found = load_cells(file, sheet)
        if found[2] and len(found[2]) * len(found[2][0]) > MAX_CELLS:
            raise ValueError(f"more than {MAX_CELLS:,} cells up to the last one that is filled.")
    except (ValueError, KeyError) as error:
        found = error
    pickle.dump(found, sys.stdout.buffer, protocol=5)


if __name__ == "__main__":
    main(*sys.argv[1:])
