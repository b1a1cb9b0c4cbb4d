"""A search compares trials on the validation split, survives kill -9, and its winner is a line of train.py."""

import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import optuna
import pandas as pd
import pytest
from conftest import ROOT, assert_refused, command, table_for

from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from errors import UserError
from search.space import default_params, search_space, with_params
from search.study import Worker, finished, next_trial, open_study, remember_winner, search
from search.trial import prepare, run_trial
from search.winner import choose_winner
from train import assemble
from tune import SearchConfig, TuneConfig, given_flags, tune

QUICK = ("--epochs", "6", "--activation", "relu", "--no-report")


def study_in(out) -> optuna.Study:
    journal = optuna.storages.journal.JournalFileBackend(str(out / "study.log"))
    return optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(journal))


def data_of(table: pd.DataFrame, target: str, **model):
    from dataloader import load_splits

    data = DataConfig(target=target, columns=("text=text", "n=number") if "text" in table else ())
    config = TuneConfig(data, ModelConfig(**model), TrainConfig(), RunConfig(report=False))
    _, pipeline, loaders, _ = assemble(load_splits(config.data, 0, table), config)
    return prepare(pipeline, loaders, config)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search as a user starts it, with two processes."""
    folder = tmp_path_factory.mktemp("search")
    table_for("binary").to_csv(folder / "data.csv", index=False)
    flags = ("--data", folder / "data.csv", "--target", "binary", "--epochs", 6, "--activation", "relu")
    result = command("tune.py", *flags, "--trials", 7, "--jobs", 2, "--out", folder / "run", fork=False)
    assert result.returncode == 0, result.stderr.decode()
    return folder, result.stdout.decode()


def test_the_search_space_is_what_the_networks_read():
    table = table_for("binary")
    space = search_space(data_of(table, "binary"), set())
    assert set(space) == {"hidden", "activation", "dropout", "epochs", "lr", "weight_decay"}
    assert set(search_space(data_of(table, "binary"), {"lr", "hidden"})) == set(space) - {"lr", "hidden"}
    texts = pd.DataFrame({"text": ["good old shoe", "a bad hat"] * 60, "y": ["a", "b"] * 60})
    both = search_space(data_of(texts.assign(n=range(120)), "y", model=("tabm", "transformer")), set())
    assert "hidden" not in both  # one width cannot be right for two networks
    space = search_space(data_of(table, "binary", model=("mlp",)), set())
    data = data_of(table, "binary", model=("mlp",))
    assert with_params(data, default_params(data, space) | {"hidden": 0.5}).model.hidden == (64, 32)


def test_the_default_flags_are_the_first_trial_and_all_trials_count(searched):
    folder, _ = searched
    study = study_in(folder / "run")
    workers = {trial.user_attrs["worker"] for trial in finished(study)}
    assert len(finished(study)) == 7 and 1 <= len(workers) <= 2  # the second process may start late
    first = study.get_trials()[0]
    assert first.params["lr"] == 3e-3 and first.params["weight_decay"] == 3e-4 and first.params["hidden"] == 1.0
    assert "epochs" not in first.params and "activation" not in first.params  # they were given


def test_the_printed_line_trains_the_winner_again(searched, tmp_path):
    folder, output = searched
    line = re.search(r"^python (train\.py .*)$", output, re.MULTILINE)[1]
    assert "--epochs 6" in line
    assert command(*shlex.split(line), "--no-report", "--out", tmp_path / "again").returncode == 0
    found = [json.loads((out / "metrics.json").read_text()) for out in (folder / "run", tmp_path / "again")]
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"] and found[0]["test"] == found[1]["test"]


def test_the_page_needs_nothing_else(searched):
    folder, output = searched
    page = (folder / "run" / "tune.html").read_text()
    assert not re.search(r'(src|href)="(?!#|report.html)|url\((?!#)|@import|<script', page)
    assert "trials were trained to the end" in page and "weight_decay" in page and page.count("<svg") == 2
    assert "validation split" in output and (folder / "run" / "report.html").exists()


def test_the_test_split_decides_nothing(tmp_path):
    """The same search with other targets in the test split has the same trials and the same winner."""
    table = table_for("regression")
    table["part"] = np.arange(len(table))
    changed = table.copy()
    newest = changed["part"] >= 0.85 * len(table)
    changed.loc[newest, "regression"] = 1000 - changed.loc[newest, "regression"]
    lines = []
    for name, each in (("a", table), ("b", changed)):
        data = DataConfig(target="regression", time="part")
        out = RunConfig(out=str(tmp_path / name), report=False)
        run = tune(TuneConfig(data, training=TrainConfig(epochs=3), run=out, search=SearchConfig(trials=4)), table=each)
        lines.append([(trial.params, trial.value) for trial in finished(study_in(tmp_path / name))])
        weights = json.loads((run.out / "metrics.json").read_text())["weights_sha256"]
        lines[-1].append(weights)
    assert lines[0] == lines[1]


def test_a_search_that_was_killed_continues(tmp_path):
    table_for("binary").to_csv(tmp_path / "data.csv", index=False)
    flags = ["--data", str(tmp_path / "data.csv"), "--target", "binary", *QUICK, "--out", str(tmp_path / "run")]
    line = [sys.executable, str(ROOT / "tune.py"), *flags, "--trials", "6"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = iter(process.stdout.readline, "")
    next(line for line in lines if line.startswith("trial   2"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [(trial.number, trial.value) for trial in finished(study_in(tmp_path / "run"))]
    assert 3 <= len(before) < 6
    result = command(*line[1:], fork=False)
    assert result.returncode == 0, result.stderr.decode()
    study = study_in(tmp_path / "run")
    after = [(trial.number, trial.value) for trial in finished(study)]
    assert after[: len(before)] == before and len(after) == 6
    assert not [trial for trial in study.get_trials() if trial.state.name in ("RUNNING", "WAITING")]
    assert_refused(command(*line[1:], "--lr", "0.1"), "has other flags or other data")


def test_hopeless_trials_are_stopped():
    data = data_of(table_for("regression"), "regression")
    study = optuna.create_study(pruner=optuna.pruners.PercentilePruner(50, n_startup_trials=1, n_warmup_steps=5))
    params = default_params(data, search_space(data, set())) | {"epochs": 20}
    run_trial(data, with_params(data, params), good := study.ask())
    study.tell(good, 0.0)
    with pytest.raises(optuna.TrialPruned):
        run_trial(data, with_params(data, params | {"lr": 1e-6}), study.ask())


def test_the_winner_is_better_with_another_seed_too():
    data = data_of(table_for("regression"), "regression")
    space = search_space(data, set())
    default = default_params(data, space) | {"epochs": 12}
    bad = default | {"lr": 1e-5}
    winner, rows, sentence = choose_winner(data, [(bad, 0.0), (default, 0.1)], default, 3)
    assert winner == default and len(rows) == 2 and "No setting is better" in sentence
    rmse = run_trial(data, with_params(data, default))[0]
    winner, rows, sentence = choose_winner(data, [(default, rmse), (bad, 9 * rmse)], bad, 3)
    assert winner == default and "beyond the noise" in sentence and rows[0][1] > rows[1][1]


def test_the_default_is_compared_even_if_its_trial_was_lost():
    data = data_of(table_for("regression"), "regression")
    default = default_params(data, search_space(data, set())) | {"epochs": 12}
    winner, rows, _ = choose_winner(data, [(default | {"lr": 1e-5}, 1e-9)], default, 3)
    assert winner == default and len(rows) == 2 and rows[0][1] > 1


def test_processes_that_begin_at_once_make_no_more_trials_than_asked(tmp_path):
    (tmp_path / "workers").mkdir()
    study = open_study(tmp_path, "", {"data": {}, "model": {}, "training": {}}, {})
    space = {"lr": optuna.distributions.FloatDistribution(1e-4, 1e-2)}
    begun = [next_trial(study, space, 2, 0) for _ in range(3)]
    assert [trial is not None for trial in begun] == [True, True, False]
    study.tell(begun[0], state=optuna.trial.TrialState.FAIL)
    assert next_trial(study, space, 2, 0) is not None  # a lost one is replaced


def test_a_trial_that_was_taken_for_lost_ends_quietly(tmp_path, monkeypatch):
    data = data_of(table_for("regression"), "regression")
    study = optuna.create_study()

    def run_lost(data, config, trial):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # as another host does
        return 1.0, None

    monkeypatch.setattr("search.study.run_trial", run_lost)
    monkeypatch.setattr("search.study._is_over", lambda study, *_: len(study.trials) >= 8)
    monkeypatch.setattr("search.study._print_progress", lambda *_: None)
    worker = Worker(tmp_path)
    search(data, search_space(data, set()), study, worker, trials=0, deadline=1e12, final=0)
    assert {trial.state.name for trial in study.trials} == {"FAIL"}


def test_a_search_can_be_repeated(tmp_path):
    data = data_of(table_for("regression"), "regression")
    space = search_space(data, set())
    drawn = [next_trial(optuna.create_study(), space, 0, seed).params for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_winner_is_chosen_once():
    """A search that ended while the winner was tested, and is started again, may not choose another one."""
    study = optuna.create_study()
    first = remember_winner(study, lambda: ({"lr": 0.1}, [["--lr 0.1", 1.0, 2.0]], "Better."))
    assert first == remember_winner(study, lambda: pytest.fail("chosen again")) == study.user_attrs["winner"]


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_the_reported_values_are_lower_for_better_epochs(monitor):
    data = data_of(table_for("binary"), "binary")
    data = replace(data, config=replace(data.config, training=replace(data.config.training, monitor=monitor)))
    study = optuna.create_study()
    params = default_params(data, search_space(data, set())) | {"epochs": 20}
    value, _ = run_trial(data, with_params(data, params), trial := study.ask())
    reported = list(study.get_trials()[trial.number].intermediate_values.values())
    assert min(reported[10:]) < reported[0] and (value < 0) == (monitor == "accuracy")


def test_wrong_flags_are_refused(tmp_path):
    assert_refused(command("tune.py", "--trials", -1), "--trials")
    assert_refused(command("tune.py", "--folds", 3), "--folds")
    every = ("--hidden", 8, "--activation", "relu", "--dropout", 0, "--epochs", 2, "--lr", 0.01, "--weight-decay", 0)
    assert_refused(command("tune.py", *every, "--out", tmp_path / "x"), "nothing to search")
    assert_refused(command("tune.py", "--data", tmp_path / "no.csv", "--target", "y"), "no.csv")
    assert given_flags(["--lr", "1", "--no-batch-norm", "--weight-decay=0.1"]) == {"lr", "batch_norm", "weight_decay"}


def test_a_study_of_another_search_is_not_used(tmp_path):
    flags = {"data": {"data": "a.csv"}, "model": {}, "training": {}, "run": {}}
    (tmp_path / "workers").mkdir()
    open_study(tmp_path, "", flags, {})
    open_study(tmp_path, "", flags, {})
    with pytest.raises(UserError, match="other flags or other data"):
        open_study(tmp_path, "", flags | {"data": {"data": "b.csv"}}, {})
    assert open_study(tmp_path / "b", f"sqlite:///{tmp_path / 'b.db'}", flags, {}).user_attrs["flags"]
