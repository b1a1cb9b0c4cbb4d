"""A run that is killed or interrupted at any moment and resumed ends with the weights of an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT, TARGETS, assert_refused, command, file_size_limit, quick_run, table_for
from forks import Popen

import trainer as trainer_module
from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from errors import UserError
from evaluation import run_folder
from evaluation.run_folder import open_run_folder
from train import resume_config, train
from trainer import Trainer

# Saves within epochs as often as long runs do in minutes, and slows the steps down so that signals arrive within them.
DRIVER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train, console, trainer
trainer.SAVE_SECONDS = trainer.SAVE_SECONDS_IN_EPOCH = 0.1
for name, pause in (("step", 0.004), ("evaluate", 0.02)):
    def slow(self, *args, method=getattr(trainer.Trainer, name), pause=pause):
        time.sleep(pause)
        return method(self, *args)
    setattr(trainer.Trainer, name, slow)
console.run(train.main)
"""


TABLE = table_for("binary").drop(columns=["since", "remark"])  # quick to prepare; test_pipeline.py resumes all kinds


def start(*args) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Popen(["-c", DRIVER, *args], **pipes)


def wait_for(path, process, after: int = 0) -> int:
    """Wait until the process has written a file, later than `after`; return the time at which it did."""
    until, written = time.monotonic() + 60, after
    while written == after and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
        written = path.stat().st_mtime_ns if path.exists() else after
    return written


