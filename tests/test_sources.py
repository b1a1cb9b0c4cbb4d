"""The same records are read, however they were written and wherever they come from."""

import contextlib
import datetime
import gzip
import io
import json
import os
import signal
import sqlite3
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import make_table
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from workbooks import encrypted, ods, xlsx

from config import DataConfig
from dataloader import load_splits
from errors import BrokenRecords, UserError, error_prefix
from sources import (
    Layout,
    load_bundled,
    log_kinds,
    read_chunks,
    read_folder,
    read_records,
    read_table,
    separator_of,
    split_folders,
    standard_input,
)
from sources.folders import read_text_file

ROWS = [("서울", 1.5, "a"), ("부산", -2.25, 'said "no"'), ("대구", 3.0, "two\nlines"), ("서울", 1000.5, "x;y,z\tw")]
FRAME = pd.DataFrame(ROWS * 5, columns=["도시", "크기", "note"])
CELLS = FRAME.astype("str")  # as they are written


def texts(*columns, lone="") -> Layout:
    return Layout(texts=frozenset(columns), lone=lone)


def images(*columns, lone="") -> Layout:
    return Layout(paths=frozenset(columns), lone=lone)


def send(monkeypatch, data: bytes) -> None:
    """Put data on standard input."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def write(path, frame, *, encoding="utf-8", sep=",", decimal=".", newline="\n", pack=False):
    text = frame.to_csv(index=False, sep=sep, decimal=decimal, lineterminator=newline)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if pack else data)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "euc-kr", "utf-16"])
@pytest.mark.parametrize("sep", [",", ";", "\t", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_however_written(tmp_path, encoding, sep, newline):
    path = write(tmp_path / "t.csv", FRAME, encoding=encoding, sep=sep, newline=newline)
    table = read_table(path)
    expected = CELLS.replace("two\nlines", f"two{newline}lines") if "two\r" in str(table["note"].iloc[2]) else CELLS
    pd.testing.assert_frame_equal(table.reset_index(drop=True), expected)
    assert table.index.tolist() == list(range(1, 21)) and table.index.name == "row"
    pd.testing.assert_frame_equal(pd.concat(read_chunks(path)), table)


def test_cells_are_text_letter_by_letter(tmp_path):
    cells = ["007", " 1,5 ", "1.50", "NA", "", "null", "True", "1e3", "2024-01-01T00:00:00", "?", "-", "+5"]
    path = tmp_path / "t.csv"
    path.write_text("a;b\n" + "".join(f"{cell};x\n" for cell in cells) + ";\n\n")
    for table in (read_table(path), pd.concat(read_chunks(path)), read_table(path, texts("a"))):
        assert table["a"].tolist() == [*cells, ""] and table["b"].iloc[-1] == ""
        assert all(dtype == "str" and dtype.storage == "pyarrow" for dtype in table.dtypes)


def test_a_header_is_found_after_blank_lines_and_over_several(tmp_path):
    for data in (b"\n\n 1,b\n1,2\n", b"\r\n\r\n 1,b\r\n1,2\r\n", b'\xef\xbb\xbf" 1","b"\n1,2\n', b"\r 1,b\r1,2\r"):
        (tmp_path / "t.csv").write_bytes(data)
        assert read_table(tmp_path / "t.csv").to_dict("list") == {"1": ["1"], "b": ["2"]}
    (tmp_path / "t.csv").write_bytes(b'"a\r\nx",b\r\n1,2\r\n')
    assert read_table(tmp_path / "t.csv").to_dict("list") == {"a\r\nx": ["1"], "b": ["2"]}


def test_latin_1_is_not_taken_for_korean(tmp_path):
    words = ["café", "Réunion", "Müller", "naïve", "Åse", "Köln"] * 4
    path = write(tmp_path / "t.csv", pd.DataFrame({"w": words, "n": range(24)}), encoding="latin-1")
    assert read_table(path)["w"].tolist() == words


@pytest.mark.parametrize("sep", [";", "\t"])
def test_decimal_comma(tmp_path, sep):
    frame = pd.DataFrame({"a": [1.5, -2.25, 1000.0], "b": ["x", "y", "z"]})
    path = write(tmp_path / "t.csv", frame, sep=sep, decimal=",")
    assert read_table(path)["a"].tolist() == ["1,5", "-2,25", "1000,0"]
    assert pd.concat(read_chunks(path))["a"].tolist() == ["1,5", "-2,25", "1000,0"]


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv.gz", "packed.csv"])
def test_gzip_whatever_its_name(tmp_path, name):
    path = write(tmp_path / name, FRAME, pack=True)
    assert len(read_table(path)) == 20


def test_parquet_and_jsonl_give_the_same_records(tmp_path):
    FRAME.to_parquet(tmp_path / "t.parquet")
    FRAME.to_json(tmp_path / "t.jsonl", orient="records", lines=True, force_ascii=False)
    for name in ("t.parquet", "t.jsonl"):
        pd.testing.assert_frame_equal(read_table(tmp_path / name).reset_index(drop=True), FRAME, check_dtype=False)


def test_a_key_that_only_some_json_lines_have_is_an_empty_cell(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1, "b": 2}\n\n{"a": 3}\n{"b": 4}\n')
    assert read_table(tmp_path / "t.jsonl").isna().sum().to_dict() == {"a": 1, "b": 1}


def test_null_words_stay_words(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\nNA,x\n1,?\n,null\nN/A,-\n2,y\n")
    table = read_table(tmp_path / "t.csv")
    assert table.to_dict("list") == {"a": ["NA", "1", "", "N/A", "2"], "b": ["x", "?", "null", "-", "y"]}


def test_a_column_that_turns_to_words_far_down(tmp_path):
    """No type is decided on by what comes first."""
    filler = "x" * 400
    lines = [f"{i},{filler}" for i in range(60_000)] + [f"A{i},{filler}" for i in range(100)]
    (tmp_path / "t.csv").write_text("a,b\n" + "\n".join(lines) + "\n")
    table = read_table(tmp_path / "t.csv")
    assert len(table) == 60_100 and table["a"].iloc[[0, -1]].tolist() == ["0", "A99"]
    chunks = list(read_chunks(tmp_path / "t.csv"))
    assert len(chunks) > 20 and all(chunk["b"].str.len().sum() < 2**20 for chunk in chunks)  # a block at a time
    assert pd.concat(chunks).index.tolist() == list(range(1, 60_101))
    assert pd.concat(chunks)["a"].iloc[[0, -1]].tolist() == ["0", "A99"]


def test_unnamed_columns_get_a_name(tmp_path):
    pd.DataFrame({"a": [1, 2], "b": [3, 4]}).to_csv(tmp_path / "t.csv")
    assert list(read_table(tmp_path / "t.csv")) == ["Unnamed: 0", "a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("a,b\n", "no rows below the header"),
        ("a,b,a\n1,2,3\n", "column 'a' occurs twice"),
        ("a,b\n1,2\n3\n", "row 2 has 1 fields, the header 2"),
        ("a,b\n1,2\n3,4,5\n", "row 2 has 3 fields, the header 2"),
    ],
)
def test_unusable_text_is_named(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("t.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"),
        ("t.parquet", b"PAR1 nothing", "cannot be read as parquet"),
        ("t.docx", b"PK", "must end in one of"),
        ("t.csv", b"\x1f\x8b broken", "cannot be read"),
        ("t.csv", bytes(range(256)) * 9, "not a text table"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / name)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.text(alphabet="ab,;\"' \n\t|é가", max_size=6)), min_size=3, max_size=12)
)
def test_what_pandas_writes_is_read_back(tmp_path_factory, rows):
    frame = pd.DataFrame(rows, columns=["n", "w"])
    frame["w"] = "w" + frame["w"] + "w"  # spaces around cells and null words are not kept
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    frame.to_csv(path, index=False)
    table = read_table(path)
    assert table["n"].map(float).tolist() == frame["n"].tolist()
    assert table["w"].tolist() == frame["w"].tolist()


def test_korean_that_begins_late(tmp_path):
    lines = [f"{i},plain words" for i in range(100_000)] + [f"{i},한국어 문장" for i in range(100)]
    (tmp_path / "t.csv").write_bytes(("n,w\n" + "\n".join(lines) + "\n").encode("cp949"))
    assert read_table(tmp_path / "t.csv")["w"].iloc[-1] == "한국어 문장"


def test_a_quote_left_open_is_not_swallowed(tmp_path):
    lines = [f"{i},fine" for i in range(50)] + ['50,"never closed'] + [f"{i},fine" for i in range(51, 2000)]
    (tmp_path / "t.csv").write_text("n,w\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match="quote was left open"):
        read_table(tmp_path / "t.csv")


def test_damaged_and_odd_files(tmp_path):
    packed = gzip.compress(FRAME.to_csv(index=False).encode() * 1)
    (tmp_path / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"cut\.csv\.gz: cannot be read"):
        read_table(tmp_path / "cut.csv.gz")
    FRAME.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    assert len(read_table(tmp_path / "t.parquet.gz")) == 20
    (tmp_path / "mac.csv").write_bytes(b"a,b\r1,x\r2,y\r")
    assert read_table(tmp_path / "mac.csv")["b"].tolist() == ["x", "y"]
    (tmp_path / "long.csv").write_text("a,b\n1," + "x" * 300_000 + "\n2,y\n")
    assert read_table(tmp_path / "long.csv")["b"].str.len().tolist() == [300_000, 1]


def test_a_word_between_decimal_commas_changes_no_other_cell(tmp_path):
    cells = [f"{i},5" for i in range(60)]
    cells[16] = "abc"
    (tmp_path / "t.csv").write_text("n;w\n" + "\n".join(f"{c};x" for c in cells) + "\n")
    frame = pd.concat(read_chunks(tmp_path / "t.csv"))
    assert frame["n"].iloc[[0, 16, 59]].tolist() == ["0,5", "abc", "59,5"]


KOREAN = "\n".join(["w,n", *(f"한국어 문장 ㅋㅋ {i},{i}" for i in range(40))]).encode("cp949")
LATE = KOREAN + (b"\n" + b"x" * 2000 + b",1") * 600  # damaged beyond the first MB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("w\nhello\nworld 가".encode()[:-1], "row 2 contains bytes that are not valid UTF-8"),
        (b"w\nhello\nworld \xea\xb0\n", "row 2 contains bytes that are not valid UTF-8"),
        ("가,나\nhello,세상\nworld,".encode() + b"\xff", "row 2 contains bytes that are not valid UTF-8"),
        ("가\xff,나\n라,세상\nworld,세".encode().replace("\xff".encode(), b"\xff"), "the header contains bytes"),
        ('w\tn\n"a 가\n나"\t1\n다 \xff\t2'.encode().replace("\xff".encode(), b"\xff"), "row 2 contains bytes"),
        (KOREAN.replace("장 ㅋㅋ 20".encode("cp949"), b"\xc0\xff 20"), "row 21 contains bytes that are not valid CP9"),
        (LATE + "\n끝".encode("cp949")[:-1] + b",2", "row 641 contains bytes that are not valid CP949"),
        ("w,n\n가,1\n".encode("utf-16")[:-1], "cannot be read"),
    ],
)
def test_damaged_letters_are_named_by_their_row(tmp_path, data, message):
    (tmp_path / "t.csv").write_bytes(data)
    for read in (read_table, lambda path: list(read_chunks(path)), lambda path: read_table(path, texts("w"))):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "t.csv")


@pytest.mark.parametrize("words", [["ㅋㅋㅋㅋ", "ㄱㅅ", "ㅠㅠ"], ["ㅋㅋㅋㅋ good", "재밌음 ㅋㅋ", "ㅠㅠ"], ["좋아요"]])
def test_everyday_korean_is_read_as_such(tmp_path, words):
    (tmp_path / "t.csv").write_bytes("\n".join(["w,n", *(f"{w},1" for w in words * 9)]).encode("cp949"))
    assert read_table(tmp_path / "t.csv")["w"].tolist() == words * 9


@pytest.mark.parametrize("word", ["café", "ÀÉ Ä", "¿Él? «Ñu»", "30 °C ±2 m²", "Übergrößenträger", "créée"])
def test_western_words_are_not_mended_into_korean(tmp_path, word):
    (tmp_path / "t.csv").write_bytes("\n".join(["w,n", *[f"{word},1"] * 9]).encode("latin-1"))
    assert read_table(tmp_path / "t.csv")["w"].tolist() == [word] * 9


TEXTS = pd.DataFrame({"id": [1, 2], "리뷰": ["lovely film", "a waste, boring"], "c" * 2000: [1, 2]})
CSV, LINES = TEXTS.to_csv(index=False), "\n".join(TEXTS["리뷰"])
INPUTS = {
    "lines": LINES.encode(),
    "packed lines": gzip.compress(LINES.encode()),
    "utf-16 lines": LINES.encode("utf-16"),
    "csv": CSV.encode(),
    "packed csv": gzip.compress(CSV.encode()),
    "utf-16 csv": CSV.encode("utf-16"),
    "cp949 csv": CSV.encode("cp949"),
    "tsv": TEXTS[TEXTS.columns[::-1]].to_csv(index=False, sep="\t").encode(),  # the column is beyond 1,024 bytes
    "jsonl": TEXTS.to_json(orient="records", lines=True).encode(),
    "parquet": TEXTS.to_parquet(),
}


@pytest.mark.parametrize("way", ["t.txt", "standard input"])
@pytest.mark.parametrize("name", INPUTS)
def test_lines_are_told_from_a_table_by_the_first(tmp_path, monkeypatch, way, name):
    if way == "t.txt" and name in ("jsonl", "parquet"):
        return  # files of these are told by their names
    (tmp_path / "t.txt").write_bytes(INPUTS[name])
    for layout in (texts("리뷰", lone="리뷰"), Layout(lone="리뷰")):
        send(monkeypatch, INPUTS[name])
        with contextlib.nullcontext(tmp_path / way) if way == "t.txt" else standard_input(layout) as path:
            assert pd.concat(read_chunks(path, layout))["리뷰"].tolist() == TEXTS["리뷰"].tolist()


def test_standard_input_is_called_so(monkeypatch):
    for data, text, message in (
        (b"w\nfine\nbro\xffken", "w", "^standard input: row 2 contains bytes"),
        ("가\n\n나\nbro".encode() + b"\xffken", "w", "^standard input: line 4 contains bytes"),
        (("가" * 300_000 + "\nbro").encode() + b"\xffken", "w", "^standard input: line 2 contains bytes"),
        (b'{"w": 1,\n', "", "^standard input: line 1 is not valid JSON"),
        (b"\x1f\x8b broken", "w", "^standard input: cannot be read"),
    ):
        send(monkeypatch, data)
        layout = texts(text, lone=text) if text else Layout()
        with pytest.raises(UserError, match=message), standard_input(layout) as path:
            list(read_chunks(path, layout))
    send(monkeypatch, b"{brace}\nno {brace}\n")
    with standard_input(texts("w", lone="w")) as path:
        assert pd.concat(read_chunks(path, texts("w", lone="w")))["w"].tolist() == ["{brace}", "no {brace}"]


def test_a_quote_left_open_to_the_end_is_named(tmp_path):
    mail = "\n".join(f'line {i} of a "mail"' for i in range(300))
    frame = pd.DataFrame({"y": ["a", "b"] * 5, "w": [mail, mail + '"', mail + "\n", "line\u2028end", '"'] * 2})
    for last, packed in (("y", False), ("w", False), ("w", True)):
        for rows in (7, 8, 10):  # the last of them another each time
            path = write(tmp_path / "t.csv", frame[sorted(frame, key=last.__eq__)].head(rows), pack=packed)
            assert read_table(path, texts("w"))["w"].tolist() == frame["w"].tolist()[:rows]
    lines = [f"{i}\ttext {i}" for i in range(600)]
    lines[99] = '99\t"open text'
    for end in ("", "\n"):
        (tmp_path / "t.tsv").write_text("n\tw\n" + "\n".join(lines) + end)
        with pytest.raises(UserError, match="row 100: a quote"):
            list(read_chunks(tmp_path / "t.tsv", texts("w")))


def test_long_texts_are_said_to_need_their_flag(tmp_path):
    for words in ("line\n" * 300, "x" * 2_000_000):
        write(tmp_path / "t.csv", pd.DataFrame({"w": [words] * 3, "n": [1, 2, 3]}))
        with pytest.raises(UserError, match="--text"):
            read_table(tmp_path / "t.csv")
        assert len(read_table(tmp_path / "t.csv", texts("w"))) == 3


def test_bytes_in_parquet_are_text_where_they_can_be(tmp_path):
    pictures = [b"\x89PNG", "가".encode()] * 3
    frame = pd.DataFrame({"w": ["가".encode(), None, b"b"] * 2, "picture": pictures, "n": range(6)})
    frame.to_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", images("picture"))
    assert table["w"].fillna("").tolist() == ["가", "", "b"] * 2 and table["picture"].tolist() == pictures
    for read in (
        lambda path: read_table(path, texts("picture")),
        lambda path: list(read_chunks(path, texts("picture"), rows=1)),
    ):
        with pytest.raises(UserError, match="row 1, column 'picture': these bytes are not valid UTF-8"):
            read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((b"NA", b"b"), "class 'NA' is read as an empty cell"),
        ((b"01", b"1"), "class '1' is read as '01'"),
        ((b"a", b"\xff"), "not valid UTF-8: rename"),
    ],
)
def test_names_of_class_folders_that_make_no_label(tmp_path, names, message):
    for name in names:
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        (Path(os.fsdecode(folder)) / "a.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path, [])
    if "UTF-8" in message:
        with pytest.raises(UserError, match=message):
            list(read_records(str(tmp_path), texts("t", lone="t"), 9))


def test_a_cell_of_bytes_changes_no_other_in_whichever_piece_it_comes(tmp_path):
    cells = [b"aa", b"bb", None] * 40 + [b"\xff"]
    pd.DataFrame({"k": cells, "image": [b"\x89PNG"] * len(cells)}).to_parquet(tmp_path / "t.parquet")
    whole = read_table(tmp_path / "t.parquet", images("image"))
    pieces = pd.concat(read_chunks(tmp_path / "t.parquet", images("image"), rows=50))
    pd.testing.assert_frame_equal(whole, pieces)
    assert whole["k"].tolist()[:2] == ["aa", "bb"] and whole["k"].iloc[-1] == "\ufffd"
    assert whole["image"].iloc[0] == b"\x89PNG"


def test_a_word_in_the_first_sentence_makes_no_table(tmp_path):
    path = tmp_path / "t.txt"
    for text, rows in (
        ("I liked it, review, really\nsecond text here\nthird\n", 3),
        ("review,n\nfine,1\nbad,2\n", 2),
        ('review\nfine\n"bad, really"\n', 2),
        ("x", 1),  # too short for some encodings: no row at all in these
    ):
        path.write_text(text)
        assert len(pd.concat(read_chunks(path, texts("review", lone="review")))) == rows


@pytest.mark.parametrize("letters", ["", "\nfílm è,pos"])
def test_an_invalid_byte_is_named_by_its_row(tmp_path, letters):
    rows = "".join(f"\nfine film {i},pos\nbad film {i},neg" for i in range(20))
    (tmp_path / "t.csv").write_bytes(f"text,label{letters}{rows}\nbro".encode() + b"\xffken,pos" + rows.encode())
    with pytest.raises(UserError, match=f"row {41 + bool(letters)} contains bytes that are not valid UTF-8"):
        read_table(tmp_path / "t.csv")


def test_only_columns_of_texts_have_long_cells(tmp_path):
    frame = pd.DataFrame({"review": ["line\n" * 300] * 2, "note": ["line\n" * 300, "x"], "y": [1, 2]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UserError, match="a cell of column 'note' has 300 lines"):
        read_table(tmp_path / "t.csv", texts("review"))
    assert len(read_table(tmp_path / "t.csv", texts("review", "note"))) == 2
    frame["y"] = "\0"
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert len(read_table(tmp_path / "t.csv", texts("review", "note"))) == 2  # a stray zero byte within a text
    with pytest.raises(UserError, match="zero bytes"):
        read_table(tmp_path / "t.csv")


# ---------------------------------------------------------------- file names in tables

URL = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_paths_start_from_the_folder_of_their_table(tmp_path, ending):
    frame = pd.DataFrame({"a": ["x/1.png", "2.png", "/3.png", URL], "b": ["1.png"] * 4, "n": range(4)})
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        frame.to_parquet(path)
    elif ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    expected = [str(tmp_path / "x/1.png"), str(tmp_path / "2.png"), "/3.png", URL]
    for table in (read_table(path, images("a")), pd.concat(read_chunks(path, images("a"), rows=2))):
        assert table["a"].tolist() == expected and table["b"].tolist() == ["1.png"] * 4
    assert read_table(path, images("a", "b"))["b"].tolist() == [str(tmp_path / "1.png")] * 4
    assert pd.concat(read_records(str(path), images("a", lone="a"), 3))["a"].tolist() == expected
    with pytest.raises(UserError, match=rf"t\.{ending}: column 'A' is missing. Did you mean 'a'"):
        read_table(path, images("A"))


def test_empty_cells_of_a_column_of_files_stay_empty(tmp_path, monkeypatch):
    """Whoever encodes them names the row, or leaves it out."""
    for cell in ("", "NA"):
        (tmp_path / "t.csv").write_text(f"n,path\n1,a.png\n2,{cell}\n")
        assert read_table(tmp_path / "t.csv", images("path"))["path"].tolist() == [str(tmp_path / "a.png"), cell]
    pd.DataFrame({"path": ["a.png", None]}).to_parquet(tmp_path / "t.parquet")
    assert pd.concat(read_chunks(tmp_path / "t.parquet", images("path"), rows=1))["path"].isna().tolist() == [0, 1]
    send(monkeypatch, b"n,path\n1,x/a.png\n2,/b.png\n")
    with standard_input(images("path")) as path:
        assert read_table(path, images("path"))["path"].tolist() == ["x/a.png", "/b.png"]


# ---------------------------------------------------------------- files that are one record each


def make_files(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}\nand more")
    return sorted(str(folder / name) for name in names)


def test_class_folders_of_images(tmp_path):
    files, notes = make_files(tmp_path, "red/1.png", "red/2.JPG", "blue/deep/3.webp"), []
    records, kinds = read_folder(tmp_path, notes)
    assert kinds == {"file": "image"} and list(records) == ["file", "label"] and not notes
    assert sorted(records["file"]) == files and records["label"].tolist() == ["blue", "red", "red"]
    assert records.index.tolist() == [1, 2, 3] and records.index.name == "row"
    make_files(tmp_path, "red/.hidden.png", "red/notes.txt", ".git/4.png")
    records, kinds = read_folder(tmp_path, notes)
    assert len(records) == 3 and "2 files that are hidden" in notes[0]
    with pytest.raises(UserError, match="no images and no texts in class folders"):
        read_folder(tmp_path / "blue" / "deep", notes)


def test_class_folders_of_texts(tmp_path):
    make_files(tmp_path, "pos/1.txt", "pos/2.TXT", "neg/3.txt")
    (tmp_path / "neg" / "4.txt").write_bytes("이 영화는 정말 좋았어요".encode("cp949"))
    (tmp_path / "neg" / "5.txt").write_bytes("\ufeffwith a mark".encode())
    records, kinds = read_folder(tmp_path, [])
    assert kinds == {"text": "text", "file": "drop"} and list(records) == ["text", "file", "label"]
    assert records["label"].tolist() == ["neg"] * 3 + ["pos"] * 2
    assert records["text"].tolist()[1:4] == ["이 영화는 정말 좋았어요", "with a mark", "text of pos/1.txt\nand more"]
    (tmp_path / "pos" / "6.txt").write_bytes("가나다\n라".encode() + b"\xff")
    with pytest.raises(UserError, match=r"6\.txt: line 2 contains bytes that are not valid UTF-8"):
        read_folder(tmp_path, [])


def test_classes_whose_names_hold_quotes(tmp_path):
    make_files(tmp_path, "it's/1.txt", 'a "b"/2.txt')
    assert read_folder(tmp_path, [])[0]["label"].tolist() == ['a "b"', "it's"]


def test_train_val_and_test_folders(tmp_path):
    folder = str(tmp_path)
    make_files(tmp_path, "train/a/1.png", "train/b/2.png")
    assert split_folders(folder) == [folder, "", ""]  # train may be a class
    make_files(tmp_path, "test/a/3.png")
    assert split_folders(folder) == [str(tmp_path / "train"), "", str(tmp_path / "test")]
    make_files(tmp_path, "val/a/3.png")
    assert split_folders(folder) == [str(tmp_path / name) for name in ("train", "val", "test")]


def test_records_of_images_are_their_paths(tmp_path):
    files = make_files(tmp_path, "a, b.png", 'c "d".jpg', "[e].png", "deep/er/가.PNG")
    make_files(tmp_path, "notes.txt", ".hidden.png")
    layout = images("photo", lone="photo")
    for source, expected in (
        (tmp_path, files),
        (tmp_path / "*.png", [f for f in files if f.endswith(".png")]),
        (tmp_path / "**" / "*.PNG", [f for f in files if f.endswith(".PNG")]),
        (tmp_path / "[e].png", [str(tmp_path / "[e].png")]),
    ):
        for rows in (2, 9):
            frames = list(read_records(str(source), layout, rows))
            assert all(len(frame) <= rows for frame in frames)
            records = pd.concat(frames)
            assert records["photo"].tolist() == records["file"].tolist() == expected
            assert records.index.tolist() == list(range(1, len(expected) + 1))
    assert list(next(read_records(files[0], images("file", lone="file"), 9))) == ["file"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        list(read_records(str(tmp_path / "empty"), layout, 9))
    with pytest.raises(UserError, match="must end in one of"):  # records of several columns are in tables alone
        list(read_records(files[0], images("photo"), 9))


def test_records_of_texts_are_what_the_files_hold(tmp_path):
    files = make_files(tmp_path, "1.txt", "deep/2.txt", "deep/3.txt")
    make_files(tmp_path, "4.png")
    layout = texts("review", lone="review")
    for source in (tmp_path, tmp_path / "**" / "*"):
        records = pd.concat(read_records(str(source), layout, 2))
        assert records["file"].tolist() == files
        assert records["review"].iloc[1] == "text of deep/2.txt\nand more"
    lines = pd.concat(read_records(files[0], layout, 1))  # but one such file alone holds one text per line
    assert lines["review"].tolist() == ["text of 1.txt", "and more"] and lines.index.tolist() == [1, 2]
    with pytest.raises(UserError, match="no texts"):
        list(read_records(str(tmp_path / "*.png"), layout, 9))


def test_records_of_a_table_come_in_slices(tmp_path):
    path = write(tmp_path / "t.csv", FRAME)
    frames = list(read_records(str(path), Layout(), 8))
    assert [len(frame) for frame in frames] == [8, 8, 4]
    pd.testing.assert_frame_equal(pd.concat(frames), read_table(path))
    with pytest.raises(UserError, match="no such file"):
        list(read_records(str(tmp_path / "none.csv"), Layout(), 8))


# ---------------------------------------------------------------- the log of a service


def make_log(path, records, kinds=None):
    """records: (model, record, name of the target, target or None)"""
    with contextlib.closing(sqlite3.connect(path)) as log, log:
        log.execute(
            "CREATE TABLE requests (id TEXT, row INTEGER, time REAL, model TEXT, record TEXT, prediction TEXT,"
            " name TEXT, target TEXT, error REAL, PRIMARY KEY (id, row))"
        )
        for i, (model, record, name, target) in enumerate(records):
            values = (str(i), 1, 0.0, model, json.dumps(record), name, None if target is None else json.dumps(target))
            log.execute(
                "INSERT INTO requests (id, row, time, model, record, name, target) VALUES (?,?,?,?,?,?,?)", values
            )
        if kinds is not None:
            log.execute("CREATE TABLE models (sha256 TEXT PRIMARY KEY, kinds TEXT)")
            log.executemany("INSERT INTO models VALUES (?, ?)", [(m, json.dumps(k)) for m, k in kinds.items()])
    return path


def test_a_log_gives_the_records_whose_target_is_known(tmp_path):
    records = [
        ("a", {"y": "seen before", "c": URL}, "y", "cat"),
        ("a", {"c": "never reported"}, None, None),
        ("b", {"c": URL, "d": 2.5}, "y", "dog"),
    ]
    path = make_log(tmp_path / "requests.db", records)
    table = read_table(path, images("c"))
    assert list(table) == ["c", "d", "y"] and table["y"].tolist() == ["cat", "dog"]
    assert table["c"].tolist() == [URL, URL] and table.index.tolist() == [1, 2]
    assert [len(chunk) for chunk in read_chunks(path, rows=1)] == [1, 1]
    assert log_kinds(path) == {}  # a log without that table


def test_a_log_knows_the_kinds_of_its_columns(tmp_path):
    kinds = {"new": {"c": "text"}, "a": {"c": "image"}, "b": {"c": "text", "d": "number"}, "quiet": {"t": "text"}}
    records = [
        ("a", {"c": URL}, "y", 1),
        ("b", {"c": "ok", "d": 1}, "y", 2),
        ("quiet", {"t": "never reported"}, "", None),
    ]
    assert log_kinds(make_log(tmp_path / "1.db", records, kinds)) == {"c": "text", "d": "number"}
    assert log_kinds(make_log(tmp_path / "2.db", records[1::-1], kinds)) == {"c": "image"}
    assert log_kinds(make_log(tmp_path / "3.db", records[2:], kinds)) == {}
    assert log_kinds(make_log(tmp_path / "4.db", records, {})) == {}


def test_unusable_logs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"1\.db: none of its records has a true target"):
        read_table(make_log(tmp_path / "1.db", [("a", {"x": 1}, "", None)]))
    (tmp_path / "2.db").write_text("not a database, but long enough to be looked at" * 9)
    for read in (read_table, log_kinds):
        with pytest.raises(UserError, match=r"2\.db: not a readable log of requests"):
            read(tmp_path / "2.db")
        with pytest.raises(UserError, match=r"none\.db"):
            read(tmp_path / "none.db")


# ---------------------------------------------------------------- bundled examples


@pytest.mark.parametrize(
    ("name", "rows", "target", "kinds"),
    [
        ("breast_cancer", 569, "target", {}),
        ("wine", 178, "target", {}),
        ("diabetes", 442, "target", {}),
        ("digits", 1797, "label", {"file": "image"}),
        ("docstrings", 0, "package", {"docstring": "text"}),
    ],
)
def test_bundled_examples(name, rows, target, kinds):
    records, found, what = load_bundled(name)
    assert (found, what) == (target, kinds)
    assert records.index.tolist() == list(range(1, len(records) + 1)) and records.index.name == "row"
    assert (len(records) == rows if rows else len(records) > 1000) and target in records and set(kinds) <= set(records)
    assert records[target].nunique() == {"breast_cancer": 2, "wine": 3, "digits": 10, "docstrings": 7}.get(name, 214)


def test_large_integers_are_not_rounded(tmp_path):
    """Beside a missing cell a column of integers becomes floats, which hold 15 digits."""
    (tmp_path / "t.jsonl").write_text('{"id": 9007199254740993, "n": 1}\n{"n": 2}\n')
    table = read_table(tmp_path / "t.jsonl")
    assert table["id"][1] == "9007199254740993" and table["n"].tolist() == [1, 2]


# ---------------------------------------------------------------- how the file is written

REPORT = "Datum;Preis;Ort\n01.02.2023;1.234,50 €;Köln\n02.02.2023;2,5 €;“Bonn”\n"
CP1252 = {"Datum": ["01.02.2023", "02.02.2023"], "Preis": ["1.234,50 €", "2,5 €"], "Ort": ["Köln", "“Bonn”"]}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("above", "lines"),
    [
        ("", 0),
        ("Übersicht 2023\n", 1),
        ("Übersicht 2023\n\n", 2),
        ("Übersicht\n\n", 2),
        ("Übersicht 2023, nach Tagen\nStand: 1.2.2023, 8,5 Uhr\n\n", 3),
        ("Übersicht;;\n;;\n", 2),
        ('"Über\nsicht";;\n', 2),
        ("\n\n", 0),
        ("sep=;\n", 0),
        ("sep=;\nÜbersicht 2023\n", 1),
    ],
)
def test_a_header_is_found_below_titles(tmp_path, above, lines, newline, encoding):
    for name in ("t.csv", "t.csv.gz"):
        data = (above + REPORT).replace("\n", newline).encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        notes = []
        table = read_table(tmp_path / name, notes=notes)
        assert table.to_dict("list") == CP1252 and table.index.tolist() == [1, 2]
        guess = [f"{tmp_path / name}: read as cp1252, which is a guess: --encoding overrules it"] * (
            encoding == "cp1252"
        )
        notes, guesses = notes[: len(notes) - len(guess)], notes[len(notes) - len(guess) :]
        assert len(notes) == bool(lines) and all(f"{lines} line" in note and "Über" in note for note in notes)
        assert guesses == guess
        assert separator_of(tmp_path / name) == ";"
        (tmp_path / name).write_bytes(data + ("x;y" + newline).encode("utf-16-le" if encoding == "utf-16" else "ascii"))
        with pytest.raises(UserError, match="row 3 has 2 fields, the header 3"):
            read_table(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2,3\n4,5,6\n",
        "a,b\nx,y,3\nz,w,6\nz,w,6\nz,w,6\n",
        "a\n1,2\n3,4\n",
        "a\n\n1,2\n3,4\n",
        "text\nHello, world\nGood, fine\n",
        "a,b,c\n1,2\n1\n1,2,3,4\n",
        "one,two,three,four\nx\ny,z\n",
    ],
)
def test_a_short_header_is_no_title(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=r"row 1 has \d fields, the header \d"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("text", [",a\nfoo,bar\nbaz,qux\n", "a,\nx,1\ny,2\n", "a,b\nx,y\n1,2\n", "x y\n1\n2\n"])
def test_no_row_of_an_ordinary_table_is_taken_for_a_header(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    assert read_table(tmp_path / "t.csv").iloc[0].tolist() == text.split("\n")[1].split(",")


def test_lines_to_skip_can_be_said(tmp_path):
    (tmp_path / "t.csv").write_text("old;names\na;b\n1;2\n3;4\n")
    for skip, names in ((-1, ["old", "names"]), (0, ["old", "names"]), (1, ["a", "b"]), (2, ["1", "2"])):
        assert list(read_table(tmp_path / "t.csv", Layout(skip_rows=skip))) == names
    with pytest.raises(UserError, match="--skip-rows 4 leaves no header"):
        read_table(tmp_path / "t.csv", Layout(skip_rows=4))
    (tmp_path / "t.csv").write_text("Titel 2023\n\na;b\n1;2\n")
    assert list(read_table(tmp_path / "t.csv", Layout(skip_rows=0))) == ["Titel 2023"]


@settings(max_examples=20, deadline=None)
@given(st.text("a bé€‚„…‘’“”–—™œŒžŸš‹›", min_size=1, max_size=30), st.integers(0, 1))
def test_windows_letters(tmp_path_factory, words, blocks):
    """€, curly quotes and dashes, wherever they come in the file."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    lines = [*["plain;1"] * (blocks * 140_000), f"x “é” {words};2"]
    path.write_bytes("\n".join(["w;n", *lines, ""]).encode("cp1252"))
    for table in (read_table(path), pd.concat(read_chunks(path))):
        assert table["w"].iloc[-1] == f"x “é” {words}"


