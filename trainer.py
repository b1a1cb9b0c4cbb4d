"""The loop: optimizers, schedulers, epochs, early stopping, interruption and resuming."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config import TrainConfig
from errors import UserError
from journal import Journal

# Below this many multiply-adds a step, handing work to other threads costs more than it saves
# (measured with `python benchmarks/training_speed.py --threads`).
ALL_THREADS_FROM = 500e6
SAVE_SECONDS = 1.0  # short epochs share a save: a kill costs no more than this much work,
SAVE_SHARE = 0.03  # or, where weights are large, than it takes for saving to be this share of the time
SAVE_SECONDS_IN_EPOCH = 120.0  # long epochs are saved half-way too
SUM_DTYPES = {"mps": torch.float32}  # of sums of losses, where there is no float64
CHECK_EVERY = 100  # steps between two looks at the loss on an accelerator, which would have to wait for each


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the torch optimizer that `config` names, fused (one kernel for all weights) where torch has it."""
    optimizer = getattr(torch.optim, config.optimizer)
    options = {"momentum": config.momentum} if config.optimizer == "SGD" else {}
    if config.optimizer != "RMSprop":
        options["fused"] = True
    return optimizer(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, **options)


def build_lr_scheduler(optimizer, config: TrainConfig, steps_per_epoch: int, higher_is_better: bool = False):
    """Return the torch scheduler that `config` names, or None. It begins after the warm-up.

    OneCycleLR moves at every step and has a warm-up of its own, as long as --warmup (30 % where that is 0);
    all others move at the end of an epoch.
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
            return schedulers.OneCycleLR(optimizer, config.lr, config.epochs * steps_per_epoch, pct_start=rise)
    raise ValueError(f"no scheduler is called {config.scheduler!r}")


def seed_all(seed: int, epoch: int) -> None:
    """Make all that is random in an epoch (order, dropout, augmentation) follow from (seed, epoch)."""
    # torch's CPU generator takes 32 bits only: the two are mixed into them
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def _generator_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state(device)
    return states


def _set_generator_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type], device)


class Trainer:
    """Fit a pipeline's model to a train loader, choosing the best epoch on a validation loader.

    `pipeline.model` may be any nn.Module with x → logits (N, task.out_features); loaders give (inputs, targets),
    targets as `task.encode` returns them. With `config.out` set, best.pt, last.pt, history.csv and TensorBoard
    events are written there.
    """

    def __init__(self, pipeline, config: TrainConfig):
        self.pipeline, self.task, self.config = pipeline, pipeline.task, config
        self.model = pipeline.to(config.device).model
        self.device = pipeline.device
        self.higher_is_better = self.task.higher_is_better(config.monitor)
        self.optimizer = build_optimizer(self.model, config)
        self.out = Path(config.out) if config.out else None
        self.threads = config.threads  # 0 until `fit` has chosen

        self.epoch = 0  # epochs done
        self.steps = 0  # of the optimizer, in all epochs
        self.position = 0  # batches done in the present epoch, up to the last step
        self.samples = 0  # records seen in the present epoch, and the sum of their losses
        self.loss_sum = torch.zeros((), device=self.device, dtype=SUM_DTYPES.get(self.device.type, torch.float64))
        self.history: list[dict] = []
        self.best = {"epoch": 0, "value": -math.inf if self.higher_is_better else math.inf, "state_dict": None}

        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if config.amp else nullcontext()
        # A CPU looks at each loss before it follows it. An accelerator would have to wait: its fused optimizer skips
        # the steps from the first loss that is not finite on, and the host looks now and then.
        self.check_every = 1 if self.device.type == "cpu" or config.optimizer == "RMSprop" else CHECK_EVERY
        self.finite_batches = torch.zeros((), device=self.device, dtype=torch.int64)  # of the present epoch
        self._interrupted = ""  # name of the signal
        self._resumed: dict | None = None  # what to go on from
        self._generator: dict | None = None  # state to go on from, inside an epoch
        self._saved_at, self._save_took, self._saved_best = 0.0, 0.0, 0  # seconds, and the epoch that best.pt has

    # ------------------------------------------------------------ the loop

    def fit(self, train_loader: DataLoader, val_loader: DataLoader) -> list[dict]:
        """Train until the last epoch, or until `patience` epochs brought nothing; leave the best weights in the model.

        Returns the history, a dict per epoch. Raises UserError where a loss is not finite, and KeyboardInterrupt
        after Ctrl-C or SIGTERM, once everything is saved.
        """
        with self._prepared(train_loader):
            while self.epoch < self.config.epochs and not self.out_of_patience():
                started = time.perf_counter()
                train_loss = self.train_epoch(train_loader)
                val = self.evaluate(val_loader)
                self._end_epoch(train_loss, val, started)
            self._save()
        self.model.load_state_dict(self.best["state_dict"])
        return self.history

    def train_epoch(self, loader: DataLoader) -> float:
        """Go once over the training records, from `position` on; return their mean loss."""
        self.model.train()
        self.optimizer.zero_grad()
        seed_all(self.config.seed, self.epoch)
        batches, last, window = iter(loader), len(loader) - 1, 0
        for _ in range(self.position):  # going on inside an epoch: the same order, and the same draws from there on
            next(batches)
        if self._generator:
            _set_generator_state(self._generator, self.device)
            self._generator = None
        self.finite_batches.fill_(self.position)
        for batch, (inputs, targets) in enumerate(batches, start=self.position):
            self.batch = batch
            window += len(targets)  # records since the last step
            full = (batch + 1) % self.config.accumulate == 0 or batch == last
            self.step(inputs, targets, window if full else 0)
            if full:
                window, self.position = 0, batch + 1
                self._between_steps()
        self._stop_if_not_finite()
        return self.loss_sum.item() / self.samples

    def step(self, inputs: Tensor, targets: Tensor, window: int) -> None:
        """Learn from one batch: add its gradients and, where `window` (records in it) is not 0, move the weights."""
        inputs, targets = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        with self.autocast:
            logits = self.model(inputs)
        loss = self.task.loss(logits.float(), targets)
        self.loss_sum += loss.detach() * len(targets)
        self.samples += len(targets)
        self._check_loss()
        if self.config.accumulate == 1:
            loss.backward()
        else:
            (loss * len(targets)).backward()  # a sum over records: the window's size is known only at its end
        if not window:
            return
        if self.config.accumulate > 1:
            torch._foreach_div_([p.grad for p in self.model.parameters() if p.grad is not None], float(window))
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if self.steps < self.warmup_steps:
            self._set_lr(self.config.lr * (self.steps + 1) / self.warmup_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.config.scheduler == "OneCycleLR":
            self.lr_scheduler.step()

    def evaluate(self, loader: DataLoader) -> dict[str, float]:
        """Return loss and metrics over all records of a loader, measured once on all logits together."""
        return self.task.measure(*self.logits(loader))

    def logits(self, loader: DataLoader) -> tuple[Tensor, Tensor]:
        """Return logits (N, out_features) and targets (N,) of all records of a loader, in its order, on the CPU."""
        self.model.eval()
        logits, targets = [], []
        with torch.inference_mode():
            for inputs, batch_targets in loader:
                logits.append(self.model(inputs.to(self.device, non_blocking=True)))
                targets.append(batch_targets)
                self._stop_if_interrupted()
            return torch.cat(logits).cpu(), torch.cat(targets).cpu()

    # ------------------------------------------------------------ between steps and epochs

    def _between_steps(self) -> None:
        self._stop_if_interrupted()
        now = time.monotonic()
        if self.out and now - self._saved_at > SAVE_SECONDS_IN_EPOCH:
            self._save()
        if self.journal.is_due(now):
            self.journal.show(now, self.epoch, self.samples, self.loss_sum.item() / self.samples)

    def _end_epoch(self, train_loss: float, val: dict[str, float], started: float) -> None:
        """Judge the epoch, move the learning rate, save, and write the row of the history."""
        if not math.isfinite(val["loss"]):
            raise self._diverged(f"in validation after epoch {self.epoch + 1}")
        if math.isnan(val[self.config.monitor]):
            raise UserError(
                f"--monitor {self.config.monitor} is not defined on this validation split (one class, or one row): "
                "give another, such as loss."
            )
        lr, samples, value = self.optimizer.param_groups[0]["lr"], self.samples, val[self.config.monitor]
        self.epoch, self.position, self.samples = self.epoch + 1, 0, 0
        self.loss_sum.zero_()
        if value > self.best["value"] if self.higher_is_better else value < self.best["value"]:
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch, "value": value, "state_dict": weights}
        self._step_scheduler(self.epoch, value)
        row = {"epoch": self.epoch, "lr": lr, "seconds": 0.0, "samples_per_second": 0.0, "train/loss": train_loss}
        row |= {f"val/{name}": number for name, number in val.items()}
        self.history.append(row)
        _clock(row, started, samples)
        if not self._saved_best or time.monotonic() - self._saved_at > max(SAVE_SECONDS, self._save_took / SAVE_SHARE):
            self._save()
            _clock(row, started, samples)  # last.pt has the time up to its own writing, history.csv all of it
        self.journal.end_epoch(row)

    def out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.epoch - self.best["epoch"]

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    # ------------------------------------------------------------ losses that are not finite

    def _check_loss(self) -> None:
        """Before a step: stop (on a CPU), or hold the weights still (elsewhere), if a loss was not finite."""
        if self.check_every > 1:
            finite = torch.isfinite(self.loss_sum)  # once it is not, it never is again
            self.finite_batches += finite
            self.optimizer.found_inf = (~finite).float()
        if (self.batch + 1) % self.check_every == 0:
            self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        if not math.isfinite(self.loss_sum.item()):
            batch = self.batch if self.check_every == 1 else int(self.finite_batches)
            raise self._diverged(f"in epoch {self.epoch + 1}, batch {batch + 1}")

    def _diverged(self, where: str) -> UserError:
        return UserError(
            f"the loss is not finite {where}. What was saved before is untouched. Try a lower --lr (now "
            f"{self.config.lr:g}), --clip-norm 1, or --scaling quantile."
        )

    # ------------------------------------------------------------ before and after

    @contextmanager
    def _prepared(self, loader: DataLoader) -> Iterator[None]:
        """Have schedule, threads, signals, files and progress bar ready for as long as the loop runs."""
        self.batches = len(loader)
        steps_per_epoch = math.ceil(self.batches / self.config.accumulate)
        self.warmup_steps = 0 if self.config.scheduler == "OneCycleLR" else self.config.warmup * steps_per_epoch
        self.lr_scheduler = build_lr_scheduler(self.optimizer, self.config, steps_per_epoch, self.higher_is_better)
        if self._resumed:
            self._restore(self._resumed)
            if self.epoch >= self.config.epochs or self.out_of_patience():
                print(f"nothing left to train after epoch {self.epoch}: raise --epochs, or --patience, to go on")
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            self.threads = self.threads or self._choose_threads(loader, threads)
            torch.set_num_threads(self.threads)
        records, monitor = len(loader.dataset), self.config.monitor
        self.journal = Journal(
            self.out, epochs=self.config.epochs, records=records, monitor=monitor, history=self.history
        )
        self._saved_at = time.monotonic()
        handlers = self._catch_signals()
        try:
            yield
        finally:
            self.journal.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_num_threads(threads)
            self._interrupted = ""  # one that came in the last save is late: the run is done

    def _choose_threads(self, loader: DataLoader, available: int) -> int:
        """One thread for small networks, all for large ones, by the multiply-adds of a step.

        Counted, not timed: another number of threads adds up in another order, and a choice by a noisy clock would
        make two runs of the same seed differ.
        """
        from torch.utils.flop_counter import FlopCounterMode

        inputs = next(iter(loader))[0].to(self.device)
        self.model.eval()
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            self.model(inputs)
        return available if counter.get_total_flops() >= ALL_THREADS_FROM else 1

    def _catch_signals(self) -> dict:
        """Note Ctrl-C and SIGTERM for the loop to act on; the second one acts at once. Returns the old handlers."""

        def note(number, frame):
            self._interrupted = signal.Signals(number).name
            signal.signal(number, handlers[number])

        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, note)
        return handlers

    def _stop_if_interrupted(self) -> None:
        if not self._interrupted:
            return
        name, self._interrupted = self._interrupted, ""
        if self.out:
            self._save()
            raise KeyboardInterrupt(
                f"{name}: saved in epoch {self.epoch + 1}. Go on with: python train.py --resume {self.out / 'last.pt'}"
            )
        raise KeyboardInterrupt(f"{name} in epoch {self.epoch + 1}")

    # ------------------------------------------------------------ files

    def _save(self) -> None:
        """Write best.pt, if there is a better one, and last.pt, which holds the best weights as well."""
        if not self.out:
            return
        started = time.monotonic()
        self._stop_if_not_finite()
        if self._saved_best != self.best["epoch"]:
            self.pipeline.save(self.out / "best.pt", state_dict=self.best["state_dict"])
            self._saved_best = self.best["epoch"]
        training = {
            "epoch": self.epoch,
            "position": self.position,
            "steps": self.steps,
            "samples": self.samples,
            "loss_sum": self.loss_sum.item(),
            "generator": _generator_state(self.device),
            "optimizer": self.optimizer.state_dict(),
            "flags": {
                "optimizer": self.config.optimizer,
                "monitor": self.config.monitor,
                "accumulate": self.config.accumulate,
                "batches": self.batches,
            },
            "threads": self.threads,
            "history": self.history,
            "best": self.best,
        }
        self.pipeline.save(self.out / "last.pt", training=training)
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - started

    def resume(self, training: dict) -> None:
        """Go on, at the next `fit`, from the `training` part of a last.pt whose weights the model has.

        Raises UserError where it belongs to another optimizer or monitor, which cannot take it over.
        """
        for name in ("optimizer", "monitor"):
            typed, before = getattr(self.config, name), training["flags"][name]
            if typed != before:
                raise UserError(f"--{name} {typed}: the run was begun with {before}. Keep that, or begin a new run.")
        self._resumed = training

    def _restore(self, state: dict) -> None:
        """Take over a saved state. The schedule is gone through again, as the flags are now: typed ones win."""
        batching = {"accumulate": self.config.accumulate, "batches": self.batches}
        if state["position"] and any(state["flags"][name] != now for name, now in batching.items()):
            raise UserError(
                "--batch-size and --accumulate cannot change in the middle of an epoch, which is where this run "
                "stopped: resume without them."
            )
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, typed in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(typed)
        self.epoch, self.position, self.steps = state["epoch"], state["position"], state["steps"]
        self.samples, self.history, self.best = state["samples"], list(state["history"]), state["best"]
        self.loss_sum.fill_(state["loss_sum"])
        self.threads = self.config.threads or state["threads"]
        if self.position:
            self._generator = state["generator"]
        with warnings.catch_warnings():  # of torch, that no step of the optimizer came before
            warnings.simplefilter("ignore")
            if self.config.scheduler == "OneCycleLR" and self.steps:
                self.lr_scheduler.last_epoch = self.steps - 1  # its rate is a function of the step alone
                self.lr_scheduler.step()
            for row in self.history:
                self._step_scheduler(row["epoch"], row[f"val/{self.config.monitor}"])
        self._resumed = None

    def _step_scheduler(self, epoch: int, value: float) -> None:
        """Move the schedules that move by the epoch, once `epoch` epochs are done, the warm-up among them."""
        if self.lr_scheduler and self.config.scheduler != "OneCycleLR" and epoch > self.config.warmup:
            self.lr_scheduler.step(*([value] if self.config.scheduler == "ReduceLROnPlateau" else []))


def _clock(row: dict, started: float, samples: int) -> None:
    row["seconds"] = time.perf_counter() - started
    row["samples_per_second"] = samples / row["seconds"]
