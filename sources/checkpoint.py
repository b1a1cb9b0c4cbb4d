"""Read a checkpoint file: checked before it is loaded, and without running any code in it."""

import hashlib
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError

FORMAT = 2  # of the checkpoint. A field added later gets a default; a change that old code cannot read makes it 3
MAGIC = "pytorch-training-project"


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """Return a hash of the names, types, shapes and bytes of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def content_sha256(checkpoint: dict) -> str:
    """Return a hash of everything in a checkpoint but the weights, which have a hash of their own in it."""
    content = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "sha256")}
    text = json.dumps(content, sort_keys=True, default=lambda tensor: weights_sha256({"": tensor}))
    return hashlib.sha256(text.encode()).hexdigest()


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file without running any code in it, and check that it is complete.

    Raises UserError if it is missing, truncated, modified, of another program or format, or holds code.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the best.pt or last.pt in it.")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint.")
    if str(path).endswith(".onnx"):
        raise UserError(f"{path}: ONNX files are not supported here: give the best.pt of the run.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():  # of torch, about files that are refused anyway
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: not a checkpoint of plain data (it may contain code).") from None
    except Exception as error:  # whatever zipfile and torch raise for bytes that torch did not write
        raise UserError(f"{path}: refused: truncated, or not a checkpoint ({type(error).__name__}).") from None
    if not isinstance(state, dict) or state.get("magic") != MAGIC:
        raise UserError(f"{path}: a PyTorch file, but not a checkpoint of this project.")
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: checkpoint format {state.get('format')}; this code reads {FORMAT}: train again.")
    try:
        _check_sizes(state, Path(path).stat().st_size)
        damaged = "the weights differ" if weights_sha256(state["state_dict"]) != state["weights_sha256"] else ""
        if not damaged and state.get("sha256", "") not in ("", content_sha256(state)):  # "": written by older code
            damaged = "the content differs"
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: not a complete checkpoint ({error}): train again.") from None
    if damaged:
        raise UserError(f"{path}: the file is damaged: {damaged} from those that were saved: use a copy of it.")
    return state


def _check_archive(path: str | Path) -> None:
    """Raise UserError if a file of torch, which is a zip archive, is damaged, or larger once it is unpacked."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)  # torch never does so
        if packed or sum(part.file_size for part in parts) > Path(path).stat().st_size:
            raise UserError(f"{path}: refused: not a checkpoint (its parts are larger than the file).")
        if archive.testzip():
            raise UserError(f"{path}: the file is damaged: its checksums do not match: use a copy of it.")


def _check_sizes(state: dict, size: int) -> None:
    """Raise ValueError for tensors and containers that are far larger in memory than in a file of `size` bytes.

    A tensor can repeat a few stored numbers, and a list can hold the same list many times.
    """
    if not all(isinstance(weight, Tensor) for weight in state["state_dict"].values()):
        raise ValueError("it has weights that are not tensors")
    values, count, tensors = [state], 0, 0
    while values:
        value = values.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("it has a tensor that is not a plain one")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {tuple(value.shape)} is not stored whole")
            tensors += value.numel() * value.element_size()
        elif isinstance(value, (dict, list, tuple)):
            count += len(value) + 1
            values += [v for v in (value.values() if isinstance(value, dict) else value) if not isinstance(v, str)]
        if count > size or tensors > 4 * size:  # tied weights are stored once
            raise ValueError("its content is larger than the file")
