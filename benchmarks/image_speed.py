"""Time an epoch of images: Trainer.fit, a bare loop, and a Dataset that decodes in every epoch.

  python benchmarks/image_speed.py

Work: 2,000 jpeg files of 96 × 96 pixels in two classes, scaled to 32 × 32, with the same network and augmentation,
batch 64, Adam, validation on 300 of them. Machines are noisy: read the ratios, medians over the rounds.
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
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from model import build_model
from preprocessing.augmentation import make_augmentation
from preprocessing.pixels import read_pixels
from train import train

BATCH, SIZE, HIDDEN = 64, 32, (16, 32)
ARGS = {"in_channels": 3, "image_size": SIZE, "out_features": 1, "hidden": list(HIDDEN), "activation": "relu"}


def make_files(folder: Path, count: int) -> None:
    """Write smooth random pictures: about as large, and as slow to decode, as photographs of their size."""
    random = np.random.default_rng(0)
    for i in range(count):
        small = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        small[..., i % 2] //= 2
        path = folder / ("ab"[i % 2]) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(path, quality=90)


def loop(train_batches, val_batches, epochs: int) -> float:
    """Hand-written loop for both references; batches are new in each epoch. Returns seconds per epoch."""
    torch.manual_seed(0)
    model = build_model(["cnn"], ARGS | {"batch_norm": True, "dropout": 0.1})
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    started = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for inputs, targets in train_batches():
            loss = F.binary_cross_entropy_with_logits(model(inputs).squeeze(1), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            for inputs, targets in val_batches():
                F.binary_cross_entropy_with_logits(model(inputs).squeeze(1), targets).item()
    return (time.perf_counter() - started) / epochs


class Files(Dataset):
    """The Dataset of most templates: open, decode and resize a file on each access."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int):
        pixels = torch.from_numpy(read_pixels(str(self.files[i]), SIZE, 3).copy())
        return pixels, float(self.files[i].parent.name == "b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="per round")
    args = parser.parse_args()
    augment = make_augmentation("standard", flip=True)

    def finish(pixels, augmented: bool):
        pixels = augment(pixels) if augmented else pixels.float()
        return (pixels / 255 - 0.5) / 0.25

    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), 2000)
        files = sorted(Path(folder).glob("*/*.jpg"), key=lambda p: int(p.stem))
        parts = files[:1400], files[1400:1700]
        started = time.perf_counter()
        tensors = [torch.stack([torch.from_numpy(read_pixels(str(f), SIZE, 3).copy()) for f in part]) for part in parts]
        print(f"decoding 1,700 files on one core, once: {time.perf_counter() - started:.2f} s")
        targets = [torch.tensor([float(f.parent.name == "b") for f in part]) for part in parts]

        def in_memory(i: int, augmented: bool):
            order = torch.randperm(len(tensors[i])) if augmented else torch.arange(len(tensors[i]))
            for rows in order.split(BATCH if augmented else 256):
                yield finish(tensors[i][rows], augmented), targets[i][rows]

        def decoding(i: int, augmented: bool):
            for pixels, labels in DataLoader(Files(parts[i]), BATCH, shuffle=augmented):
                yield finish(pixels, augmented), labels.float()

        def ours(amp: bool = False) -> float:
            data = DataConfig(data=folder, image_size=SIZE, batch_size=BATCH, flip="on")
            with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
                training = TrainConfig(epochs=args.epochs + 1, patience=0, amp=amp)
                run = RunConfig(threads=threads, out=f"{out}/run")
                history = train(data, ModelConfig(hidden=HIDDEN), training, run).history
            return float(history["seconds"][1:].mean())  # the first epoch includes imports

        threads = len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        loops = {
            "bare loop": lambda: loop(lambda: in_memory(0, True), lambda: in_memory(1, False), args.epochs),
            "Trainer.fit": ours,
            "Trainer.fit --amp": lambda: ours(amp=True),
            "decoding each epoch": lambda: loop(lambda: decoding(0, True), lambda: decoding(1, False), 1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(args.rounds):
            for name, run_loop in loops.items():
                seconds[name].append(run_loop())
        for name, times in seconds.items():
            print(
                f"{name:<20} {statistics.median(times):6.3f} s/epoch   {1400 / statistics.median(times):7,.0f} images/s"
            )

        def ratio(a: str, b: str) -> float:
            return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

        print(f"Trainer.fit / bare loop             {ratio('Trainer.fit', 'bare loop'):.3f}   (at most 1.08)")
        print(f"decoding each epoch / Trainer.fit   {ratio('decoding each epoch', 'Trainer.fit'):.2f}")


if __name__ == "__main__":
    main()
