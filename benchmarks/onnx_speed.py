"""Compare records per second of an exported file in onnxruntime with its checkpoint, preprocessing included."""

import sys
import tempfile
from functools import partial
from pathlib import Path
from timeit import repeat

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import DataConfig, RunConfig, TrainConfig
from export import Options, export, graph_inputs
from train import train


def compare(data: str, folder: str) -> None:
    out, onnx = f"{folder}/{data}", f"{folder}/{data}.onnx"
    pipeline = train(DataConfig(data=data), training=TrainConfig(epochs=1), run=RunConfig(out=out)).pipeline
    export(Options(f"{out}/best.pt", onnx))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run_session(records):
        return session.run(None, dict(zip(names, graph_inputs(pipeline.preprocessor, records).values(), strict=True)))

    for count in (1, 1000):
        records = (pipeline.examples * count)[:count]
        for name, predict in {"checkpoint": pipeline.predict_logits, "onnx": run_session}.items():
            seconds = min(repeat(partial(predict, records), number=1))
            print(f"RESULT {data:<14}{count:5} at once   {name:<10}  {count / seconds:9,.0f} records/s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("breast_cancer", "digits", "docstrings"):
            compare(name, temporary)
