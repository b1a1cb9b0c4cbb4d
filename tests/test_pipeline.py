"""A checkpoint is complete, loads without running code, and predicts as the pipeline did in memory."""

import json
import pickle
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TARGETS, command, make_table, mixed_csv, quick_run, table_for
from test_resume import fingerprint, interrupted_run
from torch import nn

from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dataloader import make_loader
from errors import UserError
from pipeline import MAGIC, Pipeline, atomic_write, content_sha256, read_checkpoint, weights_sha256
from sources import read_table
from task import Task
from train import resume_config, train
from trainer import Trainer


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_checkpoint_is_plain(runs, kind, name):
    path = runs[kind].out / name
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    state = torch.load(path, weights_only=True)
    json.dumps({k: v for k, v in state.items() if k not in ("state_dict", "training")}, allow_nan=False)
    assert state["format"] == 2 and "golden" not in state
    assert len(state["self_check"]["records"]) == len(state["self_check"]["predictions"]) == 16
    assert state["weights_sha256"] == weights_sha256(state["state_dict"])
    assert state["sha256"] == content_sha256(state)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_way_to_predict_gives_the_same_predictions(runs, kind, tmp_path):
    """In memory, loaded again (moved and renamed), predict.py on csv, jsonl and parquet."""
    run, records = runs[kind], table_for(kind, rows=50, seed=9)
    expected = run.pipeline.predict(records)
    assert len(expected) == 50 and expected.index.equals(records.index)
    moved = tmp_path / "renamed.bin"
    moved.write_bytes((run.out / "best.pt").read_bytes())
    pd.testing.assert_frame_equal(Pipeline.load(moved).predict(records), expected, rtol=1e-6)
    records.drop(columns=kind).to_csv(tmp_path / "in.csv", index=False)
    records.to_json(tmp_path / "in.jsonl", orient="records", lines=True, force_ascii=False)
    records.to_parquet(tmp_path / "in.parquet")
    for source, output in (("in.csv", "out.parquet"), ("in.jsonl", "out.csv"), ("in.parquet", "out.jsonl")):
        result = command("predict.py", "--checkpoint", moved, "--input", source, "--output", output, cwd=tmp_path)
        assert result.returncode == 0, result.stderr.decode()
        read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": lambda p: pd.read_json(p, lines=True)}
        predictions = read[output.split(".")[1]](tmp_path / output)
        pd.testing.assert_frame_equal(predictions, expected.reset_index(drop=True), rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("kind", TARGETS)
def test_chunks_and_neighbours_never_change_a_prediction(runs, kind):
    pipeline, records = runs[kind].pipeline, table_for(kind, rows=70, seed=3)
    whole = pipeline.predict(records)
    for size in (1, 9, 70):
        parts = pd.concat([pipeline.predict(records.iloc[i : i + size]) for i in range(0, 70, size)])
        pd.testing.assert_frame_equal(parts, whole, rtol=1e-6, atol=1e-6)


def test_shuffled_extra_and_missing_columns(runs):
    pipeline, records = runs["binary"].pipeline, table_for("binary", rows=20, seed=3)
    expected = pipeline.predict(records)
    changed = records[records.columns[::-1]].drop(columns=["binary", "customer_id", "same"]).assign(extra=1)
    pd.testing.assert_frame_equal(pipeline.predict(changed), expected)
    pd.testing.assert_frame_equal(pipeline.predict(records.to_dict("records")).reset_index(drop=True), expected)
    with pytest.raises(UserError, match=r"column 'age' is missing\. Did you mean 'Age'"):
        pipeline.predict(records.rename(columns={"age": "Age"}))


def test_names_of_columns_may_be_numbers(tmp_path):
    table = make_table(120)[["age", "city", "binary"]].set_axis([0, 1, "y"], axis=1)
    pipeline = quick_run(tmp_path / "run", table, data=DataConfig(target="y"), epochs=1).pipeline
    expected = pipeline.predict(table)
    for records in (table.rename(columns=str), table.to_dict("records"), table.rename(columns=str).to_dict("records")):
        predictions = pipeline.predict(records).reset_index(drop=True)
        pd.testing.assert_frame_equal(predictions, expected.reset_index(drop=True))
    table.rename(columns=str).to_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(pipeline.predict(pd.read_parquet(tmp_path / "t.parquet")), expected)


def test_predictions_of_no_records(runs):
    empty = make_table(5).iloc[:0]
    for run in runs.values():
        for records in ([], empty):
            predictions = run.pipeline.predict(records)
            assert list(predictions) == list(run.pipeline.predict(make_table(5))) and predictions.empty


def resave(path, target, change):
    state = torch.load(path, weights_only=True)
    del state["sha256"]  # as older files, and with the checksum of the changed content otherwise
    change(state)
    torch.save(state, target)
    return target


def test_self_check_rows_refuse_a_model_that_predicts_differently(runs, tmp_path):
    def other_statistics(state):
        column = next(column for column in state["preprocessor"]["columns"] if column["name"] == "age")
        column["quantiles"] = [value + 10 for value in column["quantiles"]]

    with pytest.raises(UserError, match=r"self-check row \d+ was predicted"):
        Pipeline.load(resave(runs["regression"].out / "best.pt", tmp_path / "x.pt", other_statistics))

    def other_classes(state):
        state["task"]["classes"].reverse()

    with pytest.raises(UserError, match="self-check row 1 was predicted"):
        Pipeline.load(resave(runs["multiclass"].out / "best.pt", tmp_path / "y.pt", other_classes))


def test_a_flipped_weight_is_noticed(runs, tmp_path):
    def flip(state):
        next(iter(state["state_dict"].values())).view(-1)[0] += 1e-3

    with pytest.raises(UserError, match="weights differ from those that were saved"):
        Pipeline.load(resave(runs["binary"].out / "best.pt", tmp_path / "x.pt", flip))


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_flipped_bytes_change_nothing_or_are_refused_in_one_line(runs, name, tmp_path):
    """Weights, classes, statistics and training state are those that were saved, wherever the damage is."""
    good = (runs["multiclass"].out / name).read_bytes()
    pickled = good.index(b"data.pkl"), good.index(b".format_version")
    random, refused = np.random.default_rng(0), 0
    ends = [(0, len(good)), pickled, (len(good) - 5000, len(good))]  # anything; plain part; the archive's directory
    expected = read_checkpoint(runs["multiclass"].out / name)
    for i in range(150):
        at, damaged = int(random.integers(*ends[i % 3])), bytearray(good)
        damaged[at] ^= 1 << int(random.integers(8))
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            state = read_checkpoint(tmp_path / "x.pt")
            assert content_sha256(state) == expected["sha256"] == state["sha256"]
            assert weights_sha256(state["state_dict"]) == expected["weights_sha256"]
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(tmp_path / "x.pt")) and "\n" not in str(error)
    assert refused > 75


