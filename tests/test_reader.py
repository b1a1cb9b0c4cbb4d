"""The same table is read the same, however it was written."""

import contextlib
import gzip
import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from preprocessing import TabularPreprocessor
from reader import find_files, is_text_file, read_chunks, read_class_folders, read_table, sniff, standard_input

ROWS = [("서울", 1.5, "a"), ("부산", -2.25, 'said "no"'), ("대구", 3.0, "two\nlines"), ("서울", 1000.5, "x;y,z\tw")]
FRAME = pd.DataFrame(ROWS * 5, columns=["도시", "크기", "note"])


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
    expected = FRAME.replace("two\nlines", f"two{newline}lines") if "two\r" in str(table["note"].iloc[2]) else FRAME
    pd.testing.assert_frame_equal(table.reset_index(drop=True), expected, check_dtype=False)
    assert table.index.tolist() == list(range(1, 21))
    chunks = pd.concat(read_chunks(path, numbers={"크기"}))
    pd.testing.assert_frame_equal(chunks, table, check_dtype=False)


def test_latin_1_is_not_taken_for_korean(tmp_path):
    words = ["café", "Réunion", "Müller", "naïve", "Åse", "Köln"] * 4
    path = write(tmp_path / "t.csv", pd.DataFrame({"w": words, "n": range(24)}), encoding="latin-1")
    assert read_table(path)["w"].tolist() == words


@pytest.mark.parametrize("sep", [";", "\t"])
def test_decimal_comma(tmp_path, sep):
    frame = pd.DataFrame({"a": [1.5, -2.25, 1000.0], "b": ["x", "y", "z"]})
    path = write(tmp_path / "t.csv", frame, sep=sep, decimal=",")
    assert sniff(path).decimal == ","
    assert read_table(path)["a"].tolist() == [1.5, -2.25, 1000.0]
    assert pd.concat(read_chunks(path, numbers={"a"}))["a"].tolist() == [1.5, -2.25, 1000.0]


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


