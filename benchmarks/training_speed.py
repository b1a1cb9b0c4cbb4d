"""Time an epoch of Trainer.fit, of a bare loop, and of the classic DataLoader loop, side by side.

  python benchmarks/training_speed.py              all three on the same work, alternating in the same run
  python benchmarks/training_speed.py --scale      time per row and memory from 10,000 to 1,000,000 rows
  python benchmarks/training_speed.py --threads    one thread against all, by multiply-adds per step

Work: 100,000 rows × 20 numbers, MLP 128-64 with batch norm and dropout, batch 256, Adam, and validation on
20,000 rows after each epoch. Machines are noisy: read the ratios, medians over the rounds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from config import RunConfig, TrainConfig
from dataloader import make_loader
from model import build_model
from pipeline import Pipeline
from task import Task
from trainer import Trainer

BATCH, EVAL_BATCH = 256, 8192


def make_data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 20, generator=generator)
    targets = (inputs[:, :5].sum(dim=1) + torch.randn(rows, generator=generator) > 0).float()
    return inputs, targets


def make_model(hidden=(128, 64)) -> torch.nn.Module:
    torch.manual_seed(0)
    args = {"in_features": 20, "out_features": 1, "hidden": list(hidden), "activation": "relu"}
    return build_model(["mlp"], args | {"batch_norm": True, "dropout": 0.1})


def textbook_model() -> torch.nn.Module:
    """The same network from torch's layers, as people write it by hand."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for width, size in ((20, 128), (128, 64)):
        layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(64, 1))


def bare_loop(train, val, epochs: int, model=None) -> float:
    """Tensors in memory, fused Adam, one validation pass, nothing else."""
    model = model or textbook_model()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    started = time.perf_counter()
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(train[0]))
        for i in range(0, len(order), BATCH):
            rows = order[i : i + BATCH]
            loss = F.binary_cross_entropy_with_logits(model(train[0][rows]).squeeze(1), train[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model(part) for part in val[0].split(EVAL_BATCH)]).squeeze(1)
            F.binary_cross_entropy_with_logits(logits, val[1]).item()
    return (time.perf_counter() - started) / epochs


def classic_loop(train, val, epochs: int) -> float:
    """The loop of most templates: DataLoader(TensorDataset), loss.item(), and metrics updated with each batch."""
    from torchmetrics import MetricCollection
    from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score

    model = textbook_model()
    optimizer = torch.optim.Adam(model.parameters())
    loaders = [DataLoader(TensorDataset(*part), BATCH, shuffle=i == 0) for i, part in enumerate((train, val))]
    metric, total = MetricCollection([BinaryAccuracy(), BinaryAUROC(), BinaryF1Score()]), 0.0
    started = time.perf_counter()
    for _ in range(epochs):
        for loader, training in zip(loaders, (True, False), strict=True):
            model.train(training)
            metric.reset()
            for inputs, targets in loader:
                with torch.set_grad_enabled(training):
                    logits = model(inputs).squeeze(1)
                    loss = F.binary_cross_entropy_with_logits(logits, targets)
                if training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                total += loss.item()
                metric.update(torch.sigmoid(logits), targets.long())
            metric.compute()
    return (time.perf_counter() - started) / epochs


