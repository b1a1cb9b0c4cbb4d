"""Images are learned from and predicted, the same way wherever they come from: folders, tables, memory, a command."""

import io
import json
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_refused, command, mixed_csv, quick_run
from PIL import Image
from test_image_column import make_folder, picture
from test_resume import fingerprint, interrupted_run

import dataloader as dataloader_module
import predict
import preprocessing.pixels as pixels_module
from config import DataConfig, ModelConfig
from dataloader import load_splits
from errors import BrokenRecords, UserError
from model import build_model
from pipeline import Pipeline, read_checkpoint
from preprocessing import Preprocessor
from preprocessing.augmentation import Augmentation


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


def predict_file(run, source, out) -> pd.DataFrame:
    """Predictions of predict.py, without a process of its own."""
    predict.predict(predict.Options(str(run.out / "best.pt"), str(source), str(out)))
    return pd.read_csv(out)


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The cells that are decoded during a test."""
    cells, read = [], pixels_module.read_pixels
    monkeypatch.setattr(pixels_module, "read_pixels", lambda cell, *args: (cells.append(cell), read(cell, *args))[1])
    return cells


# ---------------------------------------------------------------- folders and tables


def test_folders(tmp_path, photos):
    splits = load_splits(DataConfig(data=str(photos)), 0)
    records = pd.concat([splits.train, splits.val, splits.test])
    assert len(records) == 48 and not splits.notes and set(records["label"]) == {"red", "blue"}
    assert splits.target == "label" and splits.config.column_kinds() == {"file": "image"}
    folder = make_folder(tmp_path / "photos", 6)
    (folder / "red" / ".hidden.png").write_bytes(b"")
    (folder / "red" / "notes.txt").write_text("")
    (folder / ".git").mkdir()
    splits = load_splits(DataConfig(data=str(folder)), 0)
    assert sum(map(len, (splits.train, splits.val, splits.test))) == 12
    assert "2 files that are hidden" in splits.notes[0]
    with pytest.raises(UserError, match="no images and no texts in class folders"):
        load_splits(DataConfig(data=str(folder / "red")), 0)
    with pytest.raises(UserError, match="--target species: no such column"):
        load_splits(DataConfig(data=str(photos), target="species"), 0)


def test_a_network_for_other_data_is_refused(tmp_path, photos):
    with pytest.raises(UserError, match="--model mlp reads numbers, categories, but the records have image"):
        quick_run(tmp_path / "a", data=DataConfig(data=str(photos)), model=ModelConfig(model="mlp"))
    with pytest.raises(UserError, match="--model cnn reads image, but the records have numbers"):
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
    other = {"name": "brightness", "brightness": "name"}[target]  # the other columns are learned from as well
    assert run.pipeline.preprocessor.names == [name for name in ("path", "name", "brightness") if name != target]
    result = command("predict.py", "--checkpoint", tmp_path / "run" / "best.pt", "--input", tmp_path / "table.csv")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode().splitlines()[0].startswith("file,prediction") and result.stdout.count(b"\n") == 41
    assert b"metrics" in result.stderr
    alone = image_run(tmp_path / "alone", "", data=data | {"columns": (f"{other}=drop",)}, epochs=1)
    assert alone.pipeline.preprocessor.kinds == {"path": "image"}


def test_images_and_texts_of_the_same_records(tmp_path):
    path = mixed_csv(tmp_path, "binary", rows=80)
    data = DataConfig(data=str(path), target="binary", image="photo", text=("title", "note"))
    assert data.column_kinds() == {"title": "text", "note": "text", "photo": "image"}
    run = quick_run(tmp_path / "run", data=data, model=ModelConfig(), epochs=2)
    assert set(run.pipeline.preprocessor.kinds.values()) == {"number", "category", "date", "text", "image"}
    assert run.pipeline.model_spec["names"] == ["tabm", "cnn"]
    predictions = predict_file(run, path, tmp_path / "o.csv")
    table = pd.read_csv(path).assign(photo=lambda t: str(tmp_path) + "/" + t["photo"])
    expected = run.pipeline.predict(table)
    pd.testing.assert_frame_equal(predictions, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    shown = Pipeline.load(run.out / "best.pt").predict(run.pipeline.examples)
    assert shown["probability"].between(0.5, 1).all()
    assert (run.out / "sample.csv").exists() and len(list((run.out / "sample").iterdir())) == 5
    assert len(predict_file(run, run.out / "sample.csv", tmp_path / "s.csv")) == 5


# ---------------------------------------------------------------- decoding


def test_each_image_is_decoded_once(photos, tmp_path, decoded):
    """Training, validation and test images; a few training images once more, as examples."""
    run = image_run(tmp_path / "run", photos, epochs=3)
    splits = load_splits(DataConfig(data=str(photos)), 0)
    counts = pd.Series([cell for cell in decoded if not cell.startswith("data:")]).value_counts()
    assert set(counts.index) == {path for s in (splits.train, splits.val, splits.test) for path in s["file"]}
    assert len(run.pipeline.examples) == 16 and all(r["file"].startswith("data:") for r in run.pipeline.examples)
    examples = counts[counts > 1].index
    assert len(examples) == 16 and set(examples) <= set(splits.train["file"]) and counts.max() == 2


def test_fitting_and_encoding_decode_each_training_image_exactly_once(photos, decoded):
    splits = load_splits(DataConfig(data=str(photos)), 0)
    labels = (splits.train["label"] == "red").to_numpy().astype(int)
    fitted, encoded = Preprocessor.fit_encode(splits.train.drop(columns="label"), splits.config, labels)
    assert sorted(decoded) == sorted(splits.train["file"])
    assert torch.equal(encoded["file"], fitted.encode(splits.train)["image"])


def test_large_pixels_are_mapped_from_a_file_that_vanishes(photos, tmp_path, monkeypatch):
    whole = image_run(tmp_path / "a", photos)
    monkeypatch.setattr(pixels_module, "memory", lambda: 0)
    files, temporary_file = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: files.append(temporary_file(dir=dir)) or files[-1])
    folder = tmp_path / "b"
    folder.mkdir()
    mapped = image_run(folder / "run", photos)
    assert fingerprint(tmp_path / "a")[:2] == fingerprint(folder / "run")[:2]
    assert [p.name for p in folder.iterdir()] == ["run"]
    assert len(files) >= 3  # one for each split, at least
    assert all(pixels_module.os.fstat(file.fileno()).st_nlink == 0 for file in files)  # none of them has a name
    assert isinstance(pixels_module.allocate((2, 3, 8, 8)), np.memmap)
    assert whole.test == mapped.test


def broken_folder(folder):
    """24 valid images, a text file named .png, and a truncated image."""
    make_folder(folder, 12)
    (folder / "red" / "text.png").write_text("no image")
    whole = (folder / "red" / "000.png").read_bytes()
    (folder / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_broken_files_stop_or_are_left_out(tmp_path):
    folder = broken_folder(tmp_path / "photos")
    flags = ["--data", folder, "--epochs", 1, "--hidden", 4, "--image-size", 8]
    assert_refused(command("train.py", *flags, "--out", tmp_path / "a"), ".png:")
    assert not (tmp_path / "a").exists()
    result = command("train.py", *flags, "--skip-broken", "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr.decode()
    notes = [line for line in result.stdout.decode().splitlines() if "broken records left out" in line]
    assert sum(int(note.split()[0]) for note in notes) == 2  # perhaps in two splits
    rows = json.loads((tmp_path / "b" / "metrics.json").read_text())["rows"]
    assert sum(rows.values()) == 24


def test_images_are_decoded_again_only_if_some_are_broken(tmp_path, decoded):
    folder = broken_folder(tmp_path / "photos")
    whole = load_splits(DataConfig(data=str(folder)), 0)
    records, notes = pd.concat([whole.train, whole.val, whole.test]), []
    bad = records["file"].str.contains("text|cut")

    def encode(part):
        return Preprocessor.fit_encode(part.drop(columns="label"), DataConfig(columns=("file=image",), image_size=8))

    (fitted, parts), left = dataloader_module._without_broken(encode, records, True, notes)
    assert left["file"].tolist() == records["file"][~bad].tolist() and len(parts["file"]) == 24
    assert notes[0].startswith("2 broken records left out, the first: ") and ".png" in notes[0]
    assert sorted(decoded) == sorted([*records["file"], *left["file"]])
    decoded.clear()
    again, same = dataloader_module._without_broken(fitted.encode_columns, left, True, notes)
    assert torch.equal(again["file"], parts["file"]) and same is left and len(notes) == 1
    assert sorted(decoded) == sorted(left["file"])
    with pytest.raises(BrokenRecords) as raised:
        dataloader_module._without_broken(encode, records, False, notes)
    assert list(raised.value.messages) == np.flatnonzero(bad).tolist()
    with pytest.raises(UserError, match="all records are broken; the first"):
        dataloader_module._without_broken(fitted.encode_columns, records[bad], True, notes)


# ---------------------------------------------------------------- augmentation and the network


def test_only_training_batches_are_augmented(photos, tmp_path, monkeypatch):
    """An augmentation that blackens everything must leave validation, test and prediction as they are."""
    monkeypatch.setattr(Augmentation, "__call__", lambda self, pixels: pixels.float() * 0)
    black = image_run(tmp_path / "a", photos, epochs=1, lr=1e-30)
    plain = image_run(tmp_path / "b", photos, data={"augment": "none"}, epochs=1, lr=1e-30)
    assert black.history["train/loss"][0] != plain.history["train/loss"][0]
    probabilities = black.predictions.filter(like="probability")
    assert probabilities.nunique().max() > 1
    assert not np.allclose(black.history["val/loss"][0], np.log(2), atol=1e-6)


def test_the_contact_sheet_is_a_picture(run):
    with Image.open(run.out / "augmented.png") as sheet:
        assert sheet.width >= 8 * 64 and sheet.mode == "RGB"


def test_the_network_is_sized_by_hidden_and_takes_any_size():
    args = {"in_channels": 3, "out_features": 5, "activation": "relu", "batch_norm": True, "dropout": 0.1}
    for size in (4, 8, 28, 32, 64, 100, 224):
        model = build_model(["cnn"], args | {"image_size": size, "hidden": [4, 8]}).eval()
        assert model(torch.randn(2, 3, size, size)).shape == (2, 5)
    own, larger = (build_model(["cnn"], args | {"image_size": 32, "hidden": h}) for h in ([], [64, 128, 256]))
    count = [sum(p.numel() for p in m.parameters()) for m in (own, larger)]
    assert 3.5 < count[1] / count[0] < 4.5
    plain = build_model(["cnn"], args | {"image_size": 8, "hidden": [4], "batch_norm": False})
    assert not any("norm" in type(module).__name__.lower() for module in plain.modules())


# ---------------------------------------------------------------- the run


def test_digits(tmp_path):
    """The bundled example, in fewer epochs than by default; the README's figure is of all of them."""
    run = quick_run(tmp_path / "run", data=DataConfig(data="digits"), model=ModelConfig(), epochs=8, lr=3e-3)
    assert run.test["accuracy"] > 0.95
    assert run.pipeline.task.classes == list(range(10))
    column = run.pipeline.preprocessor.lone
    assert column.size == 8 and column.channels == 1


