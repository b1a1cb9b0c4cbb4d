"""Columns are recognised, fitted on training rows alone, and encoded the same way in training and in prediction."""

import ast
import io
import json
import random
import re
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, make_table, mixed_csv, mixed_table, quick_run, table_for
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import QuantileTransformer, StandardScaler

import config as config_module
import predict
from config import DataConfig, ModelConfig
from dataloader import load_splits
from errors import BrokenRecords, UserError
from export import Options, export
from pipeline import Pipeline
from preprocessing import KINDS, Column, Preprocessor, gather, infer_kind
from preprocessing.column import evenly_spaced, to_tensor
from preprocessing.date import DateColumn
from preprocessing.file_formats import settle_formats
from preprocessing.number import NumberColumn
from preprocessing.number_format import find_numbers, form_of, to_numbers
from preprocessing.parsing import canonical, name_cell, to_text
from preprocessing.ragged import PADDING, UNKNOWN
from sources import read_chunks, read_table


def fit(records, kinds=None, columns=(), **flags) -> Preprocessor:
    columns = (*columns, *(f"{name}={kind}" for name, kind in (kinds or {}).items()))
    return Preprocessor.fit(pd.DataFrame(records), DataConfig(columns=columns, **flags))


def kind_of(values, name="column") -> str:
    return infer_kind(pd.Series(list(values), name=name), DataConfig())[0]


def features(preprocessor: Preprocessor) -> list[str]:
    return [name for column in preprocessor.inputs["numbers"] for name in column.features]


def assert_equal(one: dict, other: dict) -> None:
    """The same named tensors, bit by bit."""
    assert list(one) == list(other)
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


# ---------------------------------------------------------------- which kind a column is


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0.5, 9, 60), "number"),
        ([1, 2, 3] * 20, "number"),
        (["1", "2.5", "-3e4", ""] * 15, "number"),
        (["1,5", "-2,25", "7", "NA"] * 15, "number"),
        (range(1, 61), "id"),
        ([str(i) for i in range(60)], "id"),
        (["red", "green", "blue"] * 20, "category"),
        (["36 months", "60 months"] * 30, "number"),
        (["1st", "2nd", "3rd", "4th"] * 20, "category"),
        ([f"{i % 30 + 1}{'ABCDEF'[i % 6]}" for i in range(90)], "category"),
        (["0", "1", "2", "3+"] * 15, "category"),
        (["yes", "no", None] * 20, "boolean"),
        ([True, False] * 30, "boolean"),
        ([f"2024-{1 + i % 12:02}-{1 + i % 28:02}" for i in range(60)], "date"),
        ([f"{1 + i % 28:02}/{1 + i % 12:02}/2024" for i in range(60)], "date"),
        ([f"2024년 {1 + i % 12}월 {1 + i % 28}일" for i in range(60)], "date"),
        (pd.date_range("2024-01-01", periods=60), "date"),
        ([f"a long remark about thing number {i}" for i in range(60)], "text"),
        ([f"{a} {b} {i}" for i in range(5) for a in ("Blue", "Old") for b in ("Shop", "House", "Bar")], "text"),
        ([f"AB-{i * 7919}-X" for i in range(60)], "id"),
        ([f"CUST-{i:05}" for i in range(60)], "id"),
        ([random.Random(i).randbytes(16).hex() for i in range(60)], "id"),
        ([f"photos/{i}.png" for i in range(60)], "image"),
        (["a.JPG", None, "data:image/png;base64,iVBORw0KGgo="] * 20, "image"),
        ([f"https://a.bc/{i}.png" for i in range(60)], "id"),
        (["x"] * 60, "constant"),
        ([7] * 60, "constant"),
        ([None] * 60, "constant"),
    ],
)
def test_kind_of_column(values, kind):
    assert kind_of(values) == kind


def test_a_column_named_id_may_have_gaps_but_a_measurement_may_not_be_lost():
    gaps = np.arange(60) * 1000 + 17
    assert kind_of(gaps, "user_id") == "id"
    assert kind_of(gaps, "area") == "number"


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("12 kg", "has the unit 'kg'.*--columns price=drop"),
        ("$99", r"has the unit '\$'"),
        ("45%", "has the unit '%'"),
        ("twelve", "--missing twelve"),
        ("not there", "--missing 'not there'"),
    ],
)
def test_one_stray_cell_in_a_column_of_numbers_is_named(cell, advice):
    values = [str(v) for v in np.linspace(1, 99, 60).round(2)]
    values[16] = cell
    column = pd.Series(values, name="price", index=pd.RangeIndex(1, 61))
    for call in (lambda: infer_kind(column, DataConfig()), lambda: fit(column.to_frame(), kinds={"price": "number"})):
        with pytest.raises(BrokenRecords, match=rf"row 17, column 'price': '{re.escape(cell)}'.*{advice}") as error:
            call()
        assert "category" not in str(error.value) and list(error.value.messages) == [16]
    mixed = pd.Series([f"{i} {'kg' if i % 3 else 'g'}" for i in range(60)], name="weight", index=pd.RangeIndex(1, 61))
    with pytest.raises(UserError, match=r"row 1, column 'weight': '0 g' has the unit 'g'.*1234.56 kg"):
        infer_kind(mixed, DataConfig())


