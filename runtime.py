"""Answer with an exported .onnx file, by onnxruntime, as with the checkpoint that it was made from."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError
from pipeline import Pipeline, kind_of
from preprocessing import as_frame, rows_per_pass


def load(path: str) -> Pipeline:
    """Load a checkpoint, or an .onnx file made of one. Raises UserError where it is neither."""
    return OnnxPipeline.load(path) if str(path).endswith(".onnx") else Pipeline.load(path)


def feed_of(preprocessor, records, x: Tensor) -> dict[str, np.ndarray]:
    """Return the inputs of an exported network: a table's raw columns, uint8 pixels or token ids.

    x: what the preprocessor made of the records.
    """
    kind = kind_of(preprocessor)
    if kind == "tabular":
        return preprocessor.measure(as_frame(records), x)
    if kind == "image":
        return {"image": (preprocessor.denormalise(x) * 255).round().to(torch.uint8).contiguous().numpy()}
    return {"ids": x.numpy()}


class OnnxPipeline(Pipeline):
    """A pipeline whose network, and a table's preprocessing, is an ONNX graph."""

    @classmethod
    def from_bytes(cls, serialized: bytes, name: str) -> "OnnxPipeline":
        """Make it of the bytes of a file that export.py made. Raises UserError for any other."""
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{name} needs another library: pip install onnxruntime.") from None
        onnxruntime.set_default_logger_severity(4)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no class in common
            raise UserError(f"{name}: no ONNX file that can be loaded ({str(error)[:100]}).") from None
        state = session.get_modelmeta().custom_metadata_map.get("pipeline")
        if not state:
            raise UserError(f"{name}: an ONNX file, but none that export.py made.")
        try:
            state = json.loads(state)
            pipeline = cls.of_state(state, name, nn.Identity)
            pipeline.session = session
            pipeline.check_golden(state, name)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:  # of what a damaged file says of its preprocessing
            raise UserError(f"{name}: the file is damaged ({error!r}).") from None
        return pipeline

    @classmethod
    def load(cls, path: str | Path) -> "OnnxPipeline":
        try:
            return cls.from_bytes(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from None

    def ask(self, records) -> tuple[Tensor, Tensor]:
        x = self.preprocessor(records)
        return x, torch.from_numpy(self.outputs(records, x)["logits"])

    def outputs(self, records, x: Tensor) -> dict[str, np.ndarray]:
        """Return all that the graph gives for records. x: what the preprocessor made of them."""
        feed, size = feed_of(self.preprocessor, records, x), rows_per_pass(x)
        names, inputs = ([put.name for put in puts] for puts in (self.session.get_outputs(), self.session.get_inputs()))
        parts = [
            self.session.run(names, {n: v[start : start + size] for n, v in zip(inputs, feed.values(), strict=True)})
            for start in range(0, len(x), size)
        ]
        return {name: np.concatenate(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
