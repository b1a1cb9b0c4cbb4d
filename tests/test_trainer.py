"""The loop learns, follows torch's schedules, weights by samples, and stops before the weights are spoiled."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TARGETS, quick_run, table_for
from torch import nn
from torch.optim import lr_scheduler as schedulers

import progress
from backbones.embeddings import NumberEmbedding, frequent_values, quantile_bins
from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dataloader import make_loader
from errors import UserError
from model import MODELS, Dropout, NGramBag, build_model
from pipeline import Pipeline
from preprocessing import Preprocessor
from preprocessing.image import ImageColumn
from scaling.randomness import seed_all, seed_weights
from task import Task
from trainer import ALL_THREADS_FROM, PLANNED_EPOCHS, Trainer, build_lr_scheduler, build_optimizer

ARGS = {"in_features": 5, "category_sizes": [4], "hidden": [32, 16], "activation": "relu", "batch_norm": True}
NUMBERS = {"in_features": 6, "category_sizes": []}  # for `make_inputs(…, categories=False)`


def make_task(kind: str) -> Task:
    targets = {"binary": [0, 1] * 9, "multiclass": [0, 1, 2] * 9, "regression": np.linspace(0, 1, 30)}[kind]
    return Task.fit(pd.Series(targets, name="y"), kind)


def make_inputs(n: int, kind: str, seed: int = 0, categories: bool = True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    codes = torch.randint(0, 4, (n, 1), generator=generator)
    inputs = {"numbers": x[:, :5], "categories": codes} if categories else {"numbers": x}
    if kind == "regression":
        return inputs, torch.randn(n, generator=generator)
    targets = torch.randint(0, 3 if kind == "multiclass" else 2, (n,), generator=generator)
    return inputs, targets if kind == "multiclass" else targets.float()


def make_trainer(kind="binary", *, args=None, model=None, **options) -> Trainer:
    torch.manual_seed(0)
    task = make_task(kind)
    model = model or build_model(["mlp"], ARGS | {"out_features": task.out_features, "dropout": 0.0} | (args or {}))
    run = RunConfig(threads=options.pop("threads", 1))
    return Trainer(Pipeline(model, task), TrainConfig(**{"epochs": 2, "patience": 0} | options), run)


def loaders(n=64, kind="binary", batch_size=16, categories=True):
    return (
        make_loader(*make_inputs(n, kind, categories=categories), batch_size, shuffle=True),
        make_loader(*make_inputs(40, kind, 1, categories), 40, shuffle=False),
    )


@pytest.mark.parametrize("name", [*(n for n in MODELS if n not in ("lite0", "hf-image")), "mlp bag cnn"])
@pytest.mark.parametrize("kind", TARGETS)
def test_overfits_32_samples(name, kind, monkeypatch):
    monkeypatch.setattr(NGramBag, "NGRAM_DROPOUT", 0.0)  # as dropout
    inputs, targets = make_inputs(32, kind)
    args = ARGS | {"out_features": make_task(kind).out_features, "dropout": 0.0}
    generator, names = torch.Generator().manual_seed(0), name.split()
    if "tabm" in names:
        args |= {"bins": quantile_bins(inputs["numbers"])}
    elif "mlp" not in names:
        inputs = {}
    if "cnn" in names:
        inputs["image"] = torch.randn(32, 3, 8, 8, generator=generator)
        args |= {"in_channels": 3, "image_size": 8}
    if names[-1] not in ("tabm", "mlp", "cnn") or "bag" in names:
        inputs["text"] = torch.randint(2, 2000, (32, 50), generator=generator, dtype=torch.int32)
        args |= {"vocab_size": 2000, "known_sizes": [1998], "max_length": 50, "padding": 0, "hidden": [64, 64]}
    if name == "hf":
        sizes = {"vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = pytest.importorskip("transformers").BertConfig(**sizes, intermediate_size=64)
        args |= {"encoder": config.to_dict()}
    torch.manual_seed(0)
    model = build_model(names, args)
    trainer = make_trainer(kind, model=model, epochs=150, lr=1e-2, weight_decay=0.0, scheduler="none")
    loader = make_loader(inputs, targets, 32, shuffle=True)
    history = trainer.fit(loader, loader)
    assert history["train/loss"].min() < 0.02
    assert trainer.evaluate(loader)["loss"] < 0.01


def test_a_network_has_a_recipe_and_flags_win():
    usual = make_trainer(patience=-1).config
    assert (usual.lr, usual.scheduler, usual.patience) == (3e-3, "CosineAnnealingLR", 16)
    args = ARGS | {"in_channels": 3, "image_size": 8, "out_features": 1, "dropout": 0.1}
    own = make_trainer(model=build_model(["cnn"], args), patience=-1, lr=0.5).config
    assert (own.lr, own.scheduler, own.patience) == (0.5, "OneCycleLR", 0)
    joint = make_trainer(model=build_model(["mlp", "cnn"], args)).config
    assert joint.scheduler == "CosineAnnealingLR"


def test_the_best_epoch_of_a_cycle_is_one_of_its_last(monkeypatch):
    losses = iter([0.1, 0.2, 0.9, 0.5, 0.6])
    trainer = make_trainer(scheduler="OneCycleLR", epochs=5)
    monkeypatch.setattr(trainer, "evaluate", lambda loader: {"loss": next(losses)})
    trainer.fit(*loaders())
    assert trainer.best["epoch"] == 4


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh", "softmax", "gelu", "silu", "leaky_relu"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_every_activation_learns(activation, batch_norm):
    trainer = make_trainer(args={"activation": activation, "batch_norm": batch_norm}, epochs=30, lr=1e-2)
    history = trainer.fit(*loaders())
    assert history["train/loss"].iloc[-1] < history["train/loss"][0]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop"])
def test_optimizers_are_torchs_own(name):
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, lr=0.3, weight_decay=0.01, momentum=0.5))
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.param_groups[0]["weight_decay"] == 0.01
    assert optimizer.defaults.get("fused", False) is (name != "RMSprop")
    history = make_trainer(optimizer=name, lr=1e-2, epochs=20).fit(*loaders())
    assert history["train/loss"].iloc[-1] < history["train/loss"][0]


EPOCHS, STEPS = 12, 4
TORCHS_OWN = {
    "LambdaLR": (lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + 0.5 * epoch)), {"gamma": 0.5}),
    "StepLR": (lambda o: schedulers.StepLR(o, 3, 0.5), {"gamma": 0.5, "step_size": 3}),
    "MultiStepLR": (lambda o: schedulers.MultiStepLR(o, [5, 7], 0.5), {"gamma": 0.5, "milestones": (5, 7)}),
    "ExponentialLR": (lambda o: schedulers.ExponentialLR(o, 0.95), {}),
    "CosineAnnealingLR": (lambda o: schedulers.CosineAnnealingLR(o, EPOCHS, 1e-4), {"min_lr": 1e-4}),
    "ReduceLROnPlateau": (
        lambda o: schedulers.ReduceLROnPlateau(o, "min", 0.5, 2, min_lr=1e-3),
        {"gamma": 0.5, "lr_patience": 2, "min_lr": 1e-3},
    ),
    "OneCycleLR": (lambda o: schedulers.OneCycleLR(o, 0.01, EPOCHS * STEPS), {}),
    "none": (lambda o: None, {}),
}


@pytest.mark.parametrize("name", TORCHS_OWN)
def test_learning_rates_equal_torchs_own_sequence(name):
    make, options = TORCHS_OWN[name]
    trainer = make_trainer(scheduler=name, lr=0.01, epochs=EPOCHS, **options)
    history = trainer.fit(*loaders())
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01, momentum=0.9)
    scheduler, rates = make(reference), []
    for val_loss in history["val/loss"]:
        for _ in range(STEPS):
            reference.step()
            if name == "OneCycleLR":
                scheduler.step()
        rates.append(reference.param_groups[0]["lr"])
        if name == "ReduceLROnPlateau":
            scheduler.step(val_loss)
        elif name not in ("OneCycleLR", "none"):
            scheduler.step()
    assert history["lr"].tolist() == pytest.approx(rates, rel=1e-12)
    assert name == "none" or len(set(rates)) > 1


@pytest.mark.parametrize("name", [name for name in TORCHS_OWN if name != "OneCycleLR"])
def test_warmup_comes_before_any_scheduler(name):
    options = TORCHS_OWN[name][1] | {"scheduler": name, "lr": 0.01}
    trainer = make_trainer(epochs=EPOCHS, warmup=3, **options)
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    history = trainer.fit(*loaders())
    assert rates[: 3 * STEPS] == pytest.approx([0.01 * (i + 1) / (3 * STEPS) for i in range(3 * STEPS)])
    after = history["lr"][3:].tolist()
    if name not in ("MultiStepLR", "CosineAnnealingLR", "ReduceLROnPlateau"):  # these count in epochs of the whole run
        plain = make_trainer(epochs=EPOCHS - 3, **options).fit(*loaders())["lr"].tolist()
        assert after == pytest.approx(plain)
    if name == "MultiStepLR":
        assert after == pytest.approx([0.01] * 2 + [0.005] * 2 + [0.0025] * 5)
    if name == "CosineAnnealingLR":
        assert after[0] == 0.01 and after[-1] < 0.001


def test_warmup_of_one_cycle_is_its_own():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(optimizer, TrainConfig(scheduler="OneCycleLR", epochs=10, warmup=2, lr=1.0), 10)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(99):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert int(np.argmax(rates)) == 19


@pytest.mark.parametrize("batch_size", [5, 16, 63, 64])
def test_train_loss_is_the_mean_over_samples(batch_size):
    """With weights that do not move, any batch size must give the loss over all records at once."""
    trainer = make_trainer(args=NUMBERS | {"batch_norm": False}, lr=1e-30, epochs=1, weight_decay=0.0)
    train_loader, val_loader = loaders(64, batch_size=batch_size, categories=False)
    inputs, targets = make_inputs(64, "binary", categories=False)
    with torch.no_grad():
        expected = float(trainer.task.loss(trainer.model(**inputs), targets))
    assert trainer.fit(train_loader, val_loader)["train/loss"][0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", TARGETS)
def test_metrics_do_not_depend_on_the_batch_size(kind):
    trainer = make_trainer(kind)
    inputs, targets = make_inputs(101, kind)
    results = [trainer.evaluate(make_loader(inputs, targets, size, shuffle=False)) for size in (1, 7, 50, 101)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-6)


@pytest.mark.parametrize("n", [64, 61])
def test_accumulated_batches_equal_one_large_batch(n):
    """Also in a last window that is short: the gradient is the mean over its records."""
    weights = []
    inputs, targets = make_inputs(n, "binary", categories=False)
    for batch_size, accumulate in ((32, 1), (8, 4)):
        trainer = make_trainer(args=NUMBERS | {"batch_norm": False}, optimizer="SGD", lr=0.1, accumulate=accumulate)
        loader = make_loader(inputs, targets, batch_size, shuffle=False)
        trainer.fit(loader, loader)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)
    assert trainer.steps == 4


def test_gradients_are_clipped():
    trainer = make_trainer(clip_norm=1e-3, optimizer="SGD", lr=1.0, weight_decay=0.0, epochs=1)
    trainer.config = replace(trainer.config, scheduler="none")
    norms = []
    trainer.optimizer.register_step_pre_hook(
        lambda o, *_: norms.append(torch.cat([p.grad.flatten() for p in o.param_groups[0]["params"]]).norm().item())
    )
    trainer.fit(*loaders())
    assert max(norms) <= 1e-3 * 1.001


def test_the_best_epoch_is_kept_not_the_last(tmp_path):
    run = quick_run(tmp_path / "run", table_for("binary"), epochs=30, lr=0.05, patience=0)
    values = run.history["val/loss"]
    assert run.val["loss"] == values.min() < values.iloc[-1]
    again = Pipeline.load(tmp_path / "run" / "best.pt")
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, run.pipeline.model.state_dict()[name])


def test_early_stopping_waits_for_patience_epochs(tmp_path):
    run = quick_run(tmp_path / "run", table_for("binary"), epochs=100, lr=0.05, patience=4)
    best = int(run.history["val/loss"].idxmin()) + 1
    assert len(run.history) == best + 4 < 100


def test_monitor_picks_by_its_own_direction(tmp_path):
    run = quick_run(tmp_path / "run", table_for("binary"), epochs=15, monitor="roc_auc", patience=0)
    assert run.val["roc_auc"] == run.history["val/roc_auc"].max()


@pytest.mark.parametrize("check_every", [1, 3])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoiled(check_every):
    """1: as on a CPU. 3: as on an accelerator, where the optimizer skips steps and the host checks later."""
    inputs, targets = make_inputs(64, "binary")
    inputs["numbers"][37, 0] = math.nan
    loader = make_loader(inputs, targets, 8, shuffle=False)
    trainer = make_trainer(args={"batch_norm": False})
    trainer.check_every = check_every
    with pytest.raises(UserError, match=r"not finite in epoch 1, batch 5\b.*lower --lr"):
        trainer.fit(loader, loader)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.steps == (4 if check_every == 1 else 6 - 1)


def test_a_run_that_diverges_at_once_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        quick_run(tmp_path / "run", table_for("regression"), data=DataConfig(target="regression"), lr=1e30)
    assert not (tmp_path / "run").exists()


def test_weights_and_epochs_have_random_streams_of_their_own():
    draws = []
    for seed in (0, 1):
        for start in (lambda s: seed_weights(s), lambda s: seed_all(s, 0), lambda s: seed_all(s, 1)):
            start(seed)
            draws.append(torch.rand(4).tolist())
            start(seed)
            assert torch.rand(4).tolist() == draws[-1]
    assert len({tuple(draw) for draw in draws}) == 6


def test_all_randomness_follows_from_seed_and_epoch(tmp_path):
    table = table_for("multiclass")
    shas = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # earlier draws must not matter
        run = quick_run(
            tmp_path / str(i), table, data=DataConfig(target="multiclass"), model=ModelConfig(dropout=0.3), seed=seed
        )
        shas.append([p.sum().item() for p in run.pipeline.model.parameters()])
    assert shas[0] == shas[1] != shas[2]


def test_validation_is_neither_shuffled_nor_trained_on():
    trainer = make_trainer()
    train_loader, val_loader = loaders()
    trainer.fit(train_loader, val_loader)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert trainer.evaluate(val_loader) == trainer.evaluate(val_loader)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert not trainer.model.training


def test_any_module_and_any_loader_of_tensors():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x)

    inputs, targets = make_inputs(64, "multiclass")
    data = torch.utils.data.TensorDataset(inputs["numbers"], targets)
    loader = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
    history = make_trainer("multiclass", model=Mine(), epochs=5, lr=0.05).fit(loader, loader)
    assert history["train/loss"].iloc[-1] < history["train/loss"][0]


def test_mixed_precision_is_for_the_network_alone():
    """Under bfloat16 the coordinates of augmented pixels would be rounded."""

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.inputs = nn.Parameter(torch.zeros(1)), []

        def forward(self, image):
            self.inputs.append(image)
            return image.mean(dim=(1, 2, 3))[:, None] * self.weight

    column = ImageColumn("photo", 32, 3, [0.5] * 3, [0.25] * 3, augment="strong", flip=True)
    pixels, model = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), Recorder()
    loader = make_loader({"image": pixels}, torch.zeros(16), 16, shuffle=False)
    for amp in (False, True):
        pipeline = Pipeline(model, make_task("binary"), Preprocessor((column,), {}))
        Trainer(pipeline, TrainConfig(epochs=1, amp=amp), RunConfig(threads=1)).fit(loader, loader)
    full, mixed = model.inputs[0], model.inputs[2]
    assert full.dtype == mixed.dtype == torch.float32 and torch.equal(full, mixed)


def test_thread_count_follows_the_work():
    small, large = make_trainer(threads=0), make_trainer(threads=0, args={"hidden": [2048, 2048]})
    assert small._count_work(loaders()[0]) < ALL_THREADS_FROM < large._count_work(loaders(512, batch_size=512)[0])
    before = torch.get_num_threads()
    small.fit(*loaders())
    assert small.threads == small.pipeline.threads == 1 and torch.get_num_threads() == before


def test_epochs_are_planned_from_the_work(monkeypatch, capsys):
    planned = make_trainer(epochs=-1)
    planned.fit(*loaders())
    assert planned.config.epochs == len(planned.history) == PLANNED_EPOCHS[1]  # so little work pays for the most
    assert "plan: at most 60 epochs" in capsys.readouterr().out
    monkeypatch.setattr("trainer.PLANNED_WORK", 0)
    least = make_trainer(epochs=-1)
    assert len(least.fit(*loaders())) == PLANNED_EPOCHS[0]


@pytest.mark.parametrize(("seconds", "budget"), [(0.01, 0.8), (0.1, 1.0)])
def test_a_time_budget_plans_the_steps_from_the_speed(seconds, budget):
    """Of a network whose speed is known: with little time, the epochs get shorter instead of too few."""

    class Slow(nn.Linear):
        def forward(self, numbers):
            time.sleep(seconds)
            return super().forward(numbers)

    trainer = make_trainer(model=Slow(6, 1), epochs=-1, time_budget=budget)
    data = loaders(n=512, batch_size=32, categories=False)  # 16 batches an epoch, and one in validation
    trainer.fit(*data)
    steps = len(trainer.history) * (trainer.batches + 1)
    assert PLANNED_EPOCHS[0] == len(trainer.history) and trainer.batches < 16
    assert steps <= max(budget / seconds, 2 * PLANNED_EPOCHS[0])
    again = make_trainer(model=Slow(6, 1), epochs=-1, time_budget=100 * budget)
    again.resume({"flags": {"optimizer": "AdamW", "monitor": "loss", "accumulate": 1}, **resume_state(trainer)})
    again.fit(*data)
    assert again.config.epochs == trainer.config.epochs and again.batches == trainer.batches  # as was planned once


def resume_state(trainer: Trainer) -> dict:
    """Return what a last.pt keeps of a trainer between two epochs."""
    return {
        "epoch": trainer.epoch, "next_batch": 0, "steps": trainer.steps, "samples": 0, "loss_sum": 0.0,
        "generator": {}, "optimizer": trainer.optimizer.state_dict(), "batches": trainer.batches, "threads": 1,
        "plan": {"epochs": trainer.config.epochs, "batches": trainer.batches}, "history": trainer.history,
        "best": trainer.best,
    }  # fmt: skip


def test_bins_are_never_as_narrow_as_rounding():
    """The sines of two moments are equal, up to rounding: a bin between them would enlarge it."""
    numbers = torch.tensor([0.0, 0.25, 0.25000003, 1.0]).repeat(100)
    assert len(numbers.unique()) == 4
    assert len(quantile_bins(numbers[:, None])[0]) == 3


def test_codes_have_frequent_values_and_other_numbers_have_none():
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 20, (1000,), generator=random).float()
    columns = [codes, torch.randn(1000, generator=random), codes % 3, 1e-6 * codes, torch.full((1000,), 7.0)]
    assert [len(values) for values in frequent_values(torch.stack(columns, dim=1))] == [20, 0, 0, 0, 0]
    assert frequent_values(codes[:100, None]) == [[]]  # too few rows of each


def test_a_code_has_a_vector_of_its_own():
    embedding = NumberEmbedding([[0.0, 1.0], [0.0, 1.0, 2.0]], [[], [0.0, 1.0, 2.0]]).eval()
    numbers = torch.tensor([[0.5, 1.0], [0.5, 2.0], [0.5, 1.5]])
    before = embedding(numbers)
    torch.nn.init.ones_(embedding.level_weight.data[0, 1])
    changed = (embedding(numbers) - before).sum(dim=1)
    assert before.shape == (3, embedding.width) and changed.tolist() == [embedding.WIDTH, 0, 0]


def test_number_embeddings_are_piecewise_linear_and_bins_follow_the_quantiles():
    numbers = torch.stack([torch.rand(1000).square(), torch.ones(1000), torch.arange(1000) % 2], dim=1)
    bins = quantile_bins(numbers)
    assert [len(edges) for edges in bins] == [21, 2, 2] and bins[1] == [1.0, 2.0] and bins[2] == [0.0, 1.0]
    counts = torch.histogram(numbers[:, 0], torch.tensor(bins[0])).hist
    assert counts.min() > 30 and counts.max() < 70
    embedding = NumberEmbedding(bins)
    left, right = bins[0][4], bins[0][5]
    inside = torch.tensor([[left + share * (right - left), 1.0, 0.0] for share in (0.0, 0.5, 1.0)])
    values = embedding(inside)
    torch.testing.assert_close(values[1], (values[0] + values[2]) / 2)
    assert torch.isfinite(embedding(torch.full((1, 3), 1e30))).all()


def test_members_of_the_ensemble_differ_and_are_averaged_as_probabilities():
    inputs, targets = make_inputs(64, "binary")
    args = ARGS | {"out_features": 1, "dropout": 0.0, "bins": quantile_bins(inputs["numbers"])}
    trainer = make_trainer(model=build_model(["tabm"], args), epochs=3)
    loader = make_loader(inputs, targets, 16, shuffle=True)
    trainer.fit(loader, loader)
    logits = trainer.model.eval()(**inputs)
    assert logits.shape == (64, 8, 1) and logits.std(dim=1).min() > 0
    expected = torch.sigmoid(logits.double()).mean(dim=1)[:, 0]
    torch.testing.assert_close(trainer.task.activate(logits)[:, 1], expected)


def test_the_bar_shows_loss_metric_and_speed(capsys, monkeypatch):
    monkeypatch.setattr(progress, "tqdm", lambda **o: __import__("tqdm").tqdm(**o | {"disable": False}))
    monkeypatch.setattr(progress, "SHOW_SECONDS", 0.0)
    make_trainer(epochs=3).fit(*loaders())
    shown = capsys.readouterr()
    assert (
        "epoch 3/3" in shown.err and "loss 0." in shown.err and "val loss 0." in shown.err and "samples/s" in shown.err
    )
    assert shown.out == ""


def test_without_a_terminal_there_are_about_ten_plain_lines(capsys):
    make_trainer(epochs=40).fit(*loaders())
    shown = capsys.readouterr()
    assert "\r" not in shown.err and 10 <= shown.out.count("\n") <= 12


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = Dropout(0.25), torch.ones(1000, 999, requires_grad=True)
    y = layer(x)
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=2e-3)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 4 / 3])
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(layer.eval()(x), x)


def test_the_unknown_embedding_is_trained():
    """Even if no training row has an unknown category, its embedding is trained."""
    inputs, targets = make_inputs(400, "binary")
    inputs["categories"].clamp_(min=1)
    trainer = make_trainer(epochs=5)
    before = trainer.model.embedding.tables[0].weight[0].clone()
    loader = make_loader(inputs, targets, 32, shuffle=True)
    trainer.config = replace(trainer.config, weight_decay=0.0)
    trainer.fit(loader, loader)
    assert not torch.allclose(trainer.model.embedding.tables[0].weight[0], before, atol=1e-4)


def test_a_network_that_needs_what_the_data_do_not_provide():
    class Words(nn.Module):
        def __init__(self, *, vocab_size: int, out_features: int):
            super().__init__()

    MODELS["words"] = Words
    try:
        with pytest.raises(UserError, match="--model words needs vocab_size"):
            build_model(["words"], ARGS | {"out_features": 1})
    finally:
        del MODELS["words"]


def test_a_monitor_that_is_nan_is_refused():
    trainer = make_trainer(monitor="roc_auc")
    inputs, _ = make_inputs(20, "binary")
    with pytest.raises(UserError, match="--monitor roc_auc is not defined"):
        trainer.fit(loaders()[0], make_loader(inputs, torch.zeros(20), 20, shuffle=False))


@pytest.mark.parametrize("kind", TARGETS)
def test_a_run_that_learned_nothing_says_so(tmp_path, capsys, kind):
    table = table_for(kind)
    noise = table.assign(**{kind: table[kind].sample(frac=1, random_state=1).to_numpy()})
    good = quick_run(tmp_path / "good", table, data=DataConfig(target=kind), epochs=20, lr=0.01)
    assert not any("no better" in sentence for sentence in good.diagnosis)
    assert "Try it: python predict.py" in capsys.readouterr().out
    unscaled = DataConfig(target=kind, scaling="none")
    bad = quick_run(tmp_path / "bad", noise, data=unscaled, lr=100, epochs=2, clip_norm=0.0)
    shown = capsys.readouterr().out
    guess = "the mean of regression" if kind == "regression" else "the most frequent class"
    assert f"no better than always predicting {guess}" in bad.diagnosis[0] and "Try it:" not in shown
    hints = ("--lr (now 100)", "--clip-norm 1", "--scaling", "--epochs (now 2)")
    assert all(hint in bad.diagnosis[1] for hint in hints)
    assert all(sentence in shown for sentence in bad.diagnosis)
    for run in (good, bad):
        assert json.loads((run.out / "metrics.json").read_text())["diagnosis"] == run.diagnosis


def test_few_epochs_do_not_start_with_a_drop():
    assert make_trainer(scheduler="MultiStepLR", epochs=1, lr=0.5).fit(*loaders())["lr"][0] == 0.5


def test_a_notebooks_own_frame(tmp_path):
    table = table_for("binary").rename(columns={"age": 7})
    table.index = pd.MultiIndex.from_arrays([range(240), range(240)])
    assert len(quick_run(tmp_path / "run", table).predictions) == 36
