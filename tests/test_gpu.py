"""What training promises on an accelerator. The CPU goes through the same tests, so that they are known to work."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import mixed_table, table_for

from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline import Pipeline, weights_sha256
from train import resume_config, train
from trainer import Trainer

HAVE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"there is no {name}"))
    for name, there in HAVE.items()
]


def fit(out, table, device: str, *, data=None, model=None, run=None, **training):
    run = RunConfig(out=str(out), device=device, report=False, threads=1, **(run or {}))
    data, model = data or DataConfig(target="binary"), model or ModelConfig(hidden=(16, 16))
    return train(data, model, TrainConfig(**{"epochs": 3} | training), run, table=table)


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_predicts_the_same_on_the_cpu(device, tmp_path, monkeypatch):
    """All kinds of columns; the self-check rows are compared when it is loaded."""
    monkeypatch.chdir(tmp_path)
    table = mixed_table(tmp_path).drop(columns=["multiclass", "regression"])
    run = fit(tmp_path / "run", table, device, data=DataConfig(target="binary", image="photo"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["device"].startswith(device)
    loaded = Pipeline.load(tmp_path / "run" / "best.pt")
    assert loaded.device.type == "cpu"
    expected = run.predictions.set_index("row")["probability_high"]
    found = loaded.predict(table.loc[expected.index])["probability_high"]
    np.testing.assert_allclose(found, expected, atol=2e-3)  # TF32 moves probabilities of convolutions


@pytest.mark.parametrize("device", DEVICES)
def test_a_deterministic_run_resumes_exactly(device, tmp_path):
    table, run = table_for("binary"), {"deterministic": True}
    try:
        whole = fit(tmp_path / "whole", table, device, run=run, epochs=4, scheduler="none")
        fit(tmp_path / "part", table, device, run=run, epochs=2, scheduler="none")
        config = resume_config(str(tmp_path / "part" / "last.pt"))
        resumed = train(config.data, config.model, replace(config.training, epochs=4), config.run, table=table)
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights_sha256(whole.pipeline.model.state_dict()) == weights_sha256(resumed.pipeline.model.state_dict())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"amp": True}, {"compile": True}], ids=["amp", "compile"])
def test_faster_ways_to_compute_learn_as_well(device, options, tmp_path):
    if device == "cpu" and "compile" in options:
        pytest.skip("needs a C++ compiler, and minutes")
    table = pd.DataFrame({"x": np.linspace(-1, 1, 400)}).assign(binary=lambda t: np.where(t["x"] > 0.1, "yes", "no"))
    training = {name: value for name, value in options.items() if name == "amp"}
    run = fit(tmp_path / "run", table, device, run=options if "compile" in options else {}, epochs=20, **training)
    assert run.test["accuracy"] > 0.9
    Pipeline.load(tmp_path / "run" / "best.pt")


@pytest.mark.skipif(not HAVE["cuda"], reason="there is no cuda")
def test_the_host_does_not_wait_for_the_device_within_an_epoch(tmp_path, monkeypatch):
    step = Trainer.step

    def strict(self, *args):
        torch.cuda.set_sync_debug_mode("error" if (self.batch + 1) % self.check_every else "default")
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "step", strict)
    fit(tmp_path / "run", table_for("binary"), "cuda", clip_norm=0.0)