def test_every_way_to_predict_gives_the_same_predictions(run, tmp_path):
    expected = run.predictions.set_index("file").drop(columns=["row", "target"])
    files = list(expected.index)
    loaded = Pipeline.load(run.out / "best.pt")
    again = loaded.predict(pd.DataFrame({"file": files})).set_index("file")
    pd.testing.assert_frame_equal(again, expected, rtol=1e-5, atol=1e-6)
    one_by_one = pd.concat([loaded.predict([{"file": f}]) for f in files]).set_index("file")
    pd.testing.assert_frame_equal(one_by_one, expected, rtol=1e-5, atol=1e-6)
    bare = loaded.predict(files).set_index("file")
    pd.testing.assert_frame_equal(bare, expected, rtol=1e-5, atol=1e-6)
    in_memory = loaded.predict([{"file": open(f, "rb").read()} for f in files])
    np.testing.assert_allclose(in_memory["probability"], expected["probability"], atol=1e-6)
    none = loaded.predict([])
    assert none.empty and set(none) == {"file", *expected}
    folder = str(run.out / "sample")
    pd.DataFrame({"file": files}).to_csv(tmp_path / "paths.csv", index=False)
    for source, count in (
        (folder, 5), (f"{folder}/*.*", 5), (files[0], 1), (str(tmp_path / "paths.csv"), len(files)),
    ):  # fmt: skip
        predictions = predict_file(run, source, tmp_path / "o.csv")
        assert len(predictions) == count and list(predictions)[:2] == ["file", "prediction"]
    np.testing.assert_allclose(predictions["probability"], expected["probability"], atol=1e-6)
    assert predictions.set_index("file")["prediction"].tolist() == expected["prediction"].tolist()