FORMS = [  # how numbers are written: (form, cells, numbers, how else they may be written when predicting)
    ("1234.56", ["1", "2.5", "-3e4", "+7"], [1, 2.5, -3e4, 7], {"2,5": 2.5, "1e3": 1000}),
    ("1,234.56", ["1,234", "0.5", "1,234,567.25"], [1234, 0.5, 1234567.25], {"9,876": 9876, "9.876": 9.876}),
    ("1.234,56", ["468", "2.053", "1.234,5"], [468, 2053, 1234.5], {"9,876": 9.876, "9.876": 9876, "1.5": 1.5}),
    ("1234,56", ["1,5", "-2,25", "7"], [1.5, -2.25, 7], {"1.5": 1.5, "1.234,5": 1234.5}),
    ("$1,234.56", ["$1,234.50", "-$12", "$0"], [1234.5, -12, 0], {"12": 12, "1,000": 1000, "$ 3": 3}),
    ("1.234,56 €", ["843.716,95 €", "1,00 €", "0"], [843716.95, 1, 0], {"2,00€": 2, "1.000": 1000}),
    ("1,234.56원", ["35,447원", "1,200,000원", "900원"], [35447, 1200000, 900], {"8,900": 8900}),
    ("1234.56%", ["20.8%", "3 %", "0"], [20.8, 3, 0], {"50": 50}),
    ("1234.56 kg", ["12 kg", "3.5kg", "7 kg"], [12, 3.5, 7], {"4": 4}),
    ("1 234.56", ["1 060.42", "12.5", "1\u00a0000.00"], [1060.42, 12.5, 1000], {"7": 7}),
    ("1'234.56", ["1'060.42", "1’000.00", "2.5"], [1060.42, 1000, 2.5], {}),
    ("1234.56 months", ["36 months", "1 month", "60 months"], [36, 1, 60], {}),
    ("1,234.56", ["(1,234.50)", "12.00", "1,00,000.00"], [-1234.5, 12, 100000], {}),
    ("1.234,56", ["1.234,50-", "3,00", "−2,00"], [-1234.5, 3, -2], {}),
    ("1234.56", ["12.3K", "980", "1.5M"], [12300, 980, 1500000], {"2B": 2e9}),
    ("1234.56원", ["3.5만원", "5000원", "2억원"], [35000, 5000, 2e8], {}),
    ("1234,56 Mio. €".replace(" Mio.", ""), ["47,3 Mio. €", "750845 €"], [47300000, 750845], {}),
    ("1234.56 K", ["300 K", "273.15 K"], [300, 273.15], {}),
    (" $1,234.56".strip(), ["$1,234.50", "$(5.00)", "$-"], [1234.5, -5, 0], {"12": 12}),
    ("CHF 1234.56", ["CHF 5.-", "CHF 3.50"], [5, 3.5], {}),
    ("1234,56 €/m²", ["16,91 €/m²", "3,00 €/m²"], [16.91, 3], {}),
    ("1234.56㎡", ["84㎡", "59.5㎡"], [84, 59.5], {}),
    ("1234.56", ["1.234e+05", "2.345e+05"], [123400, 234500], {}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "cells", "numbers", "others"), FORMS)
def test_forms_of_numbers(form, cells, numbers, others):
    """The form is found, kept, shown, and can be given as --columns shows it."""
    kept = fit({"a": [*cells * 9, "n/a ", "#DIV/0!"]}, scaling="none")
    column = kept.columns[0]
    assert column.kind == "number" and column.form == form
    what = kept.summary()[0][2]
    assert ("written" not in what) if form == "1234.56" else what.startswith(f"written {form}; ")
    assert "missing (n/a 1×, #DIV/0! 1×)" in what
    given = fit({"a": cells * 9}, scaling="none", columns=(f"a=number:{form}",))
    for fitted in (kept, given, Preprocessor.from_state(json.loads(json.dumps(kept.state())))):
        assert fitted.columns[0].parse(pd.Series(cells)).tolist() == numbers
        assert fitted.columns[0].parse(pd.Series([*others], dtype=object)).tolist() == [*others.values()]
    examples = kept.examples(pd.DataFrame({"a": cells}), 9)
    assert column.parse(pd.Series([example["a"] for example in examples], dtype=object)).tolist() == numbers


@pytest.mark.parametrize(
    ("form", "cell", "message"),
    [
        ("1234.56", "1,234", "may be 1234 or 1.234"),
        ("1234,56", "2.053", "may be 2053 or 2.053"),
        ("1234.56%", "0.2", "no % sign"),
        ("1234.56%", 0.2, "no % sign"),
        ("$1,234.56", "€3", "has the unit '€'"),
        ("1234.56", "1.2.3", "is not a number"),
        ("1.234,56", "12.34.567", "is not a number written like 1.234,56"),
    ],
)
def test_what_could_be_another_number_is_refused(form, cell, message):
    with pytest.raises(UserError, match=rf"row 1, column 'a': '{re.escape(str(cell))}'.*{re.escape(message)}"):
        to_numbers(pd.Series([cell], name="a", index=[1]), form)


def test_a_form_that_is_no_number_is_refused():
    for form in ("abc", "1.2.3", "%d"):
        with pytest.raises(UserError, match=f"'{form}' is not an example of a number"):
            fit({"a": ["1", "2"] * 9}, columns=(f"a=number:{form}",))


def settled(separator: str = ",", **columns: list) -> tuple[dict, list[str]]:
    notes = []
    config = settle_formats(pd.DataFrame(columns, dtype="str"), DataConfig(), separator, notes)
    return config.column_formats(), notes


def test_other_columns_of_the_file_decide_what_a_column_does_not_show():
    open_cells, points, commas = ["468", "2.053"], ["1.5", "2.25"], ["1,5", "2,25"]
    forms, (note,) = settled(";", a=open_cells, b=commas)
    assert forms["a"] == "1.234,56" and "'2.053' is read as 2053, because column 'b' is written so" in note
    assert "--columns 'a=number:1,234.56' reads it as 2.053" in note
    assert settled(";", a=open_cells, b=points)[0] == {"a": "1,234.56"}  # the columns before the separator
    assert settled(";", a=open_cells)[0] == {"a": "1.234,56"}
    assert settled("\t", a=open_cells)[0] == {"a": "1,234.56"} and "more common" in settled("\t", a=open_cells)[1][0]
    assert settled("\t", a=["468", "2.050"])[0] == {"a": "1.234,56"}  # 2.05 would not be written so
    assert settled("", won=["35,447원", "8,900원"])[0] == {"won": "1,234.56원"}
    both = settled(";", a=["468", "12"], b=commas)[0]
    assert both == {"a": "1.234,56", "b": "1234,56"}  # for what comes at prediction, and in the training split
    assert settled(";", a=["468", "12"])[0] == {"a": "1234,56"}  # 2.053 in a file of another kind is refused
    assert settled("\t", a=open_cells, d=["03.10.2023", "25.12.2023"])[0]["a"] == "1.234,56"
    floats = pd.DataFrame({"a": [12.5, 3.75, "2.345,50", "1.234", Decimal("1.250")]}, dtype=object)
    assert settle_formats(floats, DataConfig(), "", []).column_formats() == {"a": "1.234,56"}
    assert to_numbers(floats["a"], "1.234,56").tolist() == [12.5, 3.75, 2345.5, 1234, 1.25]
    assert settled(",", a=points, b=["x", "y"], c=["01001", "01002"]) == ({}, [])


