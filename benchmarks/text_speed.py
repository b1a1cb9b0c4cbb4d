"""Time an epoch of texts: Trainer.fit, a bare loop over prepared tensors, and batches padded as they come.

  python benchmarks/text_speed.py

Work: 20,000 texts composed of sentences from the `docstrings` example (very short to very long), seven classes, batch
128, Adam, validation on 4,000 of them; bag and transformer. The bare loop gets batches that were grouped by length and
padded in advance. Machines are noisy: read the ratios, medians over the rounds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from config import DataConfig, RunConfig, TrainConfig
from dataloader import make_loader
from model import build_model
from pipeline import Pipeline
from preprocessing import Preprocessor
from sources import load_bundled
from task import Task
from trainer import Trainer

BATCH, EVAL_BATCH = 128, 256
COUNTS = {"bag": (20_000, 4_000), "transformer": (4_000, 800)}  # texts to train and to validate on


def make_texts(count: int) -> pd.DataFrame:
    random, known = np.random.default_rng(0), load_bundled("docstrings")[0]
    sentences = known["docstring"].str.split("\n\n").str[0].tolist()
    rows = []
    for _ in range(count):
        first = int(random.integers(len(known)))
        more = random.integers(len(sentences), size=random.geometric(0.5) - 1)
        rows.append((" ".join([sentences[first], *(sentences[i] for i in more)]), known["package"].iloc[first]))
    return pd.DataFrame(rows, columns=["text", "label"])


def make_pipeline(name: str, preprocessor, task) -> Pipeline:
    torch.manual_seed(0)
    args = {**preprocessor.model_args, "out_features": task.out_features, "activation": "relu", "dropout": 0.1}
    return Pipeline(build_model([name], args), task, preprocessor)


def bare_loop(pipeline: Pipeline, batches, val_batches, epochs: int) -> float:
    model = pipeline.model
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4, fused=True)
    started = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for i in torch.randperm(len(batches)).tolist():
            loss = F.cross_entropy(model(**batches[i][0]), batches[i][1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            for inputs, targets in val_batches:
                F.cross_entropy(model(**inputs), targets).item()
    return (time.perf_counter() - started) / epochs


def trainer_fit(pipeline: Pipeline, loaders, epochs: int, threads: int) -> float:
    """Trainer.fit with everything that it does: metrics, history, TensorBoard, checkpoints on disk."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config, run = TrainConfig(epochs=epochs + 1, patience=0), RunConfig(threads=threads, out=folder)
        history = Trainer(pipeline, config, run).fit(*loaders)
    return history["seconds"][1:].sum() / epochs  # the first epoch includes imports


def compare(name: str, table: pd.DataFrame, rounds: int, epochs: int) -> None:
    tokenizer = {"bag": "ngrams", "transformer": "subwords"}[name]
    train, val = (table.head(n) if i == 0 else table.tail(n) for i, n in enumerate(COUNTS[name]))
    started = time.perf_counter()
    preprocessor = Preprocessor.fit(train[["text"]], DataConfig(text=("text",), tokenizer=tokenizer))
    fitted, task = time.perf_counter(), Task.fit(table["label"])
    ids, val_ids = (preprocessor.encode(part)["text"] for part in (train, val))
    seconds = time.perf_counter() - fitted
    tokens = int(ids.lengths.sum()) + int(val_ids.lengths.sum())
    print(f"\n{name}: {len(train):,} texts, {int(ids.lengths.sum()) / len(train):.0f} {tokenizer} each")
    print(f"  fitting the vocabulary    {fitted - started:6.2f} s")
    print(f"  texts → ids               {seconds:6.2f} s   {tokens / seconds:12,.0f} {tokenizer}/s   ({cores} cores)")
    targets = task.encode(train["label"]), task.encode(val["label"])
    loaders = (
        make_loader({"text": ids}, targets[0], BATCH, shuffle=True),
        make_loader({"text": val_ids}, targets[1], EVAL_BATCH, shuffle=False),
    )
    ready, val_ready = list(loaders[0]), list(loaders[1])
    order = torch.randperm(len(ids)).split(BATCH)
    as_they_come = [({"text": ids[rows]}, targets[0][rows]) for rows in order]
    padded = sum(inputs["text"].numel() for inputs, _ in ready) / int(ids.lengths.sum())
    waste = sum(inputs["text"].numel() for inputs, _ in as_they_come) / int(ids.lengths.sum())
    print(f"  ids in a padded batch per id of a text: {padded:.2f}; with batches as they come {waste:.2f}")
    threads = 1 if name == "bag" else cores
    torch.set_num_threads(threads)
    loops = {
        "bare loop, prepared": lambda: bare_loop(make_pipeline(name, preprocessor, task), ready, val_ready, epochs),
        "Trainer.fit": lambda: trainer_fit(make_pipeline(name, preprocessor, task), loaders, epochs, threads),
        "bare loop, as they come": lambda: bare_loop(
            make_pipeline(name, preprocessor, task), as_they_come, val_ready, epochs
        ),
    }
    times: dict[str, list[float]] = {loop: [] for loop in loops}
    for _ in range(rounds):
        for loop, run_loop in loops.items():
            times[loop].append(run_loop())
    for loop, each in times.items():
        middle = statistics.median(each)
        print(f"  {loop:<25} {middle:6.3f} s/epoch   {int(ids.lengths.sum()) / middle:12,.0f} {tokenizer}/s")

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    print(f"  Trainer.fit / bare loop   {ratio('Trainer.fit', 'bare loop, prepared'):.3f}   (at most 1.1)")
    print(f"  as they come / Trainer.fit {ratio('bare loop, as they come', 'Trainer.fit'):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="per round")
    args = parser.parse_args()
    table = make_texts(24_000)
    for name in COUNTS:
        compare(name, table, args.rounds, args.epochs)


cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

if __name__ == "__main__":
    main()
