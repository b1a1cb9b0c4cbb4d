"""Everything about y: the kind of problem, the encoding of targets, the loss, the metrics and the answer."""

import json
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cells import canonical, canonical_codes, to_numbers
from errors import UserError

REGRESSION_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def infer_kind(targets: pd.Series) -> str:
    """Tell binary, multiclass or regression from target values without nulls.

    Words and booleans are classes; numbers are classes where there are two of them, or few whole ones.
    """
    if pd.api.types.is_float_dtype(targets.dtype) and targets.nunique() > 20:
        return "regression"
    distinct = set(canonical_codes(targets)[1])
    if len(distinct) == 2:
        return "binary"
    numbers = pd.to_numeric(pd.Series(sorted(distinct)), errors="coerce")
    if numbers.isna().any():
        return "multiclass"
    few_and_whole = len(distinct) <= 20 and len(targets) >= 5 * len(distinct) and bool((numbers % 1 == 0).all())
    return "multiclass" if few_and_whole else "regression"


def _plain(key: str):
    """Return a class as a person and JSON would write it: True, 1, 0.5 or a word."""
    try:
        value = json.loads(key)
    except ValueError:
        return key
    return value if isinstance(value, (bool, int, float)) and canonical(value) == key else key


@dataclass(frozen=True)
class Task:
    """The problem, fitted on the training targets. `logits` are (N, out_features), or (N, K, out_features) of K
    ensemble members: the loss is their mean, the answer the mean of their probabilities."""

    kind: str  # binary, multiclass or regression
    target: str
    classes: list  # plain values in the order of the logits; empty for regression
    mean: float  # of the training targets, in their own units; for regression
    std: float
    loss_name: str
    class_weights: list[float]  # empty = all the same
    label_smoothing: float

    @classmethod
    def fit(
        cls,
        targets: pd.Series,
        kind: str = "auto",
        *,
        loss: str = "auto",
        class_weights: bool = False,
        label_smoothing: float = 0.0,
    ) -> "Task":
        """Learn the classes, or the mean and deviation, from training targets without nulls.

        Raises UserError where the targets do not fit the kind, or the loss does not.
        """
        targets = pd.Series(targets)
        name = str(targets.name)
        kind = infer_kind(targets) if kind == "auto" else kind
        if kind == "regression":
            if class_weights or label_smoothing:
                raise UserError("--class-weights and --label-smoothing are for classes, and this is a regression.")
            numbers = to_numbers(targets, "For classes give --task multiclass.")
            if np.ptp(numbers) == 0:
                raise UserError(f"target {name!r} has one value only: there is nothing to learn.")
            loss = "mse" if loss == "auto" else loss
            return cls(kind, name, [], float(numbers.mean()), float(numbers.std()), loss, [], 0.0)
        if loss != "auto":
            raise UserError(f"--loss {loss} is for regression; {kind} classification has cross-entropy.")
        counts = class_counts(*canonical_codes(targets))
        check_classes(counts, name, kind)
        classes = [_plain(key) for key in counts]
        if len({int if isinstance(c, float) else type(c) for c in classes}) > 1:
            classes = list(counts)  # words and numbers, or booleans and numbers: a table's column has one type
        classes = sorted(classes)
        balanced = [len(targets) / (len(counts) * counts[canonical(c)]) for c in classes] if class_weights else []
        loss = "binary_cross_entropy" if kind == "binary" else "cross_entropy"
        return cls(kind, name, classes, 0.0, 1.0, loss, balanced, label_smoothing)

    @property
    def out_features(self) -> int:
        """Logits per record: 1 for binary and regression, else one for each class."""
        return len(self.classes) if self.kind == "multiclass" else 1

    def encode(self, targets: pd.Series) -> Tensor:
        """Turn raw targets into what the loss wants: (N,) float32 0/1 or standardised values, or int64 class indices.

        Raises UserError, naming the row, for a null, a label that training did not have, or no number.
        """
        targets = pd.Series(targets)
        if self.kind == "regression":
            numbers = to_numbers(targets)
            if np.isnan(numbers).any():
                raise UserError(f"row {targets.index[np.isnan(numbers).argmax()]} has no {self.target!r}.")
            return torch.from_numpy(((numbers - self.mean) / self.std).astype(np.float32))
        index = {canonical(c): i for i, c in enumerate(self.classes)}
        codes, keys = canonical_codes(targets)
        encoded = np.array([index.get(key, -1) for key in keys], dtype=np.int64)[codes]
        if (encoded < 0).any():
            at = int((encoded < 0).argmax())
            raise UserError(
                f"row {targets.index[at]}, column {self.target!r}: {str(targets.iloc[at])!r} is no class of the "
                f"training rows ({', '.join(map(str, self.classes[:10]))})."
            )
        encoded = torch.from_numpy(encoded)
        return encoded.float() if self.kind == "binary" else encoded

    def decode(self, targets: Tensor) -> Tensor:
        """Undo `encode`: int64 class indices, or float64 values in the data's units."""
        return targets.double() * self.std + self.mean if self.kind == "regression" else targets.long()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the records, a scalar. Class weights multiply each record's own loss, so the mean of two
        batches is the mean of their records."""
        n, c = len(targets), self.out_features
        if logits.dim() not in (2, 3) or logits.shape[0] != n or logits.shape[-1] != c:
            raise ValueError(f"the network must return logits of shape {(n, c)}, not {tuple(logits.shape)}")
        if logits.dim() == 3:  # (N, K, C): every member answers for the record
            targets = targets.repeat_interleave(logits.shape[1])
            logits = logits.flatten(0, 1)
        if self.kind == "multiclass":
            losses = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction="none")
            return (losses * logits.new_tensor(self.class_weights)[targets] if self.class_weights else losses).mean()
        logits = logits.squeeze(1)
        if self.kind == "regression":
            return REGRESSION_LOSSES[self.loss_name](logits, targets)
        weight = None
        if self.class_weights:
            negative, positive = self.class_weights
            weight = negative + (positive - negative) * targets
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        return F.binary_cross_entropy_with_logits(logits, targets, weight=weight)

    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits into probabilities (N, number of classes), or values (N, 1) in the data's units, in float64."""
        logits = logits.double()
        if self.kind == "regression":  # as tensors: export makes float32 of a Python number
            values = logits * logits.new_tensor(self.std) + logits.new_tensor(self.mean)
        elif self.kind == "binary":
            values = torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=-1)
        else:
            values = torch.softmax(logits, dim=-1)
        return values.mean(dim=1) if values.dim() == 3 else values

    def metrics(self):
        """Return a fresh torchmetrics collection, updated with (`scores(logits)`, `decode(targets)`)."""
        import torchmetrics as tm
        from torchmetrics import classification as tc

        if self.kind == "binary":
            kinds = {"accuracy": tc.BinaryAccuracy, "roc_auc": tc.BinaryAUROC, "f1": tc.BinaryF1Score}
            metrics = {name: metric(validate_args=False) for name, metric in kinds.items()}
        elif self.kind == "multiclass":
            n = len(self.classes)
            metrics = {
                # torchmetrics averages over classes where it is not told: that is not what people call accuracy
                "accuracy": tc.MulticlassAccuracy(n, average="micro", validate_args=False),
                "roc_auc": tc.MulticlassAUROC(n, average=None, validate_args=False),  # averaged in `results`
                "f1": tc.MulticlassF1Score(n, average="macro", validate_args=False),
            }
        else:
            metrics = {
                "rmse": tm.MeanSquaredError(squared=False),
                "mse": tm.MeanSquaredError(),
                "mae": tm.MeanAbsoluteError(),
                "r2": tm.R2Score(),
            }
        collection = tm.MetricCollection(metrics, compute_groups=False)
        return collection.set_dtype(torch.float64)  # float32 sums of large squares lose digits

    def scores(self, logits: Tensor) -> Tensor:
        """What the metrics compare with the targets: (N, C) or, of the positive class or the value, (N,)."""
        values = self.activate(logits)
        return values if self.kind == "multiclass" else values[:, -1]

    def measure(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Return {"loss": …, metric: …} over all records at once, so that no batch size can change them."""
        collection = self.metrics()
        collection.update(self.scores(logits), self.decode(targets))
        return {"loss": float(self.loss(logits, targets)), **self.results(collection)}

    @staticmethod
    def results(metrics) -> dict[str, float]:
        """Compute a collection. ROC AUC is the mean over the classes that the targets hold, NaN where they hold one:
        torchmetrics would count a class without targets as 0."""
        values = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, metric in metrics.items(keep_base=True):
                few = name == "r2" and int(metric.total) < 2  # one row has no variance to explain
                values[name] = torch.tensor(torch.nan) if few else metric.compute()
        if "roc_auc" in values:
            present = torch.cat(metrics["roc_auc"].target).unique()
            each_class = (
                values["roc_auc"].expand(len(present)) if values["roc_auc"].dim() == 0 else values["roc_auc"][present]
            )
            values["roc_auc"] = each_class.mean() if len(present) > 1 else torch.tensor(torch.nan)
        return {name: float(value) for name, value in values.items()}

    def higher_is_better(self, monitor: str) -> bool:
        """Tell the direction of "loss" or a metric's name. Raises UserError for another name."""
        if monitor == "loss":
            return False
        metrics = self.metrics()
        if monitor not in metrics.keys(keep_base=True):
            names = ", ".join(["loss", *metrics.keys(keep_base=True)])
            raise UserError(f"--monitor {monitor}: a {self.kind} task has {names}.")
        return bool(metrics[monitor].higher_is_better)

    def columns(self, logits: Tensor) -> dict[str, np.ndarray]:
        """Return the answers as columns of a table: prediction, probability, probability_<class>; or prediction."""
        values = self.activate(logits).numpy()
        if self.kind == "regression":
            return {"prediction": values[:, 0]}
        best = values.argmax(axis=1)
        classes = np.array(self.classes, dtype=object if isinstance(self.classes[0], str) else None)
        return {
            "prediction": classes[best],
            "probability": values[np.arange(len(values)), best],
            **{f"probability_{c}": values[:, i] for i, c in enumerate(self.classes)},
        }

    def answer(self, logits: Tensor) -> list[dict]:
        """Return the answers ready for JSON: {"prediction": …, "probability": …, "probabilities": {class: p}}."""
        values = self.activate(logits).tolist()
        if self.kind == "regression":
            return [{"prediction": value[0]} for value in values]
        return [
            {
                "prediction": self.classes[p.index(max(p))],
                "probability": max(p),
                "probabilities": {str(c): q for c, q in zip(self.classes, p, strict=True)},
            }
            for p in values
        ]


def class_counts(codes: np.ndarray, keys: list[str]) -> dict[str, int]:
    """Count the rows of each class, by its canonical spelling, from what `canonical_codes` returns."""
    return dict(zip(keys, np.bincount(codes).tolist(), strict=True))


def check_classes(counts: dict[str, int], name: str, kind: str, fewest: int = 1) -> None:
    """Raise UserError where class counts do not make a `kind` problem with `fewest` rows a class."""
    if len(counts) == 1:
        raise UserError(f"target {name!r} has one class only ({next(iter(counts))!r}): there is nothing to tell apart.")
    if kind == "binary" and len(counts) > 2:
        raise UserError(
            f"target {name!r} has {len(counts)} different values and --task binary needs 2: "
            f"give --task {'multiclass' if len(counts) <= 20 else 'regression'}."
        )
    if len(counts) > 20 and len(counts) > 0.5 * sum(counts.values()):
        raise UserError(
            f"target {name!r} has {len(counts)} different values in {sum(counts.values())} rows: it looks like names "
            "or text. Choose another target (numbers to predict: --task regression)."
        )
    label, rows = min(counts.items(), key=lambda item: item[1])
    if rows < fewest:
        raise UserError(
            f"target {name!r}: class {label!r} has {rows} row{'s' * (rows > 1)} and needs {fewest}, one a split: "
            "add rows, merge the class with another, or leave it out (numbers to predict: --task regression)."
        )
