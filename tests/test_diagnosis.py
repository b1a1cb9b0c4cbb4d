"""What a run says about itself: useless models, curves that tell something, and test splits that are too small."""

import math

import numpy as np
import pandas as pd
import pytest

from config import Config, DataConfig, TrainConfig
from dataloader import Splits
from evaluation.diagnosis import _judge_curves, _judge_size, diagnose_useless
from task import Task


def history(train, val) -> pd.DataFrame:
    return pd.DataFrame({"train/loss": train, "val/loss": val})


def test_a_rare_class_that_is_ranked_well_was_learned():
    """The accuracy is that of the most frequent class, and yet the model is of use."""
    targets = pd.Series(["no"] * 95 + ["yes"] * 5, name="y")
    records, task = targets.to_frame(), Task.fit(targets)
    splits = Splits(records, records, records, "y", "binary", DataConfig(), [], [])
    for roc_auc, useless in ((0.8, False), (0.5, True), (math.nan, False)):
        metrics = {"accuracy": 0.95, "roc_auc": roc_auc}
        assert bool(diagnose_useless(metrics, metrics, task, splits, Config())) is useless
    only_test = diagnose_useless(
        {"accuracy": 0.97, "roc_auc": 0.9}, {"accuracy": 0.9, "roc_auc": 0.4}, task, splits, Config()
    )
    assert "does not generalise" in only_test[0]


FALLS = np.geomspace(1, 0.2, 20)


@pytest.mark.parametrize(
    ("train", "val", "word"),
    [
        (FALLS, FALLS + 0.1, "still falling"),
        (FALLS, np.abs(np.linspace(-0.5, 1, 20)) + 0.3, "overfits after epoch 7"),
        (np.full(20, 1.0), np.tile([1.0, 1.8], 10), "unstable"),
        (np.geomspace(1, 0.5, 20) ** 0.2, np.concatenate([np.geomspace(1, 0.6, 12), np.full(8, 0.6)]), ""),
        (FALLS, np.concatenate([FALLS[:10], FALLS[9] * np.linspace(1, 1.1, 10)]), ""),
        (FALLS[:3], FALLS[:3], ""),
    ],
)
def test_curves(train, val, word):
    sentence = _judge_curves(history(train, val), TrainConfig(epochs=len(val)))
    assert word in sentence and bool(sentence) == bool(word)
    assert not word or "--" in sentence


def test_a_run_that_stopped_by_patience_does_not_ask_for_epochs():
    assert _judge_curves(history(FALLS, FALLS), TrainConfig(epochs=60)) == ""


def test_a_small_test_split_leads_to_cross_validation():
    splits = Splits(*[pd.DataFrame({"y": range(30)})] * 3, "y", "binary", DataConfig(), [], [])
    assert (
        "30 rows" in (found := _judge_size({"accuracy": 0.8}, {"accuracy": [0.66, 0.94]}, splits))
        and "--folds" in found
    )
    assert _judge_size({"accuracy": 0.8}, {"accuracy": [0.78, 0.82]}, splits) == ""
    assert _judge_size({"accuracy": 0.8}, {}, splits) == ""
