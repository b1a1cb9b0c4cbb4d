"""Splits are disjoint and complete; each kind of record is fitted on its training rows; batches lose no record."""

import json
import sqlite3

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_table, mixed_table, quick_run, table_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from config import DataConfig, ModelConfig
from dataloader import LengthBatchSampler, fit_splits, load_splits, make_loader, make_loaders
from errors import UserError
from task import Task


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


@pytest.mark.parametrize("seed", range(20))
def test_groups_leave_every_class_in_training(seed):
    """Class c lives in one group, d in three small ones; a and b are everywhere."""
    random = np.random.default_rng(0)
    group = random.integers(0, 14, 400)
    y = np.select([group == 5, group < 3], ["c", "d"], random.choice(["a", "b"], 400))
    table = pd.DataFrame({"x": random.normal(size=400), "g": [f"g{i}" for i in group], "y": y})
    splits = load_splits(DataConfig(target="y", group="g"), seed, table)
    assert set(splits.train["y"]) == set("abcd") and set(splits.val["y"]) == set(splits.test["y"]) == set("abd")
    assert all(abs(len(part) - 60) <= 20 for part in (splits.val, splits.test))
    families = [set(part["g"]) for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, families)) == len(set.union(*families)) == 14
    assert parts(splits) == parts(load_splits(DataConfig(target="y", group="g"), seed, table))


def test_a_class_of_one_group_is_learned_although_no_other_split_has_it(tmp_path):
    table = make_table(120)[["age", "income", "multiclass"]].assign(family=np.arange(120) // 6)
    table.loc[table["family"] == 7, "multiclass"] = "rare"
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="multiclass", group="family"))
    assert run.pipeline.task.classes == ["a", "b", "c", "rare"]
    assert "rare" not in set(run.predictions["target"]) and all(np.isfinite(list(run.test.values())))


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


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", ""])
def test_empty_texts_are_empty_cells(tmp_path, ending):
    table = pd.DataFrame({"t": ["", "NA", "fine", "poor"] * 20, "y": list("abbaab") * 13 + ["a", ""]})
    path = tmp_path / f"t.{ending}"
    if ending == "csv":
        table.to_csv(path, index=False)
    elif ending:
        table.to_json(path, orient="records", lines=True) if ending == "jsonl" else table.to_parquet(path)
    config = DataConfig(data=str(path), target="y", text="t", drop_nulls=True)
    splits = load_splits(config, 0, None if ending else table)
    left = pd.concat([splits.train, splits.val, splits.test])
    assert set(left["t"]) == {"NA", "fine", "poor"} and len(left) == 59


def test_what_is_given_is_not_read_again(tmp_path, monkeypatch):
    """A file of the name that stands for a given or bundled table is none of it."""
    monkeypatch.chdir(tmp_path)
    for name in ("table", "docstrings"):
        (tmp_path / name / "a").mkdir(parents=True)
    table = pd.DataFrame({"t": [f"free words of row {i}" for i in range(60)], "y": list("ab") * 30})
    splits = load_splits(DataConfig(target="y"), 0, table)
    assert fitted(splits).kinds == {"t": "text"} and sum(map(len, parts(splits))) == 60
    others = load_splits(DataConfig(target="y", text="t", columns=("n=drop",)), 0, table.assign(n=1, m=range(60)))
    assert others.config.column_kinds() == {"t": "text", "n": "drop"} and not others.notes
    assert fitted(others).left_out == {
        "n": ("drop", "by --columns"),
        "m": ("id", "a different whole number in every row"),
    }


