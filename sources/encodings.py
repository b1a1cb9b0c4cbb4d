"""Open files, compressed or not, and detect how their text is encoded."""

import codecs
import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from encodings.aliases import aliases
from itertools import islice
from pathlib import Path

from errors import UserError, did_you_mean

HEAD = 1 << 20  # bytes that are read to detect how a file is written
EVERYDAY_LATIN = frozenset(  # letters of western languages, and the quotes, dashes and dots that Windows adds
    "ŒœŠšŽžŸ„‚‹›ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûü\xa0¡£§ª«°²³µ·º»¿€…‘’“”•–—™".encode("cp1252")
)


def check_is_file(path: str | Path) -> None:
    """Raise UserError if there is no such file, or if it is a folder or a pipe, which could be waited for endlessly."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file.")
    if not os.path.isfile(path):
        raise UserError(f"{path}: this is a folder, a pipe or a device: give a file.")


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
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def read_head(path: str | Path) -> bytes:
    with open_unpacked(path) as file:
        return file.read(HEAD)


def is_utf16(head: bytes) -> bool:
    return head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def named_encoding(name: str) -> str:
    """Return Python's name of an encoding; utf-8-sig is utf-8 here. Raises UserError for a name that is none."""
    try:
        codec = codecs.lookup(name)
        if codec._is_text_encoding and codec.name not in ("undefined", "idna", "punycode"):
            return codec.name.removesuffix("-sig")
    except (LookupError, ValueError):  # ValueError: a zero byte
        pass
    usual = ("utf-8", "utf-16", "cp1252", "latin-1", "cp949", "cp1250", "cp1251", "shift_jis", "gb18030", "big5")
    raise UserError(f"--encoding {name}: unknown encoding.{did_you_mean(name, {*usual, *aliases}, usual)}")


def find_encoding(path: str | Path, head: bytes, separator: str = "", skip: int = 0, named: str = "") -> str:
    """Return utf-8, utf-16 (with a byte order mark), cp949 (which includes euc-kr), cp1252 or latin-1.

    Nearly any bytes are valid cp949, and any are valid latin-1: either is accepted only if most of its letters are
    everyday ones. cp1252 is latin-1 with more letters and a few invalid bytes.
    head: the first HEAD bytes.  separator: of a table; "" for a file of lines.  skip: lines above its header.
    named: the encoding given by --encoding, used as it is.
    Raises UserError, naming the row or line, for a file of which a few bytes are damaged.
    """
    if named:
        encoding = named_encoding(named)
        if _first_invalid_block(path, encoding) is not None:
            raise _damaged(path, encoding, separator, skip, f" (--encoding {named}).")
        return encoding
    if is_utf16(head):
        return "utf-16"
    block = _first_invalid_block(path, "utf-8")
    if block is None:
        return "utf-8"
    text = block.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    is_cut = damaged == 1 and re.search(rb"[\xe0-\xf4][\x80-\xbf]+$", block)  # the file ends within a letter
    if is_cut or sum(c > "\x7f" for c in text) > 2 * damaged:  # other encodings are hardly ever valid UTF-8 by chance
        raise _damaged(path, "utf-8", separator, skip)
    if len(block) == HEAD:  # whole lines only, so that no letter is cut
        block = block[block.find(b"\n") + 1 : block.rfind(b"\n")]
    letters = [c for c in block.decode("cp949", "replace") if c > "\x7f"]
    korean = [c for c in letters if "가" <= c <= "힣" or "ㄱ" <= c <= "ㅣ"]
    # Everyday Korean is in the 2,350 syllables of euc-kr; western letters read as cp949 give the rare ones beyond.
    # Korean has few Chinese characters; Chinese in GB18030, read as cp949, gives many
    chinese = sum("\u4e00" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" for c in letters)
    if 2 * sum(len(c.encode("euc-kr", "ignore")) == 2 for c in korean) > len(letters) >= 3 * chinese:
        if _first_invalid_block(path, "cp949") is not None:
            raise _damaged(path, "cp949", separator, skip)
        return "cp949"
    if 2 * sum(byte in EVERYDAY_LATIN for byte in block) < sum(byte > 0x7F for byte in block):
        raise _damaged(path, "utf-8", separator, skip)
    words = b"".join(re.findall(rb"[\xa1-\xff]{4,}", block))  # of other scripts; western letters are apart
    if len(set(words)) > 8 and 2 * len(words) > sum(byte > 0x7F for byte in block):
        raise UserError(
            f"{path}: the encoding is none of UTF-8, UTF-16, cp949, cp1252: give it, such as --encoding gb18030."
        )
    return "cp1252" if _first_invalid_block(path, "cp1252") is None else "latin-1"


def guess_note(path: str | Path, encoding: str, named: str) -> list[str]:
    """Return a note if an encoding is only a guess, because its bytes could also be text in another one."""
    is_guess = not named and not encoding.startswith("utf")
    return [f"{path}: read as {encoding}, which is a guess: --encoding overrules it"] if is_guess else []


def as_raw_text(head: bytes, named: str = "") -> str:
    """Decode the beginning of a table as far as its structure is concerned: latin-1 decodes any bytes, and a separator
    is never part of a character in UTF-8 or cp949."""
    encoding = named_encoding(named) if named else "utf-16" if is_utf16(head) else "latin-1"
    return head.decode(encoding, "ignore").removeprefix("ï»¿").removeprefix("\ufeff")


def _first_invalid_block(path: str | Path, encoding: str) -> bytes | None:
    """Return the first HEAD bytes of a file that contain bytes invalid in an encoding, or None."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with open_unpacked(path) as file:
        block = file.read(HEAD)
        while block:
            following = file.read(HEAD)
            try:
                decoder.decode(block, final=not following)
            except UnicodeError:
                return block
            block = following
    return None


def _damaged(path: str | Path, encoding: str, separator: str, skip: int, end: str = "") -> UserError:
    what = f"contains bytes that are not valid {encoding.upper()}{end or ', unlike the rest of the file: fix them.'}"
    with io.TextIOWrapper(open_unpacked(path), encoding=encoding, errors="surrogateescape", newline="") as text:
        if any(re.search("[\udc80-\udcff]", line) for line in islice(text, skip)):
            return UserError(f"{path}: a line above the header {what}")
        rows = csv.reader(text, delimiter=separator) if separator else text
        rows = (row for row in rows if row)
        bad = next((i for i, row in enumerate(rows) if re.search("[\udc80-\udcff]", "".join(row))), 0)
    where = f"line {bad + 1}" if not separator else f"row {bad}" if bad else "the header"
    return UserError(f"{path}: {where} {what}")
