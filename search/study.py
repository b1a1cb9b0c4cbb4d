"""The study of a search: it keeps the trials, and survives the processes that work on them."""

import contextlib
import datetime
import json
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna

from errors import UserError
from search.space import default_params, describe, first_params, with_params
from search.trial import Data, run_trial

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STARTUP, WARMUP = 6, 5  # trials that are never pruned, and steps of a trial before it can be
SHARE = 50.0  # percent of the trials, at a step, that a trial must be among
SIGNING = 5.0  # seconds after which a running trial without a worker is lost


def open_study(out: Path, storage: str, flags: dict, space: dict) -> optuna.Study:
    """Create or open the study in a folder, or in a database that several machines share.

    flags, space: what all trials have in common. Raises UserError if the study was made with others.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if storage:
            backend = optuna.storages.RDBStorage(storage)
        else:
            lock = FileLock(out / "workers" / "study.lock") if fcntl else None
            journal = optuna.storages.journal.JournalFileBackend(str(out / "study.log"), lock_obj=lock)
            backend = optuna.storages.JournalStorage(journal)
        study = optuna.create_study(
            study_name=out.name,
            storage=backend,
            pruner=optuna.pruners.PercentilePruner(SHARE, n_startup_trials=STARTUP, n_warmup_steps=WARMUP),
            load_if_exists=True,
        )
    except (OSError, ImportError) as error:
        raise UserError(f"--storage {storage or out}: the study cannot be opened ({error}).") from None
    common = [flags[name] for name in ("data", "model", "training")]
    text = json.dumps([*common, {name: str(distribution) for name, distribution in space.items()}], sort_keys=True)
    if (known := study.user_attrs.get("flags")) is None:
        study.set_user_attr("flags", text)
    elif known != text:
        raise UserError(f"--out {out}: the study in it has other flags or other data: give another folder.")
    return study


class FileLock:
    """The lock of the study's file. The system releases it when a process is killed; Optuna's own would stay."""

    def __init__(self, path: Path):
        self.path = path

    def acquire(self) -> bool:
        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


class Worker:
    """A process that works on a study. A file that it locks says that it is alive."""

    def __init__(self, out: Path):
        self.host, self.folder = socket.gethostname(), out / "workers"
        self.name = f"{self.host}-{uuid.uuid4().hex[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / self.name, "w")  # open as long as the process
        if fcntl:
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def close(self) -> None:
        self.file.close()
        (self.folder / self.name).unlink(missing_ok=True)

    def is_lost(self, trial: optuna.trial.FrozenTrial, patience: float) -> bool:
        """Return whether the process of a running trial has ended.  patience: seconds for trials of other hosts."""
        name = trial.user_attrs.get("worker", "")
        age = (datetime.datetime.now() - trial.datetime_start).total_seconds()
        if name == self.name:
            return False
        if not name or not fcntl:  # it was killed before it signed the trial
            return age > (SIGNING if fcntl else patience)
        if not name.startswith(f"{self.host}-"):
            return age > patience
        try:
            with open(self.folder / name) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        (self.folder / name).unlink(missing_ok=True)
        return True


def remember_winner(study: optuna.Study, choose: Callable[[], tuple]) -> list:
    """Return the winner that the study remembers, or else the one that `choose` returns: a search that is interrupted
    while the winner is tested must not choose another one, knowing the test."""
    if "winner" not in study.user_attrs:
        study.set_user_attr("winner", choose())
    return study.user_attrs["winner"]


@contextlib.contextmanager
def first_to_finish(out: Path):
    """Yield whether this process is the first to come here: it finishes the search, the others leave it to it."""
    with open(out / "workers" / "finish", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def restart_lost_trials(study: optuna.Study, worker: Worker) -> list[optuna.trial.FrozenTrial]:
    """Let trials of processes that were killed be tried again. Return the trials that are running."""
    seconds = [trial.duration.total_seconds() for trial in best_trials(study)]
    patience, running = max(600.0, 10 * max(seconds, default=0.0)), []
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        if not worker.is_lost(trial, patience):
            running.append(trial)
            continue
        if _tell(study, trial.number, state=optuna.trial.TrialState.FAIL):
            study.enqueue_trial(trial.params)
    return running


def _tell(study: optuna.Study, trial: optuna.Trial | int, value: float | None = None, state=None) -> bool:
    """End a trial; return False if another process has ended it, which took this one for lost."""
    try:
        study.tell(trial, value, state)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # which of them depends on the moment
        return False
    return True


def next_trial(study: optuna.Study, space: dict, trials: int, seed: int) -> optuna.Trial | None:
    """Return a new trial; None if other processes have begun the last of `trials` (0 = no limit) meanwhile.

    The seed and the number of trials so far decide what is drawn, so that a search can be repeated.
    """
    study.sampler = optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, n_startup_trials=10, seed=seed + len(study.get_trials(deepcopy=False))
    )
    trial = study.ask(space)
    running = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
    earlier = len(finished(study)) + sum(other.number < trial.number for other in running)
    if not trials or earlier < trials:
        return trial
    _tell(study, trial, state=optuna.trial.TrialState.FAIL)
    return None


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that came to an end, or were pruned."""
    states = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
    return study.get_trials(deepcopy=False, states=states)


