"""A trial: the records that all trials share, and one training whose epochs are reported."""

import contextlib
import io
from dataclasses import dataclass, replace

import numpy as np
import optuna

from config import Config, TrainConfig
from evaluation.comparison import validation_losses
from model import initial_model
from pipeline import Pipeline
from trainer import Trainer

STEPS = 20  # at which trials are compared while they run: shares of their epochs


@dataclass(frozen=True)
class Data:
    """What all trials share: records, encoded once, and the pipeline of the default flags."""

    pipeline: Pipeline
    loaders: tuple
    config: Config
    planned: TrainConfig  # the default flags, with what follows from the network and the records


class TrialTrainer(Trainer):
    """A trainer that reports each epoch to a trial, and stops if the trial is hopeless."""

    trial: optuna.Trial | None = None

    def _end_epoch(self, train_loss: float, val: dict[str, float], started: float) -> None:
        super()._end_epoch(train_loss, val, started)
        step = STEPS * self.epoch // self.config.epochs
        if self.trial is None or step == STEPS * (self.epoch - 1) // self.config.epochs:
            return
        value = val[self.config.monitor]
        self.trial.report(-value if self.higher_is_better else value, step)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def plan(self, loaders: tuple) -> TrainConfig:
        with self._session(*loaders[:2]):
            return self.config


def prepare(pipeline: Pipeline, loaders: tuple, config: Config) -> Data:
    """Plan the epochs of the default flags for records that `train.assemble` has encoded."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = TrialTrainer(pipeline, config.training, replace(config.run, out=""))
        return Data(pipeline, loaders, config, trainer.plan(loaders))


def run_trial(data: Data, config: Config, trial: optuna.Trial | None = None) -> tuple[float, np.ndarray]:
    """Train with the flags of a trial; return (value, losses (N,)) on the validation split, lower is better.

    The value is the log-loss of calibrated predictions, or the root mean squared error; or another --monitor, negative
    if higher is better.
    Raises TrialPruned for a hopeless trial, and UserError if a loss is not finite.
    """
    spec, task = data.pipeline.model_spec, data.pipeline.task
    flags = {"hidden": list(config.model.hidden), "activation": config.model.activation}
    flags |= {} if config.model.dropout == -1 else {"dropout": config.model.dropout}
    model = initial_model(spec["names"], spec["args"] | flags, config.training.seed)
    pipeline = Pipeline(model, task, data.pipeline.preprocessor, model_spec=spec)
    trainer = TrialTrainer(pipeline, config.training, replace(config.run, out="", resume=""))
    trainer.trial = trial
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # epochs, and their bar
        trainer.fit(*data.loaders[:2])
    losses = validation_losses(trainer, data.loaders[1])
    if config.training.monitor == "loss":
        return float(losses.mean()) ** (0.5 if task.kind == "regression" else 1.0), losses
    value = trainer.evaluate(data.loaders[1])[config.training.monitor]
    return (-value if trainer.higher_is_better else value), losses