def test_names_with_commas_and_quotes(run, tmp_path):
    names = ["a, b.png", 'c "d".png', "[e].png", "가.PNG"]
    for name in names:
        picture(0, 1).save(tmp_path / name, "PNG")
    predictions = predict_file(run, tmp_path, tmp_path / "o.csv")
    assert sorted(predictions["file"]) == sorted(str(tmp_path / name) for name in names)


def test_predict_names_what_is_wrong(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "paths.csv").write_text("file\nabsent.png\n")
    (tmp_path / "other.csv").write_text("path\nx.png\n")
    for name, message in {
        "empty": "no images",
        "bad.png": r"bad\.png.*not a readable image",
        "paths.csv": r"absent\.png: no such image",
        "other.csv": "column 'file' is missing",
    }.items():
        with pytest.raises(UserError, match=message):
            predict_file(run, tmp_path / name, tmp_path / "o.csv")
    done = command("predict.py", "--checkpoint", run.out / "best.pt", "--input", tmp_path / "bad.png")
    assert_refused(done, "bad.png", "not a readable image")


def test_the_checkpoint_is_plain_and_holds_its_examples(run):
    state = read_checkpoint(run.out / "best.pt")
    json.dumps({k: v for k, v in state.items() if k != "state_dict"}, allow_nan=False)
    assert [column["kind"] for column in state["preprocessor"]["columns"]] == ["image"]
    assert len(state["self_check"]["records"]) == 16
    assert {p["prediction"] for p in state["self_check"]["predictions"]} <= {"red", "blue"}
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


def test_an_empty_cell_among_images_is_a_broken_record(tmp_path):
    path = mixed_csv(tmp_path, "binary", rows=60)
    table = pd.read_csv(path)
    table.loc[5, "photo"] = ""
    table.to_csv(path, index=False)
    with pytest.raises(UserError, match=r"row 6, column 'photo': the cell is empty.*--skip-broken"):
        quick_run(tmp_path / "run", data=DataConfig(data=str(path), target="binary"), epochs=1)
    data = DataConfig(data=str(path), target="binary", image="photo", skip_broken=True)
    assert len(quick_run(tmp_path / "run", data=data, model=ModelConfig(), epochs=1).predictions) == 9


def test_images_in_memory_have_no_file_name(tmp_path, run):
    file = io.BytesIO()
    picture(0, 5).save(file, "PNG")
    predictions = run.pipeline.predict([file.getvalue()])
    assert predictions["file"].tolist() == [""]
    predictions.to_parquet(tmp_path / "p.parquet")
