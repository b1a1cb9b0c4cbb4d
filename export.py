"""Export a checkpoint to ONNX, which runs without torch, and check it against the checkpoint.

  python export.py --checkpoint runs/x/best.pt --output model.onnx

Preprocessing is part of the graph. Each column is an input: numbers as float64 (N,) with NaN for a missing cell,
booleans as 0 and 1, dates as days since 1970, categories as strings (N,), images as uint8 pixels (N, channels, size,
size), texts as token ids (N, length), which the preprocessor computes: it is written beside the graph. The outputs are
`label` and `probabilities` (or `prediction`) and `logits`. `sha256sum --check NAME.onnx.sha256` finds a damaged file.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow down everything else on the machine

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from console import run
from errors import UserError, parse_flags

CHECK_SIZES = (1, 2, 17)  # batch sizes of the check
OPSET = 18


@dataclass(frozen=True)
class Options:
    """what to export, and where to"""

    checkpoint: str
    """best.pt of a run."""
    output: str = "model.onnx"
    """The file to write; the preprocessor of texts is written beside it, as NAME.preprocessor.json, and checksums as
    NAME.onnx.sha256."""


def graph_inputs(preprocessor, records) -> dict:
    """Return what the exported graph takes for records: an array (N, …) for each column."""
    frame = preprocessor.as_frame(records)
    return {column.name: column.parse(frame[column.name]) for column in preprocessor.columns}


def make_module(pipeline):
    """Return (module, inputs): the whole pipeline as a torch module, and two example records for its inputs.

    The module takes a list of the inputs, for each member of an ensemble one after the other. Columns of strings are
    integer codes here; the ONNX graph looks the codes up first.
    """
    import copy

    from torch import nn

    members = pipeline.members or [pipeline]

    class Module(nn.Module):
        """Preprocessing, the network, and the task's view of its logits."""

        def __init__(self):
            super().__init__()
            self.networks = nn.ModuleList([copy.deepcopy(member.model).eval() for member in members])

        def forward(self, inputs: list):
            inputs, logits = iter(inputs), []
            for member, network in zip(members, self.networks, strict=True):
                preprocessor = member.preprocessor
                parts = {column.name: column.transform(next(inputs)) for column in preprocessor.columns}
                parts |= {each.name: each.transform(parts[each.source]) for each in preprocessor.derived}
                logits.append(network(**preprocessor.join(parts)))
            return pipeline.task.graph_outputs(pipeline.join_logits(logits) if pipeline.members else logits[0])

    arrays = graph_inputs(pipeline.preprocessor, (pipeline.examples * 2)[:2])
    return Module(), {name: _example(values) for name, values in arrays.items()}


def _example(values):
    """Return an example input of the graph for two parsed cells."""
    import numpy as np
    import torch

    if values.dtype == object:  # strings, which are codes here
        return torch.zeros(2, dtype=torch.int64)
    if values.dtype == np.int32:  # ids: the exporter would take a length of 1 for a constant
        return torch.ones(2, 3, dtype=torch.int32)
    return torch.tensor(values)


def make_onnx(pipeline):
    """Return the pipeline as an ONNX model: strings → codes, the torch module, class indices → labels."""
    import onnx
    import onnx.compose
    from onnx import TensorProto, helper

    task, outputs = pipeline.task, pipeline.task.output_names
    model, inputs = _export_module(pipeline)
    columns = [column for member in pipeline.members or [pipeline] for column in member.preprocessor.columns]
    prefix = "network/"
    while any(name.startswith(prefix) for name in inputs):  # a column may have any name, also one of the graph's own
        prefix = "_" + prefix
    model = onnx.compose.add_prefix(model, prefix)
    graph, first, last, named = model.graph, [], [], {}
    for column, value in zip(columns, graph.input, strict=True):
        name, outside, inside = column.name, column.name, value.name
        while not outside or outside in outputs or (outside != name and outside in inputs):
            outside = f"column {outside}"
        value.name = outside
        if keys := column.onnx_keys:  # strings → codes
            attributes = {"keys_strings": keys, "values_int64s": range(1, len(keys) + 1), "default_int64": 0}
            first.append(helper.make_node("LabelEncoder", [outside], [inside], domain="ai.onnx.ml", **attributes))
            value.CopyFrom(helper.make_tensor_value_info(outside, TensorProto.STRING, ["N"]))
        else:
            first.append(helper.make_node("Identity", [outside], [inside]))
        named.setdefault(name, value.SerializeToString())
    del graph.input[:]  # the members of an ensemble share their inputs
    graph.input.extend(map(onnx.ValueInfoProto.FromString, named.values()))
    for name, value in zip(outputs, graph.output, strict=True):
        if name == "label":  # indices → labels
            labels = [str(c).encode() for c in task.classes]
            graph.initializer.append(helper.make_tensor(prefix + "labels", TensorProto.STRING, [len(labels)], labels))
            last.append(helper.make_node("Gather", [prefix + "labels", value.name], [name]))
            value.CopyFrom(helper.make_tensor_value_info(name, TensorProto.STRING, ["N"]))
        else:
            last.append(helper.make_node("Identity", [value.name], [name]))
            value.name = name
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.checker.check_model(model)
    return model