def test_an_encoding_can_be_said(tmp_path):
    words = ["Łódź", "Kraków"]
    for encoding in ("cp1250", "iso-8859-2", "utf-16-le", "utf-8-sig", "UTF8", "utf-32", "cp037"):
        layout = Layout(encoding=encoding)
        path = write(tmp_path / "t.csv", pd.DataFrame({"w": ["dzień"] * 2, "n": words}), encoding="utf-8", sep=";")
        text = path.read_text(encoding="utf-8").encode(encoding, "replace")
        path.write_bytes(text)
        expected = [word.encode(encoding, "replace").decode(encoding) for word in words]
        assert read_table(path, layout)["n"].tolist() == expected and separator_of(path, layout) == ";"
        (tmp_path / "l.txt").write_bytes("\n".join(words).encode(encoding, "replace"))
        lines = pd.concat(read_chunks(tmp_path / "l.txt", Layout(lone="w", encoding=encoding)))
        assert lines["w"].tolist() == expected
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.txt").write_bytes(words[0].encode("cp1250"))
    assert read_folder(tmp_path, [], "cp1250")[0]["text"].tolist() == [words[0]] * 2
    layout = Layout(texts=frozenset("t"), lone="t", encoding="cp1250")
    assert next(read_records(str(tmp_path / "?" / "*"), layout, 9))["t"].tolist() == [words[0]] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cp1253x", "--encoding cp1253x: unknown encoding. Did you mean 'cp125"),
        ("base64", "--encoding base64: unknown encoding"),
        ("a\0", "unknown encoding"),
        ("utf-8", r"row 2 contains bytes that are not valid UTF-8 \(--encoding utf-8\)"),
        ("ascii", r"row 1 contains bytes that are not valid ASCII"),
    ],
)
def test_an_encoding_that_does_not_fit(tmp_path, name, message):
    (tmp_path / "t.csv").write_bytes("Titel 2023\n\nw;n\né;1\n".encode() + b"\xe9;2\n")
    for layout in (Layout(encoding=name), Layout(encoding=name, skip_rows=2)):
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / "t.csv", layout)