DATES = [  # (form, cells, days, other spellings of the first day)
    ("ISO8601", ["2023-06-11", "2023-12-25"], ["2023-06-11", "2023-12-25"]),
    ("%m/%d/%Y %I:%M %p", ["06/11/2023 12:00 AM", "06/13/2023 12:00 PM"], ["2023-06-11", "2023-06-13T12"]),
    ("%d.%m.%y", ["11.06.23", "25.12.99"], ["2023-06-11", "1999-12-25"]),
    ("%d. %b %Y", ["11. Juni 2023", "3. März 2022", "1. Okt. 2021"], ["2023-06-11", "2022-03-03", "2021-10-01"]),
    ("%d %b %Y", ["11 juin 2023", "3 août 2022", "1 févr. 2021"], ["2023-06-11", "2022-08-03", "2021-02-01"]),
    ("%b %d, %Y", ["June 11, 2023", "Sept. 3, 2022"], ["2023-06-11", "2022-09-03"]),
    ("%Y년 %m월 %d일", ["2023년 6월 11일", "2022년 12월 3일"], ["2023-06-11", "2022-12-03"]),
    ("%Y-%m-%d %p %I:%M", ["2023-06-11 오전 12:00", "2023-06-11 오후 6:00"], ["2023-06-11", "2023-06-11T18"]),
    ("ISO8601", ["2023-06-11 00:00:00 UTC", "2023-06-11T00:00:00+06:00"], ["2023-06-11", "2023-06-10T18"]),
    ("%d %b %Y %H:%M:%S%z", ["Sun, 11 Jun 2023 00:00:00 GMT", "Sun, 11 Jun 2023 06:00:00 +0600"], ["2023-06-11"] * 2),
    ("ISO8601 | %d.%m.%Y", ["2023-06-11", "25.12.2023"], ["2023-06-11", "2023-12-25"]),
    ("%y.%m.%d", ["23.01.01", "23.01.02", "22.01.31"], ["2023-01-01", "2023-01-02", "2022-01-31"]),
    ("%Y%m%d", ["20230611", "20231225", "20221224"], ["2023-06-11", "2023-12-25", "2022-12-24"]),
    ("%m.%Y", ["06.2023", "12.2022", "01.2021"], ["2023-06-01", "2022-12-01", "2021-01-01"]),
    ("%d.%m.%Y %H:%M", ["Mo, 11.06.2023 18:00 Uhr", "25.12.2023 06:00 Uhr"], ["2023-06-11T18", "2023-12-25T06"]),
    ("%d %b %Y", ["5 de marzo de 2023", "1er janvier 2023", "1 mrt 2023"], ["2023-03-05", "2023-01-01", "2023-03-01"]),
    ("%d/%b/%Y:%H:%M:%S%z", ["03/Oct/2023:18:00:00 +0000"] * 2, ["2023-10-03T18"] * 2),
    ("%d/%m/%Y | %d/%m/%Y %H:%M", ["11/06/2023", "25/12/2023 06:00"], ["2023-06-11", "2023-12-25T06"]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "cells", "days"), DATES)
def test_forms_of_dates(form, cells, days):
    """The form is found, kept and shown; ISO dates are understood whatever the form."""
    fitted = fit({"d": [*cells * 9, "k.A."]})
    column = fitted.columns[0]
    assert column.kind == "date" and column.form == form and form in fitted.summary()[0][2]
    assert "missing (k.A. 1×)" in fitted.summary()[0][2] and ("2 formats" in fitted.summary()[0][2]) == ("|" in form)
    expected = (pd.to_datetime(pd.Series(days), format="ISO8601") - pd.Timestamp(0)) / pd.Timedelta(days=1)
    assert column.parse(pd.Series(cells)).tolist() == expected.tolist() == column.parse(pd.Series(days)).tolist()
    given = fit({"d": cells * 9}, columns=(f"d=date:{form}",))
    assert given.columns[0].parse(pd.Series(cells)).tolist() == expected.tolist()
    for word in ("soon", "now", "today"):
        with pytest.raises(UserError, match=f"row 1, column 'd': '{word}' is not a date written as"):
            fitted([{"d": word}])


def test_the_file_decides_whether_day_or_month_comes_first():
    swap, point, comma = ["03/10/2023", "04/11/2023"], ["1.5", "2.5"], ["1,5", "2,5"]
    forms, (note,) = settled(",", d=swap, x=point)
    assert forms == {"d": "%m/%d/%Y"} and "is read as 2023-03-10, the month first, because of the decimal point" in note
    assert "--columns 'd=date:%d/%m/%Y' swaps day and month" in note
    assert settled(";", d=swap, x=comma)[0]["d"] == "%d/%m/%Y"
    assert settled(";", d=swap)[0] == {"d": "%d/%m/%Y"}
    assert settled(",", d=swap, e=["25/12/2023", "26/12/2023"], x=point)[0]["d"] == "%d/%m/%Y"
    assert settled("", d=["03/10/2023 1:00 PM", "04/11/2023 2:00 AM"])[0] == {"d": "%m/%d/%Y %I:%M %p"}
    assert settled(",", d=["03/10/2023", "25/12/2023"]) == ({"d": "%d/%m/%Y"}, [])
    assert kind_of(["13/10/2023", "10/13/2023"] * 20) != "date"  # no order reads both
    day_first = fit({"d": swap * 9}, columns=("d=date:%d/%m/%Y",))
    assert day_first.columns[0].parse(pd.Series(swap)).tolist() == [19633.0, 19665.0]
    with pytest.raises(UserError, match="is not a date format"):
        fit({"d": swap * 9}, columns=("d=date:day first",))


def test_codes_with_leading_zeros_are_categories():
    assert kind_of(["01001", "20095", "80331"] * 20) == "category"
    assert kind_of(["0.5", "0", "10"] * 20) == "number"