def test_a_log_knows_the_kinds_of_its_columns(tmp_path):
    path, picture = tmp_path / "requests.db", "data:image/png;base64,iVBORw0KGgo="
    with sqlite3.connect(path) as log:
        log.execute("CREATE TABLE models (sha256 TEXT PRIMARY KEY, kinds TEXT)")
        log.execute("CREATE TABLE requests (id TEXT, model TEXT, record TEXT, name TEXT, target TEXT)")
        values = "INSERT INTO requests VALUES (?, ?, ?, 'y', ?)"
        log.executemany(values, [(i, "a", json.dumps({"c": picture, "n": i}), f'"{"ab"[i % 2]}"') for i in range(20)])
        log.execute(values, (20, "b", json.dumps({"c": "no target yet"}), None))
        kinds = {"c": "image", "n": "number"}
        log.executemany("INSERT INTO models VALUES (?, ?)", [("a", json.dumps(kinds)), ("b", '{"c": "text"}')])
    splits = load_splits(DataConfig(data=str(path)), 0)
    assert (splits.target, splits.config.column_kinds()) == ("y", kinds)
    assert set(splits.train["c"]) == {picture} and sum(map(len, parts(splits))) == 20
    overruled = load_splits(DataConfig(data=str(path), columns=("n=category",)), 0)
    assert overruled.config.column_kinds() == {"c": "image", "n": "category"}
    for kinds in ({"c": "text"}, {"c": "category", "n": "number"}, None):
        with sqlite3.connect(path) as log:
            log.execute("UPDATE models SET kinds = ?", (json.dumps(kinds),))
            if kinds is None:
                log.execute("DROP TABLE models")
        assert load_splits(DataConfig(data=str(path)), 0).config.column_kinds() == (kinds or {"c": "image"})


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
        ({"x": range(9), "y": range(9)}, {"target": "Y"}, "--target Y: no such column in table. Did you mean 'y'"),
        ({"x": range(9), "y": range(9)}, {"target": ""}, "--target is missing"),
        ({"x": range(9), "y": range(9)}, {"group": "z"}, "--group z: no such column"),
        ({"x": [1] * 40, "y": range(40)}, {"time": "x"}, "too few different moments"),
        ({"x": ["a"] * 40, "y": range(40)}, {"time": "x"}, "neither a date nor a number"),
        ({"x": [1] * 40, "y": range(40)}, {"group": "x"}, "too few groups"),
        ({"x": range(40), "g": list("pq") * 20, "y": list("ab") * 20}, {"group": "g"}, "class 'a' is in group 'p'"),
        ({"y": range(9)}, {}, "only the column 'y'"),
        ({"x": range(60), "y": list("abcdefghijklmnopqrst") * 3}, {}, "each of 20 classes to be in every split"),
        ({"y": range(9), "t": "a", "user": 1}, {"text": "t", "group": "usr"}, "--group usr: .* Did you mean 'user'"),
        ({"y": range(9), "t": "a", "when": 1}, {"text": "t", "time": "whn"}, "--time whn: .* Did you mean 'when'"),
        ({"y": range(9), "t": "a", "age": 1}, {"text": "t", "target": "lable"}, "Available: y, t, age"),
        ({"y": range(9), "t": "a"}, {"columns": ("y=number",)}, "--columns y=number: y is the target"),
        ({"y": range(9), "a": 1}, {"columns": "a=b"}, "--columns a=b: unknown kind. Available: number, category"),
        ({"y": range(9), "t": "a"}, {"time": "y"}, "--time y: the target cannot be used to split"),
        ({"y": range(9), "t": "a"}, {"text": "t", "columns": ("t=category",)}, "t=category: t is given as text"),
        ({"y": range(9), "t": "a"}, {"text": "t", "columns": ("t=drop",)}, "t=drop: t is given as text"),
    ],
)
def test_bad_tables_are_named(table, config, message):
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(**({"target": "y"} | config)), 0, pd.DataFrame(table))


def fitted(splits):
    return fit_splits(splits, splits.config, Task.fit(splits.train[splits.target], splits.kind))[1]


def test_an_empty_column_is_left_out_and_alone_it_is_refused():
    table = table_for("binary").assign(nothing=None, blank="")
    left_out = fitted(load_splits(DataConfig(target="binary"), 0, table)).left_out
    assert left_out["nothing"] == left_out["blank"] == ("constant", "no values in the training rows")
    with pytest.raises(UserError, match=r"no column is left .*\(nothing: constant, no values in the training rows\)"):
        fitted(load_splits(DataConfig(target="binary"), 0, table[["nothing", "binary"]]))


@pytest.mark.parametrize(("flag", "name"), [("time", "since"), ("group", "city")])
def test_the_column_that_splits_is_learned_from_only_if_columns_names_it(flag, name):
    table, kind = table_for("binary"), {"since": "date", "city": "category"}[name]
    splits = load_splits(DataConfig(target="binary", **{flag: name}), 0, table.fillna({"city": "Seoul"}))
    assert fitted(splits).left_out[name][0] == "drop" and name not in fitted(splits).names
    named = DataConfig(target="binary", columns=f"{name}={kind}", **{flag: name})
    assert fitted(load_splits(named, 0, table.fillna({"city": "Seoul"}))).kinds[name] == kind


@pytest.mark.parametrize("text_ids", [True, False])
def test_mixed_records_become_batches_of_named_tensors(tmp_path, monkeypatch, text_ids):
    """Training batches are shuffled and may be augmented, the others hold each record as the preprocessor gives it."""
    monkeypatch.chdir(tmp_path)
    table = mixed_table(tmp_path)
    splits = load_splits(DataConfig(target="binary"), 0, table.drop(columns=["multiclass", "regression"]))
    task = Task.fit(splits.train["binary"])
    splits, preprocessor, encoded = fit_splits(splits, splits.config, task, text_ids=text_ids)
    loaders = make_loaders(splits, preprocessor, encoded, task, batch_size=16)
    for loader, records in zip(loaders, (splits.train, splits.val, splits.test), strict=True):
        batches, is_training = list(loader), loader is loaders[0]
        assert sum(len(targets) for _, targets in batches) == len(records)
        expected, targets = preprocessor(records), task.encode(records["binary"])
        rows = torch.cat(list(loader.batch_sampler)) if not is_training else None
        for inputs, _ in batches:
            assert list(inputs) == ["numbers", "categories", *(["text"] if text_ids else []), "image"]
        if not is_training:
            assert torch.equal(torch.cat([targets for _, targets in batches]), targets[rows])
            for name in expected.keys() - {"text"}:
                parts = torch.cat([preprocessor.batch(inputs)[name] for inputs, _ in batches])
                assert torch.equal(parts, expected[name][rows])


