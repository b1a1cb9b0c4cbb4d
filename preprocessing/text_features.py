"""Numbers made from the parts (n-grams or tokens) of a text column: scores of a linear model, topics, the length.

The texts are weighted by tf-idf (Spärck Jones, 1972). Scores: a ridge regression predicts the target, or each class as
0 and 1 (Hoerl and Kennard, 1970). Training rows get the scores of models that were fitted without them, so that the
network learns how far to trust a score (stacking: Wolpert, 1992). Topics: a truncated singular value decomposition
(latent semantic analysis: Deerwester et al., 1990).
"""

import base64
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.column import evenly_spaced
from preprocessing.number import NumberColumn
from preprocessing.ragged import UNKNOWN, Ragged
from preprocessing.text import TextColumn

TOPICS = 32
FOLDS = 5
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1)  # of the ridge regression, tried from the strongest to the weakest
FIT_ROWS = 20_000  # evenly spaced texts on which the penalty is chosen and the topics are found
MAX_CLASSES = 256  # more are too many scores


@dataclass(frozen=True)
class TextFeatures:
    """Scores (one per class; one if there are two classes or the target is a number), topics, and the length."""

    name: str
    source: str  # name of the text column
    offset: int  # of its ids: known n-grams have the ids 2 + offset …
    scores: int
    idf: str  # base64 of float32: inverse document frequency of the known n-grams
    table: str  # base64 of float16 (parts, scores + topics): what a part adds to each number
    mean: list[float]  # of each number over the training rows, and its standard deviation
    std: list[float]

    input: ClassVar[str] = "numbers"
    model_args = NumberColumn.model_args

    @classmethod
    def fit_encode(cls, column: TextColumn, ids: Ragged, targets: np.ndarray) -> tuple["TextFeatures", Tensor]:
        """Fit to the encoded training texts of a column; return the numbers (N, features) of these rows as well.

        targets: float32 (N, scores): a column for each class, or the target itself.
        """
        matrix, idf = _tf_idf(ids, column.known, column.offset)
        targets = targets if targets.shape[1] <= MAX_CLASSES else targets[:, :0]
        weights, out_of_fold = _ridge(matrix, targets)
        table = np.hstack([weights, _topics(matrix)]).astype("<f2")
        encoded = [base64.b64encode(array.tobytes()).decode() for array in (idf, table)]
        unscaled = cls(f"{column.name}: parts", column.name, column.offset, targets.shape[1], *encoded, [], [])
        numbers = unscaled._numbers(ids)
        numbers[:, : targets.shape[1]] = torch.from_numpy(out_of_fold)
        mean, std = numbers.double().mean(dim=0), numbers.double().std(dim=0, correction=0).clamp_min(1e-6)
        fitted = replace(unscaled, mean=mean.tolist(), std=std.tolist())
        return fitted, fitted._scaled(numbers)

    @property
    def features(self) -> list[str]:
        """Names of the numbers."""
        kinds = [f"score {i}" for i in range(self.scores)]
        kinds += [f"topic {i}" for i in range(self._table.shape[1] - self.scores)]
        return [f"{self.source} {kind}" for kind in (*kinds, "length")]

    @cached_property
    def _idf(self) -> Tensor:
        """Weights of all ids; padding and unknown parts have none."""
        idf = torch.frombuffer(bytearray(base64.b64decode(self.idf)), dtype=torch.float32)
        return F.pad(idf, (UNKNOWN + 1 + self.offset, 0))

    @cached_property
    def _table(self) -> Tensor:
        table = torch.frombuffer(bytearray(base64.b64decode(self.table)), dtype=torch.float16).float()
        first = UNKNOWN + 1 + self.offset
        return F.pad(table.view(len(self._idf) - first, -1), (0, 0, first, 0))

    def encode(self, ids: Ragged) -> Tensor:
        """Return the numbers (N, features) of encoded texts."""
        return self._scaled(self._numbers(ids))

    def transform(self, ids: Tensor) -> Tensor:
        """Compute `encode` for padded ids (N, length), in operations that ONNX has."""
        weights, ids = self._idf[ids.long()], ids.long()
        norm = weights.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
        summed = (self._table[ids] * (weights / norm)[..., None]).sum(dim=1)
        length = torch.log1p((weights > 0).sum(dim=1, keepdim=True).float())
        return self._scaled(torch.cat([summed, length], dim=1))

    def batch(self, x: Tensor, *, training: bool = False) -> Tensor:
        return x

    def _numbers(self, ids: Ragged) -> Tensor:
        flat, ends = ids.flat[: int(ids.lengths.sum())].long(), ids.lengths.cumsum(0)
        weights = self._idf[flat]
        text_of = torch.repeat_interleave(ids.lengths)
        squares = torch.zeros(len(ids)).index_add_(0, text_of, weights.square())
        weights = weights / squares.sqrt().clamp_min(1e-6)[text_of]
        summed = F.embedding_bag(flat, self._table, ends - ids.lengths, mode="sum", per_sample_weights=weights)
        return torch.cat([summed, torch.log1p(ids.count(ids.flat > UNKNOWN).float())[:, None]], dim=1)

    def _scaled(self, numbers: Tensor) -> Tensor:
        return (numbers - numbers.new_tensor(self.mean)) / numbers.new_tensor(self.std)


