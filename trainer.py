"""Training: optimizers, learning rate schedules, the loop, early stopping, interruption and resume."""

import copy
import itertools
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from backbones.pretrained import cache_features, parameter_groups
from config import RunConfig, TrainConfig
from errors import UserError
from progress import Progress
from scaling.device import SUM_DTYPES, be_deterministic, mixed_precision, move, threads_per_process
from scaling.interruption import Interruption
from scaling.processes import count, from_main, gather, is_main, part, sync_batch_norm, total_in_place, total_of
from scaling.randomness import generator_state, seed_all, seed_batch, set_generator_state
from sources.disk import release_memory

# With fewer multiply-adds per step, distributing work over threads costs more than it saves
# (measured with `python benchmarks/training_speed.py --threads`).
ALL_THREADS_FROM = 300e6
PLANNED_EPOCHS = (8, 60)  # at least and at most; in between as many as PLANNED_WORK pays for
PLANNED_WORK = 1.3e12  # floating point operations of all forward passes in training, unless the network has its own
SAVE_SECONDS = 1.0  # between saves: short epochs share one, so a kill loses at most this much work
SAVE_SHARE = 0.03  # for large weights, save less often: at most this share of the time
SAVE_SECONDS_IN_EPOCH = 120.0  # long epochs are saved in between as well
CYCLE_END = 0.8  # share of the epochs of OneCycleLR after which one can be the best
CHECK_EVERY = 100  # batches between two looks at the loss on an accelerator: each look waits for the device


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the torch optimizer that `config` names, fused (one kernel for all weights) where torch has it."""
    optimizer = getattr(torch.optim, config.optimizer)
    options = {"momentum": config.momentum} if config.optimizer == "SGD" else {}
    if config.optimizer != "RMSprop":
        options["fused"] = True
    return optimizer(parameter_groups(model, config.lr), weight_decay=config.weight_decay, **options)


def build_lr_scheduler(optimizer, config: TrainConfig, steps_per_epoch: int, higher_is_better: bool = False):
    """Return the torch scheduler that `config` names, or None. It starts after the warm-up.

    OneCycleLR steps after every batch and has its own warm-up, as long as --warmup (30 % if that is 0). All others
    step at the end of an epoch.
    """
    epochs = config.epochs - config.warmup
    gamma = config.gamma or (0.95 if config.scheduler == "ExponentialLR" else 0.1)
    schedulers = torch.optim.lr_scheduler
    match config.scheduler:
        case "none":
            return None
        case "LambdaLR":
            return schedulers.LambdaLR(optimizer, lambda epoch: 1 / (1 + gamma * epoch))
        case "StepLR":
            return schedulers.StepLR(optimizer, config.step_size, gamma)
        case "MultiStepLR":
            milestones = config.milestones or {max(1, config.epochs // 2), max(1, config.epochs * 3 // 4)}
            after_warmup = [m - config.warmup for m in milestones if m > config.warmup]
            return schedulers.MultiStepLR(optimizer, sorted(after_warmup), gamma)
        case "ExponentialLR":
            return schedulers.ExponentialLR(optimizer, gamma)
        case "CosineAnnealingLR":
            return schedulers.CosineAnnealingLR(optimizer, epochs, config.min_lr)
        case "ReduceLROnPlateau":
            mode = "max" if higher_is_better else "min"
            return schedulers.ReduceLROnPlateau(optimizer, mode, gamma, config.lr_patience, min_lr=config.min_lr)
        case "OneCycleLR":
            rise = config.warmup / config.epochs or 0.3
            peaks = [group["lr"] for group in optimizer.param_groups]
            return schedulers.OneCycleLR(optimizer, peaks, config.epochs * steps_per_epoch, pct_start=rise)
    raise ValueError(f"unknown scheduler {config.scheduler!r}")


class Trainer:
    """Fit a pipeline's model on a train loader, and choose the best epoch on a validation loader.

    `pipeline.model` can be any nn.Module that returns logits (N, task.out_features). Loaders yield (inputs, targets):
    inputs are what `pipeline.forward` takes, targets what `task.encode` returns. If `run.out` is set, best.pt,
    last.pt, history.csv and TensorBoard events are written there.

    Under torchrun each process computes its part of each batch (see scaling/processes.py). Losses, gradients and
    metrics are computed over all parts, so that every process takes the same steps and decisions.
    """

    def __init__(self, pipeline, config: TrainConfig, run: RunConfig | None = None):
        run = run or RunConfig()
        self.pipeline, self.task = pipeline, pipeline.task
        self.model = pipeline.to(run.device).model
        self.config = config = config.settled(getattr(self.model, "RECIPE", {}))
        self.device = pipeline.device
        self.higher_is_better = self.task.higher_is_better(config.monitor)
        self.optimizer = build_optimizer(self.model, config)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.out = Path(run.out) if run.out and is_main() else None
        self.threads, self.compiles = run.threads, run.compile  # 0 threads = chosen in `fit`
        self.processes = count()
        if run.deterministic:
            be_deterministic()

        self.started = time.monotonic()  # from here on --time-budget counts
        self.batches = 0  # of an epoch, planned in `fit`
        self.epoch = 0  # finished epochs
        self.steps = 0  # optimizer steps, over all epochs
        self.next_batch = 0  # first batch after the last step of this epoch: where a resumed run continues
        self.samples = 0  # records of this epoch so far, and the sum of their losses
        self.loss_sum = torch.zeros((), device=self.device, dtype=SUM_DTYPES.get(self.device.type, torch.float64))
        self.history: list[dict] = []
        self.best = {"epoch": 0, "value": -math.inf if self.higher_is_better else math.inf, "state_dict": None}

        self.autocast, self.scaler = mixed_precision(self.device, config.amp)
        # A CPU checks every loss before the step. An accelerator would have to wait for it: there the fused optimizer
        # skips all steps from the first loss that is not finite on, and the host checks now and then.
        self.check_every = 1 if self.device.type == "cpu" or config.optimizer == "RMSprop" else CHECK_EVERY
        self.finite_batches = torch.zeros((), device=self.device, dtype=torch.int64)  # of this epoch
        self.interruption = Interruption(self.device)
        self._resume_state: dict | None = None
        self._generator: dict | None = None  # random state to restore within an epoch
        self._saved_at, self._save_took, self._saved_best = 0.0, 0.0, 0  # seconds, seconds, the epoch in best.pt

    # ------------------------------------------------------------ the loop

    def fit(self, train_loader: DataLoader, val_loader: DataLoader) -> pd.DataFrame:
        """Train until the last epoch, or until `patience` epochs brought no improvement. Load the best weights.

        Returns the history, a row per epoch. Raises UserError if a loss is not finite, and KeyboardInterrupt after
        Ctrl-C or SIGTERM, when everything is saved.
        """
        with self._session(train_loader, val_loader):
            while self.epoch < self.config.epochs and not self.out_of_patience():
                started = time.perf_counter()
                train_loss = self.train_epoch(train_loader)
                val = self.evaluate(val_loader)
                self._end_epoch(train_loss, val, started)
            self._save()
        self.model.load_state_dict(self.best["state_dict"])
        return pd.DataFrame(self.history)

    def train_epoch(self, loader: DataLoader) -> float:
        """Go through the training records once, from `next_batch` on. Return their mean loss."""
        self.model.train()
        self.optimizer.zero_grad()
        seed_all(self.config.seed, self.epoch)
        batches, last, accumulated_samples = itertools.islice(loader, self.batches), self.batches - 1, 0
        for _ in range(self.next_batch):  # resumed within an epoch: the same order, the same random state
            next(batches)
        if self._generator:
            set_generator_state(self._generator, self.device)
            self._generator = None
        self.finite_batches.fill_(self.next_batch)
        for batch, (inputs, targets) in enumerate(batches, start=self.next_batch):
            self.batch = batch
            seed_batch(self.config.seed, self.epoch, batch)
            accumulated_samples += len(targets)
            is_step = (batch + 1) % self.config.accumulate == 0 or batch == last
            self.step(inputs, targets, accumulated_samples if is_step else 0)
            if is_step:
                accumulated_samples, self.next_batch = 0, batch + 1
                self._between_steps()
        self._stop_if_not_finite()
        return self.loss_sum.item() / self.samples

    def step(self, inputs: Tensor | dict[str, Tensor], targets: Tensor, accumulated_samples: int) -> None:
        """Add the gradients of a batch. Unless `accumulated_samples` is 0, update the weights with their mean.

        With several processes, inputs are the part of this one, and targets belong to the whole batch.
        """
        self.samples += len(targets)
        targets = move(part(targets), self.device)
        with self.autocast:
            logits = self.pipeline.forward(inputs, training=True)
        loss = self.task.loss(logits.float(), targets) if len(targets) else logits.float().sum()  # 0, with gradients
        if self.config.accumulate == 1 and count() == 1:
            self.scaler.scale(loss).backward()
        else:  # summed over records: the gradients are divided by their number, over all batches and processes
            self.scaler.scale(loss * len(targets)).backward()
        self.loss_sum += self.interruption.total(loss.detach() * len(targets))
        self._check_loss()
        if not accumulated_samples:
            return
        if self.config.accumulate > 1 or count() > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            total_in_place(gradients)
            torch._foreach_div_(gradients, float(accumulated_samples))
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if self.steps < self.warmup_steps:
            self._warm_up(self.steps + 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.config.scheduler == "OneCycleLR":
            self.lr_scheduler.step()

    def _warm_up(self, step: int) -> None:
        """Set the learning rates of a step of the warm-up, counted from 1."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * (step / self.warmup_steps)

    def evaluate(self, loader: DataLoader) -> dict[str, float]:
        """Return loss and metrics over all records of a loader, computed once from all logits."""
        return from_main(self.task.evaluate, *self.logits(loader))

    def logits(self, loader: DataLoader) -> tuple[Tensor, Tensor]:
        """Return logits (N, out_features) and targets (N,) of all records, in the loader's order, on the CPU."""
        self.model.eval()
        logits, targets = [], []
        with torch.inference_mode():
            for inputs, batch_targets in loader:
                logits.append(gather(self.pipeline.forward(inputs), len(batch_targets)))
                targets.append(batch_targets)
                self._stop_if_interrupted()
            return torch.cat(logits).cpu(), torch.cat(targets).cpu()

    # ------------------------------------------------------------ between steps and epochs

    def _between_steps(self) -> None:
        self._stop_if_interrupted()
        now = time.monotonic()
        if self.out and now - self._saved_at > SAVE_SECONDS_IN_EPOCH:
            self._save()
        if self.progress.is_due(now):
            self.progress.show(now, self.epoch, self.samples, self.loss_sum.item() / self.samples)

    def _end_epoch(self, train_loss: float, val: dict[str, float], started: float) -> None:
        """Compare with the best epoch, step the schedule, save, and record the row of the history."""
        if not math.isfinite(val["loss"]):
            raise self._diverged(f"in validation after epoch {self.epoch + 1}")
        if math.isnan(val[self.config.monitor]):
            raise UserError(
                f"--monitor {self.config.monitor} is not defined on this validation split (one class, or one row): "
                "choose another, such as loss."
            )
        lr, samples, value = self.optimizer.param_groups[0]["lr"], self.samples, val[self.config.monitor]
        self.epoch, self.next_batch, self.samples = self.epoch + 1, 0, 0
        self.loss_sum.zero_()
        # A cycle ends with small steps: weights of before are noisy, and one of them is the best by luck alone.
        ends_cycle = self.config.scheduler == "OneCycleLR" and self.epoch == round(CYCLE_END * self.config.epochs)
        if (value > self.best["value"] if self.higher_is_better else value < self.best["value"]) or ends_cycle:
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch, "value": value, "state_dict": weights}
        self._step_scheduler(self.epoch, value)
        row = {"epoch": self.epoch, "lr": lr, "seconds": 0.0, "samples_per_second": 0.0, "train/loss": train_loss}
        row |= {f"val/{name}": number for name, number in val.items()}
        self.history.append(row)
        _set_time(row, started, samples)
        if not self._saved_best or time.monotonic() - self._saved_at > max(SAVE_SECONDS, self._save_took / SAVE_SHARE):
            self._save()
            _set_time(row, started, samples)  # last.pt has the time before its own writing, history.csv all of it
        self.progress.end_epoch(row)

    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.epoch - self.best["epoch"]

    def _step_scheduler(self, epoch: int, value: float) -> None:
        """Step a schedule that moves by the epoch, after `epoch` finished epochs including the warm-up."""
        if self.lr_scheduler and self.config.scheduler != "OneCycleLR" and epoch > self.config.warmup:
            self.lr_scheduler.step(*([value] if self.config.scheduler == "ReduceLROnPlateau" else []))

    # ------------------------------------------------------------ losses that are not finite

    def _check_loss(self) -> None:
        """Before a step: if a loss was not finite, stop (on a CPU) or skip the step (on an accelerator)."""
        if self.check_every > 1:
            finite = torch.isfinite(self.loss_sum)  # stays false until the end of the epoch
            self.finite_batches += finite
            self.optimizer.found_inf = (~finite).float()
        if (self.batch + 1) % self.check_every == 0:
            self._stop_if_not_finite()
            self.interruption.look()

    def _stop_if_not_finite(self) -> None:
        if not math.isfinite(self.loss_sum.item()):
            batch = self.batch if self.check_every == 1 else int(self.finite_batches)
            raise self._diverged(f"in epoch {self.epoch + 1}, batch {batch + 1}")

    def _diverged(self, where: str) -> UserError:
        return UserError(
            f"the loss is not finite {where}. Earlier saves are intact. Try a lower --lr (now {self.config.lr:g}), "
            "--clip-norm 1, or --scaling quantile."
        )

    # ------------------------------------------------------------ before and after

    @contextmanager
    def _session(self, loader: DataLoader, val_loader: DataLoader) -> Iterator[None]:
        """Set up threads, plan, schedule, signals, files and progress bar for as long as the loop runs."""
        threads, work = torch.get_num_threads(), self._count_work(loader)
        if self.device.type == "cpu":
            saved = self._resume_state["threads"] if self._resume_state else 0
            self.threads = self.threads or saved or (threads_per_process() if work >= ALL_THREADS_FROM else 1)
            torch.set_num_threads(self.threads)
        self.pipeline.threads = self.threads
        datasets = [loader.dataset, val_loader.dataset]
        if cache_features(self.model, datasets, self.pipeline.preprocessor, self.device):
            work = self._count_work(loader)
        self._set_up_network(datasets)
        release_memory()
        self._plan(work, loader, val_loader)
        steps_per_epoch = math.ceil(self.batches / self.config.accumulate)
        self.warmup_steps = 0 if self.config.scheduler == "OneCycleLR" else self.config.warmup * steps_per_epoch
        self.lr_scheduler = build_lr_scheduler(self.optimizer, self.config, steps_per_epoch, self.higher_is_better)
        if self._resume_state:
            self._restore(self._resume_state)
            if self.epoch >= self.config.epochs or self.out_of_patience():
                print(f"nothing left to train after epoch {self.epoch}: to continue, raise --epochs or --patience")
        options = {"epochs": self.config.epochs, "monitor": self.config.monitor, "history": self.history}
        self.progress = Progress(self.out, records=len(loader.dataset) * self.batches // len(loader), **options)
        self._saved_at = time.monotonic()
        try:
            with self.interruption.watch():
                yield
        finally:
            self.progress.close()
            torch.set_num_threads(threads)

    def _count_work(self, loader: DataLoader) -> int:
        """Return the floating point operations of a batch's forward pass, which decide about threads and epochs.

        They are counted, not timed: a choice by a noisy clock would make two runs with the same seed differ.
        """
        from torch.utils.flop_counter import FlopCounterMode

        inputs, _ = next(iter(loader))
        self.model.eval()
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            self.pipeline.forward(inputs)
        return total_of(counter.get_total_flops())

    def _set_up_network(self, datasets: list) -> None:
        """Prepare the network and the records for this device and these processes."""
        sync_batch_norm(self.model)
        if self.compiles:
            self.model.compile(dynamic=True)  # in place, so that weights keep their names
        for dataset in datasets:
            if hasattr(dataset, "keep_on"):
                dataset.keep_on(self.device)

    def _plan(self, work: int, loader: DataLoader, val_loader: DataLoader) -> None:
        """Decide about epochs and batches per epoch: by --epochs, by the work, or by the speed and --time-budget.

        A resumed run keeps the plan of the run that it continues, unless --epochs is given.
        """
        config, (least, most) = self.config, PLANNED_EPOCHS
        epochs, self.batches = config.epochs, len(loader)
        if plan := (self._resume_state or {}).get("plan"):
            self.batches = plan["batches"] if config.time_budget else self.batches
            epochs = plan["epochs"] if epochs == -1 else epochs
        elif config.time_budget:
            a_batch, an_evaluation = self._measure(loader, val_loader)
            left = 0.97 * config.time_budget - (time.monotonic() - self.started)
            most = epochs if epochs != -1 else most
            epochs = min(most, max(1, int(left / (a_batch * self.batches + an_evaluation))))
            if epochs < min(least, most):  # shorter epochs, so that the schedule and the choice of the best have steps
                epochs = min(least, most)
                self.batches = min(self.batches, max(1, int((left / epochs - an_evaluation) / a_batch)))
        elif epochs == -1:
            planned_work = getattr(self.model, "PLANNED_WORK", PLANNED_WORK)
            epochs = min(most, max(least, int(planned_work / (work * self.batches))))
        epochs, self.batches = from_main(lambda: (epochs, self.batches))  # speed differs between processes
        self.config = replace(config, epochs=max(epochs, config.warmup + 1))
        if config.epochs == -1 and not self.history:
            share = "" if self.batches == len(loader) else f" of {self.batches} of {len(loader)} batches"
            print(f"plan: at most {self.config.epochs} epochs{share}", flush=True)

    def _measure(self, loader: DataLoader, val_loader: DataLoader) -> tuple[float, float]:
        """Return the seconds of a batch in training, and of an evaluation. The trainer is then as before."""
        weights = copy.deepcopy(self.model.state_dict())
        started = time.monotonic()
        self.evaluate(val_loader)
        an_evaluation, times = time.monotonic() - started, []
        self.model.train()
        self.warmup_steps, self.lr_scheduler, self.batch = 0, None, 0
        for inputs, targets in itertools.islice(itertools.cycle(loader), 100):
            started = time.monotonic()
            self.step(inputs, targets, len(targets))
            times.append(time.monotonic() - started)
            if from_main(lambda: sum(times) > 0.08 * self.config.time_budget):
                break
        self.model.load_state_dict(weights)
        self.optimizer = build_optimizer(self.model, self.config)
        self.steps = self.samples = 0
        self.loss_sum.zero_()
        return float(np.median(times)), an_evaluation

    def _stop_if_interrupted(self) -> None:
        if not (name := self.interruption.take()):
            return
        if not self.out:
            raise KeyboardInterrupt(f"{name} in epoch {self.epoch + 1}")
        self._save()
        continue_with = f"python train.py --resume {self.out / 'last.pt'}"
        raise KeyboardInterrupt(f"{name}: saved in epoch {self.epoch + 1}. Continue with: {continue_with}")

    # ------------------------------------------------------------ files

    def _save(self) -> None:
        """Write last.pt, which also holds the best weights, and best.pt, if a better epoch is not in it yet.

        In this order: whenever there is a best.pt, there is a last.pt to resume from.
        """
        if not self.out:
            return
        started = time.monotonic()
        self._stop_if_not_finite()
        training = {
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "steps": self.steps,
            "samples": self.samples,
            "loss_sum": self.loss_sum.item(),
            "generator": generator_state(self.device),
            "scaler": self.scaler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "flags": {name: getattr(self.config, name) for name in ("optimizer", "monitor", "accumulate")},
            "batches": self.batches,
            "plan": {"epochs": self.config.epochs, "batches": self.batches},
            "threads": self.threads,
            "history": self.history,
            "best": self.best,
        }
        self.pipeline.save(self.out / "last.pt", training=training)
        if self._saved_best != self.best["epoch"]:
            self.pipeline.save(self.out / "best.pt", state_dict=self.best["state_dict"])
            self._saved_best = self.best["epoch"]
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - started

    def resume(self, training: dict) -> None:
        """Continue, at the next `fit`, from the `training` part of a last.pt whose weights the model has.

        Raises UserError if it belongs to another optimizer or monitor, whose state cannot be used.
        """
        for name in ("optimizer", "monitor"):
            given, saved = getattr(self.config, name), training["flags"][name]
            if given != saved:
                raise UserError(f"--{name} {given}: the run was started with {saved}. Keep it, or start a new run.")
        self._resume_state = training

    def _restore(self, state: dict) -> None:
        """Restore a saved state and replay the schedule with the current flags."""
        same_batches = state["flags"]["accumulate"] == self.config.accumulate and state["batches"] == self.batches
        if state["next_batch"] and not same_batches:
            raise UserError(
                "--batch-size and --accumulate cannot change in the middle of an epoch, which is where this run "
                "stopped: resume without them."
            )
        if len(state["optimizer"]["param_groups"]) != len(self.optimizer.param_groups):
            raise UserError("the run was started by an older version, which trained this network differently.")
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        self.epoch, self.next_batch, self.steps = state["epoch"], state["next_batch"], state["steps"]
        self.samples, self.history, self.best = state["samples"], list(state["history"]), state["best"]
        self.loss_sum.fill_(state["loss_sum"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self._generator = state["generator"] if self.next_batch else None
        if 0 < self.steps <= self.warmup_steps:  # the rate of the last step: of a whole epoch, none may be left
            self._warm_up(self.steps)
        with warnings.catch_warnings():  # torch warns that the scheduler steps before the optimizer
            warnings.simplefilter("ignore")
            if self.config.scheduler == "OneCycleLR" and self.steps:
                self.lr_scheduler.last_epoch = self.steps - 1  # its rate is a function of the step alone
                self.lr_scheduler.step()
            for row in self.history:
                self._step_scheduler(row["epoch"], row[f"val/{self.config.monitor}"])
        self._resume_state = None


def _set_time(row: dict, started: float, samples: int) -> None:
    row["seconds"] = time.perf_counter() - started
    row["samples_per_second"] = samples / row["seconds"]
