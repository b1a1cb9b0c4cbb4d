"""Images of any kind are read as a person sees them, and changed only where that is allowed."""

import io
import json
import os
import tempfile
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import preprocessing.pixels as pixels_module
from config import DataConfig, from_plain
from dataloader import load_splits
from errors import BrokenRecords, UserError
from preprocessing.augmentation import STRENGTHS, Augmentation, contact_sheet, flip_is_harmless, make_augmentation
from preprocessing.column import Cells
from preprocessing.image import ImageColumn
from preprocessing.pixels import image_bytes, read_pixels, to_data_url
from sources.folders import find_files, read_folder
from sources.layout import Layout


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


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def column(cells) -> pd.Series:
    return pd.Series(cells, index=pd.RangeIndex(1, len(cells) + 1), name="photo", dtype=object)


def fit(values, **options):
    return ImageColumn.fit_encode(values, DataConfig(**options))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pd.Series:
    folder = make_folder(tmp_path_factory.mktemp("images"))
    return column(sorted(str(path) for path in folder.rglob("*.*")))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
def test_formats(tmp_path, ending):
    seen = Image.fromarray(np.full((9, 7, 3), (200, 100, 50), dtype=np.uint8))
    seen.save(tmp_path / f"a.{ending}")
    pixels = read_pixels(str(tmp_path / f"a.{ending}"), 4, 3)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), [200, 100, 50], atol=6)
    raw = (tmp_path / f"a.{ending}").read_bytes()
    assert ImageColumn.detect(Cells(column([raw, raw])), DataConfig())


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
    assert read_pixels(png(Image.fromarray(pixels)), 10, 1).min() == 255


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    good = picture(0, 0)
    good.save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    for name, words in {"text.png": "not a readable image", "cut.png": "broken", "none.png": "no such image"}.items():
        with pytest.raises(UserError, match=rf"{name}.*{words}"):
            read_pixels(str(tmp_path / name), 8, 3)
    for limit in (100, 300):  # Pillow raises an error from twice the limit on, and a warning below that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"good\.png: refused, it has more pixels"):
            read_pixels(str(tmp_path / "good.png"), 8, 3)


