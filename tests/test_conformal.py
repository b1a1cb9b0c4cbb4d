"""Prediction sets and intervals hold the target of as many new records as asked, wherever a model predicts."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TARGETS, assert_refused, command, quick_run, table_for
from fastapi.testclient import TestClient
from test_evaluation import draw, make_task

from config import DataConfig, RunConfig, TrainConfig
from errors import UserError
from evaluation.conformal import fit_coverage, measure_coverage
from pipeline import Pipeline
from serving.app import make_app
from serving.batching import Service
from train import train


@pytest.mark.parametrize("coverage", [0.9, 0.95])
@pytest.mark.parametrize("kind", TARGETS)
def test_coverage_is_what_was_asked(kind, coverage):
    """On average over fits with 400 validation records: a single fit would show the luck of these records."""
    task, random = make_task(kind), np.random.default_rng(0)
    reached = []
    for _ in range(30):
        fitted = fit_coverage(task, *draw(task, 400, random), coverage)
        found = measure_coverage(fitted, *draw(task, 2000, random))
        assert found["interval"][0] < found["reached"] < found["interval"][1]
        reached.append(found["reached"])
    assert abs(np.mean(reached) - coverage) < 0.01, np.mean(reached)


def test_intervals_follow_the_difficulty():
    """Errors that grow with the prediction, and with the spread of an ensemble, get wider intervals there."""
    task, random = make_task("regression"), np.random.default_rng(0)

    def records(rows: int):
        spread = random.uniform(0.1, 2, rows)
        members = random.normal(size=(rows, 1)) + spread[:, None] * np.linspace(-1, 1, 8)
        targets = members.mean(axis=1) + spread * random.normal(size=rows)
        return torch.tensor(members[:, :, None]), torch.tensor(targets)

    fitted, (logits, targets) = fit_coverage(task, *records(2000), 0.9), records(4000)
    easy = logits.std(dim=1)[:, 0] < 0.8
    for part in (easy, ~easy):
        assert abs(measure_coverage(fitted, logits[part], targets[part])["reached"] - 0.9) < 0.04
    sizes = [measure_coverage(fitted, logits[part], targets[part])["size"] for part in (easy, ~easy)]
    assert sizes[0] < 0.6 * sizes[1]
    alike = fit_coverage(task, logits, targets, 0.9, scaled=False)
    assert measure_coverage(alike, logits[easy], targets[easy])["reached"] > 0.97


def test_sets_hold_the_prediction_and_more_classes_where_they_are_likely():
    task = fit_coverage(make_task("multiclass"), *draw(make_task("multiclass"), 400, np.random.default_rng(0)), 0.9)
    probabilities = torch.tensor([[0.98, 0.01, 0.01], [0.4, 0.35, 0.25], [0.45, 0.54, 0.01]])
    sets = task.sets(probabilities)
    assert sets.tolist()[0] == [True, False, False] and sets[1].sum() >= 2
    assert sets.gather(1, task.decide(probabilities)[:, None]).all()


@pytest.mark.parametrize("kind", TARGETS)
def test_files_requests_and_the_report_hold_them(kind, tmp_path):
    table = table_for(kind, 400)
    table.to_csv(tmp_path / "data.csv", index=False)
    run = ("train.py", "--data", tmp_path / "data.csv", "--target", kind, "--epochs", 3, "--out", tmp_path / "run")
    result = command(*run, "--coverage", 0.9)
    assert b"Coverage 0.9: the " in result.stdout, result.stderr
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["coverage"]
    assert found["asked"] == 0.9 and found["reached"] > 0.7
    assert "Coverage 0.9: the " in (tmp_path / "run" / "report.html").read_text()
    predictions = pd.read_csv(tmp_path / "run" / "test_predictions.csv")
    if kind == "regression":
        inside = predictions["target"].between(predictions["lower"], predictions["upper"])
    else:
        sets = predictions["set"].map(json.loads)
        inside = pd.Series([target in each for target, each in zip(predictions["target"], sets, strict=True)])
    assert inside.mean() == pytest.approx(found["reached"])
    pipeline = Pipeline.load(tmp_path / "run" / "best.pt")
    records = json.loads(table.drop(columns=kind).head(5).to_json(orient="records"))
    with TestClient(make_app(Service(str(tmp_path / "run" / "best.pt")))) as client:
        answer = client.post("/predict", json={"records": records}).json()["predictions"]
        assert client.get("/schema").json()["coverage"] == 0.9
    expected = pipeline.predict(table.head(5))
    for given, row in zip(answer, expected.to_dict("records"), strict=True):
        if kind == "regression":
            assert [given["lower"], given["upper"]] == pytest.approx([row["lower"], row["upper"]], rel=1e-6)
            assert given["lower"] < given["prediction"] < given["upper"]
        else:
            assert given["set"] == json.loads(row["set"]) and given["prediction"] in given["set"]


def test_folds_have_a_coverage_too(tmp_path):
    table, run = table_for("regression", 300), RunConfig(out=str(tmp_path / "folds"), coverage=0.8, report=False)
    result = train(DataConfig(target="regression", folds=3), None, TrainConfig(epochs=2), run, table=table)
    found = json.loads((result.out / "metrics.json").read_text())["coverage"]
    predictions = result.predictions
    inside = predictions["target"].between(predictions["lower"], predictions["upper"]).mean()
    assert found["reached"] == pytest.approx(inside) and abs(inside - 0.8) < 0.1
    assert {"lower", "upper"} <= set(Pipeline.load(result.out / "best.pt").predict(table.head(3)))


def test_too_few_rows_are_refused(tmp_path):
    run = RunConfig(out=str(tmp_path / "run"), coverage=0.99)
    with pytest.raises(UserError, match=r"--coverage 0\.99 needs 99 validation rows, and there are 36"):
        train(DataConfig(target="binary"), None, None, run, table=table_for("binary"))
    assert not (tmp_path / "run").exists()
    assert_refused(command("train.py", "--coverage", 1), "--coverage must be a number from 0 to 0.999")


def test_without_coverage_predictions_stay_as_they_are(tmp_path):
    run = quick_run(tmp_path / "run", table_for("regression"), data=DataConfig(target="regression"))
    assert list(run.pipeline.predict(table_for("regression").head(2))) == ["prediction"]
