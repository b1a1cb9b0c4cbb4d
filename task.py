"""Everything about y: the kind of problem, the encoding of targets, the loss, the metrics and the predictions."""

import json
import math
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from preprocessing.number_format import PLAIN, missing_hint, to_numbers
from preprocessing.parsing import canonical, canonical_codes, holds_text
from preprocessing.targets import (
    class_codes,
    count_classes,
    infer_kind,
    is_missing,
    numbers_form,
    sorted_classes,
    with_points,
)

REGRESSION_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
MAX_LIVE_TARGET = 1e100  # larger targets would overflow when errors are squared and summed
TOLERANCE = 1e-5  # of a probability, or of a value relative to the spread of the targets


def wilson_interval(share: float, count: int) -> list[float]:
    """Return the 95 % interval [low, high] of a share of `count` records (Wilson, 1927)."""
    z2 = 1.96**2
    center = share + z2 / (2 * count)
    half = 1.96 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return [max(0.0, (center - half) / (1 + z2 / count)), min(1.0, (center + half) / (1 + z2 / count))]


@dataclass(frozen=True)
class Task:
    """A prediction problem, fitted on the training targets.

    Logits are (N, out_features), or (N, K, out_features) from an ensemble of K members: the loss is the mean over
    members, the prediction the mean of their probabilities.
    """

    kind: str  # binary, multiclass or regression
    target: str
    classes: list = field(default_factory=list)  # plain values in the order of the logits; empty for regression
    mean: float = 0.0  # of the training targets, in their own units; for regression
    std: float = 1.0
    loss_name: str = "mse"
    class_weights: list[float] = field(default_factory=list)  # empty = equal weights
    label_smoothing: float = 0.0
    form: str = PLAIN  # how numbers in text are written, see preprocessing/number_format.py
    temperature: float = 1.0  # of probabilities, see evaluation/calibration.py
    threshold: float = 0.5  # binary: the second class is predicted above this probability
    coverage: float = 0.0  # of the sets or intervals, see evaluation/conformal.py; 0 = none
    quantile: float = 0.0  # of the errors of validation records; regression: by their difficulty
    difficulty: list[float] = field(default_factory=list)  # regression: weights of `difficulty_of`; empty = all equal

    @classmethod
    def fit(
        cls,
        targets: pd.Series,
        kind: str = "auto",
        *,
        loss: str = "auto",
        class_weights: bool = False,
        label_smoothing: float = 0.0,
        form: str = "",
    ) -> "Task":
        """Learn the classes, or mean and standard deviation, from training targets without nulls.

        form: how numbers in text are written, see preprocessing/number_format.py; "" detects it.
        Raises UserError if the targets do not fit the kind, or the loss does not.
        """
        targets = pd.Series(targets)
        name, form = str(targets.name), form or numbers_form(targets) or PLAIN
        kind = infer_kind(targets, form) if kind == "auto" else kind
        if kind == "regression":
            if class_weights or label_smoothing:
                raise UserError("--class-weights and --label-smoothing are for classes; this is a regression.")
            advice = "For classes give --task multiclass."
            numbers = to_numbers(targets, form, lambda *wrong: f"{missing_hint(*wrong)} {advice}")
            if (large := np.abs(numbers) > MAX_LIVE_TARGET).any():
                row, number = targets.index[large.argmax()], numbers[large.argmax()]
                raise UserError(f"row {row}, target {name!r}: {number:g} is too large: scale the targets down.")
            if np.ptp(numbers) == 0:
                raise UserError(f"target {name!r} has one value only: there is nothing to learn.")
            loss = "mse" if loss == "auto" else loss
            return cls(kind, name, [], float(numbers.mean()), float(numbers.std()), loss, form=form)
        if loss != "auto":
            raise UserError(f"--loss {loss} is for regression; {kind} classification has cross-entropy.")
        counts = count_classes(*class_codes(targets, form), name, kind)
        classes = sorted_classes(counts)
        keys = [canonical(c, counts) for c in classes]
        balanced = [len(targets) / (len(counts) * counts[key]) for key in keys] if class_weights else []
        loss = "binary_cross_entropy" if kind == "binary" else "cross_entropy"
        return cls(kind, name, classes, 0.0, 1.0, loss, balanced, label_smoothing, form)

    @property
    def out_features(self) -> int:
        """Logits per record: 1 for binary and regression, else one per class."""
        return len(self.classes) if self.kind == "multiclass" else 1

    def summary(self) -> str:
        """Describe the problem in one line: "price: regression (mean 6253, std 2414)"."""
        if self.kind == "regression":
            written = "" if self.form == PLAIN else f"written {self.form}, "
            return f"{self.target}: regression ({written}mean {self.mean:.4g}, std {self.std:.4g})"
        shown = ", ".join(map(str, self.classes[:8])) + (", …" if len(self.classes) > 8 else "")
        return f"{self.target}: {self.kind} ({shown})"

    def encode(self, targets: pd.Series) -> Tensor:
        """Return what the loss expects: (N,) float32 0/1 or standardised values, or int64 class indices.

        Raises UserError, naming the row, for a null, a class that is not in the training rows, or not a number.
        """
        targets = pd.Series(targets)
        if self.kind == "regression":
            numbers = to_numbers(targets, self.form)
            if np.isnan(numbers).any():
                raise UserError(f"row {targets.index[np.isnan(numbers).argmax()]} has no {self.target!r}.")
            return torch.from_numpy(((numbers - self.mean) / self.std).astype(np.float32))
        index = {canonical(c, self._words): i for i, c in enumerate(self.classes)}
        codes, keys = canonical_codes(with_points(targets, self.form), self._words)
        encoded = np.array([index.get(key, -1) for key in keys], dtype=np.int64)[codes]
        if (encoded < 0).any():
            at = int((encoded < 0).argmax())
            raise UserError(
                f"row {targets.index[at]}, column {self.target!r}: {str(targets.iloc[at])!r} is not a class of the "
                f"training rows ({', '.join(map(str, self.classes[:10]))})."
            )
        encoded = torch.from_numpy(encoded)
        return encoded.float() if self.kind == "binary" else encoded

    @property
    def _words(self) -> set[str]:
        """Classes whose spelling is not canonical, such as "None" and "007"."""
        return {c for c in self.classes if isinstance(c, str) and canonical(c) != c}

    def has_target(self, targets: pd.Series) -> np.ndarray:
        """Return a mask of the rows whose target is known."""
        return ~is_missing(targets, not any(isinstance(c, str) for c in self.classes), self._words)

    def as_numbers(self, targets: pd.Series) -> pd.Series:
        """Return values such as 1.234,56 € as numbers, like the predictions; classes and plain numbers as they are."""
        if self.kind != "regression" or self.form == PLAIN or not holds_text(targets):
            return targets
        return pd.Series(to_numbers(targets, self.form), targets.index)

    def decode(self, targets: Tensor) -> Tensor:
        """Undo `encode`: int64 class indices, or float64 values in the data's units."""
        return targets.double() * self.std + self.mean if self.kind == "regression" else targets.long()

    def labels(self, targets: Tensor) -> np.ndarray | None:
        """Return the class index of each encoded target, None for regression."""
        return None if self.kind == "regression" else targets.long().numpy()

    def scores(self, targets: Tensor) -> np.ndarray:
        """Return encoded targets as float32 (N, out_features): a column of 0 and 1 for each class, or the values."""
        columns = F.one_hot(targets, len(self.classes)) if self.kind == "multiclass" else targets[:, None]
        return columns.float().numpy()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over records, a scalar. Class weights multiply the loss of each record, so the mean
        over two batches of the same size is the mean over their records."""
        n, c = len(targets), self.out_features
        if logits.dim() not in (2, 3) or logits.shape[0] != n or logits.shape[-1] != c:
            raise ValueError(f"the network must return logits of shape {(n, c)}, not {tuple(logits.shape)}")
        if logits.dim() == 3:  # (N, K, C): each member has its own loss
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
        """Return float64 probabilities (N, number of classes), or values (N, 1) in the data's units."""
        logits = logits.double()
        if self.kind == "regression":  # tensors, because an export would turn a Python number into float32
            values = logits * logits.new_tensor(self.std) + logits.new_tensor(self.mean)
        elif self.kind == "binary":
            values = torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=-1)
        else:
            values = torch.softmax(logits, dim=-1)
        values = values.mean(dim=1) if values.dim() == 3 else values
        if self.temperature != 1:  # after the mean over members, so that the order of the records stays
            values = torch.softmax(values.clamp_min(1e-300).log() / values.new_tensor(self.temperature), dim=-1)
        return values

    def invert(self, values: Tensor) -> Tensor:
        """Undo `activate`: return float32 logits (N, out_features) of probabilities, or of values in the data's units.

        For a temperature of 1.
        """
        if self.kind == "regression":
            return ((values - values.new_tensor(self.mean)) / values.new_tensor(self.std)).float()
        logits = values.clamp_min(1e-12).log()
        return (logits[:, 1:] - logits[:, :1] if self.kind == "binary" else logits).float()

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the index of the predicted class, (N,), for probabilities (N, number of classes)."""
        if self.kind == "binary":
            return (probabilities[:, 1] > self.threshold).long()
        return probabilities.argmax(dim=1)

    def sets(self, probabilities: Tensor) -> Tensor:
        """Return the prediction sets as a mask (N, number of classes). The predicted class is always in the set."""
        predicted = F.one_hot(self.decide(probabilities), len(self.classes)).bool()
        return (1 - probabilities <= self.quantile) | predicted

    def interval(self, logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower and upper ends, (N,), of the intervals of a regression in the data's units.

        values: what `activate` returns for these logits.
        """
        half, middle = self.quantile * self.std * self.difficulty_of(logits), values[:, 0]
        return middle - half, middle + half

    def difficulty_of(self, logits: Tensor) -> Tensor:
        """Return how large an error to expect of each record of a regression, (N,), on the scale of the logits."""
        if not self.difficulty:
            return torch.ones(len(logits), dtype=torch.float64)
        return torch.exp(self.difficulty_features(logits) @ torch.tensor(self.difficulty, dtype=torch.float64))

    def difficulty_features(self, logits: Tensor) -> Tensor:
        """Return (N, 4): what the error of a regression may follow, its prediction and the spread of an ensemble."""
        members = logits.double().flatten(1)
        mean, std = members.mean(dim=1).clamp(-3, 3), members.std(dim=1, correction=0)
        return torch.stack([torch.ones_like(mean), mean, mean.abs(), torch.log(std + 1e-2)], dim=1)

    def metrics(self):
        """Return a new torchmetrics collection, to be updated with (`metric_inputs(logits)`, `decode(targets)`)."""
        import torchmetrics as tm
        from torchmetrics import classification as tc

        own = {"sync_on_compute": False}  # of several processes, one computes the metrics of all records
        if self.kind == "regression":
            metrics = {"rmse": tm.MeanSquaredError(squared=False, **own), "mse": tm.MeanSquaredError(**own)}
            metrics |= {"mae": tm.MeanAbsoluteError(**own), "r2": tm.R2Score(**own)}
        elif self.kind == "binary":
            kinds = {"accuracy": tc.BinaryAccuracy, "roc_auc": tc.BinaryAUROC, "f1": tc.BinaryF1Score}
            metrics = {name: metric(validate_args=False, **own) for name, metric in kinds.items()}
            for name in ("accuracy", "f1"):
                metrics[name].threshold = self.threshold
        else:
            n, own = len(self.classes), own | {"validate_args": False}
            metrics = {
                # micro: torchmetrics' default, the mean over classes, is not what people call accuracy
                "accuracy": tc.MulticlassAccuracy(n, average="micro", **own),
                "roc_auc": tc.MulticlassAUROC(n, average=None, **own),  # averaged in `compute_metrics`
                "f1": tc.MulticlassF1Score(n, average="macro", **own),
            }
        collection = tm.MetricCollection(metrics, compute_groups=False)
        return collection.set_dtype(torch.float64)  # float32 sums of large squares lose digits

    def metric_inputs(self, logits: Tensor) -> Tensor:
        """Return what metrics compare with the targets: (N, C), or the positive class or value, (N,)."""
        values = self.activate(logits)
        return values if self.kind == "multiclass" else values[:, -1]

    def evaluate(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Return {"loss": …, metric: …} over all records at once, so that the batch size cannot change them.

        The loss is without label smoothing, which is for training alone.
        """
        collection = self.metrics()
        collection.update(self.metric_inputs(logits), self.decode(targets))
        loss = replace(self, label_smoothing=0.0).loss(logits, targets)
        return {"loss": float(loss), **self.compute_metrics(collection)}

    @staticmethod
    def compute_metrics(metrics) -> dict[str, float]:
        """Compute a collection. ROC AUC is the mean over classes that occur in the targets, and NaN if only one does:
        torchmetrics would count a class without targets as 0."""
        values = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, metric in metrics.items(keep_base=True):
                undefined = name == "r2" and int(metric.total) < 2  # one row has no variance to explain
                values[name] = torch.tensor(torch.nan) if undefined else metric.compute()
        if "roc_auc" in values:
            present, roc_auc = torch.cat(metrics["roc_auc"].target).unique(), values["roc_auc"]
            per_class = roc_auc if roc_auc.dim() == 0 else roc_auc[present]
            values["roc_auc"] = per_class.mean() if len(present) > 1 else torch.tensor(torch.nan)
        return {name: float(value) for name, value in values.items()}

    def higher_is_better(self, monitor: str) -> bool:
        """Return the direction of "loss" or a metric. Raises UserError for another name."""
        if monitor == "loss":
            return False
        metrics = self.metrics()
        if monitor not in metrics.keys(keep_base=True):
            names = ", ".join(["loss", *metrics.keys(keep_base=True)])
            raise UserError(f"--monitor {monitor}: a {self.kind} task has {names}.")
        return bool(metrics[monitor].higher_is_better)

    def to_columns(self, logits: Tensor) -> dict[str, np.ndarray]:
        """Return predictions as columns: prediction, probability, probability_<class>; for regression prediction.

        With a coverage also set, a JSON list of classes; for regression lower and upper.
        """
        activated = self.activate(logits)
        values = activated.numpy()
        added = self._uncertainty(logits, activated)
        if self.kind == "regression":
            return {"prediction": values[:, 0], **{name: np.array(cells) for name, cells in added.items()}}
        best = self.decide(activated).numpy()
        classes = np.array(self.classes, dtype=object if isinstance(self.classes[0], str) else None)
        return {
            "prediction": classes[best],
            "probability": values[np.arange(len(values)), best],
            **{f"probability_{c}": values[:, i] for i, c in enumerate(self.classes)},
            **{
                name: np.array([json.dumps(c, ensure_ascii=False) for c in cells], object)
                for name, cells in added.items()
            },
        }

    def _uncertainty(self, logits: Tensor, values: Tensor) -> dict[str, list]:
        """Return what a coverage adds to the predictions: {"set": …}, or {"lower": …, "upper": …}."""
        if not self.coverage:
            return {}
        if self.kind == "regression":
            lower, upper = self.interval(logits, values)
            return {"lower": lower.tolist(), "upper": upper.tolist()}
        return {"set": [[self.classes[i] for i in np.flatnonzero(row)] for row in self.sets(values).numpy()]}

    def from_columns(self, predictions: pd.DataFrame) -> np.ndarray:
        """Undo `to_columns`: return float64 probabilities (N, number of classes), or values (N, 1)."""
        names = ["prediction"] if self.kind == "regression" else [f"probability_{c}" for c in self.classes]
        return predictions[names].to_numpy(float, copy=True)

    def to_json(self, logits: Tensor) -> list[dict]:
        """Return predictions for JSON: {"prediction": …, "probability": …, "probabilities": {class: p}}.

        With a coverage also "set", or "lower" and "upper".
        """
        activated = self.activate(logits)
        values, added = activated.tolist(), self._uncertainty(logits, activated)
        if self.kind == "regression":
            found = [{"prediction": value} for (value,) in values]
        else:
            names, best = [str(c) for c in self.classes], self.decide(activated).tolist()
            found = [
                {"prediction": self.classes[i], "probability": p[i], "probabilities": dict(zip(names, p, strict=True))}
                for i, p in zip(best, values, strict=True)
            ]
        for name, cells in added.items():
            found = [prediction | {name: cell} for prediction, cell in zip(found, cells, strict=True)]
        return found

    @staticmethod
    def outcome(prediction: dict) -> str:
        """Return the label under which predictions are counted: the class, or "number"."""
        return str(prediction["prediction"]) if "probabilities" in prediction else "number"

    def same_prediction(self, before: dict, after: dict) -> bool:
        """Compare two predictions of `to_json`: probabilities to 1e-5, values to 1e-5 of the targets' spread."""
        if "probabilities" in before:
            p, q = before["probabilities"], after.get("probabilities", {})
            return p.keys() == q.keys() and all(abs(p[c] - q[c]) <= TOLERANCE for c in p)
        value = before["prediction"]
        return abs(value - after["prediction"]) <= TOLERANCE * (self.std + abs(value - self.mean))

    @property
    def output_names(self) -> list[str]:
        """Names of what an exported graph returns, as `graph_outputs` orders it."""
        return ["prediction", "logits"] if self.kind == "regression" else ["label", "probabilities", "logits"]

    def graph_outputs(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Return (class index, probabilities, logits), or (value, logits) for regression."""
        values = self.activate(logits)
        if self.kind == "regression":
            return values[:, 0], logits
        return self.decide(values), values.float(), logits

    def errors(self, predictions: list[dict], targets: list) -> list[float]:
        """Return the error of each prediction of `to_json`: 0 or 1 for classes, absolute difference for numbers.

        The predictions name their own classes: another model may have made them.
        Raises UserError, naming the row, for a target that is not one of these classes, or not a number.
        """
        series = pd.Series(targets, index=range(1, len(targets) + 1), name=self.target)
        if "probabilities" in predictions[0]:
            words = {c for c in predictions[0]["probabilities"] if canonical(c).lower() != c.lower()}
            classes = {canonical(c, words): c for c in predictions[0]["probabilities"]}
            keys = [canonical(target, words) for target in with_points(series, self.form)]
            for row, key in enumerate(keys, start=1):
                if key not in classes:
                    raise UserError(f"row {row}: {str(targets[row - 1])!r} is not a class ({', '.join(classes)}).")
            return [float(key != canonical(p["prediction"], words)) for key, p in zip(keys, predictions, strict=True)]
        numbers = to_numbers(series, self.form if holds_text(series) else PLAIN)
        invalid = np.isnan(numbers) | (np.abs(numbers) > MAX_LIVE_TARGET)
        if invalid.any():
            raise UserError(f"row {invalid.argmax() + 1}: {targets[invalid.argmax()]!r} is not a plausible number.")
        return [abs(t - p["prediction"]) for t, p in zip(numbers.tolist(), predictions, strict=True)]

    def live_score(self, count: int, mean: float, mean_square: float) -> dict:
        """Return {"targets", "accuracy" or "mae", "interval"} of `count` errors: the score and its 95 % interval.

        The interval is Wilson's (1927) for an accuracy, and the normal one for a mean absolute error.
        """
        if not count:
            return {"targets": 0}
        if self.kind == "regression":
            name, score, half = "mae", mean, 1.96 * math.sqrt(max(0.0, mean_square - mean**2) / count)
            interval = [max(0.0, score - half), score + half]
        else:
            name, score = "accuracy", 1 - mean
            interval = wilson_interval(score, count)
        return {"targets": count, name: score, "interval": interval}