def test_null_words_are_empty_cells(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\nNA,x\n1,?\n,null\nN/A,-\n2,y\n")
    assert read_table(tmp_path / "t.csv").isna().sum().to_dict() == {"a": 3, "b": 3}


def test_a_column_that_turns_to_words_far_down(tmp_path):
    """The reader decides on types by the first 16 MB, and must not stumble over what comes later."""
    filler = "x" * 400
    lines = [f"{i},{filler}" for i in range(60_000)] + [f"A{i},{filler}" for i in range(100)]
    (tmp_path / "t.csv").write_text("a,b\n" + "\n".join(lines) + "\n")
    table = read_table(tmp_path / "t.csv")
    assert len(table) == 60_100 and table["a"].iloc[[0, -1]].tolist() == ["0", "A99"]
    chunks = pd.concat(read_chunks(tmp_path / "t.csv", numbers={"a"}))
    assert chunks.index.tolist() == list(range(1, 60_101))
    assert chunks["a"].astype("str").iloc[[0, -1]].str.replace(".0", "").tolist() == ["0", "A99"]


def test_unnamed_columns_get_a_name(tmp_path):
    pd.DataFrame({"a": [1, 2], "b": [3, 4]}).to_csv(tmp_path / "t.csv")
    assert list(read_table(tmp_path / "t.csv")) == ["Unnamed: 0", "a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("a,b\n", "no rows below the header"),
        ("a,b,a\n1,2,3\n", "column 'a' is there twice"),
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
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is no JSON"),
        ("t.jsonl", b"[1, 2]\n", "line 1 is no JSON object"),
        ("t.parquet", b"PAR1 nothing", "cannot be read as parquet"),
        ("t.xlsx", b"PK", "must end in one of"),
        ("t.csv", b"\x1f\x8b broken", "cannot be read"),
        ("t.csv", bytes(range(256)) * 9, "no text table"),
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
    np.testing.assert_array_equal(table["n"].to_numpy(dtype=float), frame["n"])
    assert table["w"].tolist() == frame["w"].tolist()


def test_every_way_of_reading_gives_the_same_tensor(tmp_path):
    frame = pd.DataFrame(
        {
            "zip": ["01234", "99999", "20095"] * 20,
            "ok": ["true", "False", None] * 20,
            "day": pd.date_range("2024-01-01", periods=60).strftime("%Y-%m-%d"),
            "n": np.linspace(0, 1, 60),
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    whole = read_table(tmp_path / "t.csv")
    fitted = TabularPreprocessor.fit(whole, kinds={"zip": "category"}, scaling="standard", min_freq=3)
    x = fitted(whole)
    assert [s["kind"] for s in fitted.columns.values()] == ["category", "boolean", "date", "number"]
    streamed = pd.concat(read_chunks(tmp_path / "t.csv", numbers={"n"}))
    frame.to_parquet(tmp_path / "t.parquet")
    frame.astype({"day": "datetime64[s]"}).to_parquet(tmp_path / "dates.parquet")
    others = streamed, frame, read_table(tmp_path / "t.parquet"), read_table(tmp_path / "dates.parquet")
    for other in (*others, frame.to_dict("records")):
        assert (fitted(other) == x).all()


def test_cells_are_told_alike_in_training_and_prediction(tmp_path):
    """Times, exponents, timestamps, decimal commas, in columns that are categories or whole targets."""
    frame = pd.DataFrame(
        {
            "slot": ["08:00", "12:30", "18:45"] * 20,
            "stamp": ["2024-01-01T00:00:00", "2024-01-02T10:00:00", "2024-01-03T00:30:00"] * 20,
            "code": ["1e3", "2e3", "5"] * 20,
            "price": ["0,5", "1,25", "7"] * 20,
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False, sep=";")
    whole = read_table(tmp_path / "t.csv")
    kinds = dict.fromkeys(frame, "category")
    fitted = TabularPreprocessor.fit(whole, kinds=kinds, scaling="standard", min_freq=3)
    numbers = {name for name, state in fitted.columns.items() if state["numeric"]}
    assert numbers == {"code", "price"}
    streamed = fitted(pd.concat(read_chunks(tmp_path / "t.csv", numbers=numbers)))
    assert (streamed == fitted(whole)).all() and not fitted.count_unknown(streamed)
    assert fitted.columns["price"]["values"] == ["0.5", "1.25", "7"]


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


def test_a_bad_cell_in_a_decimal_comma_file_is_the_one_named(tmp_path):
    cells = [f"{i},5" for i in range(60)]
    cells[16] = "abc"
    (tmp_path / "t.csv").write_text("n;w\n" + "\n".join(f"{c};x" for c in cells) + "\n")
    frame = pd.concat(read_chunks(tmp_path / "t.csv", numbers={"n"}))
    assert frame["n"].iloc[[0, 16, 59]].tolist() == ["0.5", "abc", "59.5"]


KOREAN = "\n".join(["w,n", *(f"한국어 문장 ㅋㅋ {i},{i}" for i in range(40))]).encode("cp949")
LATE = KOREAN + (b"\n" + b"x" * 2000 + b",1") * 600  # damaged beyond the first MB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("w\nhello\nworld 가".encode()[:-1], "row 2 holds bytes that are no UTF-8"),
        (b"w\nhello\nworld \xea\xb0\n", "row 2 holds bytes that are no UTF-8"),
        ("가,나\nhello,세상\nworld,".encode() + b"\xff", "row 2 holds bytes that are no UTF-8"),
        ("가\xff,나\n라,세상\nworld,세".encode().replace("\xff".encode(), b"\xff"), "the header holds bytes"),
        ('w\tn\n"a 가\n나"\t1\n다 \xff\t2'.encode().replace("\xff".encode(), b"\xff"), "row 2 holds bytes"),
        (KOREAN.replace("장 ㅋㅋ 20".encode("cp949"), b"\xc0\xff 20"), "row 21 holds bytes that are no CP949"),
        (LATE + "\n끝".encode("cp949")[:-1] + b",2", "row 641 holds bytes that are no CP949"),
        ("w,n\n가,1\n".encode("utf-16")[:-1], "cannot be read"),
    ],
)
def test_damaged_letters_are_named_by_their_row(tmp_path, data, message):
    (tmp_path / "t.csv").write_bytes(data)
    for read in (read_table, lambda path: list(read_chunks(path)), lambda path: read_table(path, "w")):
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
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(INPUTS[name])))
    with contextlib.nullcontext(tmp_path / way) if way == "t.txt" else standard_input("리뷰") as path:
        assert pd.concat(read_chunks(path, text="리뷰"))["리뷰"].tolist() == TEXTS["리뷰"].tolist()


def test_standard_input_is_called_so(monkeypatch):
    for data, text, message in (
        (b"w\nfine\nbro\xffken", "w", "^standard input: row 2 holds bytes"),
        ("가\n\n나\nbro".encode() + b"\xffken", "w", "^standard input: line 4 holds bytes"),
        (("가" * 300_000 + "\nbro").encode() + b"\xffken", "w", "^standard input: line 2 holds bytes"),
        (b'{"w": 1,\n', "", "^standard input: line 1 is no JSON"),
        (b"\x1f\x8b broken", "w", "^standard input: cannot be read"),
    ):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        with pytest.raises(UserError, match=message), standard_input(text) as path:
            list(read_chunks(path, text=text))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"{brace}\nno {brace}\n")))
    with standard_input("w") as path:
        assert pd.concat(read_chunks(path, text="w"))["w"].tolist() == ["{brace}", "no {brace}"]