def test_a_changed_checkpoint_is_refused(runs, tmp_path):
    """Checksums of the archive are right here: another program wrote the file."""
    for part, change in (
        ("best.pt", lambda state: state["task"]["classes"].reverse()),
        ("last.pt", lambda state: state["training"]["optimizer"]["state"][0]["exp_avg"].add_(1e-3)),
        ("last.pt", lambda state: state["training"].update(steps=1)),
    ):
        state = torch.load(runs["multiclass"].out / part, weights_only=True)
        change(state)
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"x\.pt: the file is damaged: the content differs"):
            read_checkpoint(tmp_path / "x.pt")


def test_a_crafted_checkpoint_is_refused_before_it_takes_memory(runs, tmp_path, monkeypatch):
    """Networks of 10⁹ units or 10⁶ layers, tensors that repeat one number, lists that hold each other, and archives
    that are larger once they are unpacked."""
    best = runs["multiclass"].out / "best.pt"

    def args(**values):
        return lambda state: state["model_spec"]["args"].update(values)

    def repeated(state):
        name = next(iter(state["state_dict"]))
        state["state_dict"][name] = torch.zeros(1).expand(10**9, 10**6)

    def nested(state):
        cells = ["x"]
        for _ in range(40):
            cells = [cells] * 10
        state["profile"]["x"] = cells

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "_self_check", None)  # never reached
        for change, words in (
            (args(hidden=[10**9]), "do not fit the network"),
            (args(hidden=[8] * 10**6), "more than .* parameters"),
            (args(category_sizes=[10**15]), "do not fit the network"),
            (repeated, "is not stored whole"),
            (nested, "larger than the file"),
            (lambda state: state.update(state_dict=[1]), "not a complete checkpoint"),
            (lambda state: state.pop("state_dict"), "not a complete checkpoint"),
        ):
            path = resave(best, tmp_path / "x.pt", change)
            started = time.process_time()
            with pytest.raises(UserError, match=words) as refused:
                Pipeline.load(path)
            assert "\n" not in str(refused.value) and time.process_time() - started < 5  # building it takes minutes
    with zipfile.ZipFile(best) as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part) + b"\0" * 10**6)
    with pytest.raises(UserError, match="larger than the file"):
        read_checkpoint(tmp_path / "bomb.pt")