def _tf_idf(ids: Ragged, size: int, offset: int):
    """Return a sparse matrix (texts, parts) of tf-idf weights, each row of length 1, and the weight of each part."""
    import scipy.sparse

    flat, lengths = ids.flat[: int(ids.lengths.sum())].numpy(), ids.lengths.numpy()
    known = flat > UNKNOWN
    text_of, columns = np.repeat(np.arange(len(lengths)), lengths)[known], flat[known] - UNKNOWN - 1 - offset
    matrix = scipy.sparse.csr_matrix((np.ones(len(columns), np.float32), (text_of, columns)), (len(lengths), size))
    matrix.sum_duplicates()
    idf = (np.log((1 + len(lengths)) / (1 + np.bincount(matrix.indices, minlength=size))) + 1).astype(np.float32)
    squares = np.bincount(text_of, idf[columns] ** 2, len(lengths))  # as `_numbers` counts them: once an occurrence
    rows = np.repeat(np.arange(len(lengths)), np.diff(matrix.indptr))
    matrix.data *= idf[matrix.indices] / np.sqrt(squares[rows]).astype(np.float32)
    return matrix, idf


def _topics(matrix) -> np.ndarray:
    """Return the directions (parts, topics) of largest variance."""
    from sklearn.utils.extmath import randomized_svd

    rows = matrix[evenly_spaced(torch.arange(matrix.shape[0]), FIT_ROWS).numpy()]
    count = min(TOPICS, *(side - 1 for side in rows.shape))
    return randomized_svd(rows, max(1, count), n_iter=3, random_state=0)[2].T


def _ridge(matrix, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (weights (parts, scores) of all rows, scores (N, scores) of each row by the models without it).

    The models of all folds, and that of all rows, are solved at once: each has its own columns, and a mask of its rows.
    """
    count, scores = targets.shape
    fold_of = np.random.default_rng(0).permutation(count) % FOLDS
    mask = np.stack([fold_of != fold for fold in range(FOLDS)] + [np.ones(count, bool)], axis=1).astype(np.float32)
    mean = (mask.T @ targets) / mask.sum(axis=0)[:, None]  # (models, scores)

    def solve(rows: np.ndarray, penalty: float, start: np.ndarray | None):
        """Return (solution, weights, squared error out of fold) on some rows."""
        part, wide = matrix[rows], np.repeat(mask[rows], scores, axis=1)
        solution = _conjugate_gradients(part, (targets[rows, None] - mean).reshape(len(rows), -1), wide, penalty, start)
        weights = (part.T @ (wide * solution)).reshape(-1, FOLDS + 1, scores)
        return solution, weights, float(np.square(out_of_fold(rows, weights) - targets[rows]).mean())

    def out_of_fold(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        predicted, folds = np.empty((len(rows), scores), np.float32), fold_of[rows]
        for fold in range(FOLDS):
            inside = folds == fold
            predicted[inside] = matrix[rows[inside]] @ weights[:, fold] + mean[fold]
        return predicted

    if not scores:
        return np.empty((matrix.shape[1], 0), np.float32), targets
    sample = evenly_spaced(torch.arange(count), FIT_ROWS).numpy()
    best, start = None, None
    for penalty in PENALTIES:
        start, weights, error = solve(sample, penalty, start)
        if best and error > best[0]:
            break
        best = error, penalty, weights
    weights = best[2] if len(sample) == count else solve(np.arange(count), best[1], None)[1]
    return weights[:, FOLDS], out_of_fold(np.arange(count), weights) - mean[FOLDS]


def _conjugate_gradients(matrix, targets: np.ndarray, mask: np.ndarray, penalty: float, start: np.ndarray | None):
    """Solve (mask · matrix · matrixᵀ · mask + penalty) x = mask · targets, each column for itself: the dual of ridge
    regression (Saunders et al., 1998), by conjugate gradients (Hestenes and Stiefel, 1952)."""
    transposed = matrix.T.tocsr()

    def times(x: np.ndarray) -> np.ndarray:
        return mask * (matrix @ (transposed @ (mask * x))) + penalty * x

    wanted = mask * targets
    x = np.zeros_like(wanted) if start is None else start
    residual = wanted - times(x)
    direction, size = residual, np.square(residual).sum(axis=0)
    for _ in range(60):
        product = times(direction)
        step = size / ((direction * product).sum(axis=0) + 1e-30)
        x, residual = x + step * direction, residual - step * product
        before, size = size, np.square(residual).sum(axis=0)
        if (size <= 1e-6 * np.square(wanted).sum(axis=0)).all():
            break
        direction = residual + size / (before + 1e-30) * direction
    return x
