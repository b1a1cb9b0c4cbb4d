"""The search of tune.py: what is tried for each flag, trials on the validation split, and the study that keeps them."""

import contextlib
import inspect
import io
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import optuna

from config import Config, Search
from errors import UserError
from evaluation.calibration import calibrate
from evaluation.comparison import compare_means, compare_models, record_losses
from model import build_model, network_class
from pipeline import Pipeline
from trainer import Trainer, seed_weights

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STEPS = 20  # at which trials are compared while they run: shares of their epochs
STARTUP, WARMUP = 6, 5  # trials that are never pruned, and steps of a trial before it can be
SHARE = 50.0  # percent of the trials, at a step, that a trial must be among
FEWEST_EPOCHS = 4


@dataclass(frozen=True)
class Data:
    """What all trials share: records, encoded once, and the pipeline of the default flags."""

    pipeline: Pipeline
    loaders: tuple
    config: Config
    epochs: int  # planned for the default flags


class TrialTrainer(Trainer):
    """A trainer that reports each epoch to a trial, and stops if the trial is hopeless."""

    trial: optuna.Trial | None = None

    def _end_epoch(self, train_loss: float, val: dict[str, float], started: float) -> None:
        super()._end_epoch(train_loss, val, started)
        step = STEPS * self.epoch // self.config.epochs
        if self.trial is None or step == STEPS * (self.epoch - 1) // self.config.epochs:
            return
        self.trial.report(val[self.config.monitor], step)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def planned_epochs(self, loaders: tuple) -> int:
        with self._session(*loaders[:2]):
            return self.config.epochs


def prepare(pipeline: Pipeline, loaders: tuple, config: Config) -> Data:
    """Plan the epochs of the default flags for records that `train.assemble` has encoded."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = TrialTrainer(pipeline, config.training, replace(config.run, out=""))
        return Data(pipeline, loaders, config, trainer.planned_epochs(loaders))


# ---------------------------------------------------------------- the search space


def search_space(data: Data, fixed: set[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return what is tried for each flag that the networks read and that is not `fixed`."""
    networks = [network_class(name) for name in data.pipeline.model_spec["names"]]
    read = set().union(*(inspect.signature(network.__init__).parameters for network in networks))
    space = {}
    for group in (data.config.model, data.config.training):
        for name, hint in get_type_hints(type(group), include_extras=True).items():
            search = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Search)), None)
            if search is None or name in fixed or (group is data.config.model and name not in read):
                continue
            if name == "hidden" and (len(networks) > 1 or not hasattr(networks[0], "HIDDEN")):
                continue
            space[name] = _distribution(search, name, data)
    return space


def _distribution(search: Search, name: str, data: Data) -> optuna.distributions.BaseDistribution:
    if search.choices:
        return optuna.distributions.CategoricalDistribution(search.choices)
    if name == "epochs":  # fewer than planned: noisy data are learned by heart in many
        least = min(FEWEST_EPOCHS, data.epochs)
        return optuna.distributions.IntDistribution(least, data.epochs, log=True)
    return optuna.distributions.FloatDistribution(search.low, search.high, log=search.log)


def default_params(data: Data, space: dict) -> dict:
    """Return the point of the search space that stands for the default flags."""
    values = {"hidden": 1.0, "epochs": data.epochs, "dropout": data.pipeline.model_spec["args"].get("dropout", 0.0)}
    flags = data.config.to_dict()
    flags = flags["model"] | flags["training"] | values
    return {name: flags[name] for name in space}


def with_params(data: Data, params: dict) -> Config:
    """Return the flags of a trial."""
    values = {
        name: float(f"{value:.3g}") if isinstance(value, float) and name != "hidden" else value
        for name, value in params.items()
    }
    if "hidden" in values:
        own = network_class(data.pipeline.model_spec["names"][0]).HIDDEN
        values["hidden"] = () if values["hidden"] == 1 else tuple(round(width * values["hidden"]) for width in own)
    config = data.config
    model, training = (
        replace(group, **{name: value for name, value in values.items() if hasattr(group, name)})
        for group in (config.model, config.training)
    )
    return replace(config, model=model, training=training)


# ---------------------------------------------------------------- a trial


def run_trial(data: Data, config: Config, trial: optuna.Trial | None = None) -> tuple[float, np.ndarray]:
    """Train with the flags of a trial; return (value, losses (N,)) on the validation split, lower is better.

    The value is the mean loss of calibrated predictions, or of another --monitor, negative if higher is better.
    Raises TrialPruned for a hopeless trial, and UserError if a loss is not finite.
    """
    spec, task = data.pipeline.model_spec, data.pipeline.task
    flags = {"hidden": list(config.model.hidden), "activation": config.model.activation}
    flags |= {} if config.model.dropout == -1 else {"dropout": config.model.dropout}
    seed_weights(config.training.seed)
    model = build_model(spec["names"], spec["args"] | flags)
    for name, network in zip(spec["names"], getattr(model, "networks", [model]), strict=True):
        if hasattr(network, "start_from"):
            network.start_from(name.partition(":")[2], spec["args"].get("max_length", 0))
    pipeline = Pipeline(model, task, data.pipeline.preprocessor, model_spec=spec)
    trainer = TrialTrainer(pipeline, config.training, replace(config.run, out="", resume=""))
    trainer.trial = trial
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # epochs, and their bar
        trainer.fit(*data.loaders[:2])
    logits, targets = trainer.logits(data.loaders[1])
    task = calibrate(task, logits, targets, config.training.monitor)
    losses = record_losses(task, task.activate(logits).numpy(), task.decode(targets).numpy())
    if config.training.monitor == "loss":
        return float(losses.mean()), losses
    value = task.evaluate(logits, targets)[config.training.monitor]
    return (-value if trainer.higher_is_better else value), losses


