"""Numbers made from texts: the same in every path, and honest on the rows that they were fitted to."""

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from config import DataConfig, from_plain
from preprocessing.preprocessor import Preprocessor
from preprocessing.ragged import Ragged
from preprocessing.text import TextColumn
from preprocessing.text_features import TextFeatures, _conjugate_gradients, _tf_idf

WORDS = ["good", "bad", "fine", "poor", "nice", "ugly", "warm", "cold", "fast", "slow"]


def texts(count: int, seed: int = 0) -> tuple[pd.Series, np.ndarray]:
    """Texts of random words, and targets that are 1 where "good" occurs."""
    random = np.random.default_rng(seed)
    rows = [list(random.choice(WORDS, 6)) for _ in range(count)]
    targets = np.array([["good" in row] for row in rows], dtype=np.float32)
    return pd.Series([" ".join(row) for row in rows], name="t"), targets


def fit(values: pd.Series, targets: np.ndarray) -> tuple[TextColumn, TextFeatures, torch.Tensor]:
    column, ids = TextColumn.fit_encode(values, DataConfig())
    return column, *TextFeatures.fit_encode(column, ids, targets)


def test_the_score_ranks_new_texts():
    column, features, numbers = fit(*texts(200))
    new, targets = texts(100, seed=1)
    score = features.encode(column.encode(new))[:, 0]
    assert roc_auc_score(targets[:, 0], score) > 0.95
    assert numbers.shape == (200, len(features.features)) and features.features[0] == "t score 0"


def test_scores_of_training_rows_do_not_know_their_targets():
    """Random targets can be memorised, but not predicted: the score of each row is of a model without it."""
    values, _ = texts(300)
    values = values + [f" word{i % 150}" for i in range(300)]
    targets = np.random.default_rng(1).integers(0, 2, (300, 1)).astype(np.float32)
    column, features, numbers = fit(values, targets)
    memorised = features.encode(column.encode(values))[:, 0]
    assert roc_auc_score(targets[:, 0], memorised) > 0.7
    assert roc_auc_score(targets[:, 0], numbers[:, 0]) < 0.6


def test_padded_and_ragged_ids_give_the_same_numbers_also_after_reloading():
    column, features, _ = fit(*texts(50))
    ids = column.encode(pd.Series(["good", "", "never seen zzz", "bad bad bad bad nice"]))
    assert isinstance(ids, Ragged)
    expected = features.encode(ids)
    torch.testing.assert_close(features.transform(ids[torch.arange(4)]), expected)
    again = from_plain(TextFeatures, {**vars(features)})
    assert torch.equal(again.encode(ids), expected) and torch.isfinite(expected).all()
    one_by_one = [features.encode(column.encode(pd.Series([text]))) for text in ("good", "bad bad bad bad nice")]
    torch.testing.assert_close(torch.cat(one_by_one), expected[[0, 3]])


def test_conjugate_gradients_solve_scikit_learns_ridge():
    values, targets = texts(80)
    column, ids = TextColumn.fit_encode(values, DataConfig())
    matrix, _ = _tf_idf(ids, column.known, 0)
    centred = targets - targets.mean()
    solution = _conjugate_gradients(matrix, centred, np.ones_like(centred), 1.0, None)
    weights = Ridge(alpha=1.0, fit_intercept=False).fit(matrix.toarray(), centred[:, 0]).coef_
    np.testing.assert_allclose((matrix.T @ solution)[:, 0], weights, atol=2e-3)


def test_a_column_may_have_the_name_of_derived_numbers():
    values, targets = texts(60)
    table = pd.DataFrame({"t": values, "t: parts": np.arange(60) % 7})
    fitted, parts = Preprocessor.fit_encode(table, DataConfig(text="t"))
    derived, parts = fitted.derive(parts, targets)
    assert (
        parts["t: parts"].shape == (60, 1) and derived(table)["numbers"].shape == derived.join(parts)["numbers"].shape
    )
    again = Preprocessor.from_state(derived.state())
    assert torch.equal(again(table)["numbers"], derived(table)["numbers"])