def test_a_network_too_large_for_the_memory_is_refused_before_it_is_built(tmp_path):
    for hidden in ((10**9,), (10**12, 10**12)):
        with pytest.raises(UserError, match=f"--model mlp --hidden {hidden[0]}.*network"):
            quick_run(tmp_path / "run", make_table(), model=ModelConfig(hidden=hidden, model=("mlp",)))
    assert not (tmp_path / "run").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bad_checkpoints_are_refused_without_running_anything(runs, tmp_path):
    good = (runs["binary"].out / "best.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"some": "thing"}, tmp_path / "foreign.pt")
    torch.save({"magic": Malicious(tmp_path / "RAN")}, tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "RAN")))
    for number in (1, 99):
        torch.save({"magic": MAGIC, "format": number}, tmp_path / f"{number}.pt")
    expected = {
        "truncated": "truncated", "empty": "truncated", "text": "not a checkpoint", "junk": "truncated",
        "foreign": "not a checkpoint of this project", "evil": "refused", "pickle": "refused",
        "1": "format 1; this code reads 2: train again", "99": "format 99; this code reads 2: train again",
        "absent": "no such checkpoint",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(UserError, match=words) as refused:
            read_checkpoint(tmp_path / f"{name}.pt")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "RAN").exists()


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"), atomic_write(tmp_path / "no" / "file.txt"):
        pass


def test_a_module_of_ones_own_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), torch.randint(0, 2, (64,)).float()
    task = Task.fit(pd.Series([0, 1], name="y"))
    loader = make_loader(x, y, 16, shuffle=True)
    trainer = Trainer(Pipeline(nn.Linear(3, 1), task), TrainConfig(epochs=2), RunConfig(out=str(tmp_path / "run")))
    trainer.fit(loader, loader)
    with pytest.raises(UserError, match="model="):
        Pipeline.load(tmp_path / "run" / "best.pt")
    again = Pipeline.load(tmp_path / "run" / "best.pt", model=nn.Linear(3, 1))
    assert torch.equal(again.logits(x), trainer.pipeline.logits(x))


def test_a_device_is_chosen_by_name():
    pipeline = Pipeline(nn.Linear(3, 1), Task.fit(pd.Series([0, 1])))
    assert pipeline.to("auto").device.type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            pipeline.to("cuda")


def test_self_check_records_hold_no_column_that_was_left_out(runs):
    state = read_checkpoint(runs["binary"].out / "best.pt")
    assert set(state["self_check"]["records"][0]) == {"age", "income", "city", "member", "since", "remark"}


def test_a_pipeline_without_preprocessor_refuses_records_in_one_line():
    pipeline = Pipeline(nn.Linear(1, 1), Task.fit(pd.Series([0, 1])))
    for method in (pipeline.predict, pipeline.predict_logits):
        with pytest.raises(UserError, match="no preprocessor") as refused:
            method([{"x": 1.0}])
        assert "\n" not in str(refused.value)
    assert pipeline.logits(torch.zeros(3, 1)).shape == (3, 1)


def test_an_absent_field_gets_its_default_and_an_unknown_key_is_ignored(everything, tmp_path):
    path = everything["mixed", "binary"]
    pipeline = Pipeline.load(path)
    expected = pipeline.predict(pipeline.examples)

    def older(state):
        for key in ("profile", "threads"):
            del state[key]
        del state["task"]["form"], state["preprocessor"]["left_out"], state["config"]["data"]["tokenizer"]
        for column in state["preprocessor"]["columns"]:
            for name in ("decimal", "flip_reason", *(["offset"] if column.get("offset") == 0 else [])):
                column.pop(name, None)

    def newer(state):
        groups = (state, state["task"], state["preprocessor"], state["config"], state["config"]["data"])
        for group in (*groups, *state["preprocessor"]["columns"]):
            group["added_later"] = 1

    for name, change in (("older", older), ("newer", newer)):
        last = resave(path.with_name("last.pt"), tmp_path / f"{name}-last.pt", change)
        assert resume_config(str(last)).data == resume_config(str(path.with_name("last.pt"))).data
        loaded = Pipeline.load(resave(path, tmp_path / f"{name}.pt", change))
        assert loaded.task == pipeline.task
        reasons = [column.flip_reason for column in loaded.preprocessor.columns if column.path_cells]
        assert reasons == [""] if name == "older" else reasons[0]
        pd.testing.assert_frame_equal(loaded.predict(pipeline.examples), expected)
    with pytest.raises(UserError, match="does not fit this version of the code"):
        Pipeline.load(resave(path, tmp_path / "x.pt", lambda state: state["task"].pop("kind")))


# ---------------------------------------------------------------- mixed records: every kind of column at once


