"""What is trained, saved, loaded and used to predict: preprocessor + model + task, in one checkpoint."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from config import from_plain
from errors import UserError
from model import rebuild_model
from preprocessing import Preprocessor, gather
from preprocessing.column import Encoded
from preprocessing.pixels import is_path
from scaling.device import choose_device, move
from sources import FILE
from sources.checkpoint import FORMAT, MAGIC, content_sha256, read_checkpoint, weights_sha256
from sources.writer import atomic_write
from task import Task

SELF_CHECK_ROWS = 16


class Pipeline:
    """A model with everything that predictions need: `predict(records)` turns raw records into predictions.

    model: any nn.Module that maps named tensors (or one tensor) to logits (N, task.out_features).
    preprocessor: records → named tensors; None for a model that only trains on loaders of tensors.
    model_spec: {"names", "args"} for `build_model`, so that `load` can build the model again.
    config: the flags of the run, kept for people who inspect the checkpoint.
    examples: some raw training records, or made-up ones. A checkpoint keeps their predictions too: its self-check
        rows, which `load` predicts again.
    profile: the distribution of the training data, see evaluation/drift.py.
    test: the losses of test records, with which later models are compared, see evaluation/held_out.py.
    threads: CPU threads that suit the model; 0 = unknown.
    members: pipelines of which this one is the ensemble: their predictions are averaged. `model` holds all their
        networks, `preprocessor` is the first one's.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        preprocessor: Preprocessor | None = None,
        *,
        model_spec: dict | None = None,
        config: dict | None = None,
        examples: list[dict] | None = None,
        profile: dict | None = None,
        test: dict | None = None,
        threads: int = 0,
        members: list["Pipeline"] | None = None,
    ):
        self.model, self.task, self.preprocessor = model, task, preprocessor
        self.model_spec, self.config, self.examples = model_spec, config or {}, (examples or [])[:SELF_CHECK_ROWS]
        self.profile, self.test = profile or {}, test or {}
        self.threads, self.members = threads or 0, members or []
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))  # `to` changes it

    def __repr__(self) -> str:
        names = " + ".join(self.model_spec["names"]) if self.model_spec else type(self.model).__name__
        columns = ", ".join(self.preprocessor.names) if self.preprocessor else "tensors"
        return f"Pipeline({columns} → {names} → {self.task.summary()})"

    def to(self, device: str) -> "Pipeline":
        """Move the model to a device by name; auto chooses one."""
        self.device = choose_device(device)
        self.model.to(self.device)
        for member in self.members:
            member.device = self.device
        return self

    @classmethod
    def ensemble(cls, members: list["Pipeline"]) -> "Pipeline":
        """Return the ensemble of pipelines that predict the same target from the same columns."""
        first, tasks = members[0], [member.task for member in members]
        means = {name: sum(getattr(task, name) for task in tasks) / len(tasks) for name in ("threshold", "quantile")}
        task = replace(first.task, temperature=1.0, **means)
        networks = nn.ModuleList([member.model for member in members])
        kept = {"config": first.config, "examples": first.examples, "profile": first.profile, "threads": first.threads}
        return cls(networks, task, first.preprocessor, members=members, **kept)

    # ------------------------------------------------------------ predict

    def predict(self, records) -> pd.DataFrame:
        """Predict raw records (DataFrame, dict, list of dicts, or bare cells of the only column): a row for each, in
        order, with the same index.

        Classification: prediction, probability (of the prediction), probability_<class>.  Regression: prediction.
        Raises UserError, naming row and column, for records that the preprocessor cannot read.
        """
        frame = self.require_preprocessor().as_frame(records)
        return self.to_frame(self.predict_logits(frame)[1], frame)

    def predict_logits(self, records) -> tuple[dict[str, Encoded], Tensor]:
        """Return (parts, logits) of raw records: their encoded columns, and the logits (N, out_features) on the CPU.

        An ensemble returns the parts of its first member, and logits (N, members, out_features).
        Raises BrokenRecords for records that cannot be read, or whose logits overflow.
        """
        if self.members:
            found = [member.predict_logits(records) for member in self.members]
            return found[0][0], self.join_logits([logits for _, logits in found])
        preprocessor = self.require_preprocessor()
        parts = preprocessor.encode_columns(records)
        logits = self.logits(preprocessor.join(parts))
        if not (finite := torch.isfinite(logits)).all():
            raise preprocessor.too_large(records, parts, ~finite.flatten(1).all(dim=1))
        return parts, logits

    def join_logits(self, logits: list[Tensor]) -> Tensor:
        """Return the logits of an ensemble, (N, members, out_features), from those of its members, (N, …)."""
        values = [member.task.activate(each) for member, each in zip(self.members, logits, strict=True)]
        return torch.stack([self.task.invert(each) for each in values], dim=1)

    @torch.inference_mode()
    def logits(self, inputs) -> Tensor:
        """Return the logits of a tensor (N, …), or of records that the preprocessor has encoded, on the CPU."""
        self.model.eval()
        if isinstance(inputs, Tensor):
            return torch.cat([self.forward(part).cpu() for part in inputs.split(8192)])
        count = len(next(iter(inputs.values())))
        if not count:
            return torch.empty(0, self.task.out_features)
        rows = torch.arange(count).split(self.require_preprocessor().eval_batch_size)
        return torch.cat([self.forward(gather(inputs, part)).cpu() for part in rows])

    def forward(self, inputs: Tensor | dict[str, Tensor], *, training: bool = False) -> Tensor:
        """Return the logits of a batch: a tensor, or named tensors of encoded records, on any device."""
        if isinstance(inputs, Tensor):
            return self.model(move(inputs, self.device))
        inputs = {name: move(x, self.device) for name, x in inputs.items()}
        if self.preprocessor is not None:
            inputs = self.preprocessor.batch(inputs, training=training)
        return self.model(**inputs)

    def to_frame(self, logits: Tensor, frame: pd.DataFrame, broken: dict[int, str] | None = None) -> pd.DataFrame:
        """Return the predictions of logits (N, out_features) as a table with the index of the records, after the name
        of the file if a record came from one.

        broken: position → what is wrong with a record that has no logits: its predictions are empty, and a last column
        `error` says why.
        """
        columns = self.task.to_columns(logits)
        if broken is None:
            predictions = pd.DataFrame(columns, index=frame.index)
        else:  # types that can be empty, in every chunk the same
            types = {"O": "string", "i": "Int64", "b": "boolean", "f": "float64"}
            readable = [i for i in range(len(frame)) if i not in broken]
            cells = {name: pd.Series(v, readable, dtype=types[v.dtype.kind]) for name, v in columns.items()}
            predictions = pd.DataFrame(cells, range(len(frame)))
            predictions["error"] = pd.Series(broken, range(len(frame)), dtype="string")
            predictions.index = frame.index
        layout = self.preprocessor.layout
        names = [*layout.paths, *([FILE] if layout.lone and FILE in frame else [])]
        if names:  # cells in memory have no name
            predictions.insert(0, FILE, [cell if is_path(cell) else "" for cell in frame[names[0]]])
        return predictions

    def require_preprocessor(self) -> Preprocessor:
        """Return the preprocessor. Raises UserError if there is none: such a model only trains on tensors."""
        if self.preprocessor is None:
            raise UserError(
                "this model has no preprocessor, so it cannot predict records: use Pipeline(model, task, preprocessor)."
            )
        return self.preprocessor

    # ------------------------------------------------------------ save and load

    def save(
        self, path: str | Path, *, state_dict: dict[str, Tensor] | None = None, training: dict | None = None
    ) -> None:
        """Write the checkpoint, completely or not at all.

        state_dict: weights other than the model's present ones.  training: what `Trainer` needs to resume.
        """
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        state_dict = {name: value.detach().cpu() for name, value in state_dict.items()}
        checkpoint = {
            "magic": MAGIC,
            "format": FORMAT,
            "torch": str(torch.__version__),
            **self._parts(),
            "config": self.config,
            "profile": self.profile,
            "test": self.test,
            "threads": self.threads,
            "self_check": {"records": self.examples, "predictions": self._check_predictions(state_dict)},
            "weights_sha256": weights_sha256(state_dict),
            "members": [member._parts() for member in self.members],
        }
        json.dumps(checkpoint, allow_nan=False)  # plain containers only: anything else is a bug and stops here
        checkpoint |= {"state_dict": state_dict} | ({} if training is None else {"training": training})
        checkpoint["sha256"] = content_sha256(checkpoint)
        with atomic_write(path, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
            if unsafe:
                raise TypeError(f"the checkpoint holds {unsafe}, which weights_only=True would refuse")

    def _parts(self) -> dict:
        """Return plain containers, from which `_from_parts` builds everything but the weights."""
        preprocessor = None if self.preprocessor is None else self.preprocessor.state()
        return {"model_spec": self.model_spec, "task": asdict(self.task), "preprocessor": preprocessor}

    @classmethod
    def _from_parts(cls, parts: dict, weights: dict[str, Tensor], model: nn.Module | None = None, **kept) -> "Pipeline":
        """Undo `_parts`. Raises RuntimeError if the weights do not fit the network."""
        model = rebuild_model(parts["model_spec"], weights) if model is None else model
        model.load_state_dict(weights)
        preprocessor = None if parts["preprocessor"] is None else Preprocessor.from_state(parts["preprocessor"])
        return cls(model, from_plain(Task, parts["task"]), preprocessor, model_spec=parts["model_spec"], **kept)

    @torch.inference_mode()
    def _check_predictions(self, state_dict: dict[str, Tensor]) -> list[dict]:
        """Predict the examples with these weights.

        On the CPU, where a checkpoint is checked when it is loaded: accelerators round differently.
        """
        if not self.examples:
            return []
        if self.members:
            return self.task.to_json(self.predict_logits(self.examples)[1])
        model = copy.deepcopy(self.model).cpu().eval()
        model.load_state_dict(state_dict)
        logits = model(**self.preprocessor(self.examples))
        if not torch.isfinite(logits).all():
            raise UserError("the logits are not finite. Try a lower --lr, --clip-norm 1 or --scaling quantile.")
        return self.task.to_json(logits)

    @classmethod
    def load(cls, path: str | Path, *, model: nn.Module | None = None) -> "Pipeline":
        """Load a checkpoint to the CPU and check that it still gives the predictions that it gave when it was saved.

        model: an instance to load the weights into, for networks that MODELS does not name.
        Raises UserError if the file is not a complete checkpoint, or if a self-check row is predicted differently.
        """
        state = read_checkpoint(path)
        members, weights = state.get("members") or [], state["state_dict"]
        if model is None and state.get("model_spec") is None and not members:
            raise UserError(f"{path}: the network is not in MODELS: pass it, Pipeline.load(…, model=…).")
        try:
            kept = {name: state.get(name) for name in ("config", "profile", "test", "threads")}
            kept |= {"examples": state["self_check"]["records"]}
            if members:
                of_member = [_with_prefix(weights, f"{i}.") for i in range(len(members))]
                kept["members"] = [cls._from_parts(*each) for each in zip(members, of_member, strict=True)]
                model = nn.ModuleList([member.model for member in kept["members"]])
            pipeline = cls._from_parts(state, weights, model, **kept)
        except RuntimeError as error:
            raise UserError(f"{path}: the weights do not fit the network in model.py ({error}).") from None
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: the file does not fit this version of the code ({error!r}).") from None
        pipeline._self_check(state["self_check"]["predictions"], path)
        return pipeline

    def _self_check(self, predictions: list[dict], path: str | Path) -> None:
        """Raise UserError if the examples are predicted differently from when `path` was saved."""
        now = self.task.to_json(self.predict_logits(self.examples)[1]) if self.examples else []
        for row, (before, after) in enumerate(zip(predictions, now, strict=True), start=1):
            if not self.task.same_prediction(before, after):
                raise UserError(
                    f"{path}: self-check row {row} was predicted {before} when the file was saved and {after} now: "
                    "the code or a library has changed what this model computes."
                )


def _with_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
