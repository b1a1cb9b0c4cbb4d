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
                columns = dict(zip(feed, inputs, strict=True))
                features = [x for _, x in known.features(lambda name, _: columns[name], torch, quantile_scale)]
                features += [columns[name] for name in known.categories]
                x = torch.stack([feature.float() for feature in features], dim=1)
            logits = self.model(x)
            values = task.activate(logits)
            return (values.argmax(dim=1), values.float(), logits) if task.classes else (values[:, 0], logits)

    if isinstance(model, Bag):
        model.table = GatheredBag(model.table)
    codes = {name for name, values in feed.items() if values.dtype == object}
    examples = [torch.zeros(2, dtype=torch.int64) if name in codes else torch.tensor(np.array(values))
                for name, values in feed.items()]  # fmt: skip
    return Network(), dict(zip(feed, examples, strict=True)), codes


def quantile_scale(numbers, quantiles: list[float]):
    """Do as `preprocessing._quantile_scale` in operations that ONNX has."""
    import numpy as np
    import torch

    levels = np.linspace(0, 1, len(quantiles))
    values, first, count = np.unique(quantiles, return_index=True, return_counts=True)
    # The rank rises in ramps between the values, and by a jump at a value that fills several quantiles, which itself
    # stands in the middle
    jumps = torch.from_numpy(levels[first + count - 1] - levels[first])
    rises = torch.from_numpy(levels[first[1:]] - levels[first[1:] - 1])
    points, numbers = torch.from_numpy(values), numbers[:, None]
    ramps = ((numbers - points[:-1]) / points.diff()).clamp(0, 1)
    steps = ((numbers > points).double() + (numbers >= points).double()) / 2
    rank = (ramps * rises).sum(dim=1) + (steps * jumps).sum(dim=1)
    return normal_quantile(rank.clamp(1e-4, 1 - 1e-4))


def normal_quantile(p):
    """The quantile function of the standard normal distribution, to 7 digits (Wichura, "Algorithm AS 241", 1988)."""
    import torch

    a, b = (3.3871327179, 50.434271938, 159.29113202, 59.10937472), (1.0, 17.895169469, 78.757757664, 67.1875636)
    c, d = (1.4234372777, 2.75681539, 1.3067284816, 0.17023821103), (1.0, 0.7370016425, 0.12021132975)

    def ratio(top, bottom, x):
        over, under = (sum(k * x**i for i, k in enumerate(terms)) for terms in (top, bottom))
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
    import onnx.compose
    import torch
    from onnx import TensorProto, helper

    network, inputs, codes = make_network(pipeline)
    task, rows = pipeline.task, torch.export.Dim.DYNAMIC
    outputs = ["label", "probabilities", "logits"] if task.classes else ["prediction", "logits"]
    shapes = [{0: rows, 1: rows} if x.dtype == torch.int32 else {0: rows} for x in inputs.values()]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
        program = torch.onnx.export(
            network.eval(),
            (list(inputs.values()),),
            input_names=[f"column_{i}" for i in range(len(inputs))],
            output_names=outputs,
            dynamic_shapes=(shapes,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    prefix = "network/"
    while any(name.startswith(prefix) for name in inputs):  # a column may have any name that stands in the graph
        prefix = "_" + prefix
    model = onnx.compose.add_prefix(program.model_proto, prefix)
    graph, first, last = model.graph, [], []
    for name, put in zip(inputs, graph.input, strict=True):
        outside, inside = name, put.name
        while not outside or outside in outputs or (outside != name and outside in inputs):
            outside = f"column {outside}"
        put.name = outside
        if name in codes:  # strings → codes, before anything else
            values = pipeline.preprocessor.categories[name]["values"] or ["\0"]  # it takes no empty list
            attributes = {"keys_strings": values, "values_int64s": range(1, len(values) + 1), "default_int64": 0}
            first.append(helper.make_node("LabelEncoder", [outside], [inside], domain="ai.onnx.ml", **attributes))
            put.CopyFrom(helper.make_tensor_value_info(outside, TensorProto.STRING, ["N"]))
        else:
            first.append(helper.make_node("Identity", [outside], [inside]))
    for name, out in zip(outputs, graph.output, strict=True):
        if name == "label":  # indices → labels, after all else
            labels = [str(c).encode() for c in task.classes]
            graph.initializer.append(helper.make_tensor(prefix + "labels", TensorProto.STRING, [len(labels)], labels))
            last.append(helper.make_node("Gather", [prefix + "labels", out.name], [name]))
            out.CopyFrom(helper.make_tensor_value_info(name, TensorProto.STRING, ["N"]))
        else:
            last.append(helper.make_node("Identity", [out.name], [name]))
            out.name = name
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    helper.set_model_props(model, {"pipeline": json.dumps(pipeline.state())})
    onnx.checker.check_model(model)
    return model


def check(pipeline, exported) -> None:
    """Ask both the golden rows, in batches of several sizes. Raises UserError where they answer differently.

    Numbers may differ by 1e-5 of the targets' deviation and 1e-4 of what they are beside the mean, probabilities by
    1e-5; labels are those of the highest probabilities.
    """
    import numpy as np

    task = pipeline.task
    for size in BATCHES:
        rows = (pipeline.examples * size)[:size]
        x, logits = pipeline.ask(rows)
        wanted, got = task.activate(logits).numpy(), exported.outputs(rows, x)
        values = got["probabilities"] if task.classes else got["prediction"][:, None]
        if not np.allclose((values - task.mean) / task.std, (wanted - task.mean) / task.std, rtol=1e-4, atol=1e-5):
            worst = np.abs(values - wanted).max()
            raise UserError(f"the export answers golden rows otherwise than the checkpoint, by up to {worst:.2g}.")
        labels = np.array(list(map(str, task.classes)), dtype=object)
        if task.classes and (got["label"] != labels[values.argmax(axis=1)]).any():
            raise UserError("the export's labels are not those of its highest probabilities.")


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
