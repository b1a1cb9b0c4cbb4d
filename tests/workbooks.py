"""Small spreadsheets, written by hand: what is read must not depend on the library that reads it."""

import datetime
import io
import struct
import zipfile
from itertools import product
from string import ascii_uppercase
from xml.sax.saxutils import escape

SPREADSHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
OPEN = "urn:oasis:names:tc:opendocument:xmlns:"
LETTERS = [*ascii_uppercase, *map("".join, product(ascii_uppercase, repeat=2))]


def _xlsx_cell(cell, name: str) -> str:
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, datetime.datetime):
        days = (cell - datetime.datetime(1899, 12, 30)).total_seconds() / 86400
        return f'<c r="{name}" s="1"><v>{days!r}</v></c>'
    if isinstance(cell, (bool, int, float)):
        return f'<c r="{name}" t="{"b" if isinstance(cell, bool) else "n"}"><v>{float(cell):.17g}</v></c>'
    if str(cell).startswith("#"):
        return f'<c r="{name}" t="e"><v>{cell}</v></c>'
    return f'<c r="{name}" t="inlineStr"><is><t xml:space="preserve">{escape(str(cell))}</t></is></c>'


def xlsx(sheets: dict[str, list[list]], last: str = "") -> bytes:
    """Return a workbook. Text that begins with # is an error; last: the name of one more filled cell in every sheet."""
    ids = range(1, len(sheets) + 1)
    listed = "".join(f'<sheet name="{escape(n)}" sheetId="{i}" r:id="r{i}"/>' for i, n in zip(ids, sheets, strict=True))
    links = [(f"r{i}", "worksheet", f"worksheets/{i}.xml") for i in ids] + [("s", "styles", "styles.xml")]
    formats = '<xf numFmtId="0"/><xf numFmtId="22" applyNumberFormat="1"/>'
    parts = {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>',
        "_rels/.rels": _links([("r", "officeDocument", "xl/workbook.xml")]),
        "xl/workbook.xml": f'<workbook xmlns="{SPREADSHEET}" xmlns:r="{OFFICE}"><sheets>{listed}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": _links(links),
        "xl/styles.xml": f'<styleSheet xmlns="{SPREADSHEET}"><cellXfs count="2">{formats}</cellXfs></styleSheet>',
    }
    for i, rows in zip(ids, sheets.values(), strict=True):
        lines = [
            f'<row r="{r}">{"".join(_xlsx_cell(cell, f"{LETTERS[c]}{r}") for c, cell in enumerate(row))}</row>'
            for r, row in enumerate(rows, start=1)
        ]
        lines += [f'<row r="{last.lstrip(ascii_uppercase)}">{_xlsx_cell(1, last)}</row>'] if last else []
        body = f"<sheetData>{''.join(lines)}</sheetData>"
        parts[f"xl/worksheets/{i}.xml"] = f'<worksheet xmlns="{SPREADSHEET}">{body}</worksheet>'
    return _zip(parts)


def ods(sheets: dict[str, list[list]]) -> bytes:
    """Return an OpenDocument spreadsheet of numbers, booleans, dates and text."""

    def cell(value) -> str:
        if value is None:
            return "<table:table-cell/>"
        if isinstance(value, bool):
            return f'<table:table-cell office:value-type="boolean" office:boolean-value="{str(value).lower()}"/>'
        if isinstance(value, datetime.datetime):
            return f'<table:table-cell office:value-type="date" office:date-value="{value.isoformat()}"/>'
        if isinstance(value, (int, float)):
            return f'<table:table-cell office:value-type="float" office:value="{value!r}"/>'
        return f'<table:table-cell office:value-type="string"><text:p>{escape(value)}</text:p></table:table-cell>'

    tables = "".join(
        f'<table:table table:name="{escape(name)}">'
        + "".join(f"<table:table-row>{''.join(map(cell, row))}</table:table-row>" for row in rows)
        + "</table:table>"
        for name, rows in sheets.items()
    )
    names = " ".join(f'xmlns:{n}="{OPEN}{n}:1.0"' for n in ("office", "table", "text"))
    content = f"<office:document-content {names}><office:body><office:spreadsheet>{tables}</office:spreadsheet>"
    return _zip(
        {
            "mimetype": "application/vnd.oasis.opendocument.spreadsheet",
            "META-INF/manifest.xml": f'<manifest:manifest xmlns:manifest="{OPEN}manifest:1.0"/>',
            "content.xml": f"{content}</office:body></office:document-content>",
        }
    )


def encrypted() -> bytes:
    """Return the directory of a workbook with a password: a compound file that holds an encrypted package."""

    def entry(name: str, kind: int, child: int) -> bytes:
        text = f"{name}\0".encode("utf-16-le")
        links = struct.pack("<HBBIII", len(text), kind, 1, 0xFFFFFFFF, 0xFFFFFFFF, child)
        return text.ljust(64, b"\0") + links + bytes(36) + struct.pack("<IQ", 0xFFFFFFFE, 0)

    head = bytes.fromhex("d0cf11e0a1b11ae1").ljust(24, b"\0") + struct.pack("<HHHHH", 0x3E, 3, 0xFFFE, 9, 6)
    head = head.ljust(44, b"\0") + struct.pack("<8I", 1, 1, 0, 4096, 0xFFFFFFFE, 0, 0xFFFFFFFE, 0)
    table = struct.pack("<I", 0) + b"\xff" * 432 + struct.pack("<II", 0xFFFFFFFD, 0xFFFFFFFE) + b"\xff" * 504
    directory = entry("Root Entry", 5, 1) + entry("EncryptedPackage", 2, 0xFFFFFFFF)
    return head + table + directory.ljust(512, b"\0")


def _links(links: list[tuple[str, str, str]]) -> str:
    listed = "".join(f'<Relationship Id="{i}" Type="{OFFICE}/{kind}" Target="{to}"/>' for i, kind, to in links)
    return f'<Relationships xmlns="{RELATIONS}">{listed}</Relationships>'


def _zip(parts: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in parts.items():
            packed.writestr(name, text)
    return file.getvalue()
