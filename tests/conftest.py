"""What the tests share: small tables that are quick to learn, and the commands as a user runs them."""

import dataclasses
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import forks
import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from train import train


def make_table(rows: int = 240, seed: int = 0) -> pd.DataFrame:
    """A table with every kind of column, missing cells, and a target for each kind of problem."""
    random = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "customer_id": np.arange(1, rows + 1),
            "age": random.integers(18, 90, rows).astype(float),
            "income": random.normal(50_000, 12_000, rows).round(2),
            "city": random.choice(["Seoul", "Busan", "Paris", "Köln"], rows),
            "member": random.choice(["yes", "no"], rows),
            "since": pd.date_range("2020-01-01", periods=rows).strftime("%Y-%m-%d"),
            "remark": [f"row {i} says nothing of any use {i * 7919}" for i in range(rows)],
            "same": "x",
        }
    )
    score = table["age"] / 10 + 3 * (table["city"] == "Seoul") + random.normal(0, 0.3, rows)
    table.loc[random.random(rows) < 0.1, "income"] = np.nan
    table.loc[random.random(rows) < 0.05, "city"] = None
    table["binary"] = np.where(score > score.median(), "high", "low")
    table["multiclass"] = pd.qcut(score, 3, labels=["a", "b", "c"]).astype(str)
    table["regression"] = (1000 * score).round(1)
    return table


TARGETS = ("binary", "multiclass", "regression")


def table_for(kind: str, rows: int = 240, seed: int = 0) -> pd.DataFrame:
    return make_table(rows, seed).drop(columns=[t for t in TARGETS if t != kind])


WORDS = ["red", "green", "blue", "house", "garden", "shop", "old", "new", "big", "small", "round", "sweet"]


def mixed_table(folder: Path, rows: int = 120, seed: int = 0) -> pd.DataFrame:
    """A table of numbers, categories, dates, two columns of text and one of image paths; all of them matter."""
    random = np.random.default_rng(seed)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    bright, good, price = random.integers(0, 2, rows), random.integers(0, 2, rows), random.normal(0, 1, rows).round(3)
    for i in range(rows):
        pixels = random.integers(0, 100, (12, 14, 3)) + 130 * bright[i]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / f"{seed}-{i}.png")
    table = pd.DataFrame(
        {
            "price": price,
            "city": random.choice(["Seoul", "Paris", "Köln"], rows),
            "since": pd.date_range("2020-01-01", periods=rows).strftime("%Y-%m-%d"),
            "title": [" ".join([*random.choice(WORDS, 3), "excellent" if g else "poor"]) for g in good],
            "note": [" ".join(random.choice(WORDS, 5)) for _ in range(rows)],
            "photo": [f"photos/{seed}-{i}.png" for i in range(rows)],
        }
    )
    score = pd.Series(price + 2 * bright + 2 * good)
    table["binary"] = np.where(score > score.median(), "high", "low")
    table["multiclass"] = pd.qcut(score, 3, labels=["a", "b", "c"]).astype(str)
    table["regression"] = (100 * score).round(1)
    return table


def mixed_csv(folder: Path, target: str, rows: int = 120, seed: int = 0) -> Path:
    """The mixed table with one target, as a csv beside its photos."""
    path = folder / f"{target}-{seed}.csv"
    mixed_table(folder, rows, seed).drop(columns=[t for t in TARGETS if t != target]).to_csv(path, index=False)
    return path


def quick_run(folder, table=None, *, data=None, model=None, **training):
    """`train` with few epochs, in `folder`, without a report."""
    run = RunConfig(out=str(folder), threads=training.pop("threads", 1), resume=training.pop("resume", ""))
    run = dataclasses.replace(run, report=training.pop("report", False))
    data = data or DataConfig(target="binary")
    training = TrainConfig(**({"epochs": 3} | training))
    return train(data, model or ModelConfig(hidden=(16,)), training, run, table=table)


def command(*args, cwd=None, stdin: bytes | None = None, env=None, fork=True) -> subprocess.CompletedProcess:
    """Run `python train.py …`, `python predict.py …` or `python -c …` in another process.

    fork: a process that need not import the libraries, see forks.py; False = wholly as a user starts it.
    """
    script, *rest = map(str, args)
    line = [script if script == "-c" else str(ROOT / script), *rest]
    process = (forks.Popen if fork else subprocess.Popen)(
        line if fork else [sys.executable, *line],
        cwd=cwd,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )
    try:
        output, errors = process.communicate(stdin, timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(line, process.returncode, output, errors)


@contextmanager
def file_size_limit(size: int):
    """Let no file of this process grow beyond `size` bytes: to write more fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one line on standard error that holds the words."""
    error = result.stderr.decode()
    assert result.returncode == 2, error
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error, error


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict:
    """A finished run of each kind of problem, with the csv it was trained on."""
    folder = tmp_path_factory.mktemp("runs")
    finished = {}
    for kind in TARGETS:
        path = folder / f"{kind}.csv"
        table_for(kind).to_csv(path, index=False)
        data = DataConfig(data=str(path), target=kind)
        finished[kind] = quick_run(folder / kind, data=data, epochs=8)
    return finished


@pytest.fixture(scope="session")
def everything(runs, tmp_path_factory) -> dict:
    """A checkpoint for each kind of data and of problem."""
    from test_images import make_folder
    from test_text import text_run

    folder, found = tmp_path_factory.mktemp("served"), {}
    photos = make_folder(folder / "photos")
    table = pd.DataFrame({"path": sorted(str(p) for p in photos.rglob("*.*"))})
    table["binary"] = [p.split(os.sep)[-2] for p in table["path"]]
    table["multiclass"] = [f"{b}-{i % 2}" for i, b in enumerate(table["binary"])]
    table["regression"] = np.linspace(0, 1, len(table))
    for target in TARGETS:
        found["tabular", target] = runs[target].out / "best.pt"
        text_run(folder / f"text-{target}", target, epochs=2)
        found["text", target] = folder / f"text-{target}" / "best.pt"
        data = DataConfig(data=str(folder / f"{target}.csv"), target=target, image="path")
        table[["path", target]].to_csv(data.data, index=False)
        quick_run(folder / f"image-{target}", data=data, epochs=1)
        found["image", target] = folder / f"image-{target}" / "best.pt"
        data = DataConfig(data=str(mixed_csv(folder / "mixed", target)), target=target)
        quick_run(folder / f"mixed-{target}", data=data, model=ModelConfig(), epochs=1)
        found["mixed", target] = folder / f"mixed-{target}" / "best.pt"
    return found


def close(a: dict, b: dict) -> bool:
    if "probabilities" not in a:
        return a["prediction"] == pytest.approx(b["prediction"], abs=1e-5, rel=1e-6)
    return a["prediction"] == b["prediction"] and a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-6)


@pytest.fixture(autouse=True)
def lite0_is_not_tried(monkeypatch):
    """Small images are used by tests that are about something else."""
    monkeypatch.setattr("backbones.settings.has_weights", lambda: False)
