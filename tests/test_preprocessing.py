"""Columns are understood, fitted on training rows alone, and treated the same at training and prediction."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_table, quick_run, table_for
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import QuantileTransformer, StandardScaler

from cells import canonical, to_numbers
from config import DataConfig
from dataloader import load_splits
from errors import UserError
from preprocessing import TabularPreprocessor, infer_kind


def fit(records, kinds=None, scaling="standard", min_freq=3) -> TabularPreprocessor:
    return TabularPreprocessor.fit(pd.DataFrame(records), kinds=kinds or {}, scaling=scaling, min_freq=min_freq)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0.5, 9, 60), "number"),
        ([1, 2, 3] * 20, "number"),
        (["1", "2.5", "-3e4", ""] * 15, "number"),
        (range(1, 61), "id"),
        ([str(i) for i in range(60)], "id"),
        (["red", "green", "blue"] * 20, "category"),
        (["36 months", "60 months"] * 30, "category"),
        (["0", "1", "2", "3+"] * 15, "category"),
        (["yes", "no", None] * 20, "boolean"),
        ([True, False] * 30, "boolean"),
        ([f"2024-{1 + i % 12:02}-{1 + i % 28:02}" for i in range(60)], "date"),
        ([f"{1 + i % 28:02}/{1 + i % 12:02}/2024" for i in range(60)], "date"),
        ([f"2024년 {1 + i % 12}월 {1 + i % 28}일" for i in range(60)], "date"),
        (pd.date_range("2024-01-01", periods=60), "date"),
        ([f"a long remark about thing number {i}" for i in range(60)], "text"),
        ([f"AB-{i * 7919}-X" for i in range(60)], "id"),
        (["x"] * 60, "constant"),
        ([7] * 60, "constant"),
        ([None] * 60, "constant"),
    ],
)
def test_kind_of_column(values, kind):
    assert infer_kind(pd.Series(list(values), name="column"), min_freq=3)[0] == kind


def test_a_column_named_id_may_have_gaps_but_a_measurement_may_not_be_lost():
    gaps = np.arange(60) * 1000 + 17
    assert infer_kind(pd.Series(gaps, name="user_id"), 3)[0] == "id"
    assert infer_kind(pd.Series(gaps, name="area"), 3)[0] == "number"


@pytest.mark.parametrize("cell", ["1,234", "12 kg", "$99", "45%", "1 234", "twelve"])
def test_one_dressed_number_is_named(cell):
    values = [str(v) for v in np.linspace(1, 99, 60).round(2)]
    values[16] = cell
    index = pd.RangeIndex(1, 61)
    with pytest.raises(UserError, match=r"row 17, column 'price'.*--columns price=category"):
        infer_kind(pd.Series(values, name="price", index=index), 3)


def test_a_column_of_dressed_numbers_is_named():
    with pytest.raises(UserError, match="row 1, column 'weight': '0 kg'"):
        infer_kind(pd.Series([f"{i} kg" for i in range(60)], name="weight", index=range(1, 61)), 3)


def test_fitted_state_is_plain_and_restores():
    fitted = fit(make_table())
    state = json.loads(json.dumps(asdict(fitted), allow_nan=False))
    again = TabularPreprocessor(**state)
    assert torch.equal(again(make_table(seed=5)), fitted(make_table(seed=5)))


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
    dirty = load_splits(config, 0, poisoned)
    assert clean.train.index.equals(dirty.train.index)
    fitted = [fit(s.train.drop(columns="binary"), scaling="quantile") for s in (clean, dirty)]
    assert asdict(fitted[0]) == asdict(fitted[1])
    runs = [quick_run(tmp_path / str(i), t, data=config) for i, t in enumerate((table, poisoned))]
    assert [r["train/loss"] for _, r in runs[0].history.iterrows()] == [
        r["train/loss"] for _, r in runs[1].history.iterrows()
    ]
    assert asdict(runs[0].pipeline.preprocessor) == asdict(runs[1].pipeline.preprocessor)


def test_numbers_equal_scikit_learn():
    values = np.random.default_rng(0).lognormal(size=(500, 1))
    values[::7] = np.nan
    filled = SimpleImputer(strategy="median").fit_transform(values)
    x = fit({"a": values[:, 0]})({"a": v} for v in values[:, 0])
    np.testing.assert_allclose(x[:, :1].numpy(), StandardScaler().fit_transform(filled), rtol=1e-5, atol=1e-6)
    assert x[:, 1].tolist() == np.isnan(values[:, 0]).astype(float).tolist()  # the was-missing flag
    x = fit({"a": values[:, 0]}, scaling="quantile")(pd.DataFrame({"a": values[:, 0]}))
    normal = QuantileTransformer(n_quantiles=256, output_distribution="normal", subsample=None).fit_transform(filled)
    inner = np.abs(normal[:, 0]) < 3
    np.testing.assert_allclose(x[inner, 0].numpy(), normal[inner, 0], atol=2e-2)
    assert fit({"a": [1.0, 2.0, 4.0]}, scaling="none")([{"a": 3}]).tolist() == [[3.0]]


def test_was_missing_flag_only_where_training_had_one():
    fitted = fit({"full": [1.0, 2.0, 3.0], "holes": [1.0, None, 3.0]})
    assert fitted.feature_names == ["full", "holes", "holes missing"]
    assert fitted([{"full": None, "holes": None}]).tolist() == fitted([{"full": 2, "holes": None}]).tolist()


def test_rare_and_unseen_categories_share_the_unknown_code():
    fitted = fit({"c": ["a"] * 5 + ["b"] * 3 + ["rare"] * 2 + [None] * 4, "n": range(14)}, kinds={"n": "number"})
    x = fitted([{"c": c, "n": 1} for c in ("a", "b", "rare", "never", None)])
    codes = x[:, -1].tolist()
    assert codes[2] == codes[3] == 0
    assert len({codes[0], codes[1], codes[4]} - {0}) == 3  # empty cells, seen often enough, are a value of their own
    assert fitted.count_unknown(x) == {"c": 2}
    assert fitted.model_args["category_sizes"] == [4]


def test_constant_columns_do_not_divide_by_zero():
    x = fit({"a": [5.0, 5.0, None, 5.0], "b": [1.0, 2.0, 3.0, 4.0]})([{"a": 5, "b": 1}, {"a": 7, "b": 2}])
    assert torch.isfinite(x).all()
    with pytest.raises(UserError, match="no column is left"):
        fit({"a": [1, 1, 1], "b": ["x", "x", "x"]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"n": "abc", "d": "2024-01-01", "b": "yes"}, "row 1, column 'n': 'abc' is not a plain number"),
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
    assert fit(table).columns["zip"]["kind"] == "number"
    fitted = fit(table, kinds={"zip": "category", "x": "drop"})
    assert list(fitted.used) == ["zip"] and fitted.categories["zip"]["values"] == ["10115", "20095", "80331"]
    decisions = {name: (kind, what) for name, kind, what in fitted.decisions()}
    assert decisions["x"] == ("drop", "left out: as told")


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


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 60))
def test_rows_do_not_depend_on_their_neighbours(seed, size):
    fitted = fit(make_table())
    records = make_table(60, seed)
    whole = fitted(records)
    parts = torch.cat([fitted(records.iloc[i : i + size]) for i in range(0, 60, size)])
    shuffled = records.sample(frac=1, random_state=seed)[records.columns[::-1]]
    assert torch.equal(whole, parts)
    assert torch.equal(fitted(shuffled), whole[shuffled.index.to_numpy()])


def test_codes_are_not_taken_for_dates_or_booleans():
    assert infer_kind(pd.Series(["1234-05", "1500-02", "1000-10"] * 20), 3)[0] == "category"
    assert infer_kind(pd.Series(["F", "N"] * 30), 3)[0] == "category"
    assert infer_kind(pd.Series(["T", "F"] * 30), 3)[0] == "boolean"
    ages = fit({"day": [f"{1000 + i}-01-02" for i in range(40)]})
    assert torch.isfinite(ages([{"day": "9999-12-31"}])).all()


def test_a_number_too_large_for_the_network_is_named():
    fitted = fit({"a": [1.0, 2.0, 3.0]})
    with pytest.raises(UserError, match="row 2, column 'a': the number is too large"):
        fitted([{"a": 1}, {"a": 1e300}])


def test_cells_that_hold_lists_are_categories_like_others():
    values = [["a"], ["b"], {"c": 1}] * 10
    assert fit({"x": values}, kinds={"x": "category"})([{"x": ["a"]}]).tolist() != [[0.0]]
