"""Measure throughput and memory against rows, two processes against one, and a table larger than memory.

  python benchmarks/scaling.py rows                    100,000 and 1,000,000 rows, from csv and from parquet
  python benchmarks/scaling.py rows --rows 10000000    on a machine with time: the csv alone has 5 GB
  python benchmarks/scaling.py processes               torchrun with two processes, beside one with one thread
  python benchmarks/scaling.py memory                  a table of three times the memory that the run may take

Rows: a table of 30 numbers, the default network, one epoch, one thread, without a report. "before" is the time until
the first step: reading, detecting kinds, fitting, encoding. The bare loop trains the same network on encoded tensors
with the same batches, in the same process. Memory is the peak of the process above a run of 10,000 rows: all of it, and
without mapped files, which the system can drop; the float32 table is 120 bytes a row.

Processes: the default network of tables and the cnn, the same batches, medians over the epochs after the first. On two
cores the most is 2.0. Machines are noisy: read the ratios.

Memory: a csv whose cells are three times ALLOWED. The limit (RLIMIT_DATA, as `ulimit -d`) is ALLOWED above what a run
of a tiny table takes. The run below the limit, and the one that is killed there and resumed, must give the same weights
as the run without a limit.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd

COLUMNS, LITTLE = 30, 10_000
ALLOWED = 64 << 20  # bytes, beyond a run of a tiny table
ROW = 580  # bytes that the cells of a row of a csv take in memory


def make_table(rows: int, path: Path) -> None:
    """Write a table of numbers whose sum, squared, is the target."""
    x = np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=np.float32)
    table = pd.DataFrame(x, columns=[f"x{i}" for i in range(COLUMNS)])
    table["y"] = x[:, :5].sum(axis=1) ** 2
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)


def make_images(count: int, folder: Path) -> None:
    """Write noise, brighter on the left or on the right, in a folder for each side."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 200, (32, 32, 3)).astype(np.uint8)
        pixels[:, :16] += np.uint8(55 * (i % 2))
        path = folder / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


# ---------------------------------------------------------------- rows


def memory_of_process() -> tuple[float, float]:
    """Return (all resident memory, without mapped files) in MB. Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1e3 for name in ("VmRSS", "RssAnon"))


def watch_memory(peak: list[float], is_over: threading.Event) -> None:
    while not is_over.wait(0.02):
        peak[:] = map(max, peak, memory_of_process())


def measure_rows(path: str) -> dict:
    """Train for one epoch, then with a bare loop; in a process of its own, because memory is not given back."""
    from config import DataConfig, RunConfig, TrainConfig
    from train import train
    from trainer import Trainer

    seen, begin = {}, Trainer.train_epoch
    Trainer.train_epoch = lambda self, loader: (seen.setdefault("first", time.perf_counter()), begin(self, loader))[1]
    make = Trainer.__init__
    Trainer.__init__ = lambda self, *args, **options: (seen.setdefault("trainer", self), make(self, *args, **options))[
        1
    ]
    fit = Trainer.fit
    Trainer.fit = lambda self, *loaders: (seen.setdefault("loader", loaders[0]), fit(self, *loaders))[1]
    peak, is_over = [0.0, 0.0], threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(peak, is_over))
    watcher.start()
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = train(
            DataConfig(data=path, target="y"),
            None,
            TrainConfig(epochs=1),
            RunConfig(out=tempfile.mkdtemp(dir=Path(path).parent), report=False, threads=1),
        )
    is_over.set()
    watcher.join()
    total, anonymous = peak
    speed = float(run.history["samples_per_second"][0])
    return {
        "before": seen["first"] - started,
        "speed": speed,
        "bare": bare_loop(seen["trainer"], seen["loader"]),
        "memory": total,
        "anonymous": anonymous,
    }


def bare_loop(trainer, loader) -> float:
    """Return the rows per second of the shortest loop over the same tensors, with the same network and batches."""
    import torch

    torch.set_num_threads(1)
    numbers, targets = loader.dataset.inputs["numbers"], loader.dataset.targets
    batch = loader.batch_sampler.batch_size
    model = trainer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    started, order = time.perf_counter(), torch.randperm(len(targets))
    for rows in order.split(batch):
        logits = model(numbers[rows])
        loss = torch.nn.functional.mse_loss(logits, targets[rows][:, None, None].expand_as(logits))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return len(targets) / (time.perf_counter() - started)


def compare_rows(counts: list[int], folder: Path) -> None:
    print("rows        format    before  µs a row   rows/s   bare loop   ratio   memory   without maps   float32 table")
    base = {}
    for rows in (LITTLE, *counts):
        for kind in ("csv", "parquet"):
            path = folder / f"{rows}.{kind}"
            make_table(rows, path)
            line = [sys.executable, __file__, "measure", "--path", str(path)]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            path.unlink()
            if rows == LITTLE:
                base[kind] = found
                continue
            extra = [found[name] - base[kind][name] for name in ("memory", "anonymous")]
            print(
                f"{rows:<11,} {kind:<8} {found['before']:>6.1f} s {1e6 * found['before'] / rows:>9.1f} "
                f"{found['speed']:>8,.0f} {found['bare']:>11,.0f} {found['speed'] / found['bare']:>7.2f} "
                f"{extra[0]:>6.0f}M {extra[1]:>13.0f}M {rows * COLUMNS * 4 / 1e6:>14.0f}M",
                flush=True,
            )


# ---------------------------------------------------------------- processes


def speed_of(processes: int, flags: list[str], folder: Path) -> float:
    """Return the median records per second of a run of train.py with one thread in each process."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    flags = [*flags, "--threads", "1", "--no-report", "--out", str(out)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    line = [*(launch if processes > 1 else [sys.executable]), str(ROOT / "train.py"), *flags]
    subprocess.run(line, check=True, capture_output=True)
    return float(pd.read_csv(out / "history.csv")["samples_per_second"][1:].median())


