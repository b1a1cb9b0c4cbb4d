"""Cross-validation: no row decides about the model that is tested on it, and the ensemble predicts as one model."""

import json

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from conftest import assert_refused, command, quick_run, table_for
from fastapi.testclient import TestClient

from config import DataConfig, TrainConfig
from dataloader import load_splits
from evaluation.folds import interval_of_mean, make_folds
from export import Options, export, graph_inputs
from pipeline import Pipeline
from serving.app import make_app
from serving.batching import Service

TASKS = ("binary", "multiclass", "regression")


@pytest.fixture(scope="module")
def cross_validated(tmp_path_factory):
    """Runs over three folds of a table, by the kind of problem."""

    def run(kind):
        table = table_for(kind).drop(columns="remark")
        data = DataConfig(target=kind, folds=3)
        return quick_run(tmp_path_factory.mktemp("folds") / kind, table, data=data, epochs=2)

    return {kind: run(kind) for kind in TASKS}


def folds_of(table, folds=4, **data):
    config = DataConfig(target="binary", folds=folds, **data)
    return make_folds(load_splits(config, 0, table), 0)


def test_each_row_is_tested_once_and_the_splits_of_a_fold_are_disjoint():
    table = table_for("binary", 203)
    found = folds_of(table)
    tested = np.concatenate([fold.test.index for fold in found])
    assert sorted(tested) == list(table.index)
    for fold in found:
        parts = [set(part.index) for part in (fold.train, fold.val, fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(table)
        assert abs(fold.test["binary"].eq("high").mean() - table["binary"].eq("high").mean()) < 0.02
    assert {len(fold.test) for fold in found} == {50, 51}


def test_a_group_stays_in_one_fold():
    table = table_for("binary").assign(customer=np.repeat(np.arange(40), 6))
    for fold in folds_of(table, group="customer"):
        parts = [set(part["customer"]) for part in (fold.train, fold.val, fold.test)]
        assert sum(map(len, parts)) == 40


def test_copies_of_a_row_stay_in_one_fold():
    table = table_for("binary")
    table = pd.concat([table, table.head(30)], ignore_index=True)
    for fold in folds_of(table):
        parts = [set(part["remark"]) for part in (fold.train, fold.val, fold.test)]
        assert sum(map(len, parts)) == 240


@pytest.mark.parametrize("kind", TASKS)
def test_all_rows_are_predicted_by_models_that_had_not_seen_them(cross_validated, kind):
    run, table = cross_validated[kind], table_for(kind)
    predictions = pd.read_csv(run.out / "test_predictions.csv")
    assert predictions["row"].tolist() == list(table.index)
    for number, member in enumerate(run.pipeline.members, start=1):
        part = predictions[predictions["fold"] == number]
        again = Pipeline.load(run.out / f"fold-{number}" / "best.pt").predict(table.loc[part["row"]])
        column = "prediction" if kind == "regression" else "probability"
        np.testing.assert_allclose(part[column], again[column], rtol=1e-4, atol=1e-6)
        ages = next(column for column in member.preprocessor.columns if column.name == "age")
        assert ages != next(c for c in run.pipeline.members[number % 3].preprocessor.columns if c.name == "age")
    metrics = json.loads((run.out / "metrics.json").read_text())
    of_folds = [fold["test"]["loss"] for fold in metrics["folds"]]
    assert metrics["test"]["loss"] == pytest.approx(np.mean(of_folds))
    assert metrics["rows"]["test"] == len(table)
    low, high = metrics["intervals"]["loss"]
    assert low < metrics["test"]["loss"] < high


@pytest.mark.parametrize("kind", TASKS)
def test_the_ensemble_predicts_the_mean_of_its_members_everywhere(cross_validated, kind, tmp_path):
    run, records = cross_validated[kind], table_for(kind, seed=1).head(20)
    checkpoint = run.out / "best.pt"
    columns = ["prediction"] if kind == "regression" else [f"probability_{c}" for c in run.pipeline.task.classes]
    of_members = [member.predict(records)[columns].to_numpy() for member in run.pipeline.members]
    expected = np.mean(of_members, axis=0)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(run.pipeline.predict(records)[columns], expected, **tolerance)
    loaded = Pipeline.load(checkpoint)
    np.testing.assert_allclose(loaded.predict(records)[columns], expected, **tolerance)
    client = TestClient(make_app(Service(str(checkpoint))))
    with client:
        sent = json.loads(records.drop(columns=kind).to_json(orient="records"))
        answers = client.post("/predict", json={"records": sent}).json()["predictions"]
    if kind != "regression":
        answers = [answer["probabilities"] for answer in answers]
    np.testing.assert_allclose([list(a.values())[: len(columns)] for a in answers], expected, **tolerance)
    export(Options(str(checkpoint), str(tmp_path / "model.onnx")))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feed = graph_inputs(loaded.preprocessor, records)
    names = [each.name for each in session.get_inputs()]
    assert len(names) == len(feed)
    output = session.run(
        ["prediction" if kind == "regression" else "probabilities"], dict(zip(names, feed.values(), strict=True))
    )
    np.testing.assert_allclose(np.reshape(output[0], expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_cross_validation_continues(tmp_path, cross_validated):
    """A run that stopped in the second fold gives the files of one that did not."""
    table, data = table_for("binary").drop(columns="remark"), DataConfig(target="binary", folds=3)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        import trainer

        end_epoch = trainer.Trainer._end_epoch

        def end(self, *args):
            end_epoch(self, *args)
            if self.out.name == "fold-2":
                self._save()
                stop()

        patch.setattr(trainer.Trainer, "_end_epoch", end)
        quick_run(tmp_path / "run", table, data=data, epochs=2)
    assert not (tmp_path / "run" / "best.pt").exists()
    run = quick_run(tmp_path / "run", table, data=data, epochs=2, resume=str(tmp_path / "run" / "fold-2" / "last.pt"))
    weights = [
        json.loads((r.out / "metrics.json").read_text())["weights_sha256"] for r in (run, cross_validated["binary"])
    ]
    assert weights[0] == weights[1]


def test_texts_are_members_too_and_cannot_be_one_graph(tmp_path):
    table = pd.DataFrame(
        {"text": [f"{w} day number {i}" for i in range(30) for w in ("good", "bad")], "y": ["p", "n"] * 30}
    )
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y", text="text", folds=3), epochs=1)
    assert len(Pipeline.load(run.out / "best.pt").predict(table.head(3))) == 3
    result = command("export.py", "--checkpoint", run.out / "best.pt", "--output", tmp_path / "x.onnx")
    assert_refused(result, "'text'", "fold-1")


def test_folds_exclude_other_splits(tmp_path):
    table_for("binary", 20).to_csv(tmp_path / "t.csv", index=False)
    line = ["train.py", "--data", tmp_path / "t.csv", "--target", "binary"]
    assert_refused(command(*line, "--folds", 2), "--folds", "3")
    assert_refused(command(*line, "--folds", 3, "--time", "since"), "--time")
    assert_refused(command(*line, "--folds", 30), "--folds 30", "20 rows")


def test_the_interval_of_a_mean_over_folds_covers_the_truth():
    """A simulation of folds that share training rows: the score of a model is that of its training rows (a common and
    an own part) and of its test rows."""
    random, covered = np.random.default_rng(0), 0
    rows, folds = 200, 5
    for _ in range(300):
        x = random.normal(0, 1, rows)
        parts = np.array_split(random.permutation(rows), folds)
        scores = []
        for part in parts:
            fitted = np.delete(x, part).mean()
            scores.append(float(((x[part] - fitted) ** 2).mean()))
        low, high = interval_of_mean(scores, 1 / (folds - 1))
        covered += low <= 1 + 1 / (rows * (folds - 1) / folds) <= high
    assert covered / 300 >= 0.92


def test_resumed_flags_name_the_folder_of_all_folds(cross_validated):
    from train import resume_config

    out = cross_validated["binary"].out
    assert resume_config(str(out / "fold-2" / "last.pt")).run.out == str(out)
    assert TrainConfig().epochs == -1