def test_words_for_missing_are_kept():
    table = {"n": ["-999", "1", "2.5"] * 9, "c": ["red", "Unbekannt", "blue"] * 9, "f": [-999.0, 1.0, 2.0] * 9}
    fitted = fit(table, missing=("-999", "Unbekannt"), scaling="none")
    assert features(fitted) == ["n", "n missing", "f", "f missing"] and "" in fitted.inputs["categories"][0].values
    restored = Preprocessor.from_state(json.loads(json.dumps(fitted.state())))
    assert_equal(restored([{"n": -999, "c": "Unbekannt", "f": "-999"}]), fitted([{"n": None, "c": "", "f": None}]))


def test_codes_are_not_taken_for_dates_or_booleans():
    assert kind_of(["1234-05", "1500-02", "1000-10"] * 20) == "category"
    assert kind_of(["F", "N"] * 30) == "category"
    assert kind_of(["T", "F"] * 30) == "boolean"
    ages = fit({"day": [f"{1000 + i}-01-02" for i in range(40)]})
    assert torch.isfinite(ages([{"day": "9999-12-31"}])["numbers"]).all()


def test_names_are_learned_from_and_ids_are_left_out(tmp_path):
    """Only the words in a shop's name tell what it sells; hashes and customer numbers are different in every row."""
    draw = random.Random(0)
    food, goods = ("Pizza", "Kitchen", "Bakery", "김밥"), ("Books", "Shoes", "Garden", "서점")
    labels = [draw.randrange(2) for _ in range(240)]
    table = pd.DataFrame(
        {
            "shop": [f"{draw.choice(('Old', 'Luna', 'Corner'))} {draw.choice((goods, food)[y])} {draw.choice('ABC')}{i}"
                     for i, y in enumerate(labels)],
            "customer": [f"CUST-{i:05}" for i in range(240)],
            "hash": [draw.randbytes(16).hex() for _ in labels],
            "noise": [round(draw.random(), 3) for _ in labels],
            "y": ["food" if y else "goods" for y in labels],
        }
    )  # fmt: skip
    table.to_csv(tmp_path / "shops.csv", index=False)
    data = DataConfig(data=str(tmp_path / "shops.csv"), target="y")
    run = quick_run(tmp_path / "run", data=data, model=ModelConfig(), epochs=12, lr=1e-2)
    fitted = run.pipeline.preprocessor
    assert fitted.kinds == {"shop": "text", "noise": "number"}
    assert {name: kind for name, (kind, _) in fitted.left_out.items()} == {"customer": "id", "hash": "id"}
    assert run.test["accuracy"] > 0.9
    blind = quick_run(tmp_path / "blind", table.drop(columns="shop"), data=DataConfig(target="y"), epochs=3)
    assert blind.test["accuracy"] < 0.8  # nothing else tells


def test_images_are_found_by_their_file_endings_in_the_folder_of_the_table(tmp_path, monkeypatch):
    path = mixed_csv(tmp_path / "deep", "binary", rows=40)
    monkeypatch.chdir(tmp_path)
    for name in ("deep/" + path.name, str(path)):
        splits = load_splits(DataConfig(data=name, target="binary"), 0)
        assert splits.config.column_kinds() == {"photo": "image"}
        assert splits.train["photo"].iloc[0].startswith(name.removesuffix(path.name) + "photos/")
        fitted = Preprocessor.fit(splits.train.drop(columns="binary"), splits.config)
        assert fitted.kinds["photo"] == "image"
        assert fitted(splits.test)["image"].shape == (len(splits.test), 3, 12, 12)
    run = quick_run(tmp_path / "run", data=DataConfig(data=str(path), target="binary"), model=ModelConfig(), epochs=1)
    predict.predict(predict.Options(str(run.out / "best.pt"), "deep/" + path.name, "predictions.csv"))
    assert pd.read_csv("predictions.csv")["file"].tolist() == [f"deep/photos/0-{i}.png" for i in range(40)]


# ---------------------------------------------------------------- fitting


def test_fitted_state_is_plain_and_restores():
    fitted = fit(make_table())
    state = json.loads(json.dumps(fitted.state(), allow_nan=False))
    again = Preprocessor.from_state(state)
    assert again == fitted and again.state() == fitted.state()
    assert_equal(again(make_table(seed=5)), fitted(make_table(seed=5)))


