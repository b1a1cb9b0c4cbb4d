"""The loop of maintenance: learn from feedback beside the original table, and replace a model only by one as good."""

import json
import shutil
import sqlite3

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_refused, command, mixed_table, quick_run, table_for
from test_serve import client_of

from config import DataConfig, RunConfig, TrainConfig
from dataloader import load_splits
from errors import UserError
from evaluation.held_out import is_worse
from pipeline import Pipeline
from serving.batching import Service
from serving.log import Log
from train import train


def table_config(runs, *added, **options) -> DataConfig:
    return DataConfig(data=str(runs["binary"].out) + ".csv", target="binary", add=tuple(map(str, added)), **options)


def log_of(checkpoint, records, targets, path):
    """Predict records and give feedback; None = not known."""
    with client_of(checkpoint, path) as client:
        sent = client.post("/predict", json={"records": records}).json()
        kept = client.post("/feedback", json={"id": sent["id"], "targets": targets})
        assert kept.json() == {"kept": sum(target is not None for target in targets)}
    return path


def records_of(table, names) -> list[dict]:
    return json.loads(table[names].to_json(orient="records"))


# ---------------------------------------------------------------- --add


def test_added_rows_are_trained_on_and_the_other_splits_stay(runs, tmp_path):
    """Rows of the validation and test split are left out, also if their cells are written in another way."""
    plain = load_splits(table_config(runs), 0)
    known = pd.concat([plain.val.head(3), plain.test.head(2)]).drop(columns=["customer_id", "same"])
    known["age"] = known["age"].astype(float).map("{:.2f}".format)
    known["since"] = pd.to_datetime(known["since"]).map(str)
    known.to_csv(tmp_path / "known.csv", index=False)
    new = table_for("binary", 30, seed=5)[::-1]
    new.loc[new.index[:4], "binary"] = None
    new.assign(extra=1).to_json(tmp_path / "new.jsonl", orient="records", lines=True)
    splits = load_splits(table_config(runs, tmp_path / "known.csv", tmp_path / "new.jsonl"), 0)
    pd.testing.assert_frame_equal(splits.val, plain.val)
    pd.testing.assert_frame_equal(splits.test, plain.test)
    kept = splits.train.iloc[: len(plain.train)]
    assert kept.index.tolist() == plain.train.index.tolist()
    assert kept.astype("str").fillna("").to_numpy().tolist() == plain.train.astype("str").fillna("").to_numpy().tolist()
    assert len(splits.train) == len(plain.train) + 26
    assert splits.train["age"].iloc[-1] == new["age"].iloc[-1]
    assert splits.train.index[-1] == f"30 of {tmp_path / 'new.jsonl'}"
    notes = "\n".join(splits.notes)
    assert "known.csv: 0 rows added to train; 5 of validation or test left out" in notes
    assert "new.jsonl: 4 rows without binary left out" in notes and "new.jsonl: 26 rows added" in notes


def test_where_equal_rows_are_no_surprise_they_are_added():
    table = pd.DataFrame({"a": ["x", "y"] * 100, "b": ["u", "u", "v", "v"] * 50, "target": ["no", "yes"] * 100})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataloader._read", lambda *_: (table, {}))
        splits = load_splits(DataConfig(target="target", add=("table",)), 0, table)
    assert len(splits.train) == 200 - 60 + 200


