"""What tune.py tries for each flag that the networks read."""

import inspect
from dataclasses import asdict, fields, replace
from typing import get_type_hints

import optuna

from config import Config, Search
from evaluation.report import as_flag
from model import network_class
from search.trial import Data

FEWEST_EPOCHS = 4


def search_space(data: Data, fixed: set[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return what is tried for each flag that the networks read and that is not `fixed`."""
    networks = [network_class(name) for name in data.pipeline.model_spec["names"]]
    read = set().union(*(inspect.signature(network.__init__).parameters for network in networks))
    space = {}
    for group in (data.config.model, data.config.training):
        for name, hint in get_type_hints(type(group), include_extras=True).items():
            search = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Search)), None)
            if search is None or name in fixed or (group is data.config.model and name not in read):
                continue
            if name == "hidden" and (len(networks) > 1 or not hasattr(networks[0], "HIDDEN")):
                continue
            space[name] = _distribution(search, name, data)
    return space


def _distribution(search: Search, name: str, data: Data) -> optuna.distributions.BaseDistribution:
    if search.choices:
        return optuna.distributions.CategoricalDistribution(search.choices)
    if name == "epochs":  # fewer than planned: noisy data are learned by heart in many
        least = min(FEWEST_EPOCHS, data.planned.epochs)
        return optuna.distributions.IntDistribution(least, data.planned.epochs, log=True)
    return optuna.distributions.FloatDistribution(search.low, search.high, log=search.log)


def default_params(data: Data, space: dict) -> dict:
    """Return the point of the search space that stands for the default flags."""
    values = {"hidden": 1.0, "dropout": data.pipeline.model_spec["args"].get("dropout", 0.0)}
    flags = asdict(data.config.model) | asdict(data.planned) | values
    return {name: flags[name] for name in space}


def first_params(data: Data, space: dict) -> list[dict]:
    """Return the settings that are tried before the search learns from trials: the default, and some that are often
    better on noisy data, on smooth data, and on few rows."""
    default = default_params(data, space)
    shorter, least = round(0.4 * data.planned.epochs), min(FEWEST_EPOCHS, data.planned.epochs)
    often_good = [
        {"epochs": max(least, shorter), "dropout": 0.3, "weight_decay": 0.1},
        {"hidden": 2.0, "dropout": 0.2, "lr": 2e-3},
        {"lr": 1.5e-3, "weight_decay": 0.03},
        {"hidden": 0.5, "dropout": 0.4, "weight_decay": 0.03},
        {"epochs": max(least, shorter), "hidden": 2.0, "dropout": 0.4, "weight_decay": 0.1},
    ]
    return [default, *(default | {n: x for n, x in each.items() if n in space} for each in often_good)]


def with_params(data: Data, params: dict) -> Config:
    """Return the flags of a trial."""
    values = {
        name: float(f"{value:.3g}") if isinstance(value, float) and name != "hidden" else value
        for name, value in params.items()
    }
    if "hidden" in values:
        own = network_class(data.pipeline.model_spec["names"][0]).HIDDEN
        values["hidden"] = () if values["hidden"] == 1 else tuple(round(width * values["hidden"]) for width in own)
    config = data.config
    model, training = (
        replace(group, **{name: value for name, value in values.items() if hasattr(group, name)})
        for group in (config.model, config.training)
    )
    return replace(config, model=model, training=training)


def describe(data: Data, params: dict) -> str:
    """Return the flags of a trial that differ from the fixed ones, as a person writes them."""
    config, flags = with_params(data, params), []
    for group in (config.model, config.training):
        names = [field.name for field in fields(group) if field.name in params]
        values = {name: getattr(group, name) for name in names}
        flags += [as_flag(name, list(x) if isinstance(x, tuple) else x) for name, x in values.items() if x != ()]
    return " ".join(flags)
