"""What is trained, saved, loaded and asked: preprocessor + model + task, and the checkpoint that holds them."""

import hashlib
import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call

from errors import UserError
from images import ImagePreprocessor
from model import build_model
from preprocessing import TabularPreprocessor, as_frame, rows_per_pass
from reader import FILE
from task import Task
from text import TextPreprocessor

FORMAT = 1  # of the checkpoint; a change that old code cannot read makes it 2
MAGIC = "pytorch-training-project"
GOLDEN_ROWS = 16
PREPROCESSORS = {"tabular": TabularPreprocessor, "image": ImagePreprocessor, "text": TextPreprocessor}
DEFAULT_MODELS = {"tabular": "mlp", "image": "cnn", "text": "bag"}


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Open a temporary file beside `path` and put it in its place once it is whole and on the disk.

    Raises UserError where the folder cannot be written.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from None
    try:
        os.close(handle)
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))  # a temporary file is private; the result is as any other file
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """Return a fingerprint of names, types, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def choose_device(name: str) -> torch.device:
    """Return the torch device called `name`; auto takes cuda, mps or cpu. Raises UserError where it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: this machine or this build of torch does not have it.") from None
    return torch.device(name)


class Pipeline:
    """A model with all that it takes to ask it: `predict(records)` goes from raw records to answers.

    model: any nn.Module, x → logits (N, task.out_features).
    preprocessor: records → x; None where the model is only trained on loaders and never asked.
    network: {"name", "facts"} for `build_model`, so that `load` can make the model again.
    config: the flags of the run, kept for whoever opens the checkpoint.
    examples: some raw training records; the checkpoint keeps them with their answers, and `load` asks them again.
    profile: what the training data looked like, `Profile.columns` of drift.py.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        preprocessor=None,
        *,
        network: dict | None = None,
        config: dict | None = None,
        examples: list[dict] | None = None,
        profile: dict | None = None,
    ):
        self.model, self.task, self.preprocessor = model, task, preprocessor
        self.network, self.config, self.examples = network, config or {}, (examples or [])[:GOLDEN_ROWS]
        self.profile = profile or {}

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def to(self, device: str) -> "Pipeline":
        """Move the model to a device by name; auto chooses one."""
        self.model.to(choose_device(device))
        return self

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of preprocessed records, on the CPU."""
        self.model.eval()
        return torch.cat([self.model(part.to(self.device)).cpu() for part in x.split(rows_per_pass(x))])

    def predict(self, records) -> pd.DataFrame:
        """Answer raw records (DataFrame, dict, list of dicts; list of texts, of images): a row for each, in order,
        under the same index.

        Classification: prediction, probability (of it), probability_<class>.  Regression: prediction.
        Raises UserError, naming row and column, for records that the preprocessor cannot read.
        """
        frame = as_frame(records, getattr(self.preprocessor, "column", ""))
        logits = self.ask(frame)[1] if len(frame) else torch.empty(0, self.task.out_features)
        return self.answers(logits, frame)

    def ask(self, records) -> tuple[Tensor, Tensor]:
        """Return (x, logits) of raw records, for those who want to know more of them than the answers."""
        x = self.preprocessor(records)
        return x, self.logits(x)

    def answers(self, logits: Tensor, frame: pd.DataFrame) -> pd.DataFrame:
        """Put the answers that logits (N, out_features) give beside the records' index; images carry their file,
        and so do texts that were files."""
        answers = pd.DataFrame(self.task.columns(logits), index=frame.index)
        if isinstance(self.preprocessor, ImagePreprocessor):
            answers.insert(0, FILE, frame[self.preprocessor.column])
        elif isinstance(self.preprocessor, TextPreprocessor) and FILE in frame:
            answers.insert(0, FILE, frame[FILE])
        return answers

    def save(
        self, path: str | Path, *, state_dict: dict[str, Tensor] | None = None, training: dict | None = None
    ) -> None:
        """Write the checkpoint, whole or not at all.

        state_dict: other weights than the model's present ones.  training: what `Trainer` needs to go on.
        """
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        state_dict = {name: value.detach().cpu() for name, value in state_dict.items()}
        checkpoint = {
            "magic": MAGIC,
            "format": FORMAT,
            "torch": str(torch.__version__),
            "network": self.network,
            **self.state(state_dict),
            "weights_sha256": weights_sha256(state_dict),
        }
        json.dumps(checkpoint, allow_nan=False)  # plain containers only: anything else is a bug, and stops here
        checkpoint |= {"state_dict": state_dict} | ({} if training is None else {"training": training})
        with atomic_write(path, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
            if unsafe:
                raise TypeError(f"the checkpoint holds {unsafe}, which weights_only=True would refuse")

    def state(self, state_dict: dict[str, Tensor] | None = None) -> dict:
        """Return all but the network as plain containers, with the answers that it gives to the examples."""
        return {
            "task": asdict(self.task),
            "kind": kind_of(self.preprocessor),
            "preprocessor": None if self.preprocessor is None else asdict(self.preprocessor),
            "config": self.config,
            "profile": self.profile,
            "golden": self._golden(self.model.state_dict() if state_dict is None else state_dict),
        }

    def _golden(self, state_dict: dict[str, Tensor]) -> dict:
        """The examples and the answers that these weights give."""
        if not self.examples:
            return {"records": [], "answers": []}
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            weights = {name: value.to(self.device) for name, value in state_dict.items()}
            logits = functional_call(self.model, weights, self.preprocessor(self.examples).to(self.device)).cpu()
        self.model.train(was_training)  # a run that saves in the middle of an epoch trains on
        if not torch.isfinite(logits).all():
            raise UserError(
                "the network's answers are not finite. Try a lower --lr, --clip-norm 1 or --scaling quantile."
            )
        return {"records": self.examples, "answers": self.task.answer(logits)}

    @classmethod
    def load(cls, path: str | Path, *, model: nn.Module | None = None) -> "Pipeline":
        """Load a checkpoint to the CPU and make sure that it still gives the answers that it gave when it was saved.

        model: an instance to put the weights in, for networks that MODELS does not name.
        Raises UserError where the file is no whole checkpoint of ours, or a golden row is answered differently.
        """
        state = read_checkpoint(path)
        if model is None and state["network"] is None:
            raise UserError(f"{path}: the network is not in MODELS: hand it over, Pipeline.load(…, model=…).")
        pipeline = cls.of_state(state, path, lambda: build_model(**state["network"]) if model is None else model)
        try:
            pipeline.model.load_state_dict(state["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{path}: the weights do not fit the network in model.py ({error}).") from None
        pipeline.check_golden(state, path)
        return pipeline

    @classmethod
    def of_state(cls, state: dict, path: str | Path, make_model: Callable[[], nn.Module]) -> "Pipeline":
        """Make again the pipeline whose `state` the file `path` holds, around a model without its weights."""
        try:
            return cls(
                make_model(),
                Task(**state["task"]),
                PREPROCESSORS[state["kind"]](**state["preprocessor"]) if state["kind"] else None,
                network=state.get("network"),
                config=state["config"],
                examples=state["golden"]["records"],
                profile=state.get("profile"),  # runs of before there were profiles have none
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: the file does not fit this version of the code ({error!r}).") from None

    def check_golden(self, state: dict, path: str | Path) -> None:
        """Raise UserError where the examples are answered otherwise than when `path` was saved."""
        now = self.task.answer(self.ask(self.examples)[1]) if self.examples else []
        for row, (before, after) in enumerate(zip(state["golden"]["answers"], now, strict=True), start=1):
            if not _same_answer(before, after, self.task):
                raise UserError(
                    f"{path}: golden row {row} was answered {before} when the file was saved and {after} now: "
                    "the code or a library has changed what this model computes."
                )


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file without running anything in it, and check that it is whole.

    Raises UserError where it is absent, truncated, changed, not ours, of a newer format, or holds code.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the best.pt or last.pt in it.")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint.")
    try:
        with warnings.catch_warnings():  # of torch, about files that are refused anyway
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: this is no checkpoint of plain data (it may hold code to run).") from None
    except Exception as error:  # whatever torch meets in bytes that are no file of its own
        raise UserError(f"{path}: truncated, or no checkpoint ({type(error).__name__}).") from None
    if not isinstance(state, dict) or state.get("magic") != MAGIC:
        raise UserError(f"{path}: a file of torch, but no checkpoint of this project.")
    if state["format"] > FORMAT:
        raise UserError(f"{path}: format {state['format']} is newer than this code, which reads up to {FORMAT}.")
    if weights_sha256(state["state_dict"]) != state["weights_sha256"]:
        raise UserError(f"{path}: the weights are not those that were saved (the file is damaged).")
    return state


def _same_answer(kept: dict, now: dict, task: Task) -> bool:
    """Compare two answers to 1e-5: probabilities, or values beside the mean and deviation of the training targets."""
    if "probabilities" in kept:
        return kept["probabilities"].keys() == now.get("probabilities", {}).keys() and all(
            abs(p - now["probabilities"][c]) <= 1e-5 for c, p in kept["probabilities"].items()
        )
    before, after = kept["prediction"], now["prediction"]
    return abs(before - after) <= 1e-5 * (task.std + abs(before - task.mean))


def kind_of(preprocessor) -> str | None:
    """Return tabular, image or text; None for no preprocessor."""
    return next((kind for kind, cls in PREPROCESSORS.items() if isinstance(preprocessor, cls)), None)
