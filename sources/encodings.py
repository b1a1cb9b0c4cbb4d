"""Open files, compressed or not, and detect how their text is encoded."""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError

HEAD = 1 << 20  # bytes that are read to detect how a file is written
EVERYDAY_LATIN = frozenset(  # letters of western languages, and the quotes, dashes and dots that Windows adds
    "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûü\xa0¡£§ª«°²³µ·º»¿".encode("latin-1")
) | {0x80, 0x85, *range(0x91, 0x9A)}


def is_gzip(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_unpacked(path: str | Path):
    """Open a file for reading bytes, unpacking gzip whatever its name."""
    return gzip.open(path, "rb") if is_gzip(path) else open(path, "rb")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever can be wrong with a file into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def read_head(path: str | Path) -> bytes:
    with open_unpacked(path) as file:
        return file.read(HEAD)


def is_utf16(head: bytes) -> bool:
    return head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def find_encoding(path: str | Path, head: bytes, separator: str = "") -> str:
    """Return utf-8, utf-16 (with a byte order mark), cp949 (which includes euc-kr) or latin-1.

    Nearly any bytes are valid cp949, and any are valid latin-1: either is accepted only if most of its letters are
    everyday ones.
    head: the first HEAD bytes.  separator: of a table; "" for a file of lines.
    Raises UserError, naming the row or line, for a file of which a few bytes are damaged.
    """
    if is_utf16(head):
        return "utf-16"
    block = _first_invalid_block(path, "utf-8")
    if block is None:
        return "utf-8"
    text = block.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    is_cut = damaged == 1 and re.search(rb"[\xe0-\xf4][\x80-\xbf]+$", block)  # the file ends within a letter
    if is_cut or sum(c > "\x7f" for c in text) > 2 * damaged:  # other encodings are hardly ever valid UTF-8 by chance
        raise _damaged(path, "utf-8", separator)
    if len(block) == HEAD:  # whole lines only, so that no letter is cut
        block = block[block.find(b"\n") + 1 : block.rfind(b"\n")]
    letters = [c for c in block.decode("cp949", "replace") if c > "\x7f"]
    korean = [c for c in letters if "가" <= c <= "힣" or "ㄱ" <= c <= "ㅣ"]
    # Everyday Korean is in the 2,350 syllables of euc-kr; western letters read as cp949 give the rare ones beyond
    if 2 * sum(len(c.encode("euc-kr", "ignore")) == 2 for c in korean) > len(letters):
        if _first_invalid_block(path, "cp949") is not None:
            raise _damaged(path, "cp949", separator)
        return "cp949"
    if 2 * sum(byte in EVERYDAY_LATIN for byte in block) < sum(byte > 0x7F for byte in block):
        raise _damaged(path, "utf-8", separator)
    return "latin-1"


def _first_invalid_block(path: str | Path, encoding: str) -> bytes | None:
    """Return the first HEAD bytes of a file that contain bytes invalid in an encoding, or None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_unpacked(path) as file:
        block = file.read(HEAD)
        while block:
            following = file.read(HEAD)
            try:
                decoder.decode(block, final=not following)
            except UnicodeDecodeError:
                return block
            block = following
    return None


def _damaged(path: str | Path, encoding: str, separator: str) -> UserError:
    with io.TextIOWrapper(open_unpacked(path), encoding=encoding, errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, delimiter=separator) if separator else text
        rows = (row for row in rows if row)
        bad = next(i for i, row in enumerate(rows) if re.search("[\udc80-\udcff]", "".join(row)))
    where = f"line {bad + 1}" if not separator else f"row {bad}" if bad else "the header"
    return UserError(
        f"{path}: {where} contains bytes that are not valid {encoding.upper()}, unlike the rest of the file: fix them."
    )
