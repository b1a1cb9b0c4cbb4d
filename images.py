"""Images: files → records, and records → pixels → the network's input. Any mode, size and orientation."""

import base64
import contextlib
import io
import os
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from errors import UserError, did_you_mean, naming
from preprocessing import as_frame, count_cores, spread

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # Pillow hands others to programs beside it
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
LARGEST_SIZE = 128  # of what is chosen without being asked; --image-size may go beyond
LARGE = 16_000_000  # pixels; larger images are decoded one at a time, to bound the memory
_one_large = threading.Lock()
IMAGES_AT_ONCE = 256  # of those that predict.py holds in memory
DATA_URL = "data:image/"  # …png;base64,iVBOR…
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is an error here, see `_open`
UNREADABLE = (  # what Pillow raises
    OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, NotImplementedError, IndexError
)  # fmt: skip
GREY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")

# ---------------------------------------------------------------- files → records


def is_image_file(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def digits_folder() -> Path:
    """Write scikit-learn's 1,797 digits as png files by class, once, to the temporary folder; return where."""
    folder = Path(tempfile.gettempdir()) / "digits-as-png-1797"
    if not folder.exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
                path = Path(temporary) / "digits" / str(label) / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)
            with contextlib.suppress(OSError):  # another run was faster
                os.replace(Path(temporary) / "digits", folder)
    return folder


def resolve_paths(table: pd.DataFrame, column: str, source: str | Path) -> pd.DataFrame:
    """Make the paths in a column start from the folder of the file that names them. Raises UserError without it."""
    if column not in table:
        raise UserError(f"{source}: column {column!r} is missing.{did_you_mean(column, table.columns)}")
    empty = table[column].isna()
    if empty.any():
        raise UserError(f"{source}: row {table.index[empty.argmax()]}, column {column!r} is empty: it names no image.")
    # Standard input has no folder: its paths start here
    folder = Path(".") if Path(source).name.startswith("standard input") else Path(source).parent
    paths = [str(p) if is_in_memory(p) else str(folder / str(p)) for p in table[column]]
    return table.assign(**{column: paths})


# ---------------------------------------------------------------- records → pixels


def data_url(image: bytes) -> str:
    """Return the bytes of an image file, of whatever format, as text that JSON can hold."""
    return f"{DATA_URL}png;base64,{base64.b64encode(image).decode()}"


def is_in_memory(cell: str | bytes) -> bool:
    """Tell bytes and data URLs from paths."""
    return isinstance(cell, bytes) or str(cell).startswith(DATA_URL)


def image_bytes(cell: str | bytes) -> bytes:
    """Return the bytes of an image file: a path, these bytes, or a data URL."""
    if isinstance(cell, bytes):
        return cell
    return base64.b64decode(cell.partition(",")[2]) if is_in_memory(cell) else Path(cell).read_bytes()


def naming_row(row: int, column: str, cell: str | bytes):
    """Put row and column before what is said of an image in memory; one in a file is called by that."""
    return naming(f"row {row}, column {column!r}") if is_in_memory(cell) else contextlib.nullcontext()


def _name(cell: str | bytes) -> str:
    return "" if is_in_memory(cell) else f"{cell}: "


def _open(cell: str | bytes) -> Image.Image:
    """Open an image without decoding it. A cell is a path, the bytes of a file, or a data URL."""
    try:
        image = Image.open(io.BytesIO(image_bytes(cell)) if is_in_memory(cell) else cell, formats=FORMATS)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # from twice that on, Pillow refuses by itself
            raise Image.DecompressionBombError
        return image
    except FileNotFoundError:
        raise UserError(f"{_name(cell)}no such image.") from None
    except Image.DecompressionBombError:
        raise UserError(f"{_name(cell)}refused, it has more pixels than {Image.MAX_IMAGE_PIXELS:,}.") from None
    except UNREADABLE as error:
        raise UserError(f"{_name(cell)}no image that can be read ({type(error).__name__}).") from None