def compare_processes(folder: Path) -> None:
    make_table(40_000, folder / "table.parquet")
    make_images(3_000, folder / "images")
    tasks = {
        "tabm": ["--data", str(folder / "table.parquet"), "--target", "y", "--epochs", "5"],
        "cnn": ["--data", str(folder / "images"), "--model", "cnn", "--epochs", "5"],
    }
    print("network   one process   two processes   ratio", flush=True)
    for name, flags in tasks.items():
        one, two = speed_of(1, flags, folder), speed_of(2, flags, folder)
        print(f"{name:<9} {one:>9,.0f}/s {two:>13,.0f}/s {two / one:>7.2f}", flush=True)


# ---------------------------------------------------------------- a table larger than memory


def start_limited(flags: list[str], limit: int = 0) -> subprocess.Popen:
    """Start train.py; if there is a `limit`, with no more bytes of memory of its own. Linux only."""
    import resource

    def set_limit() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    line = [sys.executable, str(ROOT / "train.py"), *flags, "--threads", "1"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, preexec_fn=set_limit, **pipes)


def finish(process: subprocess.Popen, kill_at: Path | None = None) -> int:
    """Wait for the end, or kill as soon as a file is there. Return the peak of the memory of its own, in bytes."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("VmData:")[1].split()[0]) << 10)
        if kill_at and kill_at.exists():
            time.sleep(1)  # into the next epoch
            process.kill()
        time.sleep(0.005)
    if process.returncode not in (0, -signal.SIGKILL if kill_at else 0):
        raise SystemExit(f"train.py ended with {process.returncode}: {process.stderr.read()}")
    return peak


def check_memory(folder: Path) -> None:
    """Train on a table of three times the allowed memory, with and without a limit, and killed and resumed."""
    for name, rows in (("tiny", 1_000), ("large", 3 * ALLOWED // ROW)):
        make_table(rows, folder / f"{name}.csv")
    cells = pd.read_csv(folder / "large.csv", dtype=str, nrows=10_000).memory_usage(index=False, deep=True).sum() / 1e4
    print(f"table: {rows:,} rows, {rows * cells / 1e6:.0f} MB of cells, {rows * COLUMNS * 4 / 1e6:.0f} MB as float32")

    def flags(table: str, out: str) -> list[str]:
        run = ["--model", "mlp", "--epochs", "6", "--batch-size", "512", "--no-report", "--out", str(folder / out)]
        return ["--data", str(folder / f"{table}.csv"), "--target", "y", *run]

    def sha(out: str) -> str:
        return json.loads((folder / out / "metrics.json").read_text())["weights_sha256"]

    tiny = finish(start_limited(flags("tiny", "tiny")))
    limit = tiny + ALLOWED
    free = finish(start_limited(flags("large", "free")))
    limited = finish(start_limited(flags("large", "limited"), limit))
    finish(start_limited(flags("large", "killed"), limit), kill_at=folder / "killed" / "last.pt")
    was_killed = not (folder / "killed" / "metrics.json").exists()
    finish(start_limited(["--resume", str(folder / "killed" / "last.pt")], limit))
    above = [f"{(peak - tiny) / 1e6:.0f} MB" for peak in (limit, free, limited)]
    print(f"memory above a tiny run: limit {above[0]}, without limit {above[1]}, with limit {above[2]}")
    assert was_killed, "the run was complete before it could be killed"
    assert sha("limited") == sha("free") == sha("killed"), "the weights differ"
    print("the same weights without limit, with limit, and killed and resumed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["rows", "processes", "memory", "measure"], help="measure is for one table, in rows"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--path", default="")
    args = parser.parse_args()
    if args.what == "measure":
        print(json.dumps(measure_rows(args.path)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "rows":
            compare_rows(args.rows, Path(folder))
        elif args.what == "memory":
            check_memory(Path(folder))
        else:
            compare_processes(Path(folder))


if __name__ == "__main__":
    main()
