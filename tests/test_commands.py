"""The commands as a user runs them: what they write, what they say, and how they refuse."""

import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TARGETS, assert_refused, command, table_for


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    table_for("binary").to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "diabetes"])
def test_bundled_examples(tmp_path, name):
    args = [] if name == "breast_cancer" else ["--data", name]
    result = command("train.py", *args, "--epochs", 15, cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{name}-")
    metrics = json.loads((folder / "metrics.json").read_text())
    if name == "diabetes":
        assert metrics["task"] == "regression" and metrics["test"]["r2"] > 0.1
    else:
        assert metrics["test"]["accuracy"] > 0.88


@pytest.mark.parametrize("kind", TARGETS)
def test_the_run_folder(runs, kind):
    run = runs[kind]
    files = {path.name for path in run.out.iterdir()}
    named = {"best.pt", "last.pt", "metrics.json", "history.csv", "test_predictions.csv", "sample.csv"}
    assert named <= files and any(f.startswith("events.out.tfevents") for f in files)
    assert len(files) == len(named) + 1
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert metrics["task"] == kind and metrics["target"] == kind
    assert metrics["classes"] == {"binary": ["high", "low"], "multiclass": ["a", "b", "c"], "regression": []}[kind]
    assert metrics["rows"] == {"train": 168, "val": 36, "test": 36}
    assert metrics["test"] == pytest.approx(run.test) and metrics["val"] == pytest.approx(run.val)
    keys = ("best_epoch", "epochs", "seconds", "samples_per_second", "weights_sha256", "config")
    assert all(metrics[key] for key in keys)
    history = pd.read_csv(run.out / "history.csv")
    assert list(history)[:6] == ["epoch", "lr", "seconds", "samples_per_second", "train/loss", "val/loss"]
    assert len(history) == metrics["epochs"] and history["val/loss"].min() == pytest.approx(run.val["loss"])
    predictions = pd.read_csv(run.out / "test_predictions.csv")
    assert list(predictions)[:3] == ["row", "target", "prediction"] and len(predictions) == 36
    if kind != "regression":
        assert (predictions["target"] == predictions["prediction"]).mean() == pytest.approx(run.test["accuracy"])
        assert list(predictions)[3:] == ["probability", *(f"probability_{c}" for c in metrics["classes"])]
    source = pd.read_csv(run.out.parent / f"{kind}.csv")
    assert source[kind].iloc[predictions["row"] - 1].tolist() == predictions["target"].tolist()
    sample = pd.read_csv(run.out / "sample.csv")
    assert kind not in sample and len(sample) == 5


def test_the_sample_is_answered_as_in_the_test(runs):
    run = runs["regression"]
    result = command(
        "predict.py", "--checkpoint", run.out / "best.pt", "--input", run.out / "sample.csv", "--output", "-"
    )
    assert result.returncode == 0 and result.stderr == b""
    answers = [float(line) for line in result.stdout.decode().splitlines()[1:]]
    assert answers == pytest.approx(run.predictions["prediction"].iloc[::7].head(5).tolist(), rel=1e-6)


def test_decisions_are_printed_and_can_be_overruled(table, tmp_path):
    flags = ["--data", table, "--target", "binary", "--epochs", 1]
    said = command("train.py", *flags, "--out", tmp_path / "a").stdout.decode()
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    for name, word in {
        "customer_id": "id", "age": "number", "city": "category", "member": "boolean", "since": "date",
        "remark": "free text", "same": "constant",
    }.items():  # fmt: skip
        assert word in lines[name]
    assert "left out" in lines["remark"] and "left out" in lines["customer_id"]
    overrules = ["--columns", "age=category", "customer_id=number", "city=drop", "--scaling", "quantile"]
    said = command("train.py", *flags, "--out", tmp_path / "b", *overrules).stdout.decode()
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    assert "category" in lines["age"] and "number" in lines["customer_id"] and "left out" in lines["city"]


def test_no_terminal_no_bar(table, tmp_path):
    result = command("train.py", "--data", table, "--target", "binary", "--epochs", 2, "--out", tmp_path / "run")
    assert result.stderr == b"" and b"\r" not in result.stdout and b"\x1b" not in result.stdout


def bad_table(**columns) -> pd.DataFrame:
    numbers = np.linspace(1, 50, 60).round(2)
    return pd.DataFrame({"a": numbers, "y": ["no", "yes"] * 30} | columns)


BAD_TABLES = {
    "empty file": ("", ["the file is empty"]),
    "header only": ("a,y\n", ["no rows below the header"]),
    "no such target": (bad_table().rename(columns={"y": "Y"}), ["--target y", "Did you mean 'Y'"]),
    "target all null": (bad_table(y=None), ["'y' has no value"]),
    "one class": (bad_table(y="yes"), ["one class only"]),
    "a class with one row": (bad_table(y=["maybe"] + ["no", "yes"] * 29 + ["no"]), ["class 'maybe' has 1 row"]),
    "few rows": (bad_table().head(3), ["3 rows are too few"]),
    "column of nulls": (bad_table(b=None), ["column 'b'", "--columns b=drop"]),
    "infinities": (bad_table(b=[1.0] * 16 + [np.inf] + [2.0] * 43), ["row 17", "column 'b'", "infinite"]),
    "units": (bad_table(b=[f"{i} kg" for i in range(60)]), ["column 'b'", " kg'", "--columns b=category"]),
    "thousands": (bad_table(b=[f"{i:,}" for i in range(980, 1040)]), ["row 21", "column 'b'", "'1,000'"]),
    "duplicate columns": ("a,a,y\n" + "1,2,no\n3,4,yes\n" * 20, ["column 'a' is there twice"]),
    "text without spaces": (
        pd.DataFrame({"review": [f"这家餐厅的菜第{i}次来都很好吃" for i in range(60)], "y": ["no", "yes"] * 30}),
        ["review: id", "--text COLUMN"],
    ),
    "regression for binary": (bad_table(y=np.linspace(0, 1, 60)), ["--task binary needs 2", "--task regression"]),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_refused_in_one_line(tmp_path, name):
    content, words = BAD_TABLES[name]
    path = tmp_path / "bad.csv"
    path.write_text(content) if isinstance(content, str) else content.to_csv(path, index=False)
    task = ["--task", "binary"] if name == "regression for binary" else []
    result = command("train.py", "--data", path, "--target", "y", *task, cwd=tmp_path)
    assert_refused(result, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.csv"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "absent.csv"], ["absent.csv: no such file"]),
        (["--hidden", "0"], ["--hidden", "not 0"]),
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--val-split", "0.6", "--test-split", "0.5"], ["--val-split and --test-split leave no rows"]),
        (["--optimizer", "Adamm"], ["--optimizer", "AdamW"]),
        (["--epoch", "3"], ["--epoch, 3. Did you mean --epochs"]),
        (["--hidden", "64,32"], ["--hidden", "64,32", "parted by spaces"]),
        (["--data", "wine", "--target", "alcohol", "--columns", "alcohol=drop"], ["alcohol is the target"]),
        (["--model", "mpl"], ["--model mpl", "Did you mean 'mlp'"]),
        (["--columns", "age"], ["--columns takes NAME=KIND"]),
        (["--device", "gpu"], ["--device gpu"]),
        (["--milestones", "5", "3"], ["--milestones"]),
        (["--resume", "absent.pt"], ["absent.pt: no such checkpoint"]),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, flags, words):
    assert_refused(command("train.py", *flags, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_fit_the_data(table, tmp_path):
    base = ["--data", table, "--target", "binary", "--out", tmp_path / "run"]
    assert_refused(command("train.py", *base, "--monitor", "rmse"), "--monitor rmse", "roc_auc")
    (tmp_path / "file").write_text("")
    assert_refused(command("train.py", *base[:-1], tmp_path / "file" / "run"), "--out", "no folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--epocs", "3"], ["--data", "absent.csv"]])
def test_help_and_errors_do_not_wait_for_torch(tmp_path, flags):
    code = f"import sys; sys.argv = ['train.py', *{flags}]; sys.path.insert(0, {str(ROOT)!r}); import train, errors\n"
    code += "try:\n    errors.run(train.main)\nfinally:\n    print('torch' in sys.modules, 'pandas' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.endswith("False False\n"), result.stdout + result.stderr


def test_predict_pipes_and_reports(runs, tmp_path):
    checkpoint = runs["binary"].out / "best.pt"
    records = table_for("binary", rows=30, seed=5)
    records.loc[:3, "city"] = "Atlantis"
    text = records.to_csv(index=False).encode()
    piped = command("predict.py", "--checkpoint", checkpoint, "--input", "-", "--output", "-", stdin=text)
    assert piped.returncode == 0
    assert piped.stdout.count(b"\n") == 31 and piped.stdout.startswith(b"prediction,probability,probability_high")
    said = piped.stderr.decode()
    assert "column 'city': 4 of 30 values unknown" in said and "accuracy" in said
    lines = records.to_json(orient="records", lines=True).encode()
    answers = command("predict.py", "--checkpoint", checkpoint, "--input", "-", stdin=lines).stdout
    first = json.loads(answers.splitlines()[0])
    assert set(first) == {"prediction", "probability", "probability_high", "probability_low"}


def test_predict_refuses_in_one_line(runs, tmp_path):
    checkpoint = runs["binary"].out / "best.pt"
    records = table_for("binary", rows=30)
    records.drop(columns="age").assign(Age=1).to_csv(tmp_path / "missing.csv", index=False)
    wrong = records.astype({"age": object})
    wrong.loc[16, "age"] = "old"
    wrong.to_csv(tmp_path / "wrong.csv", index=False)
    (tmp_path / "empty.csv").write_text("")
    for name, words in {
        "missing.csv": ["missing.csv", "column 'age' is missing", "Did you mean 'Age'"],
        "wrong.csv": ["wrong.csv", "row 17, column 'age': 'old'"],
        "empty.csv": ["the file is empty"],
        "absent.csv": ["absent.csv: no such file"],
    }.items():
        result = command("predict.py", "--checkpoint", checkpoint, "--input", name, "--output", "out.csv", cwd=tmp_path)
        assert_refused(result, *words)
    assert_refused(
        command("predict.py", "--checkpoint", checkpoint, "--input", tmp_path / "wrong.csv", "--output", "x.xls"),
        "x.xls",
    )
    assert_refused(command("predict.py", "--checkpoint", tmp_path / "empty.csv", "--input", "x.csv"), "no checkpoint")
    assert_refused(command("predict.py", "--checkpoint", tmp_path, "--input", "x.csv"), "is a folder")
    assert_refused(command("predict.py"), "needed: --checkpoint, --input")
    assert not (tmp_path / "out.csv").exists()


def test_predict_takes_tables_however_written(runs, tmp_path):
    checkpoint = runs["regression"].out / "best.pt"
    records = table_for("regression", rows=12, seed=2).replace("Köln", "Paris")
    expected = None
    for encoding, sep, decimal, newline in (
        ("utf-8", ",", ".", "\n"),
        ("utf-8-sig", ";", ",", "\r\n"),
        ("cp949", "\t", ".", "\n"),
    ):
        text = records.to_csv(index=False, sep=sep, decimal=decimal, lineterminator=newline).encode(encoding)
        result = command("predict.py", "--checkpoint", checkpoint, "--input", "-", stdin=text)
        assert result.returncode == 0, result.stderr.decode()
        expected = expected or result.stdout
        assert result.stdout == expected


@pytest.mark.parametrize("empty", ["", "NA", None])
def test_metrics_are_of_the_rows_that_have_a_label(empty, capsys):
    from predict import Score
    from task import Task

    score = Score(Task.fit(pd.Series(["no", "yes"], name="label")))
    score.add(torch.tensor([[5.0], [5.0], [-5.0], [5.0]]), pd.DataFrame({"label": [empty, "yes", "yes", empty]}))
    score.add(torch.tensor([[5.0]]), pd.DataFrame({"label": [empty]}))
    score.show(sys.stdout)
    assert "accuracy 0.5 " in capsys.readouterr().out


MINE = """\
class Line(nn.Module):
    def __init__(self, *, in_features, out_features):
        super().__init__()
        self.layer = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.layer(x)


"""


def test_a_network_of_ones_own_from_the_command_line(tmp_path, table):
    """One class and one line in model.py, in a copy of the project, are a new --model."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    source = (tmp_path / "model.py").read_text()
    source = source.replace("MODELS = {", MINE + 'MODELS = {"line": Line, ')
    (tmp_path / "model.py").write_text(source)
    args = ["--data", str(table), "--target", "binary", "--model", "line", "--epochs", "2", "--out", "run"]
    result = subprocess.run(
        [sys.executable, "train.py", *args], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["model"] == "line"
    args = ["--checkpoint", "run/best.pt", "--input", "run/sample.csv"]
    result = subprocess.run(
        [sys.executable, "predict.py", *args], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout.count("\n") == 6


def test_a_second_run_in_the_same_second_gets_its_own_folder(tmp_path, monkeypatch, table):
    from config import DataConfig, ModelConfig, TrainConfig
    from train import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    outs = [
        train(DataConfig(data=str(table), target="binary"), ModelConfig(hidden=()), TrainConfig(epochs=1)).out.name
        for _ in range(2)
    ]
    assert outs == ["table-now", "table-now-2"]