def best_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that came to an end, the best first, each setting once."""
    trials = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    ordered = sorted(trials, key=lambda trial: (trial.value, trial.number))
    return list({json.dumps(trial.params, sort_keys=True): trial for trial in reversed(ordered)}.values())[::-1]


def search(
    data: Data, space: dict, study: optuna.Study, worker: Worker, *, trials: int, deadline: float, final: int
) -> None:
    """Try settings until there are `trials` (0 = no limit), or the time is only enough for `final` more trainings.

    deadline: seconds of `time.time`, or infinity.  Raises UserError if the default flags fail.
    """
    default = default_params(data, space)
    if not study.get_trials(deepcopy=False):
        for params in first_params(data, space):
            study.enqueue_trial(params)
    while "winner" not in study.user_attrs:  # the search is over when the winner is chosen
        running = restart_lost_trials(study, worker)
        if _is_over(study, len(running), trials, deadline, final):
            if not running:
                return
            time.sleep(0.5)  # if another process fails, its trial is tried again
            continue
        trial = next_trial(study, space, trials, data.config.training.seed)
        if trial is None:
            continue
        trial.set_user_attr("worker", worker.name)
        try:
            value, _ = run_trial(data, with_params(data, trial.params), trial)
            _tell(study, trial, value)
        except optuna.TrialPruned:
            _tell(study, trial, state=optuna.trial.TrialState.PRUNED)
        except UserError:
            _tell(study, trial, state=optuna.trial.TrialState.FAIL)
            if trial.params == default:
                raise
        except BaseException:  # interrupted: the setting is tried again when the search continues
            if _tell(study, trial, state=optuna.trial.TrialState.FAIL):
                study.enqueue_trial(trial.params)
            raise
        _print_progress(study, trial.number, data, trials, deadline)


def _is_over(study: optuna.Study, running: int, trials: int, deadline: float, final: int) -> bool:
    if trials and len(finished(study)) + running >= trials:
        return True
    seconds = [trial.duration.total_seconds() for trial in best_trials(study)]
    return bool(seconds) and time.time() + (1 + final) * float(np.median(seconds)) > deadline


def _print_progress(study: optuna.Study, number: int, data: Data, trials: int, deadline: float) -> None:
    trial = study.get_trials(deepcopy=False)[number]
    done, best = finished(study), best_trials(study)
    state = (
        f"{trial.value:.5g}" if trial.value is not None and trial.state.name == "COMPLETE" else trial.state.name.lower()
    )
    left = f"{len(done)} of {trials} trials" if trials else f"{max(0, deadline - time.time()):.0f} s left"
    first = f"best {best[0].value:.5g} (trial {best[0].number}); " if best else ""
    print(f"trial {number:>3}  {state:<8}  {first}{left}  {describe(data, trial.params)}", flush=True)