def test_a_table_of_bytes_needs_no_flag(photos):
    """In a notebook: the cells are no text, and nothing tries to read them as such."""
    table = pd.DataFrame({"photo": photos.map(image_bytes), "y": ["a", "b"] * (len(photos) // 2)})
    assert table["photo"].iloc[0].startswith(b"\x89PNG")
    splits = load_splits(DataConfig(target="y"), 0, table)
    assert len(splits.train) and isinstance(splits.train["photo"].iloc[0], bytes)


def test_paths_bytes_and_data_urls_are_the_same_image(photos):
    fitted, pixels = fit(photos, image_size=16)
    raw = [image_bytes(path) for path in photos]
    urls = [to_data_url(read_pixels(path, 16, 3)) for path in photos]
    for cells in (raw, urls, [*photos[:9], *raw[9:20], *urls[20:]]):
        assert torch.equal(fitted.encode(column(cells)), pixels)
    with_spaces = pd.Series(photos.tolist(), name="photo", dtype="str")
    assert torch.equal(fitted.encode(with_spaces), pixels)
    assert [image_bytes(url)[:4] for url in urls] == [b"\x89PNG"] * len(urls)


@pytest.mark.parametrize(("brand", "name"), [(b"heic", "a HEIC"), (b"avif", "an AVIF"), (b"isom", "not a readable")])
def test_photos_of_telephones_are_named_as_such(tmp_path, brand, name):
    raw = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"miaf" + bytes(80)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for ending in ("heic", "jpg"):
        (tmp_path / "photos" / "a" / f"x.{ending}").write_bytes(raw)
    path = str(tmp_path / "photos" / "a" / "x.heic")
    for cell, prefix in ((path, f"{path}: "), (raw, "")):
        with pytest.raises(UserError, match=f"^{prefix}(this is {name} image: convert it|{name} image)"):
            read_pixels(cell, 8, 3)
    notes: list[str] = []
    read_folder(tmp_path / "photos", notes)
    assert "1 files that are hidden or of another kind left out, among them 1 HEIC or AVIF images: convert" in notes[0]
    assert path in find_files(str(tmp_path / "photos"), Layout(frozenset({"file"}), lone="file"))
    (tmp_path / "photos" / "a" / "x.jpg").unlink()
    with pytest.raises(UserError, match=r"no images and no texts .* There are 1 HEIC or AVIF images: convert them"):
        read_folder(tmp_path / "photos", notes)
    assert ImageColumn.detect(Cells(column([path, "b.jpg"])), DataConfig())


def test_broken_images_are_reported_all_at_once_by_position(tmp_path, photos):
    whole = image_bytes(photos[1])
    (tmp_path / "text.png").write_text("no image")
    broken = {
        3: ("row 4, column 'photo': the image is broken", whole[: len(whole) // 2]),
        5: (f"{tmp_path}/text.png: not a readable image", str(tmp_path / "text.png")),
        6: ("row 7, column 'photo': the cell is empty", None),
        8: ("row 9, column 'photo': not a readable image", "data:image/png;base64,AAAA"),
        9: ("row 10, column 'photo': not a readable image", 5),
        11: ("none.png: no such image", "none.png"),
        12: ("row 13, column 'photo': not a readable image", "data:image/png;base64,A"),
    }
    cells = photos.tolist()
    for i, (_, cell) in broken.items():
        cells[i] = cell
    fitted, _ = fit(photos, image_size=8)
    for call in (lambda values: fit(values, image_size=8), fitted.encode):
        with pytest.raises(BrokenRecords) as raised:
            call(column(cells))
        assert list(raised.value.messages) == list(broken)
        for i, (message, _) in broken.items():
            assert message in raised.value.messages[i]
        assert str(raised.value) == raised.value.messages[3]
        call(column([cell for i, cell in enumerate(cells) if i not in broken]))
    with pytest.raises(BrokenRecords, match="the cell is empty"):
        fit(column([None, None]))
    with pytest.raises(UserError, match="there are no images"):
        fit(column([]))


# ---------------------------------------------------------------- fitting


def test_state_is_plain_and_of_training_images_alone(photos):
    train = photos[:32]
    fitted, pixels = fit(train)
    assert (fitted.size, fitted.channels) == (22, 3)
    assert from_plain(ImageColumn, json.loads(json.dumps(asdict(fitted)))) == fitted
    assert torch.equal(fitted.encode(train), pixels) and pixels.dtype == torch.uint8
    x = fitted.batch(pixels)
    assert x.shape == (32, 3, 22, 22) and x.dtype == torch.float32
    assert x.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert x.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    only, _ = fit(train.head(5), image_size=8)
    assert only.size == 8 and only.mean != fitted.mean


def test_grey_images_have_one_channel_and_large_ones_are_limited(tmp_path):
    for i in range(3):
        Image.new("L", (500, 400), 50 * i).save(tmp_path / f"{i}.png")
    fitted, pixels = fit(column([str(path) for path in tmp_path.iterdir()]))
    assert (fitted.size, fitted.channels) == (128, 1) and pixels.shape == (3, 1, 128, 128)
    args = ImageColumn.model_args([fitted])
    assert (args["in_channels"], args["image_size"], args["image_mean"]) == (1, 128, fitted.mean)
    assert fitted.max_examples == 4 and fit(column([str(tmp_path / "0.png")]), image_size=64)[0].max_examples == 16


def test_each_file_is_decoded_once(photos, monkeypatch):
    decoded = []
    monkeypatch.setattr(pixels_module, "read_pixels", lambda cell, *a: (decoded.append(cell), read_pixels(cell, *a))[1])
    ImageColumn.fit_encode(photos, DataConfig(augment="strong"), np.arange(48) % 2)
    assert sorted(decoded) == sorted(photos)


def test_large_pixels_are_a_file_that_vanishes(photos, monkeypatch):
    whole, pixels = fit(photos)
    monkeypatch.setattr(pixels_module, "memory", lambda: 0)
    files, temporary_file = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: files.append(temporary_file(dir=dir)) or files[-1])
    mapped, mapped_pixels = fit(photos)
    assert len(files) == 1 and os.fstat(files[0].fileno()).st_nlink == 0  # it has no name
    files.clear()
    assert mapped == whole and torch.equal(mapped_pixels, pixels)
    assert torch.equal(mapped_pixels[torch.tensor([3, 1])], pixels[[3, 1]])
    assert isinstance(pixels_module.allocate((2, 3, 8, 8)), np.memmap)
    monkeypatch.setattr(pixels_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"the pixels take 384 bytes.*--image-size"):
        pixels_module.allocate((2, 3, 8, 8))
    monkeypatch.undo()
    assert not isinstance(pixels_module.allocate((2, 3, 8, 8)), np.memmap)


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
    nothing = {"shift": 0.0, "rotation": 0.0, "zoom": 0.0, "colour": 0.0, "erase": 0.0, "flip": False}
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


def test_only_training_batches_of_a_column_are_augmented(photos):
    fitted, pixels = fit(photos, augment="strong")
    plain, _ = fit(photos, augment="none")
    torch.manual_seed(0)
    changed = fitted.batch(pixels, training=True)
    torch.manual_seed(0)
    expected = plain.batch(make_augmentation("strong", fitted.flip)(pixels))
    assert torch.equal(changed, expected) and not torch.equal(changed, fitted.batch(pixels))
    for column_ in (fitted, plain):
        normalised = (pixels.float() / 255 - torch.tensor(column_.mean)[:, None, None]) / torch.tensor(column_.std)[
            :, None, None
        ]
        assert torch.equal(column_.batch(pixels), normalised)
    assert torch.equal(plain.batch(pixels, training=True), plain.batch(pixels))
    assert changed.is_contiguous(memory_format=torch.channels_last) and changed.dtype == torch.float32


def test_flip_is_decided_by_the_images():
    torch.manual_seed(0)
    letters = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    letters[:20, :, :, :3] = 255  # bright left
    letters[20:, :, :, 5:] = 255  # bright right
    labels = torch.tensor([0] * 20 + [1] * 20)
    assert flip_is_harmless(letters, labels)[0] is False
    assert flip_is_harmless(letters.transpose(2, 3), labels)[0] is True  # bright top against bright bottom


@pytest.mark.parametrize("count", [10, 40, 400])
def test_noise_does_not_look_like_its_class(count):
    """An image counts for the mean of its class: judged against it, noise would seem to show its label."""
    for seed in range(5):
        torch.manual_seed(seed)
        noise, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 4, (count,))
        assert flip_is_harmless(noise, labels)[0] is True
        arrows = noise // 2
        arrows[labels % 2 == 0, :, :, :12] += 100
        arrows[labels % 2 == 1, :, :, -12:] += 100
        assert flip_is_harmless(arrows, labels % 2)[0] is False
    assert flip_is_harmless(noise[:3], torch.arange(3))[0] is True


def test_a_column_decides_to_flip_by_its_labels_or_the_flag(photos):
    labels = np.arange(48) // 24
    for flip, given, expected in (
        ("auto", labels, True), ("auto", None, False), ("on", None, True), ("off", labels, False),
    ):  # fmt: skip
        fitted, _ = ImageColumn.fit_encode(photos, DataConfig(flip=flip), given)
        assert fitted.flip is expected
        assert f"standard augmentation, horizontal flip {'on' if expected else 'off'} (" in fitted.summary()
    assert "closest to the mean of their own class" in ImageColumn.fit_encode(photos, DataConfig(), labels)[0].summary()
    assert fit(photos, augment="none")[0].summary() == "short side to 22, centre crop; RGB, mean 0 and std 1"


def test_the_contact_sheet_is_a_picture(photos):
    fitted, pixels = fit(photos)
    sheet = fitted.preview(fitted.batch(pixels[:16]))
    assert sheet.width >= 8 * 46 and sheet.mode == "RGB"
    first = np.asarray(sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.NEAREST))[:22, :22]
    np.testing.assert_array_equal(first, pixels[0].permute(1, 2, 0).numpy())
    assert contact_sheet(torch.zeros(9, 1, 70, 70)).size == (8 * 71, 2 * 71)


# ---------------------------------------------------------------- what others use of a column


def test_which_columns_are_images(photos):
    def is_image(cells, dtype=object) -> bool:
        return ImageColumn.detect(Cells(pd.Series(cells, name="photo", dtype=dtype)), DataConfig())

    raw = png(picture(0, 0))
    url = to_data_url(read_pixels(raw, 8, 3))
    assert is_image(photos.tolist()) and is_image(photos.tolist(), "str") and is_image([raw, None, url, "a b.JPEG"])
    assert is_image(["a.png", "", "NA", None], "str")
    for cells in (["a.png", "b.txt"], [b"text"], [None, ""], ["png"], ["https://a.bc/d.png"], [["a.png"]]):
        assert not is_image(cells)
    assert not is_image([1.0, 2.0], float) and not is_image([True, False], bool)


def test_a_network_takes_one_image_column(photos):
    fitted, _ = fit(photos, image_size=8)
    with pytest.raises(UserError, match=r"columns 'photo', 'photo' are images.*--columns NAME=drop"):
        ImageColumn.model_args([fitted, fitted])


def test_examples_profiles_and_samples(photos):
    fitted, pixels = fit(photos, image_size=8)
    examples = fitted.examples(photos[:5])
    assert torch.equal(fitted.encode(column(json.loads(json.dumps(examples)))), pixels[:5])
    brightness = fitted.profile_values(photos, pixels)["photo: brightness"]
    np.testing.assert_allclose(brightness, pixels.numpy().mean(axis=(1, 2, 3)) / 255)
    assert fitted.unknown(photos, pixels) is None
    raw = png(picture(0, 0))
    files = fitted.sample_files(pd.Series([photos[1], raw, examples[0]], index=[7, 8, 9], name="photo"))
    assert [name for name, _ in files] == [f"7-{os.path.basename(photos[1])}", "8.png", "9.png"]
    assert [data for _, data in files] == [image_bytes(photos[1]), raw, image_bytes(examples[0])]
    schema = fitted.json_schema({}, examples)
    assert schema["pattern"] == "^data:image/" and (schema["type"], schema["x-kind"]) == ("string", "image")


def test_pixels_of_a_request_are_counted_before_decoding(photos):
    fitted, _ = fit(photos, image_size=8)
    cells = column([png(Image.new("L", (100, 30))), png(Image.new("L", (20, 50)))])
    fitted.check_pixels(cells, 4_000)
    with pytest.raises(UserError, match="the images have 4,000 pixels together, a request at most 3,999"):
        fitted.check_pixels(cells, 3_999)
    with pytest.raises(UserError, match="row 2, column 'photo': not a readable image"):
        fitted.check_pixels(column([cells[1], b"no image"]), 4_000)


@pytest.mark.parametrize("channels", [1, 3])
def test_onnx_takes_pixels(channels, photos, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    fitted = ImageColumn("photo", 8, channels, [0.4] * channels, [0.2] * channels)

    class Graph(torch.nn.Module):
        def forward(self, x):
            return fitted.transform(x)

    pixels = fitted.parse(photos)
    assert pixels.dtype == np.uint8 and pixels.shape == (48, channels, 8, 8)
    x = torch.from_numpy(pixels)
    torch.onnx.export(
        Graph().eval(), (x,), tmp_path / "a.onnx", input_names=["image"], dynamic_shapes=({0: "batch"},), verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (found,) = session.run(None, {"image": pixels[:5]})
    np.testing.assert_allclose(found, fitted.batch(x[:5]).numpy(), atol=1e-6)
