"""What is saved is all that is needed, opens without running anything, and answers as it did."""

import json
import pickle

import pandas as pd
import pytest
import torch
from conftest import TARGETS, command, make_table, table_for
from torch import nn

from dataloader import make_loader
from errors import UserError
from pipeline import Pipeline, atomic_write, read_checkpoint, weights_sha256
from task import Task
from trainer import TrainConfig, Trainer


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_checkpoint_is_plain(runs, kind, name):
    path = runs[kind].out / name
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    state = torch.load(path, weights_only=True)
    json.dumps({k: v for k, v in state.items() if k not in ("state_dict", "training")}, allow_nan=False)
    assert len(state["golden"]["records"]) == len(state["golden"]["answers"]) == 16
    assert state["weights_sha256"] == weights_sha256(state["state_dict"])


@pytest.mark.parametrize("kind", TARGETS)
def test_every_way_to_ask_gives_the_same_answers(runs, kind, tmp_path):
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
        answers = read[output.split(".")[1]](tmp_path / output)
        pd.testing.assert_frame_equal(answers, expected.reset_index(drop=True), rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("kind", TARGETS)
def test_chunks_and_neighbours_never_change_an_answer(runs, kind):
    pipeline, records = runs[kind].pipeline, table_for(kind, rows=70, seed=3)
    whole = pipeline.predict(records)
    for size in (1, 9, 70):
        parts = pd.concat([pipeline.predict(records.iloc[i : i + size]) for i in range(0, 70, size)])
        pd.testing.assert_frame_equal(parts, whole, rtol=1e-6, atol=1e-6)


def test_shuffled_extra_and_missing_columns(runs):
    pipeline, records = runs["binary"].pipeline, table_for("binary", rows=20, seed=3)
    expected = pipeline.predict(records)
    changed = records[records.columns[::-1]].drop(columns=["binary", "remark", "same"]).assign(extra=1)
    pd.testing.assert_frame_equal(pipeline.predict(changed), expected)
    pd.testing.assert_frame_equal(pipeline.predict(records.to_dict("records")).reset_index(drop=True), expected)
    with pytest.raises(UserError, match=r"column 'age' is missing\. Did you mean 'Age'"):
        pipeline.predict(records.rename(columns={"age": "Age"}))


def test_answers_of_no_records(runs):
    empty = make_table(5).iloc[:0]
    for run in runs.values():
        for records in ([], empty):
            answers = run.pipeline.predict(records)
            assert list(answers) == list(run.pipeline.predict(make_table(5))) and answers.empty


def resave(path, target, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, target)
    return target


def test_golden_rows_refuse_a_model_that_answers_differently(runs, tmp_path):
    def other_statistics(state):
        state["preprocessor"]["columns"]["age"]["mean"] += 10

    with pytest.raises(UserError, match=r"golden row \d+ was answered"):
        Pipeline.load(resave(runs["regression"].out / "best.pt", tmp_path / "x.pt", other_statistics))

    def other_classes(state):
        state["task"]["classes"].reverse()

    with pytest.raises(UserError, match="golden row 1 was answered"):
        Pipeline.load(resave(runs["multiclass"].out / "best.pt", tmp_path / "y.pt", other_classes))


def test_a_flipped_weight_is_noticed(runs, tmp_path):
    def flip(state):
        next(iter(state["state_dict"].values())).view(-1)[0] += 1e-3

    with pytest.raises(UserError, match="not those that were saved"):
        Pipeline.load(resave(runs["binary"].out / "best.pt", tmp_path / "x.pt", flip))


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
    resave(runs["binary"].out / "best.pt", tmp_path / "newer.pt", lambda state: state.update(format=99))
    expected = {
        "truncated": "truncated", "empty": "truncated", "text": "no checkpoint", "junk": "truncated",
        "foreign": "no checkpoint of this project",
        "evil": "refused", "pickle": "refused", "newer": "format 99 is newer", "absent": "no such checkpoint",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(UserError, match=words):
            read_checkpoint(tmp_path / f"{name}.pt")
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
    trainer = Trainer(Pipeline(nn.Linear(3, 1), task), TrainConfig(epochs=2, out=str(tmp_path / "run")))
    trainer.fit(loader, loader)
    with pytest.raises(UserError, match="model="):
        Pipeline.load(tmp_path / "run" / "best.pt")
    again = Pipeline.load(tmp_path / "run" / "best.pt", model=nn.Linear(3, 1))
    assert torch.equal(again.logits(x), trainer.pipeline.logits(x))


def test_the_device_is_asked_for_by_name():
    pipeline = Pipeline(nn.Linear(3, 1), Task.fit(pd.Series([0, 1])))
    assert pipeline.to("auto").device.type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            pipeline.to("cuda")


def test_golden_records_hold_no_column_that_was_left_out(runs):
    state = read_checkpoint(runs["binary"].out / "best.pt")
    assert set(state["golden"]["records"][0]) == {"age", "income", "city", "member", "since"}