def _export_module(pipeline):
    """Return (the torch module as an ONNX model, its example inputs by column)."""
    import contextlib
    import io
    import logging
    import warnings

    import torch

    module, inputs = make_module(pipeline)
    members = len(pipeline.members) or 1
    rows = torch.export.Dim.DYNAMIC
    shapes = [{0: rows, 1: rows} if x.dtype == torch.int32 else {0: rows} for x in inputs.values()]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
        program = torch.onnx.export(
            module.eval(),
            (list(inputs.values()) * members,),
            input_names=[f"column_{i}" for i in range(len(inputs) * members)],
            output_names=pipeline.task.output_names,
            dynamic_shapes=(shapes * members,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    return program.model_proto, inputs


def check(pipeline, serialized: bytes) -> None:
    """Compare the graph with the checkpoint on its self-check rows, in batches of several sizes.

    Values may differ by 1e-5 of the targets' std and 1e-4 of their distance from the mean, probabilities by 1e-5.
    Raises UserError for a larger difference, or a label that does not follow from the probabilities.
    """
    import numpy as np
    import onnxruntime
    import torch

    onnxruntime.set_default_logger_severity(4)
    task, session = pipeline.task, onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for size in CHECK_SIZES:
        rows = (pipeline.examples * size)[:size]
        expected = task.activate(pipeline.predict_logits(rows)[1]).numpy()
        feed = dict(zip(names, graph_inputs(pipeline.preprocessor, rows).values(), strict=True))
        outputs = dict(zip(task.output_names, session.run(task.output_names, feed), strict=True))
        values = outputs["probabilities" if "label" in outputs else "prediction"].reshape(expected.shape)
        if not np.allclose((values - task.mean) / task.std, (expected - task.mean) / task.std, rtol=1e-4, atol=1e-5):
            worst = np.abs(values - expected).max()
            raise UserError(
                f"the export predicts self-check rows differently from the checkpoint, by up to {worst:.2g}."
            )
        labels = np.array(list(map(str, task.classes)), dtype=object)
        if "label" in outputs and (outputs["label"] != labels[task.decide(torch.from_numpy(values)).numpy()]).any():
            raise UserError("the export's labels do not follow from its probabilities.")


def export(options: Options) -> None:
    """Write the ONNX file, if it gives the same predictions as the checkpoint."""
    from pipeline import Pipeline, atomic_write

    if not options.output.endswith(".onnx"):
        raise UserError(f"--output {options.output}: the name must end in .onnx.")
    pipeline = Pipeline.load(options.checkpoint)
    if not pipeline.examples:
        raise UserError(f"{options.checkpoint}: it has no self-check rows, so an export could not be checked.")
    outside = [column.name for column in pipeline.preprocessor.columns if column.encodes_outside_graph]
    if outside and pipeline.members:
        raise UserError(
            f"{options.checkpoint}: each member of the ensemble has its own ids for the texts in {outside[0]!r}, so it "
            f"cannot be one graph: export one member, such as {Path(options.checkpoint).parent / 'fold-1' / 'best.pt'}."
        )
    serialized = make_onnx(pipeline).SerializeToString()
    check(pipeline, serialized)
    written = {Path(options.output): serialized}
    with atomic_write(options.output, "wb") as file:
        file.write(serialized)
    sizes = ", ".join(map(str, CHECK_SIZES))
    print(f"{options.output}: same predictions as {options.checkpoint}, checked in batches of {sizes}")
    if outside:
        path = Path(options.output).with_suffix(".preprocessor.json")
        written[path] = json.dumps(pipeline.preprocessor.state(), ensure_ascii=False).encode()
        with atomic_write(path, "wb") as file:
            file.write(written[path])
        print(f"{path}: the preprocessor, which turns texts into ids")
    with atomic_write(f"{options.output}.sha256") as file:
        file.writelines(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n" for path, content in written.items())
    verify(options.output)


def verify(path: str) -> None:
    """Raise UserError if an exported file, or the preprocessor beside it, is not what `export` wrote."""
    for line in Path(f"{path}.sha256").read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        written = Path(path).with_name(name)
        if not written.is_file() or hashlib.sha256(written.read_bytes()).hexdigest() != digest:
            raise UserError(f"{written}: the file is damaged or missing: export it again.")


if __name__ == "__main__":
    run(lambda: export(parse_flags(Options, description=__doc__)))