# ---------------------------------------------------------------- the study


def open_study(out: Path, storage: str, flags: dict, space: dict) -> optuna.Study:
    """Create or open the study in a folder, or in a database that several machines share.

    flags, space: what all trials have in common. Raises UserError if the study was made with others.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if storage:
            backend = optuna.storages.RDBStorage(storage)
        else:
            journal = optuna.storages.journal.JournalFileBackend(str(out / "study.log"))
            backend = optuna.storages.JournalStorage(journal)
        study = optuna.create_study(
            study_name=out.name,
            storage=backend,
            sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=8),
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


class Worker:
    """A process that works on a study. A file that it locks says that it is alive."""

    def __init__(self, out: Path):
        self.name, self.folder = f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}", out / "workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / self.name, "w")  # open as long as the process
        if fcntl:
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def close(self) -> None:
        self.file.close()
        (self.folder / self.name).unlink(missing_ok=True)

    def is_dead(self, name: str) -> bool:
        """Return whether a worker of this host has ended, whatever it was doing."""
        if name == self.name or not name.startswith(f"{socket.gethostname()}-") or not fcntl:
            return False
        try:
            with open(self.folder / name) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        (self.folder / name).unlink(missing_ok=True)
        return True


def restart_lost_trials(study: optuna.Study, worker: Worker) -> None:
    """Let trials of processes that were killed be tried again."""
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        if worker.is_dead(trial.user_attrs.get("worker", "")):
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process was faster
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(trial.params)


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
    restart_lost_trials(study, worker)
    default = default_params(data, space)
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(default)
    study.sampler.reseed_rng()
    while not _is_over(study, trials, deadline, final):
        trial = study.ask(space)
        trial.set_user_attr("worker", worker.name)
        try:
            value, _ = run_trial(data, with_params(data, trial.params), trial)
            study.tell(trial, value)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except UserError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if trial.params == default:
                raise
        except BaseException:  # interrupted: the setting is tried again when the search continues
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
            raise
        _print_progress(study, trial.number, data, trials, deadline)


def _is_over(study: optuna.Study, trials: int, deadline: float, final: int) -> bool:
    running = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING])
    done = finished(study)
    if trials and len(done) + len(running) >= trials:
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


def describe(data: Data, params: dict) -> str:
    """Return the flags of a trial that differ from the fixed ones, as a person writes them."""
    from evaluation.report import as_flag

    config, flags = with_params(data, params), []
    for group in (config.model, config.training):
        names = [field.name for field in fields(group) if field.name in params]
        values = {name: getattr(group, name) for name in names}
        flags += [as_flag(name, list(x) if isinstance(x, tuple) else x) for name, x in values.items() if x != ()]
    return " ".join(flags)


# ---------------------------------------------------------------- the winner


def choose_winner(data: Data, ranked: list[dict], default: dict, count: int) -> tuple[dict, list[list], str]:
    """Train the best settings and the default again with another seed; return (the winner, a row [setting, loss, loss
    with the other seed] of each, a sentence about the winner and the default).

    ranked: settings of the trials, the best first. Choosing the best of many by one noisy number flatters it; the
    other seed tells luck with the initial weights from a better setting.
    """
    contenders = [default, *(params for params in ranked if params != default)][:count]
    losses, rows = [], []
    for params in contenders:
        values = []
        for seed in (data.config.training.seed, data.config.training.seed + 1):
            config = with_params(data, params)
            value, of_records = run_trial(data, replace(config, training=replace(config.training, seed=seed)))
            values.append(value)
            losses.append(of_records)
        rows.append([describe(data, params), *values])
    means = [float(np.mean(row[1:])) for row in rows]
    best = int(np.argmin(means))
    if best == 0:
        return default, rows, "No setting is better than the default flags on the validation split."
    both = np.stack([losses[2 * best] + losses[2 * best + 1], losses[0] + losses[1]], axis=1) / 2
    paired = compare_means(both)
    low, high = paired.interval(1, 0)
    sure = "beyond the noise" if low > 0 else "but not beyond the noise"
    what = "mean squared error" if data.pipeline.task.kind == "regression" else "log-loss"
    sentence = (
        f"The best setting is better than the default flags on the validation split, {sure} of its {len(both)} "
        f"records: {what} {paired.values[0]:.4g} against {paired.values[1]:.4g} (difference {low:.2g} to {high:.2g})."
    )
    return contenders[best], rows, sentence


def compare_tests(result, other) -> list[str]:
    """Return sentences that compare the test predictions of two runs, of the winner and of the default flags."""
    if result is other:
        return []
    task, names = result.pipeline.task, ["the winner", "the default flags"]
    targets = task.decode(task.encode(result.predictions["target"])).numpy()
    runs = (result, other)
    values = [run.pipeline.task.from_columns(run.predictions) for run in runs]
    groups = result.predictions["group"].to_numpy() if "group" in result.predictions else None
    found = compare_models([run.pipeline.task for run in runs], values, targets, groups)
    decides, paired = next(iter(found.items()))
    low, high = paired.interval(0, 1)
    said = "worse" if low > 0 else "better" if high < 0 else "the same as far as these rows can tell"
    return [
        f"On the test split, {names[0]} is {said}: {decides} {paired.values[0]:.4g} against {paired.values[1]:.4g} of "
        f"{names[1]} (difference {low:.2g} to {high:.2g}, {len(targets)} rows)."
    ]
