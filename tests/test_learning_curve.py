"""The learning curve tells whether more rows help, from nested and stratified parts of the training rows."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import table_for

from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dataloader import Splits, load_splits
from evaluation.learning_curve import _some_rows, learning_curve
from task import Task
from train import train

TRAIN = pd.DataFrame({"x": range(4000), "y": np.linspace(0, 10, 4000)})


def curve_of(power: float, noise: float = 0.0) -> tuple[list[dict], str]:
    """The curve of models whose squared error is 1 + 50 / rows ** power."""
    task = Task.fit(TRAIN["y"])
    targets = torch.zeros(2000)
    signs = torch.tensor([1.0, -1.0]).repeat(1000)

    def fit(splits):
        error = (1 + 50 * len(splits.train) ** -power) ** 0.5 * signs + noise * torch.randn(2000)
        return task, (error / task.std)[:, None], targets

    splits = Splits(TRAIN, TRAIN, TRAIN, "y", "regression", DataConfig(), [], [])
    return learning_curve(splits, 0, fit(splits), fit)


def test_the_expected_loss_follows_the_power_law():
    curve, sentence = curve_of(0.5)
    assert [point["rows"] for point in curve] == [500, 1000, 2000, 4000]
    assert curve[-1]["loss"] == pytest.approx((1 + 50 * 4000**-0.5) ** 0.5, rel=1e-3)
    assert "would help" in sentence
    assert float(sentence.split("about ")[1].split()[0]) == pytest.approx((1 + 50 * 8000**-0.5) ** 0.5, rel=0.01)


def test_noise_is_no_gain():
    torch.manual_seed(0)
    assert "hardly help" in curve_of(50.0, noise=0.3)[1]


@pytest.mark.parametrize("group", ["", "customer"])
def test_parts_are_nested_and_keep_classes_or_groups(group):
    table = table_for("binary", 400).assign(customer=np.repeat(np.arange(50), 8))
    splits = load_splits(DataConfig(target="binary", group=group), 0, table)
    half, quarter = (_some_rows(splits, share, 0) for share in (0.5, 0.25))
    assert set(quarter) < set(half) and abs(len(half) - len(splits.train) / 2) <= 1
    if group:
        sizes = splits.train["customer"].iloc[half].value_counts()
        assert (sizes == 8).sum() >= len(sizes) - 1  # the last one may be cut
    else:
        share = splits.train["binary"].eq("high").mean()
        assert splits.train["binary"].iloc[half].eq("high").mean() == pytest.approx(share, abs=0.01)


def test_a_run_tells_its_learning_curve(tmp_path, capsys):
    run = RunConfig(out=str(tmp_path / "run"), learning_curve=True, report=False)
    data = DataConfig(target="binary", columns=("remark=drop",))
    result = train(data, ModelConfig(hidden=(8,)), TrainConfig(epochs=2), run, table=table_for("binary"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [point["rows"] for point in metrics["learning_curve"]] == [20, 42, 84, 168]
    assert "training rows would" in result.diagnosis[-1] and result.diagnosis[-1] in capsys.readouterr().out
    again = train(
        data,
        ModelConfig(hidden=(8,)),
        TrainConfig(epochs=2),
        replace(run, out=str(tmp_path / "x"), learning_curve=False),
        table=table_for("binary"),
    )
    torch.testing.assert_close(again.pipeline.model.state_dict(), result.pipeline.model.state_dict(), rtol=0, atol=0)