def test_broken_records_are_named_or_left_out_of_their_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = mixed_table(tmp_path, rows=60)[["price", "photo", "binary"]]
    splits = load_splits(DataConfig(target="binary"), 0, table)
    broken = [splits.train.index[3], splits.val.index[0]]
    for row in broken:
        (tmp_path / table.loc[row, "photo"]).write_bytes(b"no image")
    with pytest.raises(UserError, match=f"table: .*{table.loc[broken[0], 'photo']}"):
        fitted(splits)
    task, config = Task.fit(splits.train["binary"]), DataConfig(target="binary", skip_broken=True)
    left, _, encoded = fit_splits(splits, config, task)
    assert set(table.index) - set.union(*parts(left)) == set(broken)
    assert [len(columns["price"]) for columns in encoded] == [len(p) for p in (left.train, left.val, left.test)]
    assert sum("1 broken records left out" in note for note in left.notes) == 2


@given(st.integers(1, 200), st.integers(1, 50), st.booleans())
def test_batches_hold_every_record_once_and_never_a_single_one(count, size, shuffle):
    batches = list(LengthBatchSampler(count, size, shuffle=shuffle))
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert len(batches) == len(LengthBatchSampler(count, size, shuffle=shuffle))
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
    data, model = DataConfig(target="binary", batch_size=2), ModelConfig(model="mlp")
    run = quick_run(tmp_path / "run", make_table(97), data=data, model=model)
    assert len(run.history) == 3
    assert any(isinstance(m, nn.BatchNorm1d) for m in run.pipeline.model.modules())


def test_an_empty_column_costs_no_row_with_drop_nulls():
    table = make_table(60).assign(empty=None)
    splits = load_splits(DataConfig(target="binary", drop_nulls=True), 0, table)
    assert sum(map(len, parts(splits))) == make_table(60).notna().all(axis=1).sum()


def test_how_a_column_is_written_does_not_depend_on_the_split(tmp_path):
    """The cell that shows it may be in any split; the reading of the separator follows the flags of the file."""
    numbers = [f"{1 + i % 9}.{100 + i % 900}" for i in range(120)]
    days = [f"{1 + i % 12:02}/{1 + i % 11:02}/2023" for i in range(120)]
    for at in range(0, 120, 40):
        table = pd.DataFrame({"x": numbers, "d": days, "y": ["a", "b"] * 60})
        table.loc[at, ["x", "d"]] = "12,5", "25/12/2023"
        for seed in range(2):
            splits = load_splits(DataConfig(target="y"), seed, table)
            fitted = fit_splits(splits, splits.config, Task.fit(splits.train["y"]))[1]
            assert [column.form for column in fitted.columns] == ["1.234,56", "%d/%m/%Y"]
    text = (
        "\n".join(["a, b, and some prose"] * 25)
        + "\nx;y\n"
        + "\n".join(f"{n};{'ab'[i % 2]}" for i, n in enumerate(numbers))
    )
    (tmp_path / "t.csv").write_text(text)
    splits = load_splits(DataConfig(data=str(tmp_path / "t.csv"), target="y", skip_rows=25), 0)
    assert splits.config.column_formats() == {"x": "1.234,56"} and "is read as 1100" in " ".join(splits.notes)


def test_the_format_of_the_column_that_splits_by_time():
    days = pd.Series(pd.date_range("2020-01-01", periods=60).strftime("%d%m%Y"), name="when")
    table = pd.DataFrame({"when": days, "x": range(100, 160), "y": ["a", "b"] * 30})
    config = DataConfig(target="y", time="when", columns=("when=date:%d%m%Y", "x=number"))
    splits = load_splits(config, 0, table)
    assert splits.test.index.min() > splits.train.index.max()
    assert fit_splits(splits, splits.config, Task.fit(splits.train["y"]))[1].names == ["x"]


def test_copies_stay_in_one_split_and_other_rows_where_they_were():
    table = table_for("binary").drop(columns="customer_id")
    copies = pd.concat([table, table.head(60)], ignore_index=True)
    splits = load_splits(DataConfig(target="binary"), 0, copies)
    parts = [set(part["remark"]) for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, parts)) == len(table)
    assert any("--keep-duplicates" in note for note in splits.notes)
    as_they_come = load_splits(DataConfig(target="binary", keep_duplicates=True), 0, copies)
    assert set(as_they_come.train["remark"]) & set(as_they_come.test["remark"])
    for part in ("train", "val", "test"):
        without, kept = (load_splits(DataConfig(target="binary", keep_duplicates=k), 0, table) for k in (False, True))
        assert getattr(without, part).index.tolist() == getattr(kept, part).index.tolist()


def test_equal_rows_of_few_possible_ones_are_no_copies():
    random = np.random.default_rng(0)
    table = pd.DataFrame({"a": random.choice(list("xyz"), 300), "b": random.choice(list("uvw"), 300)})
    table["binary"] = random.choice(["high", "low"], 300)
    splits = load_splits(DataConfig(target="binary"), 0, table)
    assert not any("--keep-duplicates" in note for note in splits.notes)
