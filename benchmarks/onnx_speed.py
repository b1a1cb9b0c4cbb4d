"""Records a second of an exported .onnx file against the checkpoint that it was made from, in the same run.

python benchmarks/onnx_speed.py
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import DataConfig, TrainConfig
from export import Options, export
from pipeline import Pipeline
from runtime import OnnxPipeline
from train import train


def seconds(asked, records: list, repeats: int = 7) -> float:
    """Return the least seconds that it took to answer the records, preprocessing included."""
    asked.ask(records)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        asked.ask(records)
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for data in ("breast_cancer", "digits", "docstrings"):
            out = Path(folder) / data
            train(DataConfig(data=data), training=TrainConfig(epochs=1, out=str(out)))
            export(Options(str(out / "best.pt"), str(out / "model.onnx")))
            checkpoint, exported = Pipeline.load(out / "best.pt"), OnnxPipeline.load(out / "model.onnx")
            for count in (1, 1000):
                records = (checkpoint.examples * count)[:count]
                a, b = seconds(checkpoint, records), seconds(exported, records)
                print(
                    f"RESULT {data:<14}{count:5} at once   checkpoint {count / a:9,.0f} records/s   "
                    f"onnx {count / b:9,.0f} records/s   onnx / checkpoint {a / b:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
