"""The commands as a user runs them: what they write and print, and their one-line errors."""

import io
import json
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ROOT,
    TARGETS,
    assert_refused,
    command,
    file_size_limit,
    mixed_csv,
    mixed_table,
    quick_run,
    table_for,
)
from pyarrow import parquet

import model as model_module
from config import DataConfig, ModelConfig, TrainConfig
from errors import BrokenRecords, UserError
from pipeline import Pipeline, read_checkpoint
from train import train


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    table_for("binary").to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["breast_cancer", "wine", "diabetes"])
def test_bundled_examples(tmp_path, name):
    args = [] if name == "breast_cancer" else ["--data", name]
    result = command("train.py", *args, "--epochs", 15, cwd=tmp_path, fork=name != "breast_cancer")
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


def test_the_sample_is_predicted_as_in_the_test(runs):
    run = runs["regression"]
    result = command(
        "predict.py", "--checkpoint", run.out / "best.pt", "--input", run.out / "sample.csv", "--output", "-"
    )
    assert result.returncode == 0 and result.stderr == b""
    predictions = [float(line) for line in result.stdout.decode().splitlines()[1:]]
    assert predictions == pytest.approx(run.predictions["prediction"].iloc[::7].head(5).tolist(), rel=1e-6)


def test_decisions_are_printed_and_can_be_overruled(table, tmp_path):
    def decisions(*args) -> dict[str, str]:
        result = command("train.py", "--data", table, "--target", "binary", "--epochs", 1, *args)
        assert result.returncode == 0, result.stderr.decode()
        return {line.split()[0]: line for line in result.stdout.decode().splitlines() if line.startswith("  ")}

    lines = decisions("--out", tmp_path / "a")
    for name, word in {
        "customer_id": "id", "age": "number", "city": "category", "member": "boolean", "since": "date",
        "remark": "text", "same": "constant",
    }.items():  # fmt: skip
        assert word in lines[name]
    assert [name for name, line in lines.items() if "left out" in line] == ["customer_id", "same"]
    overrules = ["--columns", "age=category", "customer_id=number", "city=drop", "--scaling", "quantile"]
    lines = decisions("--out", tmp_path / "b", *overrules, "--text", "member")
    assert "category" in lines["age"] and "number" in lines["customer_id"] and "left out" in lines["city"]
    assert "text" in lines["member"] and "ngrams" in lines["member"]


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
    "only nulls": (bad_table(a=None), ["a: constant, no values in the training rows"]),
    "infinities": (bad_table(b=[1.0] * 16 + [np.inf] + [2.0] * 43), ["row 17", "column 'b'", "infinite"]),
    "units": (bad_table(b=[f"{i} {'kg' if i % 9 else 'g'}" for i in range(60)]), ["column 'b'", "unit 'g'", "b=drop"]),
    "words": (bad_table(b=[i % 29 if i % 20 else "k. Ang." for i in range(60)]), ["'k. Ang.'", "--missing 'k. Ang.'"]),
    "duplicate columns": ("a,a,y\n" + "1,2,no\n3,4,yes\n" * 20, ["column 'a' occurs twice"]),
    "text without spaces": (
        pd.DataFrame({"review": [f"这家餐厅的菜第{i}次来都很好吃" for i in range(60)], "y": ["no", "yes"] * 30}),
        ["review: id", "--columns NAME=KIND"],
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


def test_a_column_of_nulls_is_left_out(tmp_path):
    bad_table(b=None).to_csv(tmp_path / "t.csv", index=False)
    result = command(
        "train.py", "--data", tmp_path / "t.csv", "--target", "y", "--epochs", 1, "--out", tmp_path / "run"
    )
    assert result.returncode == 0 and "left out: no values in the training rows" in result.stdout.decode()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "absent.csv"], ["absent.csv: no such file"]),
        (["--hidden", "0"], ["--hidden", "not 0"]),
        (["--lr", "-2"], ["--lr", "not -2"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--val-split", "0.6", "--test-split", "0.5"], ["--val-split and --test-split leave no rows"]),
        (["--optimizer", "Adamm"], ["--optimizer", "AdamW"]),
        (["--epoch", "3"], ["--epoch, 3. Did you mean --epochs"]),
        (["--hidden", "64,32"], ["--hidden", "64,32", "separate several values with spaces"]),
        (["--data", "wine", "--target", "alcohol", "--columns", "alcohol=drop"], ["alcohol is the target"]),
        (["--model", "mpl"], ["--model mpl", "Did you mean 'mlp'"]),
        (["--model", "hf"], ["--model hf needs a name"]),
        (["--segment", "words"], ["--segment"]),
        (["--image", "x", "--text", "x"], ["--image x", "--text"]),
        (["--text", "x", "--columns", "x=number"], ["--columns x=number", "x is given as text"]),
        (["--columns", "age"], ["--columns takes NAME=KIND"]),
        (["--device", "gpu"], ["--device gpu"]),
        (["--milestones", "5", "3"], ["--milestones"]),
        (["--resume", "absent.pt"], ["absent.pt: no such checkpoint"]),
        (["--threads", "1000000000"], ["--threads must be a number from 0 to 1024"]),
        (["--max-length", "1000000000"], ["--max-length must be a number from 0 to"]),
        (["--data", "/"], ["--data /: give a folder of class folders"]),
        (["--data", "x" * 5000], ["--data xxx", "no such file"]),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, flags, words):
    assert_refused(command("train.py", *flags, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_fit_the_data(table, tmp_path):
    base = ["--data", table, "--target", "binary", "--out", tmp_path / "run"]
    assert_refused(command("train.py", *base, "--monitor", "rmse"), "--monitor rmse", "roc_auc")
    (tmp_path / "file").write_text("")
    assert_refused(
        command("train.py", *base[:-1], tmp_path / "file" / "run"), "--out", "not a folder that can be written to"
    )
    assert_refused(command("train.py", *base, "--model", "cnn"), "--model cnn reads image", "numbers, categories")
    assert_refused(
        command("train.py", *base, "--model", "bag", "transformer"), "--model bag transformer", "two networks read text"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--epocs", "3"], ["--data", "absent.csv"]])
def test_help_and_errors_do_not_wait_for_torch(tmp_path, flags):
    code = f"import sys; sys.argv = ['train.py', *{flags}]; sys.path.insert(0, {str(ROOT)!r}); import train, console\n"
    code += "try:\n    console.run(train.main)\nfinally:\n    print('torch' in sys.modules, 'pandas' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.endswith("False False\n"), result.stdout + result.stderr


def test_predict_pipes_and_reports(runs, tmp_path):
    checkpoint = runs["binary"].out / "best.pt"
    records = table_for("binary", rows=30, seed=5)
    records.loc[:3, "city"] = "Atlantis"
    text = records.to_csv(index=False).encode()
    piped = command("predict.py", "--checkpoint", checkpoint, "--input", "-", "--output", "-", stdin=text, fork=False)
    assert piped.returncode == 0
    assert piped.stdout.count(b"\n") == 31 and piped.stdout.startswith(b"prediction,probability,probability_high")
    printed = piped.stderr.decode()
    assert "column 'city': 4 of 30 values unknown" in printed and "accuracy" in printed
    lines = records.to_json(orient="records", lines=True).encode()
    predictions = command("predict.py", "--checkpoint", checkpoint, "--input", "-", stdin=lines).stdout
    first = json.loads(predictions.splitlines()[0])
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
    assert_refused(
        command("predict.py", "--checkpoint", tmp_path / "empty.csv", "--input", "x.csv"), "not a checkpoint"
    )
    assert_refused(command("predict.py", "--checkpoint", tmp_path, "--input", "x.csv"), "is a folder")
    assert_refused(command("predict.py"), "required: --checkpoint, --input")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("encoding", "sep", "decimal", "newline"),
    [("utf-8-sig", ";", ".", "\r\n"), ("cp949", "\t", ".", "\n"), ("utf-8", ";", ",", "\n")],
)
def test_predict_reads_tables_however_written(runs, tmp_path, encoding, sep, decimal, newline):
    checkpoint = runs["regression"].out / "best.pt"
    records = table_for("regression", rows=12, seed=2).replace("Köln", "Paris")
    expected = runs["regression"].pipeline.predict(records)
    text = records.to_csv(index=False, sep=sep, decimal=decimal, lineterminator=newline).encode(encoding)
    result = command("predict.py", "--checkpoint", checkpoint, "--input", "-", stdin=text)
    assert result.returncode == 0, result.stderr.decode()
    written = pd.read_csv(io.BytesIO(result.stdout), index_col=False)
    pd.testing.assert_frame_equal(written, expected, rtol=1e-6)


ODD = ["007", " x ", "1e5", 'say "hi"', "a,b", "two\nlines", "", "서울", "0.10", "TRUE", "-0", "9007199254740993"]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_kept_columns_come_first_and_stay_as_they_are(runs, tmp_path, form, monkeypatch):
    """Text stays text, in chunks as well; a column that is missing or clashes is named."""
    import predict
    import sources

    checkpoint, rows = runs["binary"].out / "best.pt", 36
    monkeypatch.setattr(sources, "read_records", partial(_in_chunks_of, 5, sources.read_records))
    table = table_for("binary", rows=rows, seed=5).assign(order_id=ODD * 3, error="no", item=ODD[::-1] * 3)
    table.to_csv(tmp_path / "in.csv", index=False)
    options = {
        "checkpoint": str(checkpoint),
        "input": str(tmp_path / "in.csv"),
        "output": str(tmp_path / f"out.{form}"),
    }
    predict.predict(predict.Options(**options, keep=("order_id", "error", "item", "order_id")))
    text = {"dtype": str, "keep_default_na": False}
    written = {
        "csv": lambda path: pd.read_csv(path, **text),
        "tsv": lambda path: pd.read_csv(path, sep="\t", **text),
        "jsonl": lambda path: pd.DataFrame(map(json.loads, path.read_text().splitlines())),
        "parquet": pd.read_parquet,
    }[form](tmp_path / f"out.{form}")
    assert list(written)[:4] == ["order_id", "error", "item", "prediction"]
    assert written["order_id"].tolist() == ODD * 3 and written["item"].tolist() == ODD[::-1] * 3
    assert written["prediction"].tolist() == runs["binary"].pipeline.predict(table)["prediction"].tolist()
    for names, words in (
        (("orderid",), "--keep orderid: no such column. Did you mean 'order_id'"),
        (("error",), "--keep error: the predictions have a column of that name"),
    ):
        with pytest.raises(UserError, match=words):
            predict.predict(predict.Options(**options, keep=names, skip_broken=True))


def _in_chunks_of(size, read, path, layout, rows, *rest):
    yield from read(path, layout, size, *rest)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_kept_cells_of_json_keep_their_types(runs, tmp_path, form):
    records = json.loads(table_for("binary", rows=4).to_json(orient="records"))
    cells = {"n": [7, None, 8, 9], "f": [0.1, 1e-20, 2.5, 0.30000000000000004], "m": ["007", 7, True, [1, "x"]]}
    lines = [record | {name: column[i] for name, column in cells.items()} for i, record in enumerate(records)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["--checkpoint", runs["binary"].out / "best.pt", "--input", "in.jsonl", "--keep", *cells]
    result = command("predict.py", *args, "--output", f"out.{form}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    path = tmp_path / f"out.{form}"
    if form == "jsonl":
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert json.dumps([[line[name] for line in found] for name in cells]) == json.dumps(list(cells.values()))
        return
    found = pd.read_csv(path, dtype={"n": "Int64", "m": str}) if form == "csv" else pd.read_parquet(path)
    assert found["n"].isna().tolist() == [False, True, False, False] and found["n"].dropna().tolist() == [7, 8, 9]
    assert found["f"].tolist() == cells["f"] and found["m"].tolist() == ["007", "7", "true", '[1, "x"]']
    if form == "parquet":
        assert parquet.read_schema(path).field("n").type == "int64"
    if form == "csv":
        assert ",7," not in path.read_text().splitlines()[2] and path.read_text().splitlines()[1].startswith("7,0.1,")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("target", TARGETS)
def test_broken_records_do_not_cost_the_batch(everything, tmp_path, form, target, monkeypatch, capsys):
    """They keep their place, whatever columns are broken and however many chunks: one of them is wholly broken."""
    import predict
    import sources

    pipeline = Pipeline.load(everything["mixed", target])
    table = mixed_table(tmp_path, rows=12)
    whole = pipeline.predict(table.assign(photo=[str(tmp_path / path) for path in table["photo"]]))
    wrong = {2: "price", 4: "photo", 5: "since", 8: "price", 9: "photo", 10: "photo", 11: "since"}
    for row, name in wrong.items():
        table[name] = table[name].astype(object)
        table.loc[row, name] = {"price": "dear", "photo": "gone.png", "since": "soon"}[name]
    table.to_csv(tmp_path / "in.csv", index=False)
    monkeypatch.setattr(sources, "read_records", partial(_in_chunks_of, 4, sources.read_records))
    options = {"checkpoint": str(everything["mixed", target]), "input": str(tmp_path / "in.csv")}
    with pytest.raises(UserError, match=r"row 3, column 'price': 'dear' .*--skip-broken"):
        predict.predict(predict.Options(**options, output=str(tmp_path / "x.csv")))
    predict.predict(predict.Options(**options, output=str(tmp_path / f"out.{form}"), skip_broken=True, keep=("photo",)))
    printed = capsys.readouterr()
    assert "7 of 12 records cannot be read; the first: " in printed.err and "row 3, column 'price'" in printed.err
    read = {"csv": pd.read_csv, "jsonl": partial(pd.read_json, lines=True), "parquet": pd.read_parquet}[form]
    written = read(tmp_path / f"out.{form}")
    assert written["photo"].tolist() == table["photo"].tolist() and list(written)[-1] == "error"
    for row, error in written["error"].items():
        assert (wrong[row] in error or "gone.png" in error) if row in wrong else pd.isna(error)
    columns = [name for name in whole if name != "file"]
    assert written.loc[list(wrong), columns].isna().all(axis=None)
    good = [row for row in range(12) if row not in wrong]
    pd.testing.assert_frame_equal(
        written.loc[good, columns], whole.loc[good, columns], rtol=1e-5, atol=1e-6, check_dtype=False
    )
    encoded = pipeline.task.encode(table[target].iloc[good])
    expected = pipeline.task.evaluate(pipeline.predict_logits(table.iloc[good].assign(
        photo=[str(tmp_path / path) for path in table["photo"].iloc[good]]))[1], encoded)  # fmt: skip
    name = "rmse" if target == "regression" else "accuracy"
    assert f"{name} {expected[name]:.5g}" in printed.out


@pytest.mark.parametrize("empty", ["", "NA", None])
def test_metrics_cover_the_rows_that_have_a_label(empty, capsys):
    from evaluation.summary import Score
    from task import Task

    score = Score(Task.fit(pd.Series(["no", "yes"], name="label")))
    score.add(torch.tensor([[5.0], [5.0], [-5.0], [5.0]]), pd.DataFrame({"label": [empty, "yes", "yes", empty]}))
    score.add(torch.tensor([[5.0]]), pd.DataFrame({"label": [empty]}))
    score.show(sys.stdout)
    assert "accuracy 0.5 " in capsys.readouterr().out


OWN_NETWORK = """\
class Line(nn.Module):
    def __init__(self, *, in_features, out_features):
        super().__init__()
        self.layer = nn.Linear(in_features, out_features)

    def forward(self, numbers):
        return self.layer(numbers)


"""


def test_a_network_of_ones_own_from_the_command_line(tmp_path, table):
    """One class and one line in model.py, in a copy of the project, are a new --model."""
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "tests", "runs", "__pycache__"))
    source = (project / "model.py").read_text()
    (project / "model.py").write_text(source.replace("MODELS = {", OWN_NETWORK + 'MODELS = {"line": Line, '))
    kinds = [f"{name}=drop" for name in ("city", "remark")]
    args = ["--data", str(table), "--target", "binary", "--model", "line", "--epochs", "2", "--out", "run", "--columns"]
    result = command(project / "train.py", *args, *kinds, cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["model"] == "line"
    args = ["--checkpoint", "run/best.pt", "--input", "run/sample.csv"]
    result = command(project / "predict.py", *args, cwd=tmp_path)
    assert result.stdout.count(b"\n") == 6


def test_a_network_for_each_input_of_mixed_records(tmp_path):
    """`--model mlp transformer` chooses two; the images, which none of them reads, get the default."""
    source, out = mixed_csv(tmp_path, "binary", rows=60), tmp_path / "run"
    base = ["--data", source, "--target", "binary", "--epochs", 1, "--hidden", 32]
    result = command("train.py", *base, "--out", out, "--model", "mlp", "transformer")
    assert result.returncode == 0, result.stderr.decode()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["model"] == "mlp + transformer + cnn" and metrics["config"]["data"]["tokenizer"] == "auto"
    files = {path.name for path in out.iterdir()}
    assert {"sample.csv", "sample", "augmented.png"} <= files and len(list((out / "sample").iterdir())) == 5
    tried = command("predict.py", "--checkpoint", out / "best.pt", "--input", out / "sample.csv", cwd=tmp_path)
    assert tried.returncode == 0 and tried.stdout.count(b"\n") == 6, tried.stderr.decode()
    assert "subwords" in result.stdout.decode() and "ngrams" not in result.stdout.decode()


def test_text_and_image_columns_are_named_together_with_others(tmp_path):
    flags = ["--text", "note", "--image", "photo", "--columns", "title=drop", "since=category"]
    base = ["--data", mixed_csv(tmp_path, "regression", rows=60), "--target", "regression", "--epochs", 1]
    result = command("train.py", *base, *flags, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr.decode()
    state = read_checkpoint(tmp_path / "run" / "best.pt")["preprocessor"]
    kinds = {column["name"]: column["kind"] for column in state["columns"]}
    assert kinds == {"price": "number", "city": "category", "since": "category", "note": "text", "photo": "image"}
    assert state["left_out"] == {"title": ["drop", "by --columns"]}


def test_a_second_run_in_the_same_second_gets_its_own_folder(tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    data = DataConfig(data=str(table), target="binary")
    outs = [train(data, ModelConfig(hidden=(8,)), TrainConfig(epochs=1)).out.name for _ in range(2)]
    assert outs == ["table-now", "table-now-2"]


def test_one_value_means_a_tuple_of_one():
    assert ModelConfig(hidden=64) == ModelConfig(hidden=(64,)) and ModelConfig(model="mlp").model == ("mlp",)
    data = DataConfig(text="a", columns="b=drop", clean="html")
    assert (data.text, data.columns, data.clean) == (("a",), ("b=drop",), ("html",))
    assert data.column_kinds() == {"a": "text", "b": "drop"} and DataConfig(text="").text == ()
    assert TrainConfig(milestones=3).milestones == (3,) and TrainConfig(milestones=[3, 5]).milestones == (3, 5)


def test_a_closed_output_stops_nothing(runs, tmp_path):
    """What cannot be printed is dropped; predictions that cannot be written are an error."""
    data, checkpoint = runs["binary"].out.parent / "binary.csv", runs["binary"].out / "best.pt"
    train = f"train.py --data {data} --target binary --epochs 2 --out {tmp_path / 'run'}"
    predict = f"predict.py --checkpoint {checkpoint} --input {runs['binary'].out / 'sample.csv'} --output"
    commands = f"{train} 2>&- | true", f"{predict} {tmp_path / 'o.csv'} <&- >&- 2>&-", f"{predict} - > /dev/full"
    shell = ["bash", "-o", "pipefail", "-c"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    started = [subprocess.Popen([*shell, f"{sys.executable} {line}"], **pipes) for line in commands]
    errors = [process.communicate(timeout=120)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 2], errors
    assert errors[:2] == ["", ""] and errors[2].count("\n") == 1 and "No space left" in errors[2]
    assert (tmp_path / "run" / "metrics.json").exists() and len(pd.read_csv(tmp_path / "o.csv")) == 5


def with_large_weights(model):
    """Multiply the weights of the first layer, so that large inputs overflow; batch normalisation undoes it."""
    with torch.no_grad():
        next(layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)).weight *= 1e4
    return model


@pytest.mark.parametrize("kind", TARGETS)
def test_numbers_whose_logits_overflow_are_broken(tmp_path, kind):
    """Each is finite as float32, but not what the network makes of it."""
    import predict

    data = DataConfig(target=kind, scaling="standard")  # by rank, no number is too large
    pipeline = quick_run(tmp_path / "run", table_for(kind), data=data, epochs=1).pipeline
    table = table_for(kind, rows=9, seed=3).drop(columns=kind)
    with_large_weights(pipeline.model)
    pipeline.save(tmp_path / "best.pt")
    good = pipeline.predict(table)
    table.loc[2, "age"], table.loc[5, "income"] = 4e39, -1e42
    table.to_csv(tmp_path / "in.csv", index=False)
    with pytest.raises(BrokenRecords) as error:
        pipeline.predict(table)
    assert list(error.value.messages) == [2, 5]
    options = {"checkpoint": str(tmp_path / "best.pt"), "input": str(tmp_path / "in.csv")}
    output = tmp_path / "out.csv"
    with pytest.raises(UserError, match=r"in.csv: row 3, column 'age': '4e\+39' is too large a number"):
        predict.predict(predict.Options(**options, output=str(output)))
    assert not output.exists()
    predict.predict(predict.Options(**options, output=str(output), skip_broken=True))
    written = pd.read_csv(output)
    assert written["error"].notna().tolist() == [i in (2, 5) for i in range(9)] and "'income'" in written["error"][5]
    assert written["prediction"].isna().tolist() == [i in (2, 5) for i in range(9)]
    pd.testing.assert_frame_equal(written[good.columns].drop([2, 5]), good.drop([2, 5]), check_dtype=False, rtol=1e-5)


def test_too_large_numbers_in_training(tmp_path, monkeypatch):
    table = table_for("regression")
    large = table.assign(regression=table["regression"] * 1e197)
    with pytest.raises(UserError, match=r"target 'regression': .* is too large"):
        quick_run(tmp_path / "run", large, data=DataConfig(target="regression"))
    test = table.head(20).assign(age=[50.0] * 10 + [4e39] + [50.0] * 9)
    test.to_csv(tmp_path / "test.csv", index=False)
    build = model_module.build_model
    monkeypatch.setattr(model_module, "build_model", lambda *args: with_large_weights(build(*args)))
    data = DataConfig(target="regression", test_data=str(tmp_path / "test.csv"), scaling="standard")
    with pytest.raises(UserError, match=r"test.csv: row 11, column 'age': '4e\+39' is too large a number"):
        quick_run(tmp_path / "run", table, data=data)


def test_where_files_cannot_be_written(runs, tmp_path):
    import predict

    with pytest.raises(UserError, match=r"--out .*not a folder that can be written to .File name too long"):
        quick_run(tmp_path / ("x" * 300), table_for("binary"))
    options = {"checkpoint": str(runs["binary"].out / "best.pt"), "input": str(runs["binary"].out / "sample.csv")}
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv is a folder"):
        predict.predict(predict.Options(**options, output=str(tmp_path / "folder.csv")))
    for form in ("csv", "jsonl", "parquet"):
        with file_size_limit(100), pytest.raises(UserError, match=rf"x\.{form}: cannot be written .File too large"):
            predict.predict(predict.Options(**options, output=str(tmp_path / f"x.{form}")))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_shards_put_together_are_the_file_of_one_process(runs, tmp_path, form):
    """Parts of whole chunks: with chunks of 50 rows, 240 rows are five of them."""
    code = "import sys, preprocessing.preprocessor as p; p.Preprocessor.read_rows = 50\nimport predict; predict.main()"
    line = ("--checkpoint", runs["binary"].out / "best.pt", "--input", runs["binary"].out.parent / "binary.csv")
    whole = tmp_path / f"whole.{form}"
    assert command("-c", code, *line, "--output", whole, cwd=ROOT).returncode == 0
    parts = [tmp_path / f"part-{i}.{form}" for i in (1, 2, 3)]
    for i, part in enumerate(parts, start=1):
        result = command("-c", code, *line, "--shard", f"{i}/3", "--output", part, cwd=ROOT)
        assert result.returncode == 0, result.stderr
    assert b"".join(part.read_bytes() for part in parts) == whole.read_bytes()
    assert all(part.read_bytes() for part in parts)
    for wrong in ("0/3", "4/3", "x", "2"):
        assert_refused(command("predict.py", *line, "--shard", wrong, "--output", whole), "--shard")