def trainer_fit(train, val, epochs: int, warm: bool = True) -> float:
    """Trainer.fit with everything that it does: metrics, history, TensorBoard, checkpoints on disk."""
    task = Task("binary", "y", [0, 1])
    train, val = (({"numbers": inputs}, targets) for inputs, targets in (train, val))
    loaders = make_loader(*train, BATCH, shuffle=True), make_loader(*val, EVAL_BATCH, shuffle=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config, run = TrainConfig(epochs=epochs, patience=0), RunConfig(threads=1, out=folder)
        trainer = Trainer(Pipeline(make_model(), task), config, run)
        history = trainer.fit(*loaders)
    return history["seconds"].sum() / epochs


def compare(rounds: int, epochs: int) -> None:
    torch.set_num_threads(1)
    train, val = make_data(100_000), make_data(20_000)
    loops = {
        "bare loop": bare_loop,
        "bare loop, our network": lambda *work: bare_loop(*work, make_model()),
        "Trainer.fit": trainer_fit,
        "classic loop": classic_loop,
    }
    for loop in loops.values():  # imports and caches
        loop(make_data(1000), make_data(1000), 1)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            seconds[name].append(loop(train, val, 1 if name == "classic loop" else epochs))
    for name, times in seconds.items():
        print(f"{name:<23} {statistics.median(times):6.3f} s/epoch   {100_000 / statistics.median(times):9,.0f} rows/s")

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    print(f"Trainer.fit / bare loop               {ratio('Trainer.fit', 'bare loop'):.3f}   (at most 1.08)")
    print(
        f"Trainer.fit / bare loop, our network  {ratio('Trainer.fit', 'bare loop, our network'):.3f}   (at most 1.08)"
    )
    print(f"classic loop / Trainer.fit            {ratio('classic loop', 'Trainer.fit'):.2f}    (at least 2.3)")


def peak_mb() -> float:
    """Return the peak memory of this process alone; getrusage includes what the parent had when it forked."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def scale_one(rows: int) -> None:
    """Run `train` on a csv file, in its own process, so that its memory can be measured."""
    import numpy as np
    import pandas as pd

    import dataloader  # noqa: F401
    from config import DataConfig, ModelConfig
    from train import train

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        small = DataConfig(data="breast_cancer")
        train(small, ModelConfig(), TrainConfig(epochs=1), RunConfig(out=f"{folder}/warm"))
        path = f"{folder}/table.csv"
        generator = np.random.default_rng(0)
        with open(path, "w") as file:
            for start in range(0, rows, 10_000):
                part = pd.DataFrame(generator.standard_normal((min(10_000, rows - start), 20))).add_prefix("x")
                part["y"] = (part.sum(axis=1) > 0).astype(int)
                part.to_csv(file, index=False, header=start == 0, float_format="%.7g")
        before = peak_mb()
        started = time.perf_counter()
        data = DataConfig(data=path, target="y", batch_size=BATCH)
        run = train(data, ModelConfig(), TrainConfig(epochs=2), RunConfig(out=f"{folder}/run"))
        whole = time.perf_counter() - started
    table = rows * 20 * 4 / 2**20
    per_row = run.history["seconds"].iloc[-1] / rows * 1e6
    print(
        f"{rows:>9,} rows: epoch {per_row:5.2f} µs/row, whole run {whole:5.1f} s, memory above the imports "
        f"{peak_mb() - before:6.1f} MB = {(peak_mb() - before) / table:4.1f} × the float32 table ({table:.1f} MB)",
        file=sys.stderr,
    )


def compare_threads() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cores = len(os.sched_getaffinity(0))
    sizes = ((128, 64), 256), ((256, 128), 512), ((512, 512), 512), ((1024, 512), 512), ((1024, 1024), 1024)
    for hidden, batch in sizes:
        inputs, targets = make_data(batch)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            make_model(hidden)(inputs)
        best = {}
        for threads in (1, cores):
            torch.set_num_threads(threads)
            model = make_model(hidden)
            optimizer = torch.optim.Adam(model.parameters(), fused=True)
            best[threads] = float("inf")
            for _ in range(50):
                started = time.perf_counter()
                F.binary_cross_entropy_with_logits(model(inputs).squeeze(1), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                best[threads] = min(best[threads], time.perf_counter() - started)
        print(
            f"{counter.get_total_flops() / 1e6:8.1f} M multiply-adds ({hidden}, batch {batch}): 1 thread "
            f"{best[1] * 1e3:7.2f} ms, {cores} threads {best[cores] * 1e3:7.2f} ms, ×{best[1] / best[cores]:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="per round")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--threads", action="store_true")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        scale_one(args.rows)
    elif args.scale:
        for rows in (10_000, 100_000, 1_000_000):
            subprocess.run([sys.executable, __file__, "--rows", str(rows)], check=True)
    elif args.threads:
        compare_threads()
    else:
        compare(args.rounds, args.epochs)


if __name__ == "__main__":
    main()
