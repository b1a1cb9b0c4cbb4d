"""Pictures of any kind are read as a person sees them, changed only where that is allowed, and answered alike."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_refused, command, quick_run
from PIL import Image
from test_resume import fingerprint, interrupted_run

import images as images_module
from augmentation import STRENGTHS, Augmentation, contact_sheet, flip_is_harmless, make_augmentation
from config import DataConfig, ModelConfig
from dataloader import load_splits
from errors import UserError
from images import ImagePreprocessor, PixelCache, is_image_file, read_pixels
from model import build_model
from pipeline import Pipeline, read_checkpoint
from reader import read_class_folders


def picture(label: int, seed: int, size=(20, 24)) -> Image.Image:
    """Red pictures with a bright top (0), or blue ones with a bright bottom (1), and noise."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 90, (*size, 3))
    pixels[..., 0 if label == 0 else 2] += 90
    half = size[0] // 2
    pixels[:half] += 60 * (1 - label)
    pixels[half:] += 60 * label
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_folder(folder, count=24, names=("red", "blue")):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            ending = ("png", "jpg", "bmp", "webp")[i % 4]
            picture(label, 1000 * label + i, (20 + i % 5, 24)).save(folder / name / f"{i:03}.{ending}")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "run"
    return image_run(out, photos, epochs=4)


def image_run(out, photos, *, data=None, **training):
    data = {"data": str(photos), "image_size": 16} | (data or {})
    return quick_run(out, data=DataConfig(**data), model=ModelConfig(hidden=(8, 16)), **training)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
def test_formats(tmp_path, ending):
    seen = Image.fromarray(np.full((9, 7, 3), (200, 100, 50), dtype=np.uint8))
    seen.save(tmp_path / f"a.{ending}")
    pixels = read_pixels(str(tmp_path / f"a.{ending}"), 4, 3)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), [200, 100, 50], atol=6)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 120, [120, 120, 120]),
        ("LA", (0, 0), [255, 255, 255]),
        ("P", 3, None),
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("I;16", 257 * 100, [100, 100, 100]),
        ("F", 60.0, [60, 60, 60]),
    ],
)
def test_modes_are_seen_as_a_person_sees_them(tmp_path, mode, colour, expected):
    image = Image.new(mode, (6, 6), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 3 + [9, 99, 199] + [0, 0, 0] * 252)
        expected = [9, 99, 199]
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "F") else "a.png")
    image.save(path)
    assert read_pixels(str(path), 4, 3).mean(axis=(1, 2)).tolist() == pytest.approx(expected, abs=1)
    grey = read_pixels(str(path), 4, 1)
    assert grey.shape == (1, 4, 4)


def test_exif_orientation_is_honoured(tmp_path):
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # bright left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: bright top
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = read_pixels(str(tmp_path / "a.jpg"), 8, 1)[0].astype(int)
    assert seen[:3].mean() > 240 and seen[-3:].mean() < 15


def test_short_side_and_centre_crop():
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 255
    file = images_module.io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert read_pixels(file.getvalue(), 10, 1).min() == 255


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    good = picture(0, 0)
    good.save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    for name, words in {
        "text.png": "no image that can be read",
        "cut.png": "broken",
        "none.png": "no such image",
    }.items():
        with pytest.raises(UserError, match=rf"{name}.*{words}"):
            read_pixels(str(tmp_path / name), 8, 3)
    for limit in (100, 300):  # an error from twice the limit on, a warning of Pillow's below that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"good\.png: refused, it has more pixels"):
            read_pixels(str(tmp_path / "good.png"), 8, 3)


