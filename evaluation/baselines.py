"""What simple models reach on the same split: a guess, a linear model, boosted trees."""

import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.comparison import compare_means, record_losses
from preprocessing import gather
from preprocessing.column import evenly_spaced

ROWS = 20_000  # training records, evenly spaced, that the baselines are fitted to
PIXELS = 12  # side of the images that they read
WORK = 4e8  # records × columns × trees of the boosted trees: some seconds
TREES, TREES_OF_ALL_CLASSES = (10, 100), 300


def evaluate_baselines(task, preprocessor, train_loader, test_loader) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Fit the baselines to training records; return their test metrics, and their logits (N, out_features).

    They read the same encoded numbers (those of texts among them) and categories as the network, and the pixels of
    small versions of the images.
    """
    task = replace(task, temperature=1.0, threshold=0.5)
    (numbers, codes), targets = _read(preprocessor, train_loader.dataset, ROWS)
    (test_numbers, test_codes), test_targets = _read(preprocessor, test_loader.dataset)
    logits = {"guess": _guess(task, targets).repeat(len(test_targets), 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence
        if numbers.shape[1] + codes.shape[1]:
            logits["linear"] = _linear(task, (numbers, codes), targets, (test_numbers, test_codes))
            inputs, test_inputs = np.hstack([numbers, codes]), np.hstack([test_numbers, test_codes])
            logits["boosted trees"] = _trees(task, inputs, targets, test_inputs)
    return {name: task.evaluate(each, test_targets) for name, each in logits.items()}, logits


def _read(preprocessor, dataset, count: int = 0) -> tuple[tuple[np.ndarray, np.ndarray], Tensor]:
    """Return ((numbers (N, F), category codes (N, C)), targets) of `count` records of a data set, or of all."""
    rows = torch.arange(len(dataset))
    rows = evenly_spaced(rows, count) if count else rows
    empty = np.zeros((len(rows), 0), np.float32)
    parts: dict[str, list[np.ndarray]] = {"numbers": [], "image": [], "categories": []}
    for some in rows.split(512):
        inputs = {name: x for name, x in dataset.inputs.items() if name in parts}
        inputs = preprocessor.batch(gather(inputs, some), training=False) if inputs else {}
        for name, x in inputs.items():
            small = F.adaptive_avg_pool2d(x, min(PIXELS, x.shape[-1])).flatten(1) if x.dim() == 4 else x
            parts[name].append(small.numpy())
    numbers, image, codes = (np.concatenate(part) if part else empty for part in parts.values())
    return (np.hstack([numbers, image]), codes), dataset.targets[rows]


def _guess(task, targets: Tensor) -> Tensor:
    """Return the logits (out_features,) of the shares of the classes, or of the mean."""
    shares = torch.from_numpy(task.scores(targets)).double().mean(dim=0).clamp(1e-6, 1 - 1e-6)
    return {"binary": shares.logit(), "multiclass": shares.log(), "regression": shares * 0}[task.kind].float()


def _linear(task, inputs, targets: Tensor, test_inputs) -> Tensor:
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    scaler, encoder = StandardScaler().fit(inputs[0]) if inputs[0].shape[1] else None, None
    if inputs[1].shape[1]:
        encoder = OneHotEncoder(handle_unknown="ignore", dtype=np.float32).fit(inputs[1])

    def matrix(numbers: np.ndarray, codes: np.ndarray):
        parts = [sparse.csr_matrix(scaler.transform(numbers))] if scaler else []
        return sparse.hstack([*parts, *([encoder.transform(codes)] if encoder else [])], format="csr")

    model = Ridge(1.0) if task.kind == "regression" else LogisticRegression(C=0.3, max_iter=200)
    model.fit(matrix(*inputs), targets.numpy())
    return _logits(task, model, matrix(*test_inputs))


def _trees(task, inputs: np.ndarray, targets: Tensor, test_inputs: np.ndarray) -> Tensor:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    trees = min(TREES_OF_ALL_CLASSES // task.out_features, int(WORK / (inputs.size * task.out_features + 1)))
    model = HistGradientBoostingRegressor if task.kind == "regression" else HistGradientBoostingClassifier
    model = model(max_iter=min(TREES[1], max(TREES[0], trees)), early_stopping=False, random_state=0)
    return _logits(task, model.fit(inputs, targets.numpy()), test_inputs)


def _logits(task, model, inputs) -> Tensor:
    if task.kind == "regression":
        return torch.from_numpy(np.asarray(model.predict(inputs))).float()[:, None]
    p = np.full((inputs.shape[0], len(task.classes)), 1e-6)
    p[:, model.classes_.astype(int)] = model.predict_proba(inputs).clip(1e-6)
    return task.invert(torch.from_numpy(p / p.sum(axis=1, keepdims=True)))


def compare_with_baselines(task, logits: Tensor, targets: Tensor, baselines: dict[str, Tensor]) -> str:
    """Return a sentence if the network is not better than the best baseline beyond noise, otherwise "".

    Compared are squared errors, or logarithms of the probability of the class, record by record: the difference is
    beyond noise if its 95 % interval (see evaluation/comparison.py) does not hold 0.
    """
    plain, labels = replace(task, temperature=1.0), task.decode(targets).numpy()
    losses = {
        name: record_losses(task, plain.activate(each).numpy(), labels)
        for name, each in baselines.items()
        if name != "guess"
    }
    if not losses or len(targets) < 2:
        return ""
    name = min(losses, key=lambda name: losses[name].mean())
    own = record_losses(task, task.activate(logits).numpy(), labels)
    paired = compare_means(np.stack([own, losses[name]], axis=1))
    low, high = paired.interval(0, 1)
    if high < 0:
        return ""
    what = "mean squared error" if task.kind == "regression" else "log-loss"
    figures = f"{what} {paired.values[0]:.4g} against {paired.values[1]:.4g} on {len(targets)} test rows"
    if low > 0:
        return f"The baseline “{name}” is better than the network: {figures}."
    return f"The network is not better than the baseline “{name}” beyond noise: {figures}."
