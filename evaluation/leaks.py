"""Find what gives the target away without being known when the model is used: a column, a word, the size of a file."""

import numpy as np
import torch
from torch import Tensor

from preprocessing.column import evenly_spaced

LEAK = 0.995  # score, 0 = a guess and 1 = perfect, from which on something alone gives the target away
ALONE = 0.9  # score from which on a column is suspicious that is as good as all columns together …
OTHERS = 0.6  # … and far better than the next one, by this factor
ROWS = 5_000  # training records, and validation records, that are read
MIN_RECORDS = 20


def find_leaks(splits, task, preprocessor, encoded: list[dict]) -> list[tuple[str, str]]:
    """Return findings as (check, sentence).  encoded: as `audit` takes it.

    Trees are fitted to training records and scored on validation records. Full ones: a copy of the target stays
    visible in them, and noise that they learn by heart is of no use on validation records.
    """
    parts = (splits.train, splits.val)
    targets = [task.encode(part[splits.target]) for part in parts]
    rows = [evenly_spaced(torch.arange(len(each)), ROWS) for each in targets]
    y, expected = (each[some].numpy() for each, some in zip(targets, rows, strict=True))
    if len(expected) < MIN_RECORDS:
        return []
    plain = {
        name: [encoded[i][name][rows[i]].reshape(len(rows[i]), -1).numpy() for i in (0, 1)]
        for name in preprocessor.names
        if _is_plain(encoded[0][name])
    }
    scores = {name: _tree_score(task, x, y, x_val, expected)[0] for name, (x, x_val) in plain.items()}
    several = len(preprocessor.names) > 1
    found = [
        (
            "target leak",
            f"Column {name!r} alone predicts {task.target} ({score:.1%} of the way from a guess to certainty). If "
            f"it is not known when the model is used, leave it out: --columns {name}=drop.",
        )
        for name, score in scores.items()
        if several and score >= LEAK
    ]
    if not found and len(plain) > 2:
        found += _find_best_alone(task, plain, scores, y, expected)
    return [*found, *_find_shortcuts(parts, rows, task, preprocessor, encoded, y, expected)]


def _find_best_alone(task, plain: dict, scores: dict[str, float], y, expected) -> list[tuple[str, str]]:
    """Find a column that predicts nearly as well as all columns together, while no other is close to it."""
    best, second = sorted(scores, key=scores.get, reverse=True)[:2]
    if scores[best] < ALONE or scores[second] > OTHERS * scores[best]:
        return []
    from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor

    forest = (ExtraTreesRegressor if task.kind == "regression" else ExtraTreesClassifier)(50, random_state=0)
    x, x_val = (np.hstack([values[i] for values in plain.values()]) for i in (0, 1))
    if _score(task, y, expected, forest.fit(x, y).predict(x_val)) > scores[best] + 0.01:
        return []
    return [
        (
            "target leak",
            f"Column {best!r} alone predicts {task.target} as well as all columns together ({scores[best]:.0%} of the "
            f"way from a guess to certainty). If it is computed from {task.target}, or not known when the model is "
            f"used, leave it out: --columns {best}=drop.",
        )
    ]


def _find_shortcuts(parts, rows, task, preprocessor, encoded, y, expected) -> list[tuple[str, str]]:
    """Find words of texts, and properties of files, that alone tell the classes apart."""
    if task.kind == "regression":
        return []
    found, count = [], len(rows[0])
    for column in preprocessor.columns:
        some = [part[column.name].iloc[each.numpy()] for part, each in zip(parts, rows, strict=True)]
        features = column.shortcuts(some)
        if features is None:
            continue
        x = features.to_numpy(np.float32)
        score, tree = _tree_score(task, x[:count], y, x[count:], expected, leaves=2 * len(task.classes))
        if score >= LEAK:
            used = [features.columns[i] for i in np.argsort(-tree.feature_importances_)[:3]]
            used = [name for name in used if tree.feature_importances_[list(features).index(name)] > 0.1]
            found.append((
                "target leak",
                f"In column {column.name!r}, {' and '.join(used)} alone {'predicts' if len(used) == 1 else 'predict'} "
                f"{task.target} ({score:.1%} of the way from a guess to certainty). The model will rely on it: remove "
                "it from the data if it is not there when the model is used.",
            ))  # fmt: skip
    return found


def _is_plain(values) -> bool:
    return isinstance(values, Tensor) and values.dim() <= 2


def _tree_score(task, x, y, x_val, expected, leaves: int | None = None):
    """Return (score on validation records, the tree).  leaves: at most so many; None = a full tree."""
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    tree = DecisionTreeRegressor if task.kind == "regression" else DecisionTreeClassifier
    tree = tree(random_state=0, max_leaf_nodes=leaves).fit(x, y)
    return _score(task, y, expected, tree.predict(x_val)), tree


def _score(task, seen: np.ndarray, expected: np.ndarray, predicted: np.ndarray) -> float:
    """Return 0 for a guess and 1 for perfect predictions."""
    if task.kind == "regression":
        return 1 - float(((predicted - expected) ** 2).mean() / max(expected.var(), 1e-12))
    values, counts = np.unique(seen, return_counts=True)
    guess = (expected == values[counts.argmax()]).mean()
    return float(((predicted == expected).mean() - guess) / max(1 - guess, 1e-12))