def test_folders(tmp_path, photos):
    notes = []
    records = read_class_folders(photos, is_image_file, notes)
    assert len(records) == 48 and not notes and set(records["label"]) == {"red", "blue"}
    folder = make_folder(tmp_path / "photos", 2)
    (folder / "red" / ".hidden.png").write_bytes(b"")
    (folder / "red" / "notes.txt").write_text("")
    (folder / ".git").mkdir()
    assert len(read_class_folders(folder, is_image_file, notes)) == 4 and "2 files that are hidden" in notes[0]
    with pytest.raises(UserError, match="no images and no texts in folders by class"):
        load_splits(DataConfig(data=str(folder / "red")), 0)
    with pytest.raises(UserError, match="--target species: no such column"):
        load_splits(DataConfig(data=str(photos), target="species"), 0)


def test_a_network_for_the_other_kind_of_data_says_so(tmp_path, photos):
    with pytest.raises(UserError, match="--model mlp needs in_features"):
        quick_run(tmp_path / "a", data=DataConfig(data=str(photos)), model=ModelConfig(model="mlp"))
    with pytest.raises(UserError, match="--model cnn needs in_channels"):
        quick_run(tmp_path / "b", data=DataConfig(data="wine"), model=ModelConfig(model="cnn"))


def test_train_val_test_folders_and_stratified_splits(tmp_path, photos):
    for part, count in (("train", 8), ("val", 4), ("test", 6)):
        make_folder(tmp_path / "all" / part, count)
    splits = load_splits(DataConfig(data=str(tmp_path / "all")), 0)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [16, 8, 12]
    assert all("test" in path for path in splits.test["file"])
    splits = load_splits(DataConfig(data=str(photos)), 0)
    assert [s["label"].value_counts().to_dict() for s in (splits.val, splits.test)] == [{"red": 4, "blue": 4}] * 2


@pytest.mark.parametrize("target", ["name", "brightness"])
def test_a_table_of_paths_for_classes_and_numbers(tmp_path, target):
    folder = make_folder(tmp_path / "pictures", 20)
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    table = pd.DataFrame(
        {"path": [str(p.relative_to(tmp_path)) for p in paths], "name": [p.parent.name for p in paths]}
    )
    table["brightness"] = [np.asarray(Image.open(p).convert("L")).mean() + (i % 9) for i, p in enumerate(paths)]
    table.to_csv(tmp_path / "table.csv", index=False)
    data = {"data": str(tmp_path / "table.csv"), "image": "path", "target": target}
    run = image_run(tmp_path / "run", "", data=data, epochs=2)
    assert run.pipeline.task.kind == {"name": "binary", "brightness": "regression"}[target]
    result = command("predict.py", "--checkpoint", tmp_path / "run" / "best.pt", "--input", tmp_path / "table.csv")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode().splitlines()[0].startswith("file,prediction") and result.stdout.count(b"\n") == 41
    assert b"metrics" in result.stderr


# ---------------------------------------------------------------- preprocessing


def test_state_is_plain_and_of_training_images_alone(photos, tmp_path):
    splits = load_splits(DataConfig(data=str(photos)), 0)
    fitted = ImagePreprocessor.fit(splits.train, column="file", image_size=0, cache=PixelCache(tmp_path))
    assert (fitted.size, fitted.channels) == (22, 3)
    assert ImagePreprocessor(**json.loads(json.dumps(asdict(fitted)))) == fitted
    x = fitted(splits.train)
    assert x.shape == (32, 3, 22, 22) and x.dtype == torch.float32
    assert x.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert x.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    only = ImagePreprocessor.fit(splits.train.head(5), column="file", image_size=8, cache=PixelCache(tmp_path))
    assert only.size == 8 and only.mean != fitted.mean


def test_grey_images_have_one_channel_and_large_ones_are_limited(tmp_path):
    for i in range(3):
        Image.new("L", (500, 400), 50 * i).save(tmp_path / f"{i}.png")
    records = pd.DataFrame({"file": [str(p) for p in tmp_path.iterdir()]})
    fitted = ImagePreprocessor.fit(records, column="file", image_size=0, cache=PixelCache(tmp_path))
    assert (fitted.size, fitted.channels) == (128, 1)


