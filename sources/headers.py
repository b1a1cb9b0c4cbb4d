"""Find the header of a table below title lines, as reports and spreadsheets have them."""

import re

TITLE_LINES = 20  # at most


def find_header(rows: list[list[str]]) -> int:
    """Return the position of the header among the first rows of a table; an empty list is a blank line.

    It is the first row that is not blank, or, below mostly empty title rows, the first row of distinct names that is as
    wide as the rows below and differs from them. A header that is too short is no title.
    """
    top = next((i for i, row in enumerate(rows) if any(row)), 0)
    for at in range(top, min(top + TITLE_LINES + 1, len(rows))):
        body = [row for row in rows[at + 1 :] if row]
        if _is_complete(rows[at], body):
            return at if at > top and _are_titles(rows[top:at], rows[at], body) else top
    return top


def as_note(rows: list[list[str]], count: int) -> str:
    """Return a note on `count` lines above the header: their number, and the beginning of the first one."""
    title = " ".join(" ".join(cell for row in rows for cell in row).split())
    return f"{count} line{'s' if count > 1 else ''} above the header skipped ({title[:40]}{'…' * (len(title) > 40)})"


def _names(row: list[str]) -> list[str]:
    """Return the cells of a row without empty ones at its end."""
    return row[: max((i + 1 for i, cell in enumerate(row) if cell.strip()), default=0)]


def _is_complete(row: list[str], body: list[list[str]]) -> bool:
    """Tell whether a row names every column of most rows below it."""
    names = _names(row)
    alike = [below for below in body if len(below) == len(row) and not any(below[len(names) :])]
    return len(names) > 1 and all(name.strip() for name in names) and 2 * len(alike) > len(body)


def _are_titles(titles: list[list[str]], header: list[str], body: list[list[str]]) -> bool:
    """Tell whether a complete row is the header, and the rows above it titles, rather than a header that is too short
    and a row of values."""
    names, width = _names(header), len(header)
    filled = [[cell for cell in row if cell.strip()] for row in titles]
    if len(set(names)) < len(names) or any(len(cells) > max(1, len(names) / 2) for cells in filled):
        return False
    if any(re.search(r"\d", name) and not re.search(r"[^\W\d_]|^(19|20)\d\d$", name.strip()) for name in names):
        return False  # a number or a date
    blank = not all(filled)
    columns = ([row[i] for row in body if i < len(row) and row[i].strip()] for i in range(len(names)))
    unlike = any(
        not re.search(r"\d", name) and 2 * sum(bool(re.search(r"\d", cell)) for cell in cells) > len(cells)
        for name, cells in zip(names, columns, strict=True)
    )
    padded = all(len(row) == width for row in titles if row)
    sentence = any(re.search(r"\s|\d", cell.strip()) for cells in filled for cell in cells)
    if len(names) == 2:  # a title of one cell may as well be a header without its second name
        first = all(row[0].strip() for row, cells in zip(titles, filled, strict=True) if cells)
        return first and (blank or (unlike and (padded or sentence)))
    return blank or unlike or (sentence and (padded or len(body) > 3))
