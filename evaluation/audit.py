"""Find what makes an evaluation untrustworthy: records in two splits, columns that give the target away, rare classes.

Each finding is {"check", "finding"}: a name and a sentence.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from preprocessing.column import evenly_spaced
from preprocessing.parsing import canonical_codes

SHARE = 0.01  # of the test records: fewer duplicates hardly change a metric
RICH = 20  # distinct records per hundred: where rows are less distinct, equal ones are no surprise
LEAK = 0.995  # score of a single column, 0 = a guess and 1 = perfect, from which on it gives the target away
FEW_TEST, RARE = 10, 0.05  # test records of a class, share of a class
ROWS = 5_000  # records that a check of a column reads


def audit(splits, task, preprocessor, encoded: list[dict]) -> list[dict]:
    """Return the findings.  encoded: the columns of train, validation and test, as `fit_splits` returns them."""
    found = [
        *_duplicates(splits, preprocessor, encoded),
        *_leaks(splits, task, preprocessor, encoded),
        *_rare_classes(splits, task),
    ]
    return [{"check": check, "finding": finding} for check, finding in found]


def _duplicates(splits, preprocessor, encoded: list[dict]) -> list[tuple[str, str]]:
    """Find equal records in two splits, and equal records with different targets."""
    parts, target = (splits.train, splits.val, splits.test), splits.target
    names = preprocessor.names
    hashes = [_hash(part[names], columns) for part, columns in zip(parts, encoded, strict=True)]
    every = np.concatenate(hashes)
    codes, counts = np.unique(every, return_inverse=True, return_counts=True)[1:]
    if 100 * len(counts) < RICH * len(every) or len(every) < 2:
        return []
    found = []
    copied = np.isin(hashes[2], np.concatenate(hashes[:2]))
    if copied.mean() > SHARE:
        row = splits.test.index[copied.argmax()]
        others = pd.Index(hashes[0]).append(pd.Index(hashes[1]))
        twin = splits.train.index.append(splits.val.index)[(others == hashes[2][copied.argmax()]).argmax()]
        found.append((
            "duplicates",
            f"{copied.sum()} of {len(copied)} test records ({copied.mean():.0%}) stand in the training or validation "
            f"split as well, such as row {row}, which equals row {twin}: the test metrics are too good. Remove "
            "duplicates, or give the same value in a --group column.",
        ))  # fmt: skip
    if splits.kind != "regression":
        labels = canonical_codes(pd.concat([part[target] for part in parts]))[0]
        first = np.zeros(len(counts), int)
        first[codes[::-1]] = labels[::-1]
        differs = labels != first[codes]
        if differs.mean() > SHARE / 2:
            index = np.concatenate([part.index for part in parts])
            row, code = index[differs.argmax()], codes[differs.argmax()]
            other = index[(codes == code).argmax()]
            found.append((
                "conflicting targets",
                f"{differs.sum()} records equal another one but have another {target}, such as rows {other} and {row}: "
                "no model can predict both.",
            ))  # fmt: skip
    return found


def _hash(records: pd.DataFrame, encoded: dict) -> np.ndarray:
    """Return a hash of the cells of each record; of images, of their pixels."""

    def comparable(cells: pd.Series) -> pd.Series:
        values = encoded[cells.name]
        if isinstance(values, Tensor) and values.dim() == 4:
            return pd.Series([image.numpy().tobytes() for image in values], cells.index).map(hash)
        is_number = pd.api.types.is_numeric_dtype(cells)  # a column of a second file may have whole numbers only
        return cells.astype(float) if is_number else cells.map(str)

    return pd.util.hash_pandas_object(records.apply(comparable), index=False).to_numpy()


def _leaks(splits, task, preprocessor, encoded: list[dict]) -> list[tuple[str, str]]:
    """Find columns that alone predict the target of validation records nearly perfectly."""
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    tree = DecisionTreeRegressor if task.kind == "regression" else DecisionTreeClassifier
    targets = [task.encode(part[splits.target]) for part in (splits.train, splits.val)]
    rows = [evenly_spaced(torch.arange(len(each)), ROWS) for each in targets]
    y, expected = (each[some].numpy() for each, some in zip(targets, rows, strict=True))
    names = [name for name in preprocessor.names if _is_plain(encoded[0][name])]
    if len(names) < 2 or len(expected) < 20:
        return []
    found = []
    for name in names:
        x, x_val = (encoded[i][name][rows[i]].reshape(len(rows[i]), -1).numpy() for i in (0, 1))
        # A full tree: a copy of the target stays visible in it, and noise that it learns by heart is of no use
        # on validation records.
        model = tree(random_state=0)
        score = _score(task, y, expected, model.fit(x, y).predict(x_val))
        if score >= LEAK:
            found.append((
                "target leak",
                f"Column {name!r} alone predicts {task.target} ({score:.1%} of the way from a guess to certainty). If "
                f"it is not known when the model is used, leave it out: --columns {name}=drop.",
            ))  # fmt: skip
    return found


def _is_plain(values) -> bool:
    return isinstance(values, Tensor) and values.dim() <= 2


def _score(task, seen: np.ndarray, expected: np.ndarray, predicted: np.ndarray) -> float:
    """Return 0 for a guess and 1 for perfect predictions."""
    if task.kind == "regression":
        return 1 - float(((predicted - expected) ** 2).mean() / max(expected.var(), 1e-12))
    values, counts = np.unique(seen, return_counts=True)
    guess = (expected == values[counts.argmax()]).mean()
    return float(((predicted == expected).mean() - guess) / max(1 - guess, 1e-12))


def _rare_classes(splits, task) -> list[tuple[str, str]]:
    if task.kind == "regression":
        return []
    train, test = (
        np.bincount(task.encode(part[splits.target]).long(), minlength=len(task.classes))
        for part in (splits.train, splits.test)
    )
    found = []
    rare = [i for i in range(len(train)) if train[i] < RARE * train.sum() / max(1, len(train) / 2)]
    if rare:
        shown = ", ".join(f"{task.classes[i]} ({train[i]} of {train.sum()} rows)" for i in rare[:5])
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        found.append(("rare classes", f"Rare in training: {shown}{more}. Look at recall and F1 rather than accuracy."))
    few = [i for i in range(len(test)) if test[i] < FEW_TEST]
    if few:
        shown = ", ".join(f"{task.classes[i]} ({test[i]})" for i in few[:5])
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        found.append(("few test records", f"Few test records of {shown}{more}: their metrics are uncertain."))
    return found