def test_each_file_is_decoded_once(photos, tmp_path, monkeypatch):
    decoded = []
    read = images_module.read_pixels
    monkeypatch.setattr(images_module, "read_pixels", lambda cell, *a: (decoded.append(cell), read(cell, *a))[1])
    cached = image_run(tmp_path / "run", photos, epochs=3)
    golden = [r["file"] for r in cached.pipeline.examples]
    test = set(cached.predictions["file"])
    counts = pd.Series(decoded).value_counts()
    training = counts[[c not in test and not c.startswith("data:") for c in counts.index]]
    assert len(golden) == 16 and (training <= 2).all() and (training == 1).sum() >= 24  # once more as an example


def test_a_large_cache_is_a_file_that_vanishes(photos, tmp_path, monkeypatch):
    whole = image_run(tmp_path / "a", photos)
    monkeypatch.setattr(images_module, "_memory", lambda: 0)
    folder = tmp_path / "b"
    folder.mkdir()
    mapped = image_run(folder / "run", photos)
    assert fingerprint(tmp_path / "a")[:2] == fingerprint(folder / "run")[:2]
    assert [p.name for p in folder.iterdir()] == ["run"]
    assert isinstance(PixelCache(tmp_path)._allocate((2, 3, 8, 8)), np.memmap)
    assert whole.test == mapped.test