def test_a_quote_left_open_to_the_end_is_named(tmp_path):
    mail = "\n".join(f'line {i} of a "mail"' for i in range(300))
    frame = pd.DataFrame({"y": ["a", "b"] * 5, "w": [mail, mail + '"', mail + "\n", "line\u2028end", '"'] * 2})
    for last, packed in (("y", False), ("w", False), ("w", True)):
        for rows in (7, 8, 10):  # the last of them another each time
            path = write(tmp_path / "t.csv", frame[sorted(frame, key=last.__eq__)].head(rows), pack=packed)
            assert read_table(path, "w")["w"].tolist() == frame["w"].tolist()[:rows]
    lines = [f"{i}\ttext {i}" for i in range(600)]
    lines[99] = '99\t"open text'
    for end in ("", "\n"):
        (tmp_path / "t.tsv").write_text("n\tw\n" + "\n".join(lines) + end)
        with pytest.raises(UserError, match="row 100: a quote"):
            list(read_chunks(tmp_path / "t.tsv", text="w"))


def test_long_texts_are_said_to_need_their_flag(tmp_path):
    for words in ("line\n" * 300, "x" * 2_000_000):
        write(tmp_path / "t.csv", pd.DataFrame({"w": [words] * 3, "n": [1, 2, 3]}))
        with pytest.raises(UserError, match="--text"):
            read_table(tmp_path / "t.csv")
        assert len(read_table(tmp_path / "t.csv", "w")) == 3


def test_bytes_in_parquet_are_text_where_they_can_be(tmp_path):
    pictures = [b"\x89PNG", "가".encode()] * 3
    frame = pd.DataFrame({"w": ["가".encode(), None, b"b"] * 2, "picture": pictures, "n": range(6)})
    frame.to_parquet(tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", image="picture")
    assert table["w"].fillna("").tolist() == ["가", "", "b"] * 2 and table["picture"].tolist() == pictures
    for read in (
        lambda path: read_table(path, "picture"),
        lambda path: list(read_chunks(path, text="picture", rows=1)),
    ):
        with pytest.raises(UserError, match="row 1, column 'picture': these bytes are no UTF-8"):
            read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((b"NA", b"b"), "class 'NA' is read as an empty cell"),
        ((b"01", b"1"), "class '1' is read as '01'"),
        ((b"a", b"\xff"), "no UTF-8: rename it"),
    ],
)
def test_names_of_class_folders_that_make_no_label(tmp_path, names, message):
    for name in names:
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        (Path(os.fsdecode(folder)) / "a.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        read_class_folders(tmp_path, is_text_file, [])
    if "UTF-8" in message:
        with pytest.raises(UserError, match=message):
            find_files(str(tmp_path), is_text_file, "texts")


def test_a_cell_of_bytes_changes_no_other_in_whichever_piece_it_comes(tmp_path):
    cells = [b"aa", b"bb", None] * 40 + [b"\xff"]
    pd.DataFrame({"k": cells, "image": [b"\x89PNG"] * len(cells)}).to_parquet(tmp_path / "t.parquet")
    whole = read_table(tmp_path / "t.parquet", image="image")
    pieces = pd.concat(read_chunks(tmp_path / "t.parquet", image="image", rows=50))
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
        assert len(pd.concat(read_chunks(path, text="review"))) == rows