def count_pixels(cell: str | bytes) -> int:
    """Return the pixels of an image, read off its header."""
    with _open(cell) as image:
        return image.width * image.height


def _as_seen(image: Image.Image, channels: int) -> Image.Image:
    """Return what a person sees: turned by its EXIF tag, transparent parts white, 16 bits as 8, grey or RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        scale = 1 if image.mode == "F" and values.max(initial=0) <= 255 else 257  # 65,535 / 255
        strips = np.array_split(values, 1 + len(values) // 256)  # in float64, the whole would be four times as large
        image = Image.fromarray(np.concatenate([(s / scale).clip(0, 255).round().astype(np.uint8) for s in strips]))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        seen = Image.new(mode, image.size, "white")
        seen.paste(image, mask=image.getchannel("A"))
        return seen
    return image.convert(mode)


def read_pixels(cell: str | bytes, size: int, channels: int) -> np.ndarray:
    """Decode one image: short side to `size`, centre crop; uint8 (channels, size, size).

    Raises UserError, naming the file, where it is none, is broken, or would unpack to a decompression bomb.
    """
    with _open(cell) as image, _one_large if image.width * image.height > LARGE else contextlib.nullcontext():
        try:
            image.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))  # jpeg: decode no larger than needed
            seen = _as_seen(image, channels)
        except UNREADABLE as error:
            raise UserError(f"{_name(cell)}the image is broken ({error}).") from None
        if seen.size != (size, size):  # the short side fills, the long is cropped
            seen = ImageOps.fit(seen, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(seen)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@dataclass
class PixelCache:
    """The decoded images of a run: each file is decoded once, by all cores, with a progress bar.

    They are kept in memory, or, where they would take more than a quarter of it, in a file in `folder` that is mapped
    into memory and vanishes with the process, however that ends.
    """

    folder: Path
    skip_broken: bool = False
    kept: dict = field(default_factory=dict)  # by the identity of the records
    broken: list[str] = field(default_factory=list)  # messages
    bytes_used: int = 0

    def get(self, records: pd.DataFrame, column: str, size: int, channels: int) -> tuple[Tensor, pd.DataFrame]:
        """Return uint8 pixels (N, channels, size, size) of the records that can be read, and these records."""
        if id(records) not in self.kept:
            shape = (len(records), channels, size, size)
            pixels, good = self._allocate(shape), np.ones(len(records), dtype=bool)

            def decode(i: int) -> None:
                try:
                    with naming_row(records.index[i], column, cells[i]):
                        pixels[i] = read_pixels(cells[i], size, channels)
                except UserError as error:
                    if not self.skip_broken:
                        raise
                    good[i] = False
                    self.broken.append(str(error))

            cells = records[column].tolist()
            with ThreadPoolExecutor(count_cores()) as pool:
                for _ in tqdm(
                    pool.map(decode, range(len(cells))), "decoding", len(cells), unit=" images", disable=None
                ):
                    pass
            pixels, readable = torch.from_numpy(pixels), records
            if not good.all():
                pixels, readable = pixels[torch.from_numpy(good)], records[good]
            # With the records themselves, whose identity must stay theirs
            self.kept[id(records)] = self.kept[id(readable)] = (pixels, readable, records)
        return self.kept[id(records)][:2]

    def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        self.bytes_used += int(np.prod(shape))
        if self.bytes_used <= _memory() / 4:
            return np.empty(shape, dtype=np.uint8)
        return np.memmap(tempfile.TemporaryFile(dir=self.folder), dtype=np.uint8, mode="w+", shape=shape)


def _memory() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30


# ---------------------------------------------------------------- the preprocessor


@dataclass(frozen=True)
class ImagePreprocessor:
    """What was learned of the training images; `__call__` applies it."""

    column: str  # that holds the image: a path, bytes, or a data URL
    size: int  # pixels of a side
    channels: int  # 1 = grey, 3 = RGB
    mean: list[float]  # of each channel over the training pixels, 0 … 1
    std: list[float]

    @classmethod
    def fit(cls, records: pd.DataFrame, *, column: str, image_size: int, cache: PixelCache) -> "ImagePreprocessor":
        """Choose size and channels from the training images' headers, and take the statistics of their pixels.

        image_size: pixels of a side, 0 = the median short side, 128 at most.
        """
        headers, skipped = [], (UserError,) if cache.skip_broken else ()
        for row, cell in records[column].items():
            with contextlib.suppress(*skipped), naming_row(row, column, cell), _open(cell) as image:
                headers.append((image.size, image.mode))
        if not headers:
            raise UserError("no image can be read.")
        size = image_size or int(min(LARGEST_SIZE, np.median([min(size) for size, _ in headers])))
        channels = 1 if all(mode in GREY_MODES for _, mode in headers) else 3
        pixels, _ = cache.get(records, column, size, channels)
        mean, square = np.zeros(channels), np.zeros(channels)
        for part in pixels.split(1024):  # in float64, a piece at a time: the cache may be larger than the memory
            values = part.double() / 255
            mean += values.mean(dim=(2, 3)).sum(dim=0).numpy()
            square += values.square().mean(dim=(2, 3)).sum(dim=0).numpy()
        mean, square = mean / len(pixels), square / len(pixels)
        std = np.sqrt((square - mean**2).clip(0))
        return cls(column, size, channels, mean.tolist(), np.where(std > 1e-6, std, 1.0).tolist())

    @property
    def model_args(self) -> dict:
        """in_channels and image_size of the network's input."""
        return {"in_channels": self.channels, "image_size": self.size}

    def __call__(self, records) -> Tensor:
        """Turn records (DataFrame, dict or list of dicts) into a float32 tensor (N, channels, size, size).

        Raises UserError, naming the file, for an image that cannot be read, or where the column is missing.
        """
        return self.normalise(self.pixels(records))

    def pixels(self, records) -> Tensor:
        """Decode records into uint8 pixels (N, channels, size, size)."""
        cells = as_frame(records, self.column)[self.column]

        def read(row: int, cell: str | bytes) -> np.ndarray:
            with naming_row(row, self.column, cell):
                return read_pixels(cell, self.size, self.channels)

        with ThreadPoolExecutor(count_cores()) as pool:
            parts = list(pool.map(read, cells.index, cells))
        return torch.from_numpy(np.stack(parts)) if parts else torch.empty(0, self.channels, self.size, self.size)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn pixels (uint8, or float 0 … 255) into mean 0 and deviation 1 in each channel, on their device."""
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def examples(self, records: pd.DataFrame, count: int) -> list[dict]:
        """Return some records as plain dicts, the image at its final size as a data URL."""
        examples = []
        for cell in spread(records, count if self.size <= 64 else count // 4)[self.column]:
            pixels, file = read_pixels(cell, self.size, self.channels), io.BytesIO()
            Image.fromarray(pixels[0] if self.channels == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
            examples.append({self.column: data_url(file.getvalue())})
        return examples

    def denormalise(self, x: Tensor) -> Tensor:
        """Undo `normalise`, to float 0 … 1."""
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return x * std + mean

    def measure(self, records, x: Tensor) -> dict[str, np.ndarray]:
        """Return the brightness of each image, 0 … 1, from its tensor."""
        return {"brightness": self.denormalise(x).mean(dim=(1, 2, 3)).double().numpy()}

    def count_unknown(self, x: Tensor) -> dict[str, int]:
        return {}

    def decisions(self) -> list[tuple[str, str, str]]:
        """(column, kind, what becomes of it), to show to a person."""
        colour = "grey" if self.channels == 1 else "RGB"
        return [(self.column, "image", f"short side to {self.size}, centre crop; {colour}, mean 0 and deviation 1")]