def six_kinds(folder, rows=60, seed=0) -> pd.DataFrame:
    """Records with columns of all kinds, two of them of text."""
    table = mixed_table(folder, rows, seed).drop(columns=["binary", "multiclass", "regression"])
    return table.assign(member=["yes", "no", None] * (rows // 3))


def test_the_state_of_all_six_kinds_together_is_plain_and_restores(tmp_path):
    table = six_kinds(tmp_path)
    table["photo"] = str(tmp_path) + "/" + table["photo"]
    fitted = fit(table)
    assert set(fitted.kinds.values()) == {"number", "boolean", "category", "date", "text", "image"} == set(KINDS)
    assert list(fitted.inputs) == ["numbers", "categories", "text", "image"]
    again = Preprocessor.from_state(json.loads(json.dumps(fitted.state(), allow_nan=False)))
    assert again == fitted
    assert_equal(again(table), fitted(table))
    with_unknown = {**fitted.state(), "added later": 1}
    with_unknown["columns"] = [column | {"added later": 1} for column in with_unknown["columns"]]
    assert Preprocessor.from_state(with_unknown) == fitted


def test_calling_is_encoding_and_batching(tmp_path):
    table = six_kinds(tmp_path)
    table["photo"] = str(tmp_path) + "/" + table["photo"]
    fitted, parts = Preprocessor.fit_encode(table, DataConfig())
    whole, rows = fitted(table), torch.tensor([40, 3, 17])
    for encoded in (fitted.encode(table), fitted.join(parts), fitted.join(fitted.encode_columns(table))):
        assert_equal(fitted.batch(gather(encoded, torch.arange(60))), whole)
        some = fitted.batch(gather(encoded, rows))
        assert {name: x.shape[0] for name, x in some.items()} == dict.fromkeys(whole, 3)
        for name in ("numbers", "categories", "image"):
            assert torch.equal(some[name], whole[name][rows]), name
        for ids, all_ids in zip(some["text"], whole["text"][rows], strict=True):  # padded to the longest of the batch
            assert ids[ids != PADDING].tolist() == all_ids[all_ids != PADDING].tolist()
    assert {name: x.dtype for name, x in whole.items()} == {
        "numbers": torch.float32, "categories": torch.int64, "text": torch.int32, "image": torch.float32,
    }  # fmt: skip
    assert_equal(fitted(table.to_dict("records")), whole)


def test_several_text_columns_have_ids_of_their_own_side_by_side():
    table = pd.DataFrame(
        {
            "title": [f"good {word} shop" for word in ("old", "new", "red") for _ in range(20)],
            "price": np.linspace(0, 1, 60),
            "note": [f"good {word} words {i}" for i in range(20) for word in ("old", "blue", "green")],
            "body": [f"nothing at all {i}" for i in range(60)],
        }
    )
    for tokenizer in ("ngrams", "words", "subwords", "characters"):
        data = DataConfig(text=("title", "note", "body"), tokenizer=tokenizer)
        fitted, parts = Preprocessor.fit_encode(table, data)
        columns = fitted.inputs["text"]
        assert [column.name for column in columns] == ["title", "note", "body"]
        encoded = {column.name: column.encode(table[column.name]) for column in columns}
        side_by_side = [part[torch.arange(60)] for part in encoded.values()]
        assert torch.equal(fitted(table)["text"], torch.cat(side_by_side, dim=1))
        known = [set(ids.flatten().tolist()) - {PADDING, UNKNOWN} for ids in side_by_side]
        assert all(known) and not (known[0] & known[1] or known[0] & known[2] or known[1] & known[2])
        assert max(set.union(*known)) < fitted.model_args["vocab_size"]
        for name, part in encoded.items():  # encoded while fitting: the same ids, moved as well
            assert torch.equal(parts[name].flat, part.flat), (tokenizer, name)


def test_statistics_come_from_training_rows_alone(tmp_path):
    """Poison every row outside the training split: nothing that was fitted may move."""
    table = table_for("binary")
    config = DataConfig(target="binary")
    clean = load_splits(config, 0, table)
    outside = clean.val.index.union(clean.test.index)
    poisoned = table.copy()
    poisoned.loc[outside, ["age", "income"]] = 1e9
    poisoned.loc[outside, "city"] = "Atlantis"
    poisoned.loc[outside, "since"] = "2199-12-31"
    poisoned.loc[outside, "remark"] = "atlantis " * 50
    dirty = load_splits(config, 0, poisoned)
    assert clean.train.index.equals(dirty.train.index)
    fitted = [fit(s.train.drop(columns="binary"), scaling="quantile") for s in (clean, dirty)]
    assert fitted[0].state() == fitted[1].state() and "remark" in fitted[0].names
    runs = [quick_run(tmp_path / str(i), t, data=config) for i, t in enumerate((table, poisoned))]
    assert runs[0].history["train/loss"].tolist() == runs[1].history["train/loss"].tolist()
    assert runs[0].pipeline.preprocessor.state() == runs[1].pipeline.preprocessor.state()


def test_numbers_equal_scikit_learn():
    values = np.random.default_rng(0).lognormal(size=(500, 1))
    values[::7] = np.nan
    filled = SimpleImputer(strategy="median").fit_transform(values)
    x = fit({"a": values[:, 0]}, scaling="standard")({"a": v} for v in values[:, 0])["numbers"]
    np.testing.assert_allclose(x[:, :1].numpy(), StandardScaler().fit_transform(filled), rtol=1e-5, atol=1e-6)
    assert x[:, 1].tolist() == np.isnan(values[:, 0]).astype(float).tolist()  # the was-missing flag
    x = fit({"a": values[:, 0]}, scaling="quantile")(pd.DataFrame({"a": values[:, 0]}))["numbers"]
    normal = QuantileTransformer(n_quantiles=256, output_distribution="normal", subsample=None).fit_transform(filled)
    inner = np.abs(normal[:, 0]) < 3
    np.testing.assert_allclose(x[inner, 0].numpy(), normal[inner, 0], atol=2e-2)
    assert fit({"a": [1.0, 2.0, 4.0]}, scaling="none")([{"a": 3}])["numbers"].tolist() == [[3.0]]


def test_was_missing_flag_only_where_training_had_one():
    fitted = fit({"full": [1.0, 2.0, 3.0], "holes": [1.0, None, 3.0]})
    assert features(fitted) == ["full", "holes", "holes missing"]
    assert fitted.model_args == {"in_features": 3}
    assert_equal(fitted([{"full": None, "holes": None}]), fitted([{"full": 2, "holes": None}]))


def test_rare_and_unseen_categories_share_the_unknown_code():
    cells = {"c": ["a"] * 5 + ["b"] * 3 + ["rare"] * 2 + [None] * 4, "n": range(14)}
    fitted = fit(cells, kinds={"n": "number"}, min_freq=3)
    records = [{"c": c, "n": 1} for c in ("a", "b", "rare", "never", None)]
    codes = fitted(records)["categories"][:, 0].tolist()
    assert codes[2] == codes[3] == 0
    assert len({codes[0], codes[1], codes[4]} - {0}) == 3  # empty cells, seen often enough, are a value of their own
    assert {k: int(v.sum()) for k, v in fitted.unknown(records, fitted.encode_columns(records)).items()} == {"c": 2}
    assert fitted.model_args["category_sizes"] == [4]


def test_constant_columns_do_not_divide_by_zero():
    fitted = fit({"a": [5.0, 5.0, None, 5.0], "b": [1.0, 2.0, 3.0, 4.0]})
    assert torch.isfinite(fitted([{"a": 5, "b": 1}, {"a": 7, "b": 2}])["numbers"]).all()
    with pytest.raises(UserError, match="no column is left"):
        fit({"a": [1, 1, 1], "b": ["x", "x", "x"]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"n": "abc", "d": "2024-01-01", "b": "yes"}, "row 1, column 'n': 'abc' is not a number"),
        ({"n": 1, "d": "soon", "b": "yes"}, "row 1, column 'd': 'soon' is not a date"),
        ({"n": 1, "d": "2024-01-01", "b": "maybe"}, "row 1, column 'b': 'maybe' is not a boolean"),
        ({"n": float("inf"), "d": "2024-01-01", "b": "yes"}, "row 1, column 'n': 'inf' is infinite"),
        ({"N": 1, "d": "2024-01-01", "b": "yes"}, "column 'n' is missing. Did you mean 'N'"),
    ],
)
def test_wrong_cells_are_named(record, message):
    days = [f"2024-01-{d:02}" for d in range(1, 29)]
    fitted = fit({"n": np.linspace(0, 1, 28), "d": days, "b": ["yes", "no"] * 14})
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        fitted([record])


