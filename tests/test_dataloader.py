"""Splits are disjoint, complete and what was asked for; batches lose no record."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_table, quick_run, table_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from config import DataConfig
from dataloader import BatchIndices, load_splits, make_loader
from errors import UserError


def parts(splits) -> list[set]:
    return [set(part.index) for part in (splits.train, splits.val, splits.test)]


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_splits_are_disjoint_and_complete(kind):
    table = table_for(kind)
    train, val, test = parts(load_splits(DataConfig(target=kind), 0, table))
    assert train | val | test == set(table.index)
    assert len(train) + len(val) + len(test) == len(table)
    assert len(val) == len(test) == 36


def test_the_seed_decides():
    table = table_for("binary")
    first, same, other = (parts(load_splits(DataConfig(target="binary"), seed, table)) for seed in (0, 0, 1))
    assert first == same != other


def test_classes_keep_their_shares():
    table = pd.DataFrame({"x": range(200), "y": ["a"] * 160 + ["b"] * 40})
    splits = load_splits(DataConfig(target="y"), 3, table)
    for part in (splits.train, splits.val, splits.test):
        assert (part["y"] == "b").mean() == pytest.approx(0.2, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.integers(3, 12), min_size=2, max_size=5))
def test_every_class_can_be_learned(seed, sizes):
    labels = [f"c{i}" for i, size in enumerate(sizes) for _ in range(size)]
    table = pd.DataFrame({"x": np.arange(len(labels)), "y": labels})
    try:
        splits = load_splits(DataConfig(target="y"), seed, table)
    except UserError as error:
        assert "too few" in str(error)
        return
    assert set(splits.train["y"]) == set(labels)


def test_a_group_stays_whole():
    table = table_for("binary")
    table["family"] = np.arange(len(table)) // 6
    splits = load_splits(DataConfig(target="binary", group="family"), 0, table)
    families = [set(part["family"]) for part in (splits.train, splits.val, splits.test)]
    assert all(families) and not (families[0] & families[1] | families[0] & families[2] | families[1] & families[2])


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d/%m/%Y", None])
def test_the_future_is_in_the_test(form):
    table = table_for("binary")
    days = pd.Series(pd.date_range("2020-01-01", periods=len(table) // 2).repeat(2)).sample(frac=1, random_state=0)
    table["since"] = (days.dt.strftime(form) if form else days).to_numpy()
    splits = load_splits(DataConfig(target="binary", time="since"), 0, table)
    moments = [pd.to_datetime(part["since"], format=form) for part in (splits.train, splits.val, splits.test)]
    assert moments[0].max() < moments[1].min() and moments[1].max() < moments[2].min()
    assert len(moments[2]) >= 36


def test_given_files_are_taken_whole(tmp_path):
    make_table(60, 1).to_csv(tmp_path / "val.csv", index=False)
    make_table(50, 2).to_csv(tmp_path / "test.csv", index=False)
    table = make_table(100)
    config = DataConfig(target="binary", val_data=str(tmp_path / "val.csv"), test_data=str(tmp_path / "test.csv"))
    splits = load_splits(config, 0, table)
    assert [len(p) for p in (splits.train, splits.val, splits.test)] == [100, 60, 50]
    one = load_splits(DataConfig(target="binary", test_data=str(tmp_path / "test.csv")), 0, table)
    assert [len(p) for p in (one.train, one.val, one.test)] == [85, 15, 50]


def test_rows_that_cannot_be_used(tmp_path):
    table = make_table(100)
    table.loc[:9, "binary"] = None
    splits = load_splits(DataConfig(target="binary"), 0, table)
    assert sum(map(len, parts(splits))) == 90 and "10 rows without binary" in splits.notes[0]
    whole = load_splits(DataConfig(target="binary", drop_nulls=True), 0, table)
    left = pd.concat([whole.train, whole.val, whole.test])
    assert left.notna().all(axis=None) and len(left) == table.notna().all(axis=1).sum()


def test_the_users_frame_is_left_as_it_was():
    table = table_for("binary")
    before = table.copy()
    load_splits(DataConfig(target="binary"), 0, table)
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize(
    ("table", "config", "message"),
    [
        ({"x": [1, 2, 3], "y": [1, 2, 3]}, {}, "3 rows are too few"),
        ({"x": range(9), "y": ["a"] * 9}, {}, "one class only"),
        ({"x": range(9), "y": ["a"] * 8 + ["b"]}, {}, "class 'b' has 1 row and needs 3"),
        ({"x": range(9), "y": [None] * 9}, {}, "'y' has no value in any row"),
        ({"x": [None] * 9, "y": range(9)}, {}, "column 'x' has no value in any row"),
        ({"x": range(9), "y": range(9)}, {"target": "Y"}, "--target Y: no such column in table. Did you mean 'y'"),
        ({"x": range(9), "y": range(9)}, {"target": ""}, "--target is needed"),
        ({"x": range(9), "y": range(9)}, {"group": "z"}, "--group z: no such column"),
        ({"x": [1] * 40, "y": range(40)}, {"time": "x"}, "too few different moments"),
        ({"x": ["a"] * 40, "y": range(40)}, {"time": "x"}, "no date and no number"),
        ({"x": [1] * 40, "y": range(40)}, {"group": "x"}, "too few groups"),
        ({"y": range(9)}, {}, "one column"),
        ({"x": range(60), "y": list("abcdefghijklmnopqrst") * 3}, {}, "20 classes in every split"),
    ],
)
def test_bad_tables_are_named(table, config, message):
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(**({"target": "y"} | config)), 0, pd.DataFrame(table))


@given(st.integers(1, 200), st.integers(1, 50), st.booleans())
def test_batches_hold_every_record_once_and_never_a_single_one(count, size, shuffle):
    batches = list(BatchIndices(count, size, shuffle=shuffle))
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert len(batches) == len(BatchIndices(count, size, shuffle=shuffle))
    if size > 1 and count > 1:
        assert all(len(batch) > 1 for batch in batches)


def test_batches_of_the_loader_are_tensors_in_order():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    loader = make_loader(x, y, 4, shuffle=False)
    assert [b[1].tolist() for b in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    torch.manual_seed(1)
    first = torch.cat([b[1] for b in make_loader(x, y, 4, shuffle=True)])
    assert sorted(first.tolist()) == list(range(10)) and first.tolist() != list(range(10))


def test_batch_norm_survives_a_last_batch_of_one(tmp_path):
    run = quick_run(tmp_path / "run", make_table(97), data=DataConfig(target="binary", batch_size=2))
    assert len(run.history) == 3
    assert any(isinstance(m, nn.BatchNorm1d) for m in run.pipeline.model.modules())
