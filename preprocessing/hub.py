"""Load configurations, tokenizers, image sizes and weights of Hugging Face models: --model hf:NAME."""

import json
import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from errors import UserError

MAX_TOKENS = 512  # unless --max-length is given


def from_hugging_face(kind: str, name: str):
    """Return transformers' `kind` (AutoConfig, AutoTokenizer, AutoModel) of a model, by its name or folder.

    Raises UserError if `transformers` is not installed or the model cannot be loaded.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"--model hf:{name} needs another library: pip install transformers.") from None
    transformers.utils.logging.disable_progress_bar()
    offline = not os.path.isdir(name) and _is_offline()
    try:
        return getattr(transformers, kind).from_pretrained(name, local_files_only=offline)
    except (OSError, ValueError) as error:
        if offline:
            message = "the hub cannot be reached, and the model was not downloaded before: give a local folder."
            raise UserError(f"--model hf:{name}: {message}") from None
        raise UserError(f"--model hf:{name}: the model cannot be loaded ({str(error).splitlines()[0]}).") from None


@cache
def _is_offline() -> bool:
    """Return whether the hub cannot be reached. The library itself would try for minutes."""
    from huggingface_hub.constants import ENDPOINT

    url = urlsplit(ENDPOINT)
    try:
        if not getproxies():
            socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
    except OSError:
        return True
    return False


@cache
def load_config(name: str):
    """Return the configuration of a model, of transformers' PretrainedConfig."""
    return from_hugging_face("AutoConfig", name)


def reads_images(name: str) -> bool:
    """Return whether a model is an encoder of images; otherwise it reads texts, or is refused by `load_tokenizer`."""
    config = load_config(name)
    if not hasattr(config, "num_channels"):
        return False
    from transformers import MODEL_MAPPING

    return type(config) in MODEL_MAPPING and MODEL_MAPPING[type(config)].main_input_name == "pixel_values"


def load_image_settings(name: str) -> dict:
    """Return the images that an encoder was trained with, from its preprocessor_config.json: {"size": side in pixels,
    "mean", "std": of each channel, for pixels from 0 to 1, "mode": interpolation}.

    Raises UserError if the file is missing or does not say so.
    """
    from transformers.utils import cached_file

    try:
        state = json.loads(Path(cached_file(name, "preprocessor_config.json")).read_text(encoding="utf-8"))
        size = state.get("crop_size") or state["size"]
        size = next(iter(size.values())) if isinstance(size, dict) else size
        return {
            "size": int(size),
            "mean": [float(x) for x in state["image_mean"]],
            "std": [float(x) for x in state["image_std"]],
            "mode": "bilinear" if state.get("resample") == 2 else "bicubic",  # Pillow's number
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"--model hf:{name}: preprocessor_config.json cannot be read ({problem}).") from None


def load_tokenizer(name: str) -> tuple[str, int]:
    """Return (the tokenizer of a text encoder as JSON, how many tokens the encoder reads at most, up to MAX_TOKENS).

    Raises UserError if the model is not a text encoder, or its tokenizer not of the `tokenizers` library.
    """
    from tokenizers import Tokenizer

    config = load_config(name)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise UserError(f"--model hf:{name} is a {config.model_type}: only encoders of texts or images can be used.")
    tokenizer = from_hugging_face("AutoTokenizer", name)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"--model hf:{name}: its tokenizer does not use the `tokenizers` library.")
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.no_padding()
    inner.no_truncation()
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    return inner.to_str(), min(MAX_TOKENS, positions, tokenizer.model_max_length)