def test_a_title_is_found_in_lines_of_a_lone_text(tmp_path):
    (tmp_path / "t.txt").write_text("sep=;\nMeldungen 2023\n\nreview;n\nfine;1\nbad;2\n")
    table = pd.concat(read_chunks(tmp_path / "t.txt", texts("review", lone="review")))
    assert table["review"].tolist() == ["fine", "bad"]


def test_only_text_tables_have_a_separator(tmp_path):
    FRAME.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("one text, and more\nanother\n")
    for path in (tmp_path, tmp_path / "t.parquet", tmp_path / "none.csv"):
        assert separator_of(path) == ""
    assert separator_of(tmp_path / "t.txt", texts("review", lone="review")) == ""
    assert separator_of(write(tmp_path / "t.tsv", FRAME, sep="\t")) == "\t"


def test_what_is_not_there_is_said_before_its_ending(tmp_path):
    for name in ("none.jpg", "none.xyz", "none"):
        for layout in (Layout(), images("x", lone="x"), texts("x", lone="x")):
            with pytest.raises(UserError, match="no such file"):
                list(read_records(str(tmp_path / name), layout, 9))


def test_a_path_is_named_once():
    for message, expected in (("a/b.png: broken", "a/b.png: broken"), ("row 1: broken", "a: row 1: broken")):
        for error in (UserError(message), BrokenRecords({3: message})):
            with pytest.raises(UserError, match=f"^{expected}$"), error_prefix("a"):
                raise error
    with pytest.raises(UserError, match=r"^a\.png: broken$"), error_prefix("a.png"):
        raise UserError("a.png: broken")