def fingerprint(folder) -> str:
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics["weights_sha256"], metrics["test"], metrics["epochs"], metrics["best_epoch"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "table.csv"
    table_for("binary", rows=300).to_csv(path, index=False)
    return path


FLAGS = {
    "plateau": ["--batch-size", 16],
    "cycle": ["--batch-size", 16, "--scheduler", "OneCycleLR", "--accumulate", 3, "--optimizer", "SGD"],
    "warm": ["--batch-size", 32, "--warmup", 3, "--scheduler", "CosineAnnealingLR", "--clip-norm", 1],
}


@pytest.mark.parametrize("name", FLAGS)
def test_kill_9_at_any_moment(tmp_path, table, name):
    flags = ["--data", table, "--target", "binary", "--epochs", 12, "--patience", 0, "--dropout", 0.3, *FLAGS[name]]
    whole = start(*flags, "--out", tmp_path / "whole")
    killed = start(*flags, "--out", tmp_path / "killed")
    moments, last, saved, ended = random.Random(name), tmp_path / "killed" / "last.pt", 0, []
    for _ in range(3):
        wait_for(last, killed, saved)
        time.sleep(moments.uniform(0.0, 0.3))
        killed.kill()
        killed.communicate()
        ended.append(killed.returncode)
        saved = last.stat().st_mtime_ns
        killed = start("--resume", last)
    assert ended[0] == -signal.SIGKILL
    for process in (whole, killed):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "killed")
    rows = [(tmp_path / run / "history.csv").read_text().splitlines() for run in ("whole", "killed")]
    assert len(rows[0]) == len(rows[1]) == 13
    for one, other in zip(*rows, strict=True):  # all but the seconds and their quotient
        assert one.split(",")[:2] + one.split(",")[4:] == other.split(",")[:2] + other.split(",")[4:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_and_exits_130(tmp_path, table, number):
    flags = ["--data", table, "--target", "binary", "--epochs", 40, "--patience", 0, "--batch-size", 16]
    flags += ["--scheduler", "ReduceLROnPlateau"]  # which, unlike a cosine, does not depend on --epochs
    process = start(*flags, "--out", tmp_path / "run")
    wait_for(tmp_path / "run" / "history.csv", process)
    time.sleep(0.3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {tmp_path / 'run' / 'last.pt'}" in error.decode() and error.count(b"\n") == 1
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["training"]
    assert state["epoch"] + state["next_batch"] > 0 and state["epoch"] < 40
    result = command("train.py", "--resume", tmp_path / "run" / "last.pt", "--epochs", 12)
    assert result.returncode == 0, result.stderr.decode()
    result = command("train.py", *flags, "--epochs", 12, "--out", tmp_path / "whole", fork=False)  # other hash seed
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def interrupted_run(folder, where: str, at: int, monkeypatch, table=TABLE, data=None, **options):
    """Train until call `at` of Trainer's method `where`, interrupt there, and resume in a new Trainer."""
    calls = 0
    method = getattr(Trainer, where)

    def interrupting(self, *args):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGINT)
        return method(self, *args)

    monkeypatch.setattr(Trainer, where, interrupting)
    data = data or DataConfig(target="binary", batch_size=16)
    with pytest.raises(KeyboardInterrupt):
        quick_run(folder, table, data=data, **options)
    monkeypatch.setattr(Trainer, where, method)
    config = resume_config(str(folder / "last.pt"))
    return train(config.data, config.model, config.training, config.run, table=table)


@pytest.mark.parametrize(
    ("where", "at"), [("step", 1), ("step", 7), ("step", 11), ("step", 25), ("evaluate", 1), ("evaluate", 3)]
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_interrupted_in_an_epoch_or_in_validation(tmp_path, monkeypatch, where, at, accumulate):
    resumed = interrupted_run(tmp_path / "a", where, at, monkeypatch, epochs=4, accumulate=accumulate)
    whole = quick_run(
        tmp_path / "b", TABLE, data=DataConfig(target="binary", batch_size=16), epochs=4, accumulate=accumulate
    )
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    columns = [c for c in whole.history if "second" not in c]
    assert whole.history[columns].equals(resumed.history[columns])


@pytest.mark.parametrize(
    "scheduler", ["LambdaLR", "StepLR", "MultiStepLR", "ExponentialLR", "ReduceLROnPlateau", "none"]
)
def test_every_scheduler_continues_where_it_was(tmp_path, monkeypatch, scheduler):
    options = {"epochs": 6, "scheduler": scheduler, "step_size": 2, "lr_patience": 1, "lr": 0.03, "patience": 0}
    resumed = interrupted_run(tmp_path / "a", "step", 35, monkeypatch, **options)
    data = DataConfig(target="binary", batch_size=16)
    whole = quick_run(tmp_path / "b", TABLE, data=data, **options)
    assert resumed.history["lr"].tolist() == whole.history["lr"].tolist()
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_the_generator_state_is_restored(tmp_path, monkeypatch):
    """The tests above can fail: without the saved state, dropout has other draws and the weights differ."""
    monkeypatch.setattr(trainer_module, "set_generator_state", lambda states, device: torch.manual_seed(1))
    interrupted_run(tmp_path / "a", "step", 7, monkeypatch, epochs=2)
    quick_run(tmp_path / "b", TABLE, data=DataConfig(target="binary", batch_size=16), epochs=2)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_given_flags_win(tmp_path, table):
    flags = ["--data", table, "--target", "binary", "--epochs", 2, "--out", tmp_path / "run", "--scheduler", "none"]
    assert command("train.py", *flags).returncode == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    result = command("train.py", "--resume", moved / "last.pt", "--epochs", 4, "--lr", 0.0005)
    assert result.returncode == 0, result.stderr.decode()
    history = [line.split(",") for line in (moved / "history.csv").read_text().splitlines()]
    assert [row[1] for row in history[1:]] == ["0.003", "0.003", "0.0005", "0.0005"]
    config = json.loads((moved / "metrics.json").read_text())["config"]
    assert config["training"]["epochs"] == 4 and config["data"]["target"] == "binary"


@pytest.mark.parametrize("scheduler", ["CosineAnnealingLR", "StepLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_given_flags_change_the_whole_schedule(tmp_path, scheduler):
    """After --resume --epochs 8 --lr …, a run has the learning rates of a run that had these flags from the start."""
    options = {"scheduler": scheduler, "step_size": 3, "patience": 0}
    quick_run(tmp_path / "a", TABLE, epochs=4, **options)
    config = resume_config(str(tmp_path / "a" / "last.pt"))
    longer = replace(config.training, epochs=8, lr=0.02)
    resumed = train(config.data, config.model, longer, config.run, table=TABLE)
    whole = quick_run(tmp_path / "b", TABLE, epochs=8, lr=0.02, **options)
    assert resumed.history["lr"][4:].tolist() == whole.history["lr"][4:].tolist()


def test_batches_do_not_change_inside_an_epoch(tmp_path, monkeypatch):
    """The place to continue from is counted in batches."""
    monkeypatch.setattr(Trainer, "_between_steps", lambda self: self._stop_if_interrupted())
    method = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *a: (os.kill(os.getpid(), signal.SIGINT), method(self, *a)))
    with pytest.raises(KeyboardInterrupt):
        quick_run(tmp_path / "a", TABLE)
    config = resume_config(str(tmp_path / "a" / "last.pt"))
    with pytest.raises(UserError, match="--batch-size and --accumulate cannot change in the middle"):
        small = replace(config.data, batch_size=100)
        train(small, config.model, config.training, config.run, table=TABLE)


def test_a_finished_run_resumes_to_the_same(tmp_path, table):
    flags = ["--data", table, "--target", "binary", "--epochs", 2, "--out", tmp_path / "run"]
    assert command("train.py", *flags).returncode == 0
    files = {name: (tmp_path / "run" / name).read_bytes() for name in ("metrics.json", "test_predictions.csv")}
    done = command("train.py", "--resume", tmp_path / "run" / "last.pt")
    assert done.returncode == 0 and b"stays as it is: the test split was evaluated before" in done.stdout
    for name, content in files.items():
        assert (tmp_path / "run" / name).read_bytes() == content


@pytest.mark.parametrize("kind", TARGETS)
def test_the_test_split_is_evaluated_once_when_the_run_is_complete(tmp_path, monkeypatch, kind):
    """Interrupted: never. Resumed: at the end. Finished: only if weights, test records or files have changed."""
    table, times = table_for(kind), []
    evaluate = run_folder.evaluate_test
    monkeypatch.setattr(run_folder, "evaluate_test", lambda *args: times.append(1) or evaluate(*args))
    out, data = tmp_path / "run", DataConfig(target=kind, batch_size=16)
    method = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda self, *a: (os.kill(os.getpid(), signal.SIGINT), method(self, *a)))
    with pytest.raises(KeyboardInterrupt):
        quick_run(out, table, data=data)
    monkeypatch.setattr(Trainer, "evaluate", method)
    assert not times and not (out / "metrics.json").exists() and not (out / "test_predictions.csv").exists()

    def resume(table=table, **training):
        config = resume_config(str(out / "last.pt"))
        return train(config.data, config.model, replace(config.training, **training), config.run, table=table)

    first, again = resume(), resume()
    assert len(times) == 1 and first.test == again.test and first.diagnosis == again.diagnosis
    pd.testing.assert_frame_equal(first.predictions, again.predictions, check_dtype=False)
    assert len(resume(epochs=4).history) == 4 and len(times) == 2
    for name in ("metrics.json", "test_predictions.csv"):
        (out / name).unlink()  # killed between the last save and the test
        resume()
        assert (out / name).exists()
    assert len(times) == 4
    (out / "test_predictions.csv").write_text("")
    resume()
    assert len(times) == 5


def test_a_checkpoint_of_another_run_is_refused(tmp_path, table):
    flags = ["--data", table, "--target", "binary", "--epochs", 1, "--out", tmp_path / "run"]
    assert command("train.py", *flags).returncode == 0
    last = tmp_path / "run" / "last.pt"
    assert_refused(command("train.py", "--resume", last, "--hidden", 7), "the network", "start a new run")
    assert_refused(command("train.py", "--resume", last, "--seed", 5), "rows", "start a new run")
    assert_refused(command("train.py", "--resume", last, "--optimizer", "SGD"), "--optimizer SGD", "Adam")
    assert_refused(command("train.py", "--resume", last, "--monitor", "f1"), "--monitor f1", "loss")
    assert_refused(command("train.py", "--resume", tmp_path / "run" / "best.pt"), "no training state")
    assert_refused(command("train.py", "--resume", tmp_path / "no.pt"), "no such checkpoint")
    assert_refused(command("train.py", *flags), "already holds a run", "--resume")
    assert fingerprint(tmp_path / "run")


def test_resume_in_a_notebook_needs_the_table(tmp_path):
    quick_run(tmp_path / "run", TABLE)
    config = resume_config(str(tmp_path / "run" / "last.pt"))
    with pytest.raises(UserError, match="used a DataFrame: resume it in Python"):
        train(config.data, config.model, config.training, config.run)
    assert len(train(config.data, config.model, config.training, config.run, table=TABLE).history) == 3


def test_short_epochs_share_a_save_and_long_ones_are_saved_in_between(tmp_path, monkeypatch):
    saved = []
    save = Trainer._save
    monkeypatch.setattr(Trainer, "_save", lambda self: (saved.append((self.epoch, self.next_batch)), save(self)))
    quick_run(tmp_path / "short", TABLE, epochs=6)
    assert len(saved) < 6
    saved.clear()
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS_IN_EPOCH", 0.0)
    quick_run(tmp_path / "long", TABLE, epochs=1, model=ModelConfig(hidden=(4,)))
    assert (0, 1) in saved and (0, 2) in saved


def test_saving_within_an_epoch_changes_nothing(tmp_path, monkeypatch):
    quick_run(tmp_path / "a", TABLE)
    monkeypatch.setattr(trainer_module, "SAVE_SECONDS_IN_EPOCH", 0.0)
    quick_run(tmp_path / "b", TABLE)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_defaults_of_the_configuration_survive_the_checkpoint(tmp_path):
    quick_run(tmp_path / "run", TABLE)
    config = resume_config(str(tmp_path / "run" / "last.pt"))
    assert config.training == TrainConfig(epochs=3)
    run = RunConfig(threads=1, out=str(tmp_path / "run"), resume=str(tmp_path / "run" / "last.pt"), report=False)
    assert config.run == run
    assert config.model == ModelConfig(hidden=(16,)) and config.data == DataConfig(
        data="(a DataFrame)", target="binary"
    )


def test_two_runs_never_write_to_the_same_folder(tmp_path):
    out = tmp_path / "new" / "run"
    with open_run_folder(RunConfig(out=str(out)), "table"), pytest.raises(UserError, match="another run is writing"):
        quick_run(out, TABLE)
    assert list(out.iterdir()) == []
    quick_run(out, TABLE)  # the lock has gone with the block
    with pytest.raises(UserError), open_run_folder(RunConfig(out=str(tmp_path / "x" / "y")), "table"):
        raise UserError("a failed start leaves nothing behind, whatever it created")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_killed_before_any_file_is_complete(tmp_path, monkeypatch):
    """In every state in which kill -9 can leave the folder, the run starts anew or resumes, to the same weights."""
    replace_file, moments = os.replace, []

    def copying(temporary, path):
        if str(path).startswith(str(tmp_path / "whole")):
            moments.append(tmp_path / f"killed-{len(moments)}")
            shutil.copytree(tmp_path / "whole", moments[-1])
        replace_file(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", copying)
        quick_run(tmp_path / "whole", TABLE, epochs=2)
    assert len(moments) >= 5
    for folder in (*moments[:3], moments[-1]):
        assert any(path.name.startswith(".") for path in folder.iterdir())
        if (folder / "last.pt").exists():
            with pytest.raises(UserError, match=f"--resume {folder / 'last.pt'}"):
                quick_run(folder, TABLE, epochs=2)
            config = resume_config(str(folder / "last.pt"))
            train(config.data, config.model, config.training, config.run, table=TABLE)
        else:
            quick_run(folder, TABLE, epochs=2)
        assert fingerprint(folder) == fingerprint(tmp_path / "whole")
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_full_disk_costs_no_earlier_save(tmp_path, capsys):
    quick_run(tmp_path / "run", TABLE)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    config = resume_config(str(tmp_path / "run" / "last.pt"))
    with file_size_limit(5000), pytest.raises(UserError, match=r"last\.pt: cannot be written \(File too large\)"):
        train(config.data, config.model, replace(config.training, epochs=5), config.run, table=TABLE)
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")} == before
    assert not list((tmp_path / "run").glob(".*"))
    with file_size_limit(100), pytest.raises(UserError, match=r"--out .*cannot be written to"):
        train(config.data, config.model, replace(config.training, epochs=5), config.run, table=TABLE)
    resumed = train(config.data, config.model, replace(config.training, epochs=5), config.run, table=TABLE)
    assert len(resumed.history) == 5


def test_a_run_that_was_saved_after_the_last_step_of_an_epoch_keeps_its_learning_rate(tmp_path, monkeypatch):
    """In the warm-up the rate is set before a step, and there is none left in this epoch."""
    whole = quick_run(tmp_path / "whole", table_for("binary"), warmup=2)
    monkeypatch.setattr("trainer.SAVE_SECONDS_IN_EPOCH", -1.0)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):

        def stop(self, loader):
            raise InterruptedError

        patch.setattr("trainer.Trainer.evaluate", stop)
        quick_run(tmp_path / "killed", table_for("binary"), warmup=2)
    killed = quick_run(tmp_path / "killed", table_for("binary"), warmup=2, resume=str(tmp_path / "killed" / "last.pt"))
    assert killed.history["lr"].tolist() == whole.history["lr"].tolist()
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "killed")
