"""Export a checkpoint to ONNX, which runs without torch, and check it against the checkpoint.

  python export.py --checkpoint runs/x/best.pt --output model.onnx

Preprocessing is inside. Of a table each column is an input (N,): numbers as float64 with NaN for an empty cell,
booleans as 0 and 1, dates as days since 1970, categories as strings; of images, uint8 pixels (N, channels, size, size);
of texts, token ids, with the tokenizer in a file beside it. Out come `label` (or `prediction`), `probabilities` and
`logits`. predict.py and serve.py take the file in the place of a checkpoint.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin slow down all else on the machine

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import UserError, parse_flags, run

BATCHES = (1, 2, 17)  # sizes of the check
OPSET = 18


@dataclass(frozen=True)
class Options:
    """what to export, and where to"""

    checkpoint: str
    """best.pt of a run."""
    output: str = "model.onnx"
    """The file to write; a text model's tokenizer comes beside it, as NAME.tokenizer.json."""


def make_network(pipeline):
    """Return (module, inputs, codes): raw columns, pixels or ids → (logits, values); two examples of what goes in, by
    name; and the names of those that are strings outside, codes inside."""
    import copy

    import numpy as np
    import torch
    from torch import nn

    from model import Bag
    from pipeline import kind_of
    from runtime import feed_of

    known, task, model = pipeline.preprocessor, pipeline.task, copy.deepcopy(pipeline.model).eval()
    kind, example = kind_of(known), (pipeline.examples * 2)[:2]
    feed = feed_of(known, example, known(example))

    class GatheredBag(nn.Module):
        """nn.EmbeddingBag of weighted sums in operations that ONNX has."""

        def __init__(self, bag):
            super().__init__()
            self.weight, self.padding_idx = bag.weight, bag.padding_idx

        def forward(self, ids, per_sample_weights):
            return (self.weight[ids.long()] * per_sample_weights[..., None]).sum(dim=1)

    class Network(nn.Module):
        """Preprocessing, the network, and what the task makes of its logits."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs: list):
            if kind == "image":
                x = known.normalise(inputs[0])
            elif kind == "text":
                x = inputs[0]
            else:
                x = torch.stack(table_features(known, dict(zip(feed, inputs, strict=True))), dim=1)
            logits = self.model(x)
            return logits, task.activate(logits).float()

    if isinstance(model, Bag):
        model.table = GatheredBag(model.table)
    codes = {name for name, values in feed.items() if values.dtype == object}
    examples = [torch.zeros(2, dtype=torch.int64) if name in codes else torch.tensor(np.array(values))
                for name, values in feed.items()]  # fmt: skip
    return Network(), dict(zip(feed, examples, strict=True)), codes


def table_features(known, columns: dict) -> list:
    """Return the features of a table's preprocessor, each (N,), as operations on its raw columns.

    The same as TabularPreprocessor does with numpy; the check of the export holds them together.
    """
    import math

    import torch

    from preprocessing import date_periods

    features = []
    for name, state in known.used.items():
        if state["kind"] == "category":
            continue
        raw = columns[name]
        missing = torch.isnan(raw)
        # As tensors: the exporter makes float32 of a Python number
        facts = {k: torch.tensor(v, dtype=torch.float64) for k, v in state.items() if k in ("mean", "std", "fill")}
        if state["kind"] == "date":
            days = torch.where(missing, facts["mean"], raw)
            features.append((days - facts["mean"]) / facts["std"])
            for period in torch.tensor(date_periods(state), dtype=torch.float64):
                # The turn's fraction first: float32, which is all that ONNX runtimes have for sines, then suffices
                angle = (2 * math.pi * (days / period - torch.floor(days / period))).float()
                features += [torch.where(missing, 0.0, torch.sin(angle)), torch.where(missing, 0.0, torch.cos(angle))]
        else:
            numbers = torch.where(missing, facts["fill"], raw)
            if "quantiles" in state:
                numbers = quantile_scale(numbers, state["quantiles"])
            elif "std" in state:
                numbers = (numbers - facts["mean"]) / facts["std"]
            features.append(numbers)
        if state["flag"]:
            features.append(missing)
    features += [columns[name] for name in known.categories]
    return [feature.float() for feature in features]


def quantile_scale(numbers, quantiles: list[float]):
    """Do as `preprocessing._quantile_scale` in operations that ONNX has."""
    import numpy as np
    import torch

    grid, levels = np.asarray(quantiles), np.linspace(0, 1, len(quantiles))
    values, first = np.unique(grid, return_index=True)
    last = len(grid) - 1 - np.unique(grid[::-1], return_index=True)[1]
    # A value that fills several quantiles stands in their middle; between two values the line starts and ends at the
    # levels next to it
    low, high, middle = (torch.from_numpy(v) for v in (levels[first], levels[last], (levels[first] + levels[last]) / 2))
    points = torch.from_numpy(values)
    at = (numbers[:, None] >= points).sum(dim=1) - 1  # the last point that is not larger
    left, right = at.clamp(0, len(values) - 1), (at + 1).clamp(0, len(values) - 1)
    width = torch.where(points[right] > points[left], points[right] - points[left], 1.0)
    share = ((numbers - points[left]) / width).clamp(0, 1)
    rank = torch.where(numbers == points[left], middle[left], high[left] + share * (low[right] - high[left]))
    rank = torch.where(at < 0, 0.0, torch.where(numbers > points[-1], 1.0, rank))
    return normal_quantile(rank.clamp(1e-4, 1 - 1e-4))


def normal_quantile(p):
    """The quantile function of the standard normal distribution (Wichura, "Algorithm AS 241", 1988)."""
    import torch

    a = (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
         4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4,
         2.5090809287301226727e3)  # fmt: skip
    b = (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
         3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3)  # fmt: skip
    c = (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
         1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2,
         7.74545014278341407640e-4)  # fmt: skip
    d = (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
         1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
         1.05075007164441684324e-9)  # fmt: skip

    def ratio(top, bottom, x):
        over, under = torch.zeros_like(x), torch.zeros_like(x)
        for t, u in zip(reversed(top), reversed(bottom), strict=True):
            over, under = over * x + t, under * x + u
        return over / under

    q = p - 0.5
    tail = torch.sqrt(-torch.log(torch.minimum(p, 1 - p))) - 1.6
    outside = ratio(c, d, tail)
    return torch.where(q.abs() <= 0.425, q * ratio(a, b, 0.180625 - q * q), torch.where(q < 0, -outside, outside))


def make_onnx(pipeline):
    """Return the pipeline as an ONNX model with its labels, and all that runtime.py needs in its metadata."""
    import contextlib
    import io
    import logging
    import warnings

    import onnx
    import torch
    from onnx import TensorProto, helper

    network, inputs, codes = make_network(pipeline)
    names, rows = {name: f"column_{i}" for i, name in enumerate(inputs)}, torch.export.Dim.DYNAMIC
    shapes = [{0: rows, 1: rows} if x.dtype == torch.int32 else {0: rows} for x in inputs.values()]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
        program = torch.onnx.export(
            network.eval(),
            (list(inputs.values()),),
            input_names=list(names.values()),
            output_names=["logits", "values"],
            dynamic_shapes=(shapes,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    graph, task = model.graph, pipeline.task
    for put in graph.input:
        name = next(n for n, short in names.items() if short == put.name)
        if name in codes:  # strings → codes, before anything else
            values = pipeline.preprocessor.categories[name]["values"] or ["\0"]  # it takes no empty list
            attributes = {"keys_strings": values, "values_int64s": range(1, len(values) + 1), "default_int64": 0}
            graph.node.insert(
                0, helper.make_node("LabelEncoder", [name], [put.name], domain="ai.onnx.ml", **attributes)
            )
            put.CopyFrom(helper.make_tensor_value_info(name, TensorProto.STRING, ["N"]))
        else:
            graph.node.insert(0, helper.make_node("Identity", [name], [put.name]))
            put.name = name
    if task.classes:
        labels = helper.make_tensor(
            "labels", TensorProto.STRING, [len(task.classes)], [str(c).encode() for c in task.classes]
        )
        graph.initializer.append(labels)
        graph.node.append(helper.make_node("Identity", ["values"], ["probabilities"]))
        graph.node.append(helper.make_node("ArgMax", ["values"], ["best"], axis=1, keepdims=0))
        graph.node.append(helper.make_node("Gather", ["labels", "best"], ["label"]))
        new = [("probabilities", TensorProto.FLOAT, ["N", len(task.classes)]), ("label", TensorProto.STRING, ["N"])]
    else:
        graph.node.append(helper.make_node("Squeeze", ["values", "one"], ["prediction"]))
        graph.initializer.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
        new = [("prediction", TensorProto.FLOAT, ["N"])]
    kept = [output for output in graph.output if output.name == "logits"]
    del graph.output[:]
    graph.output.extend([*(helper.make_tensor_value_info(*info) for info in new), *kept])
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    helper.set_model_props(model, {"pipeline": json.dumps(pipeline.state())})
    onnx.checker.check_model(model)
    return model


def check(pipeline, exported) -> None:
    """Ask both the golden rows, in batches of several sizes. Raises UserError where they answer differently.

    Numbers may differ by 1e-4 of their size, probabilities by 1e-5.
    """
    import torch

    for size in BATCHES:
        rows = (pipeline.examples * size)[:size]
        logits = [asked.ask(rows)[1] for asked in (pipeline, exported)]
        values = [pipeline.task.activate(part) for part in logits]
        if not torch.allclose(*values, rtol=1e-4, atol=1e-5):
            worst = (values[0] - values[1]).abs().max()
            raise UserError(f"the export answers golden rows otherwise than the checkpoint, by up to {worst:.2g}.")


def export(options: Options) -> None:
    """Write the ONNX file, once it answers as the checkpoint does."""
    from pipeline import Pipeline, atomic_write
    from runtime import OnnxPipeline

    if not options.output.endswith(".onnx"):
        raise UserError(f"--output {options.output}: the name must end in .onnx.")
    pipeline = Pipeline.load(options.checkpoint)
    if not pipeline.examples:
        raise UserError(f"{options.checkpoint}: it holds no golden rows, against which an export could be checked.")
    serialized = make_onnx(pipeline).SerializeToString()
    check(pipeline, OnnxPipeline.from_bytes(serialized, options.output))
    with atomic_write(options.output, "wb") as file:
        file.write(serialized)
    said = [f"{options.output}: answers as {options.checkpoint} does, in batches of {', '.join(map(str, BATCHES))}"]
    if hasattr(pipeline.preprocessor, "segment"):
        beside = Path(options.output).with_suffix(".tokenizer.json")
        with atomic_write(beside) as file:
            file.write(json.dumps(asdict(pipeline.preprocessor), ensure_ascii=False))
        said.append(f"{beside}: from texts to ids")
    print("\n".join(said), file=sys.stdout)


if __name__ == "__main__":
    run(lambda: export(parse_flags(Options, description=__doc__)))