# ---------------------------------------------------------------- spreadsheets

DAY = datetime.datetime(2023, 1, 2)
SHEET = [
    ["id", "price", "mixed", "when", "fine", 2023, None],
    [1, 2.5, "k.A.", DAY, True, "x", None],
    [2, None, 3, DAY.replace(hour=3), False, None, None],
    [None] * 7,
    [3, 1e300, 2.5, None, True, " y ", None],
    [None] * 7,
]


@pytest.mark.parametrize("write_sheets", [xlsx, ods])
@pytest.mark.parametrize("above", [[], [["Report 2023"]], [["Report"], [], [None, None]], [[]]])
def test_cells_of_a_spreadsheet_keep_their_types(tmp_path, write_sheets, above):
    path, notes = tmp_path / "t.xlsx", []
    path.write_bytes(write_sheets({"First": above + SHEET, "Second": [["a", "b"], [1, 2]]}))
    table = read_table(path, notes=notes)
    assert list(table) == ["id", "price", "mixed", "when", "fine", "2023"] and table.index.tolist() == [1, 2, 3]
    assert table["id"].tolist() == [1, 2, 3] and table["price"].tolist()[::2] == [2.5, 1e300]
    assert table["mixed"].tolist() == ["k.A.", 3, 2.5] and isinstance(table["mixed"].iloc[1], int)
    assert table["when"].tolist()[:2] == [DAY, DAY.replace(hour=3)] and str(table["when"].dtype).startswith("datetime")
    assert table["fine"].tolist() == [True, False, True] and table["2023"].tolist()[::2] == ["x", " y "]
    assert table.isna().sum().to_dict() == {"id": 0, "price": 1, "mixed": 0, "when": 1, "fine": 0, "2023": 1}
    assert "sheet 'First' read, of 'First', 'Second'" in notes[0] and len(notes) == 1 + bool(above and above[0])
    assert ["Report" in note for note in notes[1:]] == [True] * (len(notes) - 1)
    assert read_table(path, Layout(sheet="Second")).to_dict("list") == {"a": [1], "b": [2]}
    pd.testing.assert_frame_equal(read_table(path, Layout(max_bytes=1 << 20)), table)
    for rows in (1, 3):
        frames = list(read_records(str(path), Layout(), rows))
        assert all(len(frame) <= rows for frame in frames) and pd.concat(frames).index.tolist() == [1, 2, 3]
    assert "k.A." in read_table(path, Layout(skip_rows=len(above) + 1)) and separator_of(path) == ""


