"""What follows from naming a pretrained network: its configuration, its images, and how it is trained."""

import json
from dataclasses import replace

from backbones.lite0 import Lite0, has_weights
from config import Config, DataConfig, ModelConfig
from errors import UserError
from preprocessing.hub import load_config, load_image_settings, reads_images

FEW_IMAGES = 5_000
TRY_IMAGES = 2_000  # training records up to which the features of lite0 take seconds
FINE_TUNE_ROWS = 2_000  # training records from which on a pretrained network is fine-tuned, if there is a GPU


def resolve_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of --model with "hf-image:NAME" for hf:NAME, if that is an encoder of images."""
    is_image = {name: name.startswith("hf:") and reads_images(name.removeprefix("hf:")) for name in names}
    return tuple(name.replace("hf:", "hf-image:", 1) if is_image[name] else name for name in names)


def advise(config: Config, names: list[str], args: dict, rows: int) -> list[str]:
    """Return a sentence for few images and a network that knows nothing yet, to print; otherwise nothing.

    args: constructor arguments of the networks called `names`.
    """
    if "cnn" not in names or args["in_channels"] == 1 or rows >= FEW_IMAGES:
        return []
    if tries_lite0(config, names, args, rows):
        return [f"{rows:,} images are few for a network without training: lite0, trained on ImageNet, is tried as well"]
    return [f"{rows:,} images are few for a network without training: try --model lite0, which is trained on ImageNet"]


def tries_lite0(config: Config, names: list[str], args: dict, rows: int) -> bool:
    """Return whether to compare a cnn with a head on frozen features of lite0: for few images in colour, unless flags
    decide about the network or the time. Which is better cannot be told beforehand."""
    is_open = config.model.model == ("auto",) and not config.training.time_budget
    return is_open and names == ["cnn"] and args["in_channels"] == 3 and rows <= TRY_IMAGES and has_weights()


def data_settings(data: DataConfig, names: tuple[str, ...], freeze: bool) -> DataConfig:
    """Return the flags of the data with what pretrained networks of images need: images up to the size that they were
    trained with, and no augmentation of images whose features are computed once."""
    hub = [name.removeprefix("hf-image:") for name in names if name.startswith("hf-image:")]
    largest = [load_image_settings(name)["size"] for name in hub] + [Lite0.MAX_SIZE] * ("lite0" in names)
    if not largest:
        return data
    augment = "none" if freeze else data.augment
    return replace(data, image_size=data.image_size or -largest[0], augment=augment)


def is_pretrained(name: str) -> bool:
    return name == "lite0" or ":" in name


def pretrained_args(names: list[str], freeze: bool) -> dict:
    """Return the constructor arguments that only the pretrained networks among `names` need."""
    args = {}
    for kind, name in (name.split(":", 1) for name in names if ":" in name):
        config = json.loads(load_config(name).to_json_string(use_diff=False))
        if kind == "hf":
            args["encoder"] = config
        else:
            args["image_encoder"] = {"config": config, **load_image_settings(name)}
    return args | ({"freeze": freeze} if any(map(is_pretrained, names)) else {})


def settle_training(model: ModelConfig, rows: int, on_cpu: bool, notes: list[str]) -> ModelConfig:
    """Return the flags with `freeze` or `fine_tune` set if there is a pretrained network: as they are given, or else
    frozen on a CPU, where fine-tuning takes minutes to hours, and for few training records.

    Raises UserError for --freeze or --fine-tune without a pretrained network.
    """
    pretrained = " ".join(name for name in model.model if is_pretrained(name))
    if not pretrained and (model.freeze or model.fine_tune):
        flag = "--freeze" if model.freeze else "--fine-tune"
        raise UserError(f"{flag} is for pretrained networks: give --model lite0 or hf:NAME as well.")
    if not pretrained or model.freeze or model.fine_tune:
        return model
    if on_cpu or rows < FINE_TUNE_ROWS:
        why = "there is no GPU" if on_cpu else f"there are fewer than {FINE_TUNE_ROWS:,} training rows"
        notes.append(f"{pretrained}: frozen, because {why}; --fine-tune trains all of it")
        return replace(model, freeze=True)
    notes.append(f"{pretrained}: fine-tuned; --freeze trains only the head, in seconds")
    return replace(model, fine_tune=True)