def test_groups_of_the_test_split_are_not_added(tmp_path):
    table = pd.DataFrame({"n": np.arange(200.0) % 7, "m": np.arange(200.0), "group": np.arange(200) // 5})
    table["target"] = np.where(table["n"] > 3, "high", "low")
    table.assign(m=-table["m"]).to_csv(tmp_path / "more.csv", index=False)
    config = DataConfig(target="target", group="group", add=(str(tmp_path / "more.csv"),))
    splits = load_splits(config, 0, table)
    assert set(splits.train["group"].astype(int)).isdisjoint(pd.concat([splits.val, splits.test])["group"])
    assert len(splits.train) == 2 * (200 - len(splits.val) - len(splits.test))


def test_a_log_is_learned_from_beside_its_table(runs, tmp_path):
    """A log lacks columns that the model left out. Records without feedback are not learned from."""
    checkpoint, names = runs["binary"].out / "best.pt", runs["binary"].pipeline.preprocessor.names
    new = table_for("binary", 12, seed=6)
    targets = [*new["binary"].tolist()[:10], None, None]
    log = log_of(checkpoint, records_of(new, names), targets, tmp_path / "requests.db")
    assert sqlite3.connect(log).execute("SELECT COUNT(*) FROM requests WHERE target IS NULL").fetchone() == (2,)
    run = train(
        table_config(runs, log), training=TrainConfig(epochs=1), run=RunConfig(out=str(tmp_path / "run"), report=False)
    )
    before = json.loads((runs["binary"].out / "metrics.json").read_text())["rows"]
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert after == before | {"train": before["train"] + 10}
    assert run.pipeline.preprocessor.kinds == runs["binary"].pipeline.preprocessor.kinds
    assert run.pipeline.test["records"] == runs["binary"].pipeline.test["records"]


def test_what_cannot_be_added_is_refused(runs, tmp_path):
    table = table_for("binary", 20, seed=7)
    for name, bad, words in (
        ("a", table.drop(columns="income").assign(incom=1), "column 'income' is missing. Did you mean 'incom'?"),
        ("b", table.drop(columns="binary"), "column 'binary' is missing"),
        ("c", table.assign(binary="middle"), "row 1, column 'binary': 'middle' is not a class of the training rows"),
        ("d", table.assign(age="old"), "row 1, column 'age': 'old'"),
        ("e", table.assign(binary=None), "target 'binary' has no value in any row"),
    ):
        bad.to_csv(tmp_path / f"{name}.csv", index=False)
        with pytest.raises(UserError, match=f"{name}.csv: ") as error:
            load_splits(table_config(runs, tmp_path / f"{name}.csv"), 0)
        assert words in str(error.value) and "\n" not in str(error.value)
    Log(str(tmp_path / "empty.db")).close()
    with pytest.raises(UserError, match="none of its records has a true target yet"):
        load_splits(table_config(runs, tmp_path / "empty.db"), 0)
    assert_refused(command("train.py", "--add", tmp_path / "none.db"), "--add", "none.db: no such file")


# ---------------------------------------------------------------- a new checkpoint


def changed(checkpoint, path, *, losses=0.0, records="", data=""):
    """Write a copy of a checkpoint whose test records had other losses, or were others."""
    pipeline = Pipeline.load(checkpoint)
    pipeline.test |= {"losses": [loss + losses for loss in pipeline.test["losses"]]}
    pipeline.test |= {"records": records or pipeline.test["records"]}
    pipeline.config["data"]["data"] = data or pipeline.config["data"]["data"]
    pipeline.threads += 7  # another file, even if nothing else differs
    pipeline.save(path)


def inverted(checkpoint, path, **options):
    """Write a model that predicts the opposite of another one."""
    changed(checkpoint, path, **options)
    pipeline = Pipeline.load(path)
    for parameter in pipeline.model.head.parameters():
        parameter.data.neg_()
    pipeline.save(path)


def test_the_checkpoint_keeps_what_later_models_are_compared_with(runs, tmp_path):
    """Also when a complete run is resumed; a checkpoint of older code has none."""
    for kind, run in runs.items():
        kept = Pipeline.load(run.out / "best.pt").test
        losses, predictions = np.array(kept["losses"]), run.predictions
        assert kept["count"] == len(losses) == len(predictions)
        if kind == "regression":
            assert np.sqrt(losses.mean()) == pytest.approx(run.test["rmse"], rel=1e-4)
        else:
            p = [row[f"probability_{row['target']}"] for _, row in predictions.iterrows()]
            assert losses == pytest.approx(-np.log(p), rel=1e-4)
        assert {"accuracy", "rmse"} & kept["metrics"].keys() and "loss" not in kept["metrics"]
    folder = shutil.copytree(runs["binary"].out, tmp_path / "run")
    before = Pipeline.load(folder / "best.pt").test
    data = table_config(runs)
    quick_run(folder, data=data, epochs=8, resume=str(folder / "last.pt"))
    assert Pipeline.load(folder / "best.pt").test == before
    state = torch.load(folder / "best.pt", weights_only=True)
    torch.save({name: value for name, value in state.items() if name not in ("test", "sha256")}, folder / "old.pt")
    assert Pipeline.load(folder / "old.pt").test == {}


def test_a_worse_model_is_refused_unless_forced(runs, tmp_path):
    best, checkpoint = runs["binary"].out / "best.pt", tmp_path / "best.pt"
    shutil.copy(best, checkpoint)
    with client_of(checkpoint) as client:
        assert client.post("/reload").json()["comparison"] == ""  # the same file
        old = client.get("/health").json()["model"]
        changed(best, checkpoint, losses=0.5)
        refused = client.post("/reload")
        mean = np.mean(Pipeline.load(best).test["losses"])
        assert refused.status_code == 409
        assert f"log-loss {mean + 0.5:.4g} against {mean:.4g}" in refused.json()["detail"]
        assert "accuracy" in refused.json()["detail"] and "36 test records" in refused.json()["detail"]
        assert client.get("/health").json()["model"] == old
        assert client.post("/reload", json={"force": "yes"}).status_code == 422
        forced = client.post("/reload", json={"force": True})
        assert forced.status_code == 200 and "warning: the new model is worse" in forced.json()["comparison"]
        changed(best, checkpoint)
        assert client.post("/reload").json()["comparison"].startswith("not worse than the present model")
        changed(best, checkpoint, losses=0.5, records="others")
        assert "cannot be compared" in client.post("/reload").json()["comparison"]
        changed(best, checkpoint, records="the log", data="requests.db")
        assert "trained on requests.db alone" in client.post("/reload").json()["detail"]


def test_models_of_different_tests_are_compared_on_feedback(runs, tmp_path):
    """Also at the start of the service, with the model that the log used last."""
    best, new, log = runs["binary"].out / "best.pt", tmp_path / "new.pt", tmp_path / "requests.db"
    table = table_for("binary", 40, seed=8)
    records = records_of(table, runs["binary"].pipeline.preprocessor.names)
    log_of(best, records, table["binary"].tolist(), log)
    accuracy = (runs["binary"].pipeline.predict(table)["prediction"] == table["binary"]).mean()
    inverted(best, new, records="others")
    with pytest.raises(UserError, match="is worse") as error:
        Service(str(new), str(log))
    assert f"accuracy {1 - accuracy:.4g} against {accuracy:.4g} on 40 logged records" in str(error.value)
    assert_refused(command("serve.py", "--checkpoint", new, "--log", log, "--port", 0), "is worse", "--force")
    changed(best, new, records="others")
    service = Service(str(new), str(log))
    assert service.comparison.startswith("not worse") and "40 logged records" in service.comparison
    service.close()
    inverted(best, new, records="yet others")
    service = Service(str(new), str(log))  # of the model that was used last there is no feedback
    assert "cannot be compared" in service.comparison and "fewer than 30" in service.comparison
    service.close()
    service = Service(str(best), str(log), force=True)
    service.close()
    Service(str(new), str(log), force=True).close()
    assert Log(str(log)).last_model()[0] == Service(str(new)).model.sha256


def test_equal_models_are_seldom_called_worse_and_worse_ones_found():
    random = np.random.default_rng(0)
    alarms = found = 0
    for _ in range(1000):
        hard = random.exponential(size=60)
        a, b = (-np.log(np.exp(-hard * random.lognormal(0, 0.4, 60)).clip(1e-6)) for _ in range(2))
        alarms += is_worse(a, b)
        found += is_worse(a + 0.5, b)
    assert alarms <= 70 and found > 950


# ---------------------------------------------------------------- feedback and metrics


def test_feedback_for_some_records(runs, tmp_path):
    """The others stay unknown. Feedback that is sent again replaces what was sent before."""
    best, names = runs["binary"].out / "best.pt", runs["binary"].pipeline.preprocessor.names
    records = records_of(table_for("binary", 4, seed=9), names)
    with client_of(best, tmp_path / "requests.db") as client:
        sent = client.post("/predict", json={"records": records}).json()
        said = [prediction["prediction"] for prediction in sent["predictions"]]
        wrong = {"high": "low", "low": "high"}[said[3]]
        for targets, live in (
            ([said[0], None, said[2], wrong], {"targets": 3, "accuracy": pytest.approx(2 / 3)}),
            ([None, None, None, wrong], {"targets": 1, "accuracy": 0}),
            ([said[0], None, None, said[3]], {"targets": 2, "accuracy": 1}),
        ):
            assert client.post("/feedback", json={"id": sent["id"], "targets": targets}).status_code == 200
            health = client.get("/health").json()["live"]
            assert {name: health[name] for name in live} == live
            metrics = client.get("/metrics").text
            assert f"live_targets {live['targets']}.0" in metrics
            score = metrics.partition('live_score{metric="accuracy"} ')[2].split()[0]
            assert float(score) == live["accuracy"]
        refused = client.post("/feedback", json={"id": sent["id"], "targets": [None, None, None, "odd"]})
        assert refused.status_code == 422 and refused.json()["detail"].startswith("row 4: 'odd' is not a class")


def test_the_live_score_is_of_the_newest_feedback(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.log.RECENT", 3)
    best, record = runs["regression"].out / "best.pt", Pipeline.load(runs["regression"].out / "best.pt").examples[0]
    for restarted in (False, True):
        with client_of(best, tmp_path / "requests.db") as client:
            if not restarted:
                sent = client.post("/predict", json={"records": [record] * 5}).json()
                said = sent["predictions"][0]["prediction"]
                targets = [said + error for error in (100, 100, 1, 2, 3)]
                client.post("/feedback", json={"id": sent["id"], "targets": targets})
            metrics = client.get("/metrics").text
        assert "live_targets 3.0" in metrics
        assert float(metrics.partition('live_score{metric="mae"} ')[2].split()[0]) == pytest.approx(2)


def test_metrics_tell_which_column_has_drifted(runs):
    best, names = runs["binary"].out / "best.pt", runs["binary"].pipeline.preprocessor.names
    records = records_of(table_for("binary", 200, seed=10).assign(age=88), names)
    with client_of(best) as client:
        client.post("/predict", json={"records": records})
        metrics = client.get("/metrics").text
    assert 'drift_detected{column="age"} 1.0' in metrics and 'drift_detected{column="member"} 0.0' in metrics
    assert "drift_records 200.0" in metrics and "live_score{" not in metrics


# ---------------------------------------------------------------- privacy


def test_no_training_record_is_in_a_checkpoint_without_examples(tmp_path):
    """Its self-check has made-up rows, which still find a model that computes something else."""
    table = mixed_table(tmp_path, 60).drop(columns=["multiclass", "regression"])
    table["photo"] = [str(tmp_path / path) for path in table["photo"]]
    run = RunConfig(out=str(tmp_path / "run"), report=False, examples=False)
    data = DataConfig(target="binary", columns=("photo=image", "title=text", "note=text"))
    train(data, training=TrainConfig(epochs=1), run=run, table=table)
    pipeline = Pipeline.load(tmp_path / "run" / "best.pt")
    assert len(pipeline.examples) == 16
    content = (tmp_path / "run" / "best.pt").read_bytes()
    assert not [text for name in ("title", "note") for text in table[name] if text.encode() in content]
    real = pipeline.preprocessor.examples(table, 60)
    for name in ("photo", "title", "note", "price"):
        cells = [record[name] for record in pipeline.examples]
        assert len(set(cells)) > 3 and not {record[name] for record in real} & set(cells)
    assert {record["city"] for record in pipeline.examples} == {"Seoul", "Paris", "Köln"}
    with torch.no_grad():
        for parameter in pipeline.model.parameters():
            parameter.mul_(1.1)
    with pytest.raises(UserError, match="self-check row"):
        pipeline._self_check(
            torch.load(tmp_path / "run" / "best.pt", weights_only=True)["self_check"]["predictions"], "x"
        )


def test_without_the_key_health_says_no_more_than_ready(runs):
    with client_of(runs["binary"].out / "best.pt", key="k") as client:
        for value in ({}, {"Authorization": "Bearer wrong"}):
            assert client.get("/health", headers=value).json() == {"status": "ready"}
        assert client.get("/health", headers={"Authorization": "Bearer k"}).json()["target"] == "binary"
    with client_of(runs["binary"].out / "best.pt") as client:
        assert client.get("/health").json()["target"] == "binary"