def test_overrules_are_kept():
    table = pd.DataFrame({"zip": [10115, 20095, 80331] * 10, "x": np.linspace(0, 1, 30)})
    assert fit(table).kinds["zip"] == "number"
    fitted = fit(table, kinds={"zip": "category", "x": "drop"})
    assert fitted.names == ["zip"] and fitted.lone.values == ["10115", "20095", "80331"]
    decisions = {name: (kind, what) for name, kind, what in fitted.summary()}
    assert decisions["x"] == ("drop", "left out by --columns")


@pytest.fixture(scope="module")
def fitted() -> Preprocessor:
    return fit(make_table())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 60))
def test_rows_do_not_depend_on_their_neighbours(fitted, seed, size):
    records = make_table(60, seed)
    whole, chunks = fitted(records), [fitted(records.iloc[i : i + size]) for i in range(0, 60, size)]
    shuffled = records.sample(frac=1, random_state=seed)[records.columns[::-1]]
    mixed = fitted(shuffled)
    for name, x in whole.items():
        rows = [row for chunk in chunks for row in chunk[name]]
        if name == "text":  # padded to the longest text of the chunk
            rows, expected = ([row[row != PADDING].tolist() for row in part] for part in (rows, x))
            assert rows == expected
        else:
            assert torch.equal(torch.stack(rows), x)
        assert torch.equal(mixed[name], x[shuffled.index.tolist()])


def test_a_number_too_large_for_the_network_is_named():
    fitted = fit({"a": [1.0, 2.0, 3.0]}, scaling="standard")
    with pytest.raises(UserError, match=r"row 2, column 'a': '1e\+300' is too large a number"):
        fitted([{"a": 1}, {"a": 1e300}])


def test_cells_that_hold_lists_or_objects_are_refused():
    table = pd.DataFrame({"x": ["a", "b", {"c": 1}] * 9, "y": ["p", "q", "r"] * 9}, index=pd.RangeIndex(1, 28))
    with pytest.raises(UserError, match=r"row 3, column 'x': .* is a list or an object.*--columns x=drop"):
        fit(table)
    assert fit(table, kinds={"x": "drop"}).names == ["y"]
    with pytest.raises(UserError, match=r"row 1, column 'x': .* is a list or an object"):
        fit({"x": ["a", "b"] * 9})([{"x": ["a"]}])


# ---------------------------------------------------------------- cells


CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=True, allow_infinity=False, width=32),
    st.text(max_size=8),
)  # fmt: skip


@given(CELLS)
def test_canonical_spelling_is_stable(value):
    key = canonical(value)
    assert isinstance(key, str) and canonical(key) == key


@pytest.mark.parametrize(
    "same",
    [
        (1, 1.0, "1", "1.0", " 01 "),
        (True, "True", "true"),
        (None, np.nan, "", "NA", pd.NaT),
        ("1" * 5000, "1" * 5000 + " "),
    ],
)
def test_canonical_spelling_is_one(same):
    assert len({canonical(v) for v in same}) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6)), min_size=1, max_size=20))
def test_numbers_read_the_same_from_any_container(values):
    plain = to_numbers(pd.Series(values, dtype=object))
    text = to_numbers(pd.Series([None if v is None else repr(v) for v in values], dtype="str"))
    np.testing.assert_array_equal(plain, text)
    commas = pd.Series(["" if v is None else f"{v:.6f}".replace(".", ",") for v in values], dtype="str")
    expected = [np.nan if v is None else float(f"{v:.6f}") for v in values]
    np.testing.assert_array_equal(to_numbers(commas, "1234,56"), expected)


SIGNS = st.sampled_from([("", "."), (",", "."), ("", ","), (".", ","), (" ", "."), (" ", ","), ("'", ".")])
AFFIXES = st.sampled_from([("", ""), ("$", ""), ("", " €"), ("", "원"), ("", "%"), ("", " kg"), ("CHF ", "")])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=20), SIGNS, AFFIXES)
def test_no_number_is_read_as_another_one(cents, signs, affixes):
    """Whatever the signs and the unit: with one cell of two decimals, every cell has its own value."""
    (thousands, decimal), (prefix, suffix) = signs, affixes

    def write(cent: int) -> str:
        text = f"{abs(cent) / 100:,.2f}".replace(",", "T").replace(".", decimal).replace("T", thousands)
        return f"{'-' * (cent < 0)}{prefix}{text}{suffix}"

    cells = pd.Series([write(cent) for cent in cents], name="a", dtype="str")
    form = find_numbers(cells).form
    np.testing.assert_allclose(to_numbers(cells, str(form)), np.array(cents) / 100, rtol=1e-15)
    assert form_of(str(form)) == form


def test_a_bad_cell_in_a_decimal_comma_file_is_the_one_named(tmp_path):
    cells = [f"{i},5" for i in range(60)]
    (tmp_path / "a.csv").write_text("n;w\n" + "\n".join(f"{c};x" for c in cells) + "\n")
    fitted = fit(read_table(tmp_path / "a.csv"), scaling="none", kinds={"w": "drop"})
    assert fitted(read_table(tmp_path / "a.csv"))["numbers"][:, 0].tolist() == [i + 0.5 for i in range(60)]
    cells[16] = "abc"
    (tmp_path / "b.csv").write_text("n;w\n" + "\n".join(f"{c};x" for c in cells) + "\n")
    frame = pd.concat(read_chunks(tmp_path / "b.csv"))
    with pytest.raises(UserError, match="row 17, column 'n': 'abc' is not a number"):
        fitted(frame)
    assert fitted(frame.drop(index=17))["numbers"][[0, 58], 0].tolist() == [0.5, 59.5]
    for call in (lambda: infer_kind(frame["n"], DataConfig()), lambda: fit(frame, kinds={"n": "number", "w": "drop"})):
        with pytest.raises(UserError, match="row 17, column 'n': 'abc' is not a number"):
            call()  # in training as well