def mixed_source(everything, target):
    """(the checkpoint of a mixed run, the csv that it was trained on)"""
    path = everything["mixed", target]
    return path, path.parent.parent / "mixed" / f"{target}-0.csv"


@pytest.mark.parametrize("target", TARGETS)
def test_mixed_records_are_predicted_the_same_everywhere(everything, target, tmp_path):
    """By the run in memory, by the reloaded checkpoint, and by predict.py; test_export.py adds ONNX."""
    path, source = mixed_source(everything, target)
    in_memory = pd.read_csv(path.parent / "test_predictions.csv").set_index("row").drop(columns="target")
    pipeline = Pipeline.load(path)
    assert set(pipeline.preprocessor.kinds.values()) == {"number", "category", "date", "text", "image"}
    assert list(pipeline.preprocessor.inputs) == ["numbers", "categories", "image"]  # texts have become numbers
    reloaded = pipeline.predict(read_table(source, pipeline.preprocessor.layout))
    pd.testing.assert_frame_equal(reloaded.loc[in_memory.index, list(in_memory)], in_memory, rtol=1e-5, atol=1e-6)
    result = command("predict.py", "--checkpoint", path, "--input", source, "--output", tmp_path / "out.csv")
    assert result.returncode == 0, result.stderr.decode()
    assert ("rmse" if target == "regression" else "accuracy") in result.stdout.decode()
    written = pd.read_csv(tmp_path / "out.csv")
    pd.testing.assert_frame_equal(written, reloaded.reset_index(drop=True), rtol=1e-6, check_dtype=False)


def test_mixed_records_in_any_order_and_with_other_columns(everything, tmp_path):
    path, source = mixed_source(everything, "binary")
    pipeline = Pipeline.load(path)
    table = read_table(source, pipeline.preprocessor.layout)
    expected = pipeline.predict(table)
    shuffled = table[table.columns[::-1]].sample(frac=1, random_state=0)
    changed = shuffled.drop(columns="binary").assign(extra=1)
    pd.testing.assert_frame_equal(pipeline.predict(changed).loc[table.index], expected, rtol=1e-6, atol=1e-6)
    shuffled.to_csv(tmp_path / "in.csv", index=False)  # its file names are absolute now
    changed.to_csv(tmp_path / "unlabelled.csv", index=False)
    written = {}
    for name in ("in", "unlabelled"):
        flags = "--checkpoint", path, "--input", f"{name}.csv", "--output", f"{name}-out.csv"
        result = command("predict.py", *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr.decode()
        assert ("accuracy" in result.stdout.decode()) == (name == "in")
        written[name] = (tmp_path / f"{name}-out.csv").read_text()
    assert written["in"] == written["unlabelled"]
    with pytest.raises(UserError, match=r"column 'photo' is missing\. Did you mean 'photos'"):
        pipeline.predict(table.rename(columns={"photo": "photos"}))


def test_mixed_records_with_empty_unseen_and_broken_cells(everything):
    path, source = mixed_source(everything, "binary")
    pipeline = Pipeline.load(path)
    table = read_table(source, pipeline.preprocessor.layout).head(6)
    expected = pipeline.predict(table)
    empty = table.assign(price="", city="", since="", title="", note=None, binary="")
    unseen = table.assign(city="Atlantis", title="zzzz qqqq")
    for changed in (empty, unseen):
        together = pipeline.predict(pd.concat([table, changed]).reset_index(drop=True))
        pd.testing.assert_frame_equal(together.iloc[:6], expected.reset_index(drop=True), rtol=1e-6, atol=1e-6)
        assert together.iloc[6:]["probability"].between(0.5, 1).all()
    for name, cell, where in (
        ("price", "dear", "row 4, column 'price'"),
        ("since", "soon", "row 4, column 'since'"),
        ("photo", None, "row 4, column 'photo'"),
        ("photo", str(source), f"{source}: not a readable image"),
    ):
        with pytest.raises(UserError, match=where) as refused:
            pipeline.predict(table.assign(**{name: table[name].mask(table.index == 4, cell)}))
        assert "\n" not in str(refused.value)


def test_a_mixed_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """Augmentation, dropout and the order of the rows continue where they were, in the second epoch."""
    data = DataConfig(data=str(mixed_csv(tmp_path, "binary", rows=60)), target="binary")
    options = {"data": data, "model": ModelConfig(hidden=(8,)), "epochs": 2}
    interrupted_run(tmp_path / "a", "step", 3, monkeypatch, table=None, **options)
    whole = RunConfig(out=str(tmp_path / "b"), threads=1)
    train(data, options["model"], TrainConfig(epochs=2), whole)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