def test_errors_in_a_sheet_are_empty_cells(tmp_path):
    (tmp_path / "t.xlsm").write_bytes(xlsx({"S": [["a", "b"], [1, "#DIV/0!"], [2, 3]]}))
    assert read_table(tmp_path / "t.xlsm")["b"].isna().tolist() == [True, False]


BOOK = xlsx({"Daten": [["a", "b"], [1, 2]], "Leer": [], "Kopf": [["a", "b"]], "Zwei": [["a", "a"], [1, 2]]})


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize(
    ("data", "sheet", "message"),
    [
        (BOOK, "daten", "there is no sheet 'daten'. Did you mean 'Daten'"),
        (BOOK, "x", "there is no sheet 'x'. Available: Daten, Leer, Kopf, Zwei"),
        (BOOK, "Leer", "the sheet 'Leer' is empty. --sheet reads another one: Daten, Kopf, Zwei"),
        (BOOK, "Kopf", "there are no rows below the header"),
        (BOOK, "Zwei", "column 'a' occurs twice"),
        (BOOK[:700], "", "is damaged"),
        (BOOK[:900] + BOOK[950:], "", "is damaged"),
        (b"a;b\n1;2\n", "", "not a spreadsheet. If it is a text table, rename it to .csv"),
        (encrypted(), "", "protected by a password"),
        (b"", "", "not a spreadsheet"),
    ],
)
def test_unusable_spreadsheets_are_named(tmp_path, data, sheet, message, limit):
    (tmp_path / "t.xlsx").write_bytes(data)
    with pytest.raises(UserError, match=rf"t\.xlsx: .*{message}") as found:
        read_table(tmp_path / "t.xlsx", Layout(sheet=sheet, max_bytes=limit))
    assert "\n" not in str(found.value)