def test_null_words_are_empty_cells(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\nNA,x\n1,?\n,null\nN/A,-\n2,y\n")
    table = read_table(tmp_path / "t.csv")
    assert {name: to_text(table[name]).isna().sum() for name in table} == {"a": 3, "b": 3}
    assert np.isnan(to_numbers(table["a"])).tolist() == [True, False, True, True, False]
    fitted = fit(table, kinds={"a": "number", "b": "category"}, min_freq=1)
    assert features(fitted) == ["a", "a missing"] and fitted.inputs["categories"][0].values == ["", "x", "y"]
    assert fitted(table)["categories"][:, 0].tolist() == [2, 1, 1, 1, 3]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=12))
def test_what_pandas_writes_is_read_back(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    frame = pd.DataFrame({"n": numbers, "w": "x"})
    for decimal, separator in ((".", ","), (",", ";")):
        frame.to_csv(path, index=False, sep=separator, decimal=decimal)
        config = settle_formats(read_table(path), DataConfig(), separator, [])
        form = config.column_formats().get("n", "") or str(find_numbers(read_table(path)["n"]).form)
        np.testing.assert_array_equal(to_numbers(read_table(path)["n"], form), frame["n"])


def test_a_column_that_turns_to_words_far_down(tmp_path):
    lines = [*range(60_000), *(f"A{i}" for i in range(100))]
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{cell},x\n" for cell in lines))
    table = read_table(tmp_path / "t.csv")
    with pytest.raises(UserError, match="row 60001, column 'a': 'A0' is not a number"):
        infer_kind(table["a"], DataConfig())
    fitted = fit(table.head(60_000), kinds={"a": "number", "b": "drop"})
    chunks = list(read_chunks(tmp_path / "t.csv"))
    with pytest.raises(UserError, match="row 60001, column 'a': 'A0' is not a number"):
        [fitted(chunk) for chunk in chunks]
    numbers = pd.DataFrame({"a": [*range(99)] * 2, "y": list("ab") * 99})
    run = quick_run(tmp_path / "run", numbers, data=DataConfig(target="y"), epochs=1)
    options = predict.Options(str(run.out / "best.pt"), str(tmp_path / "t.csv"), str(tmp_path / "predictions.csv"))
    with pytest.raises(UserError, match=r"t\.csv: row 60001, column 'a': 'A0' is not a number"):
        predict.predict(options)
    assert not (tmp_path / "predictions.csv").exists()


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
    fitted = fit(whole, kinds={"zip": "category"})
    x = fitted(whole)
    assert list(fitted.kinds.values()) == ["category", "boolean", "date", "number"]
    streamed = pd.concat(read_chunks(tmp_path / "t.csv"))
    frame.to_parquet(tmp_path / "t.parquet")
    frame.astype({"day": "datetime64[s]"}).to_parquet(tmp_path / "dates.parquet")
    others = streamed, frame, read_table(tmp_path / "t.parquet"), read_table(tmp_path / "dates.parquet")
    for other in (*others, frame.to_dict("records")):
        assert_equal(fitted(other), x)


def test_cells_are_read_alike_in_training_and_prediction(tmp_path):
    """Times, exponents, timestamps, decimal commas, in columns that are categories."""
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
    fitted = fit(whole, kinds=dict.fromkeys(frame, "category"))
    streamed = pd.concat(read_chunks(tmp_path / "t.csv"))
    assert_equal(fitted(streamed), fitted(whole))
    assert not fitted.unknown(streamed, fitted.encode_columns(streamed))
    values = {column.name: column.values for column in fitted.columns}
    assert values["code"] == ["1000", "2000", "5"] and values["slot"] == ["08:00", "12:30", "18:45"]
    assert values["price"] == ["0,5", "1,25", "7"]  # words, as they are written
    typed = frame.assign(code=[1000.0, 2000, 5] * 20)
    assert not fitted.unknown(typed, fitted.encode_columns(typed))


# ---------------------------------------------------------------- a new kind is one file and one line of the registry


DURATION = re.compile(r"(?:(\d+) ?h)? ?(?:(\d+) ?m)?")


@dataclass(frozen=True)
class DurationColumn(Column):
    """A duration such as 2h 30m: minutes, scaled."""

    name: str
    mean: float
    std: float

    kind, input, model_args = "duration", "numbers", NumberColumn.model_args

    @property
    def features(self):
        return [self.name]

    @classmethod
    def detect(cls, cells, config):
        return cells.present.map(lambda text: DURATION.fullmatch(text) is not None).all()

    @classmethod
    def fit_encode(cls, values, config, labels=None):
        minutes = _minutes(values)
        column = cls(str(values.name), float(minutes.mean()), float(minutes.std()) or 1.0)
        return column, column.encode(values)

    def encode(self, values):
        return self.transform(to_tensor(_minutes(values)))

    def summary(self):
        return f"minutes, mean {self.mean:.4g}, std {self.std:.4g} → 0, 1"

    def json_schema(self, profile, examples):
        return {"type": "string", "examples": examples[:1], "x-kind": self.kind}

    def profile_values(self, values, encoded):
        return {self.name: _minutes(values)}

    def parse(self, values):
        return _minutes(values)

    def transform(self, x):
        return ((x - x.new_tensor(self.mean)) / x.new_tensor(self.std)).float()[:, None]


def _minutes(values: pd.Series) -> np.ndarray:
    found = values.map(lambda cell: DURATION.fullmatch(str(cell).strip()) if cell else None)
    if found.isna().any():
        raise UserError(f"{name_cell(values, found.isna().to_numpy())} is not a duration such as 2h 30m.")
    return np.array([60.0 * int(match[1] or 0) + int(match[2] or 0) for match in found])


@pytest.fixture
def with_durations(monkeypatch):
    kinds = dict(KINDS)
    KINDS.clear()
    KINDS.update({"duration": DurationColumn, **kinds})
    monkeypatch.setattr(config_module, "COLUMN_KINDS", (*config_module.COLUMN_KINDS, "duration"))
    yield
    KINDS.clear()
    KINDS.update(kinds)


@pytest.mark.parametrize("overruled", [(), ("length=duration",)])
def test_a_new_kind_is_one_file_and_one_line(tmp_path, with_durations, overruled):
    draw = np.random.default_rng(0)
    minutes = draw.integers(1, 400, 240)
    cells = [f"{m // 60}h {m % 60}m" if m >= 60 else f"{m}m" for m in minutes]
    table = pd.DataFrame(
        {"length": cells, "noise": draw.normal(size=240), "y": np.where(minutes > 180, "long", "short")}
    )
    table.to_csv(tmp_path / "films.csv", index=False)
    data = DataConfig(data=str(tmp_path / "films.csv"), target="y", columns=overruled)
    run = quick_run(tmp_path / "run", data=data, epochs=10, lr=1e-2)
    assert run.pipeline.preprocessor.kinds == {"length": "duration", "noise": "number"}
    assert run.test["accuracy"] > 0.9
    x = run.pipeline.preprocessor([{"length": "2h 30m", "noise": 0}, {"length": "150m", "noise": 0}])["numbers"]
    assert torch.equal(x[0], x[1]) and run.pipeline.profile.keys() == {"length", "noise"}
    loaded = Pipeline.load(run.out / "best.pt")
    assert loaded.preprocessor == run.pipeline.preprocessor
    pd.testing.assert_frame_equal(loaded.predict(table), run.pipeline.predict(table))
    with pytest.raises(UserError, match="row 2, column 'length': 'soon' is not a duration"):
        loaded.predict([{"length": "5m", "noise": 0}, {"length": "soon", "noise": 0}])
    export(Options(str(run.out / "best.pt"), str(tmp_path / "model.onnx")))  # compared with the checkpoint


COLUMN_CLASSES = {column.__name__ for column in KINDS.values()}
PRODUCT = sorted([*ROOT.glob("*.py"), *(path for name in ("sources", "backbones", "evaluation", "serving")
                                        for path in (ROOT / name).rglob("*.py"))])  # fmt: skip


def parts(node: ast.AST) -> list[ast.AST]:
    """Return the values that a side of a comparison lists, or the value itself."""
    match node:
        case ast.Tuple() | ast.List() | ast.Set():
            return node.elts
        case ast.Dict():
            return [key for key in node.keys if key]
    return [node]


def is_kind(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in {"tabular", *KINDS}


def is_column_class(node: ast.AST) -> bool:
    return ast.unparse(node).split(".")[-1] in COLUMN_CLASSES


def kind_checks(source: str) -> list[int]:
    """Return the lines that compare something with the name of a kind, or check for a class of columns."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare(left=left, comparators=others):
                sides = [part for side in (left, *others) for part in parts(side)]
                found = any(is_kind(side) or is_column_class(side) for side in sides)
            case ast.MatchValue(value=value):
                found, node = is_kind(value), value
            case ast.MatchClass(cls=cls):
                found, node = is_column_class(cls), cls
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, classes]):
                found = any(map(is_column_class, parts(classes)))
            case _:
                continue
        if found:
            lines.append(node.lineno)
    return lines


def test_nothing_outside_preprocessing_asks_for_the_kind_of_data():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {path.read_text(encoding='utf-8').splitlines()[line - 1].strip()}"
        for path in PRODUCT
        for line in kind_checks(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "if kind == 'image': pass",
        "if 'text' != column.kind: pass",
        "x = [c for c in columns if c.kind in ('text', 'image')]",
        "x = 'text' in kinds",
        "match kind:\n    case 'number' | 'date': pass",
        "match column:\n    case TextColumn(): pass",
        "x = isinstance(column, TextColumn)",
        "x = isinstance(column, (image.ImageColumn, int))",
        "x = type(column) is DateColumn",
    ],
)
def test_every_way_of_asking_for_the_kind_is_noticed(source):
    assert kind_checks(source)
    assert not kind_checks(
        "x = {'text': 1}['text']; y = kind == 'binary'; z = isinstance(x, Column); text == f('text')"
    )


@pytest.mark.parametrize("count", [1, 3, 16, 31, 32, 33])
def test_evenly_spaced_records_reach_both_ends(count):
    frame, chosen = pd.DataFrame({"a": range(32)}), evenly_spaced(pd.DataFrame({"a": range(32)}), count)["a"]
    assert len(chosen) == min(count, 32) and chosen.is_unique and chosen.is_monotonic_increasing
    assert chosen.iloc[0] == 0 and chosen.iloc[-1] >= 32 - 32 / count - 1
    assert torch.equal(evenly_spaced(torch.arange(32), count), torch.tensor(chosen.to_numpy())) and len(frame) == 32


def test_columns_may_have_names_that_are_not_text():
    table = pd.DataFrame({0: [1.0, 2.0, 4.0] * 10, 1: ["a", "b", "b"] * 10})
    fitted = Preprocessor.fit(table.set_axis(["0", "1"], axis=1), DataConfig())
    assert torch.equal(fitted(table)["numbers"], fitted(table.set_axis(["0", "1"], axis=1))["numbers"])


def test_bytes_of_images_are_found_and_never_parsed():
    def picture(value: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (8, 8), value).save(file, "PNG")
        return file.getvalue()

    table = pd.DataFrame({"photo": [picture(10 * i) for i in range(20)], "n": [0.5, 1.5] * 10})
    assert Preprocessor.fit(table, DataConfig()).kinds == {"photo": "image", "n": "number"}


def test_a_date_column_without_dates_is_refused():
    values = pd.Series(pd.to_datetime([None] * 5), name="when")
    with pytest.raises(UserError, match="column 'when' is empty in the training rows"):
        DateColumn.fit(values, DataConfig())


def test_infinity_in_a_category_is_an_example_that_json_can_hold():
    table = pd.DataFrame({"c": [1.5, np.inf] * 10, "n": [0.5, 2.5] * 10})
    fitted = Preprocessor.fit(table, DataConfig(columns="c=category"))
    cells = [record["c"] for record in json.loads(json.dumps(fitted.examples(table, 16), allow_nan=False))]
    assert set(cells) == {1.5, "inf"}


def test_numbers_that_begin_after_a_hundred_empty_cells():
    values = [np.nan] * 150 + [float(i % 7) for i in range(150)]
    assert fit({"a": values, "b": range(300)}, kinds={"b": "number"}).kinds == {"a": "number", "b": "number"}