def test_broken_files_stop_or_are_left_out(tmp_path):
    folder = make_folder(tmp_path / "photos", 12)
    (folder / "red" / "text.png").write_text("no image")
    whole = (folder / "red" / "000.png").read_bytes()
    (folder / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    flags = ["--data", folder, "--epochs", 1, "--hidden", 4, "--image-size", 8]
    assert_refused(command("train.py", *flags, "--out", tmp_path / "a"), ".png:")
    assert not (tmp_path / "a").exists()
    result = command("train.py", *flags, "--skip-broken", "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr.decode()
    assert "2 broken images left out" in result.stdout.decode()
    rows = json.loads((tmp_path / "b" / "metrics.json").read_text())["rows"]
    assert sum(rows.values()) == 24


# ---------------------------------------------------------------- augmentation


def batch(n=6, channels=3, size=16):
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_changes_images_and_keeps_their_range(strength, channels):
    torch.manual_seed(0)
    pixels = batch(64, channels)
    changed = make_augmentation(strength, flip=True)(pixels)
    assert changed.shape == pixels.shape and changed.min() >= 0 and changed.max() <= 255
    different = (changed - pixels.float()).abs().mean(dim=(1, 2, 3))
    assert (different > 1).float().mean() > 0.9
    assert changed.mean() == pytest.approx(pixels.float().mean().item(), rel=0.1)


def test_augmentation_follows_the_generator():
    pixels, change = batch(), make_augmentation("strong", flip=True)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(change(pixels))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert make_augmentation("none", flip=True) is None


def test_each_switch_does_its_own():
    nothing = {"shift": 0.0, "turn": 0.0, "zoom": 0.0, "colour": 0.0, "erase": 0.0, "flip": False}
    pixels = batch(200, 1)
    same = Augmentation(**nothing)(pixels)
    assert torch.allclose(same, pixels.float(), atol=1e-2)
    flipped = Augmentation(**nothing | {"flip": True})(pixels)
    mirrored = (flipped - pixels.flip(-1).float()).abs().amax(dim=(1, 2, 3)) < 0.1
    kept = (flipped - pixels.float()).abs().amax(dim=(1, 2, 3)) < 0.1
    assert (mirrored ^ kept).all() and 60 < mirrored.sum() < 140
    erased = Augmentation(**nothing | {"erase": 1.0})(pixels)
    share = ((erased - pixels.float()).abs() > 0.5).float().mean().item()
    assert 0.04 < share < 0.16
    level = torch.full((50, 3, 8, 8), 100, dtype=torch.uint8)
    tinted = Augmentation(**nothing | {"colour": 0.2})(level)
    assert 80 <= tinted.min() < 90 and 110 < tinted.max() <= 120 and tinted.std(dim=(2, 3)).max() < 1e-2
    moved = Augmentation(**nothing | {"shift": 0.1})(torch.arange(16.0).expand(50, 1, 16, 16))
    assert (moved - torch.arange(16.0)).abs()[..., 4:12].max() <= 1.6 + 1e-4


def test_only_training_batches_are_augmented(photos, tmp_path, monkeypatch):
    """An augmentation that blackens everything must leave validation, test and prediction as they are."""
    monkeypatch.setattr(Augmentation, "__call__", lambda self, pixels: pixels.float() * 0)
    black = image_run(tmp_path / "a", photos, epochs=1, lr=1e-30)
    plain = image_run(tmp_path / "b", photos, data={"augment": "none"}, epochs=1, lr=1e-30)
    assert black.history["train/loss"][0] != plain.history["train/loss"][0]
    answers = black.predictions.filter(like="probability")
    assert answers.nunique().max() > 1 and not np.allclose(black.history["val/loss"][0], np.log(2), atol=1e-6)


def test_flip_is_decided_by_the_images():
    torch.manual_seed(0)
    letters = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    letters[:20, :, :, :3] = 255  # bright left
    letters[20:, :, :, 5:] = 255  # bright right
    labels = torch.tensor([0] * 20 + [1] * 20)
    assert flip_is_harmless(letters, labels)[0] is False
    assert flip_is_harmless(letters.transpose(2, 3), labels)[0] is True  # bright top against bright bottom


def test_the_contact_sheet_is_a_picture(run):
    with Image.open(run.out / "augmented.png") as sheet:
        assert sheet.width >= 8 * 64 and sheet.mode == "RGB"
    assert contact_sheet(torch.zeros(9, 1, 70, 70)).size == (8 * 71, 2 * 71)


# ---------------------------------------------------------------- the run


def test_the_network_is_sized_by_hidden_and_takes_any_size():
    facts = {"in_channels": 3, "out_features": 5, "activation": "relu", "batch_norm": True, "dropout": 0.1}
    for size in (4, 8, 28, 32, 64, 100, 224):
        model = build_model("cnn", facts | {"image_size": size, "hidden": [4, 8]}).eval()
        assert model(torch.randn(2, 3, size, size)).shape == (2, 5)
    own, larger = (build_model("cnn", facts | {"image_size": 32, "hidden": h}) for h in ([], [64, 128, 256]))
    count = [sum(p.numel() for p in m.parameters()) for m in (own, larger)]
    assert 3.5 < count[1] / count[0] < 4.5
    assert not any(
        "norm" in type(m).__name__.lower()
        for m in build_model("cnn", facts | {"image_size": 8, "hidden": [4], "batch_norm": False}).modules()
    )


def test_digits(tmp_path):
    """The bundled example, in fewer epochs than by default; the README's figure is of all of them."""
    run = quick_run(tmp_path / "run", data=DataConfig(data="digits"), model=ModelConfig(), epochs=8, lr=3e-3)
    assert run.test["accuracy"] > 0.95
    assert run.pipeline.task.classes == list(range(10))
    assert run.pipeline.preprocessor.size == 8 and run.pipeline.preprocessor.channels == 1


def test_every_way_to_ask_gives_the_same_answers(run, tmp_path):
    expected = run.predictions.set_index("file").drop(columns=["row", "target"])
    files = list(expected.index)
    loaded = Pipeline.load(run.out / "best.pt")
    again = loaded.predict(pd.DataFrame({"file": files})).set_index("file")
    pd.testing.assert_frame_equal(again, expected, rtol=1e-5, atol=1e-6)
    one_by_one = pd.concat([loaded.predict([{"file": f}]) for f in files]).set_index("file")
    pd.testing.assert_frame_equal(one_by_one, expected, rtol=1e-5, atol=1e-6)
    in_memory = loaded.predict([{"file": open(f, "rb").read()} for f in files])
    np.testing.assert_allclose(in_memory["probability"], expected["probability"], atol=1e-6)
    none = loaded.predict([])
    assert none.empty and set(none) == {"file", *expected}
    folder = str(run.out / "sample")
    pd.DataFrame({"file": files}).to_csv(tmp_path / "paths.csv", index=False)
    for source, count in (
        (folder, 5), (f"{folder}/*.*", 5), (files[0], 1), (str(tmp_path / "paths.csv"), len(files)),
    ):  # fmt: skip
        result = command(
            "predict.py", "--checkpoint", run.out / "best.pt", "--input", source, "--output", tmp_path / "o.csv"
        )
        assert result.returncode == 0, result.stderr.decode()
        answers = pd.read_csv(tmp_path / "o.csv")
        assert len(answers) == count and list(answers)[:2] == ["file", "prediction"]
    np.testing.assert_allclose(answers["probability"], expected["probability"], atol=1e-6)
    answers = pd.read_csv(tmp_path / "o.csv").set_index("file")
    assert answers["prediction"].tolist() == expected["prediction"].tolist()


def test_names_with_commas_and_quotes(run, tmp_path):
    names = ["a, b.png", 'c "d".png', "[e].png", "가.PNG"]
    for name in names:
        picture(0, 1).save(tmp_path / name, "PNG")
    result = command(
        "predict.py", "--checkpoint", run.out / "best.pt", "--input", tmp_path, "--output", tmp_path / "o.csv"
    )
    assert result.returncode == 0, result.stderr.decode()
    assert sorted(pd.read_csv(tmp_path / "o.csv")["file"]) == sorted(str(tmp_path / name) for name in names)


def test_predict_names_what_is_wrong(run, tmp_path):
    checkpoint = ["predict.py", "--checkpoint", run.out / "best.pt", "--input"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "paths.csv").write_text("file\nabsent.png\n")
    (tmp_path / "other.csv").write_text("path\nx.png\n")
    assert_refused(command(*checkpoint, tmp_path / "empty"), "no images")
    assert_refused(command(*checkpoint, tmp_path / "bad.png"), "bad.png", "no image that can be read")
    assert_refused(command(*checkpoint, tmp_path / "paths.csv"), "absent.png", "no such image")
    assert_refused(command(*checkpoint, tmp_path / "other.csv"), "column 'file' is missing")


def test_the_checkpoint_is_plain_and_holds_its_examples(run):
    state = read_checkpoint(run.out / "best.pt")
    json.dumps({k: v for k, v in state.items() if k != "state_dict"}, allow_nan=False)
    assert state["kind"] == "image" and len(state["golden"]["records"]) == 16
    assert {a["prediction"] for a in state["golden"]["answers"]} <= {"red", "blue"}
    files = {p.name for p in run.out.iterdir()}
    assert {
        "best.pt",
        "last.pt",
        "metrics.json",
        "history.csv",
        "test_predictions.csv",
        "augmented.png",
        "sample",
    } <= files


@pytest.mark.parametrize(("where", "at"), [("step", 2), ("evaluate", 2)])
def test_interrupted_with_augmentation(photos, tmp_path, monkeypatch, where, at):
    data = DataConfig(data=str(photos), image_size=8, augment="strong", batch_size=8)
    model = ModelConfig(hidden=(4, 8))
    interrupted_run(tmp_path / "a", where, at, monkeypatch, table=None, data=data, model=model)
    quick_run(tmp_path / "b", data=data, model=model)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_mixed_precision_learns(photos, tmp_path):
    run = image_run(tmp_path / "run", photos, epochs=4, amp=True, lr=1e-2)
    assert run.history["train/loss"].iloc[-1] < run.history["train/loss"].iloc[0]
    assert all(p.dtype == torch.float32 for p in run.pipeline.model.parameters())