def test_a_small_spreadsheet_that_would_be_large_is_refused(tmp_path, monkeypatch):
    rows = [["a", "b"], *[[1, "x" * 1000]] * 300]
    (tmp_path / "t.xlsx").write_bytes(xlsx({"S": rows}))
    with pytest.raises(UserError, match="more than 100,000 bytes when unpacked"):
        read_table(tmp_path / "t.xlsx", Layout(max_bytes=100_000))
    for last in ("XFD1048576", "ALL12000"):  # the cells between are allocated
        (tmp_path / "t.xlsx").write_bytes(xlsx({"S": rows}, last))
        with pytest.raises(UserError, match=r"take too much memory|more than 10,000,000 cells"):
            read_table(tmp_path / "t.xlsx", Layout(max_bytes=1 << 20))


def test_a_large_spreadsheet_is_read_in_seconds(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(xlsx({"S": [list("abcde"), *[[1.5, 2, "x", None, True]] * 30_000]}))
    start = time.perf_counter()
    assert len(read_table(tmp_path / "t.xlsx")) == 30_000
    assert time.perf_counter() - start < 5


def test_large_integers_of_parquet_are_not_rounded(tmp_path):
    cells = pd.array([9007199254740993, None, 3], dtype="Int64")
    for frame in (
        pd.DataFrame({"id": cells, "n": [1, 2, 3]}),
        pd.DataFrame({"id": cells}).set_index("id", append=True),
    ):
        frame.to_parquet(tmp_path / "t.parquet")
        for table in (read_table(tmp_path / "t.parquet"), pd.concat(read_chunks(tmp_path / "t.parquet", rows=1))):
            assert table["id"].iloc[0] == "9007199254740993" and table["id"].isna().tolist() == [False, True, False]
    table = pa.table({"id": pa.array([9007199254740993, None, -3]), "n": pa.array([1, None, 3])})
    parquet.write_table(table, tmp_path / "t.parquet")  # without the types of pandas
    table = read_table(tmp_path / "t.parquet")
    assert table["id"].tolist()[::2] == ["9007199254740993", "-3"] and table["n"].tolist()[::2] == [1, 3]


def test_the_flags_reach_the_readers(tmp_path):
    rows = [["n", "w", "y"], *[[i, f"“{i % 3}”", i % 2] for i in range(60)]]
    (tmp_path / "t.xlsx").write_bytes(xlsx({"Notes": [["nothing"]], "Data": [["a", "b", "c"], *rows]}))
    text = "a;b;c\n" + "".join(";".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "t.csv").write_bytes(text.encode("cp1252"))
    for name, flag in (("t.xlsx", {"sheet": "Data"}), ("t.csv", {"encoding": "cp1252"})):
        splits = load_splits(DataConfig(data=str(tmp_path / name), target="y", skip_rows=1, **flag), seed=0)
        assert sorted(splits.train) == ["n", "w", "y"] and set(splits.train["w"]) == {"“0”", "“1”", "“2”"}
        assert f"{name}: 1 line above the header skipped (a b c)" in splits.notes[0]
    with pytest.raises(UserError, match="there is no sheet 'data'"):
        load_splits(DataConfig(data=str(tmp_path / "t.xlsx"), target="y", sheet="data"), seed=0)


def test_the_first_line_can_name_the_separator(tmp_path):
    for separator in "~|\t;":
        (tmp_path / "t.csv").write_text(f"sep={separator}\r\na,1{separator}b,2\r\n1,5{separator}2,5\r\n")
        assert read_table(tmp_path / "t.csv").to_dict("list") == {"a,1": ["1,5"], "b,2": ["2,5"]}


# ---------------------------------------------------------------- damaged, crafted and endless files


@pytest.fixture(scope="module")
def kinds_of_files(tmp_path_factory):
    """A file of each kind, all with the same records."""
    folder, frame = tmp_path_factory.mktemp("kinds"), make_table(60).assign(n=range(60))
    write(folder / "t.csv", frame)
    write(folder / "t.csv.gz", frame, pack=True)
    frame.to_json(folder / "t.jsonl", orient="records", lines=True)
    frame.to_parquet(folder / "t.parquet")
    (folder / "t.xlsx").write_bytes(xlsx({"a": [list(frame), *frame.head(9).astype(str).to_numpy().tolist()]}))
    records = [("m", {"x": i, "word": f"w{i}"}, "y", i % 2) for i in range(60)]
    make_log(folder / "t.db", records, {"m": {"x": "number"}})
    return sorted(folder.iterdir())


def test_damaged_files_of_any_kind_are_refused_in_one_line(kinds_of_files, tmp_path):
    """Flipped bits: a table, or one line that names the file; never another exception."""
    random, refused = np.random.default_rng(0), {path.name: 0 for path in kinds_of_files}
    for name, good in [(path.name, path.read_bytes()) for path in kinds_of_files] * 40:
        damaged = bytearray(good)
        for at in random.integers(len(good), size=3):
            damaged[at] ^= 1 << int(random.integers(8))
        (tmp_path / name).write_bytes(damaged)
        try:
            log_kinds(tmp_path / name) if name.endswith(".db") else None
            assert isinstance(read_table(tmp_path / name), pd.DataFrame)
        except UserError as error:
            refused[name] += 1
            assert str(tmp_path / name) in str(error)
    assert min(refused[name] for name in ("t.csv.gz", "t.jsonl", "t.xlsx", "t.db")) > 0, refused


def test_only_files_are_read(kinds_of_files, tmp_path):
    """A pipe, which nobody writes to, would be waited for without end."""

    def stop(*_):
        pytest.fail("waits for a pipe")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for name in [path.name for path in kinds_of_files] + ["t.txt", "t.tsv.gz"]:
            os.mkfifo(tmp_path / name)
            (tmp_path / "folder" / name).mkdir(parents=True)
            signal.alarm(5)
            for path in (tmp_path / name, tmp_path / "folder" / name):
                for read in (read_table, *([log_kinds] if name.endswith(".db") else [])):
                    with pytest.raises(UserError, match="this is a folder, a pipe or a device"):
                        read(path)
                with pytest.raises(UserError):
                    next(read_records(str(path), Layout(lone="t"), 9))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_only_tables_of_a_log_are_read(tmp_path):
    """A view can be endless."""
    endless = "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT i AS rowid, "
    with contextlib.closing(sqlite3.connect(tmp_path / "1.db")) as log, log:
        log.execute(
            f"CREATE VIEW requests AS {endless} '{{}}' AS record, 'y' AS name, NULL AS target, '' AS model FROM r"
        )
    for read in (read_table, log_kinds):
        with pytest.raises(UserError, match=r"1\.db: not a log of requests"):
            read(tmp_path / "1.db")
    path = make_log(tmp_path / "2.db", [("m", {"x": 1}, "y", 1)])
    with contextlib.closing(sqlite3.connect(path)) as log, log:
        log.execute(f"CREATE VIEW models AS {endless} 'm' AS sha256, '{{}}' AS kinds FROM r WHERE i < 0")
    assert log_kinds(path) == {} and len(read_table(path)) == 1


@pytest.mark.parametrize(
    "change", ["record = '{'", "record = '[1]'", "record = NULL", "record = x'ff'", "target = 'x'", "name = NULL"]
)
def test_damaged_rows_of_a_log_are_named(tmp_path, change):
    path = make_log(tmp_path / "t.db", [("m", {"x": 1}, "y", 1)] * 3)
    with contextlib.closing(sqlite3.connect(path)) as log, log:
        log.execute(f"UPDATE requests SET {change} WHERE rowid = 2")
    with pytest.raises(UserError, match=r"t\.db: row 2 of the table requests is damaged"):
        read_table(path)


@pytest.mark.parametrize("kinds", ["{", "[1]", "null", "7"])
def test_damaged_kinds_in_a_log(tmp_path, kinds):
    path = make_log(tmp_path / "t.db", [("m", {"x": 1}, "y", 1)], {"m": {}})
    with contextlib.closing(sqlite3.connect(path)) as log, log:
        log.execute("UPDATE models SET kinds = ?", [kinds])
    with pytest.raises(UserError, match=r"t\.db: the kinds of columns in the table models are damaged"):
        log_kinds(path)


def test_unusual_columns_of_parquet(tmp_path):
    table = pa.table([[1, 2], [3, 4]], names=["a", "a"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet: column 'a' occurs twice"):
        read_table(tmp_path / "twice.parquet")
    months = pd.period_range("2023-01", periods=3, freq="M").where([True, False, True])
    frame = pd.DataFrame({"month": months, "bin": pd.cut([1, 5, 9], 3), 7: [1, 2, 3], "y": list("aba")})
    frame["bin"] = pd.arrays.IntervalArray(frame["bin"])
    frame.to_parquet(tmp_path / "t.parquet")
    read = read_table(tmp_path / "t.parquet")
    assert list(read) == ["month", "bin", "7", "y"] and read["7"].tolist() == [1, 2, 3]
    assert read["month"].dropna().tolist() == ["2023-01", "2023-03"] and read["bin"].str.startswith("(").all()


RUSSIAN, CHINESE = (
    "быстрая коричневая лиса прыгает",
    "我昨天在网上买了一台新电脑，快递很快就到了，客服态度也很好，希望下次改进",
)
POLISH, KOREAN = "zażółć gęślą jaźń", "이 제품은 정말 좋아요 大韓民國"


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        (RUSSIAN, "koi8-r", ""),
        (RUSSIAN, "cp1251", ""),
        (CHINESE, "gb18030", ""),
        (POLISH, "cp1250", "cp1252"),
        (KOREAN, "cp949", "cp949"),
        ("Käse für Größe", "cp1252", "cp1252"),
    ],
)
def test_an_encoding_that_is_a_guess_is_said(tmp_path, text, encoding, guess):
    """Encodings that are certainly another one are refused; of others a note says which was taken."""
    (tmp_path / "c").mkdir()
    data = "\n".join(["w,n", *[f"{text},1"] * 9]).encode(encoding)
    for name in ("t.csv", "t.txt", "c/1.txt", "c/2.txt"):
        (tmp_path / name).write_bytes(data)

    def read_all(notes: list[str], said: str) -> None:
        read_table(tmp_path / "t.csv", Layout(encoding=said), notes)
        list(read_chunks(tmp_path / "t.txt", Layout(lone="t", encoding=said), notes=notes))
        read_folder(tmp_path, notes, said)

    notes: list[str] = []
    if guess:
        read_all(notes, "")
        assert [f"read as {guess}, which is a guess: --encoding" in note for note in notes] == [True, True, True, False]
        assert notes[-1].endswith("so are 1 more files")
    else:
        for read in (read_table, lambda path: read_text_file(tmp_path / "c" / "1.txt")):
            with pytest.raises(UserError, match=r"the encoding is none of .* --encoding gb18030"):
                read(tmp_path / "t.csv")
    notes = []
    read_all(notes, encoding)
    assert not notes and read_table(tmp_path / "t.csv", Layout(encoding=encoding))["w"].tolist() == [text] * 9


def test_the_digits_come_from_no_folder_that_others_can_write_to(tmp_path, monkeypatch):
    """Of scikit-learn alone; nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "digits-as-png-1797" / "7").mkdir(parents=True)
    (tmp_path / "digits-as-png-1797" / "7" / "0000.png").write_bytes(b"an image of another user")
    records, target, kinds = load_bundled("digits")
    assert len(records) == 1797 and records[target].value_counts().min() > 170 and kinds == {"file": "image"}
    assert all(cell.startswith(b"\x89PNG") for cell in records["file"]) and len(list(tmp_path.iterdir())) == 1
