"""Columns of images: file names, bytes or data URLs → pixels → the normalised input of a network."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from config import DataConfig
from errors import BrokenRecords, UserError
from preprocessing.augmentation import Augmentation, contact_sheet, flip_is_harmless, make_augmentation
from preprocessing.column import Cells, Column
from preprocessing.pixels import (
    ENDINGS,
    GREY_MODES,
    MANY_IMAGES,
    Pixels,
    decode,
    hash_content,
    image_bytes,
    is_image,
    is_missing,
    is_path,
    read_headers,
    to_data_url,
)
from preprocessing.similarity import fingerprints_of_images

PLACES = 8  # squares in a row of an image that are greyed out in turn
MAX_AUTO_SIZE = 128  # pixels of a side, unless --image-size is given


@dataclass(frozen=True)
class ImageColumn(Column):
    """An image: the short side scaled to `size`, centre crop, each channel to mean 0 and std 1."""

    name: str
    size: int  # pixels of a side
    channels: int  # 1 = grey, 3 = RGB
    mean: list[float]  # of each channel over the training pixels, 0 … 1
    std: list[float]
    augment: str = "none"  # strength, for training batches
    flip: bool = False  # whether augmentation mirrors
    flip_reason: str = ""

    kind: ClassVar[str] = "image"
    input: ClassVar[str] = "image"
    eval_batch_size: ClassVar[int] = 256
    read_rows: ClassVar[int] = 256
    file_endings: ClassVar[tuple[str, ...]] = ENDINGS
    path_cells: ClassVar[bool] = True
    near: ClassVar[float] = 0.997  # of different digits and icons at most .992
    is_content: ClassVar[bool] = True

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        dtype, found = cells.values.dtype, False
        if not (pd.api.types.is_object_dtype(dtype) or isinstance(dtype, pd.StringDtype)):
            return False
        for cell in cells.values:
            if is_missing(cell):
                continue
            if not is_image(cell):
                return False
            found = True
        return found

    @classmethod
    def keys(cls, values: pd.Series) -> np.ndarray:
        return hash_content(values)

    @classmethod
    def fit_encode(
        cls, values: pd.Series, config: DataConfig, labels: np.ndarray | None = None
    ) -> tuple["ImageColumn", Tensor]:
        """Choose size and channels from the images' headers, decode each image once, and take the pixels' statistics.

        Raises BrokenRecords if images cannot be read.
        """
        headers, broken = read_headers(values)
        if not headers:
            raise BrokenRecords(broken) if broken else UserError(f"column {values.name!r}: there are no images.")
        shortest = np.median([min(width, height) for width, height, _ in headers])
        largest = -config.image_size or MAX_AUTO_SIZE
        size = config.image_size if config.image_size > 0 else int(min(largest, shortest))
        channels = 1 if all(mode in GREY_MODES for *_, mode in headers) else 3
        pixels = decode(values, size, channels, progress=True)
        flip, reason = config.flip == "on", f"--flip {config.flip}"
        if config.augment != "none" and config.flip == "auto" and labels is not None:
            flip, reason = flip_is_harmless(pixels, torch.as_tensor(labels))
        mean, std = _mean_and_std(pixels)
        return cls(str(values.name), size, channels, mean, std, config.augment, flip, reason), pixels

    @classmethod
    def comparable(cls, train: pd.Series, config: DataConfig) -> Callable[[pd.Series], np.ndarray]:
        """Compare the bytes of the files."""

        def read(cell) -> str:
            return "" if is_missing(cell) else hashlib.sha256(image_bytes(cell)).hexdigest()

        return lambda cells: np.array([read(cell) for cell in cells], dtype=object)

    @classmethod
    def model_args(cls, columns: list["ImageColumn"]) -> dict:
        if len(columns) > 1:
            names = ", ".join(repr(column.name) for column in columns)
            raise UserError(
                f"columns {names} are images, a network takes one: leave out others with --columns NAME=drop."
            )
        column = columns[0]
        statistics = {"image_mean": column.mean, "image_std": column.std}
        return {"in_channels": column.channels, "image_size": column.size, **statistics}

    @property
    def max_examples(self) -> int:
        return 16 if self.size <= 64 else 4

    @cached_property
    def _augmentation(self) -> Augmentation | None:
        return make_augmentation(self.augment, self.flip)

    def encode(self, values: pd.Series) -> Tensor:
        """Decode images into uint8 pixels (N, channels, size, size). Raises BrokenRecords if some cannot be read."""
        return decode(values, self.size, self.channels, progress=len(values) >= MANY_IMAGES)

    def batch(self, x: Tensor, *, training: bool = False) -> Tensor:
        """Augment training batches, then normalise: uint8 pixels → float32 (N, channels, size, size)."""
        if training and self._augmentation:
            with torch.autocast(x.device.type, enabled=False):  # bfloat16 would move pixels
                x = self._augmentation(x)
        x = x.float()
        mean, std = self._statistics(x)
        return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return mean, std

    def preview(self, x: Tensor) -> Image.Image:
        """Return a picture of a batch as the network sees it."""
        mean, std = self._statistics(x)
        return contact_sheet((x * std + mean) * 255)

    def summary(self) -> str:
        colour = "grey" if self.channels == 1 else "RGB"
        what = f"short side to {self.size}, centre crop; {colour}, mean 0 and std 1"
        if self.augment != "none":
            what += f"; {self.augment} augmentation, horizontal flip {'on' if self.flip else 'off'}"
            what += f" ({self.flip_reason})" if self.flip_reason else ""
        return what

    def json_schema(self, profile: dict, examples: list) -> dict:
        return {
            "type": "string",
            "pattern": "^data:image/",
            "description": "an image as a data URL",
            "x-kind": self.kind,
        }

    def made_up(self, profile: dict, position: float | None = None) -> str:
        """Return a small picture that becomes brighter from corner to corner, and darker again from `position` on."""
        steps = np.arange(32) * 4
        brightness = abs((steps[:, None] + steps) - (0 if position is None else round(248 * position)))
        return to_data_url(np.repeat(brightness[None].astype(np.uint8), self.channels, axis=0))

    def profile_values(self, values: pd.Series, encoded: Tensor) -> dict[str, np.ndarray]:
        """Return the brightness of each image, 0 … 1."""
        parts = [part.double().mean(dim=(1, 2, 3)) / 255 for part in encoded.split(1024)]
        return {f"{self.name}: brightness": torch.cat(parts).numpy()}

    def fingerprints(self, values: pd.Series, encoded: Tensor) -> Tensor:
        return fingerprints_of_images(encoded)

    def shortcuts(self, parts: list[pd.Series]) -> pd.DataFrame:
        """Return width, height, form and colour mode of the files."""
        width, height, mode = zip(*(header for part in parts for header in read_headers(part)[0]), strict=True)
        width, height = np.array(width, float), np.array(height, float)
        names = ("the width of the files", "the height of the files", "the form of the files", "the colour mode")
        cells = (width, height, width / height, pd.factorize(pd.Series(mode))[0])
        return pd.DataFrame(dict(zip(names, cells, strict=True)))

    def occlusions(self, cell) -> list[tuple[tuple[float, float, float], Pixels]]:
        """Grey out one square after the other."""
        pixels, side = self.encode(pd.Series([cell], dtype=object))[0].numpy(), -(-self.size // PLACES)
        found = []
        for top in range(0, self.size, side):
            for left in range(0, self.size, side):
                changed = pixels.copy()
                changed[:, top : top + side, left : left + side] = pixels.mean(axis=(1, 2), keepdims=True)
                place = (left / self.size, top / self.size, side / self.size)
                found.append((place, Pixels(changed)))
        return found

    def examples(self, values: pd.Series) -> list[str]:
        """Return images at their final size, as data URLs."""
        return [to_data_url(pixels) for pixels in self.encode(values).numpy()]

    def check_pixels(self, values: pd.Series, limit: int) -> None:
        """Raise UserError if images, small as files, would have more than `limit` pixels, or one is not an image."""
        headers, broken = read_headers(values)
        if broken:
            raise BrokenRecords(broken)
        pixels = sum(width * height for width, height, _ in headers)
        if pixels > limit:
            raise UserError(f"the images have {pixels:,} pixels together, a request at most {limit:,}.")

    def sample_files(self, values: pd.Series) -> list[tuple[str, bytes]]:
        """Return (file name, bytes) of each image."""
        return [
            (f"{row}-{Path(cell).name}" if is_path(cell) else f"{row}.png", image_bytes(cell))
            for row, cell in values.items()
        ]

    def parse(self, values: pd.Series) -> np.ndarray:
        """Return uint8 pixels (N, channels, size, size)."""
        return self.encode(values).numpy()

    def transform(self, x: Tensor) -> Tensor:
        return self.batch(x)


def _mean_and_std(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel over all pixels, 0 … 1; std 1 for a constant channel."""
    mean, square = np.zeros(pixels.shape[1]), np.zeros(pixels.shape[1])
    for part in pixels.split(1024):  # float64, a part at a time: the pixels may be larger than the memory
        values = part.double() / 255
        mean += values.mean(dim=(2, 3)).sum(dim=0).numpy()
        square += values.square().mean(dim=(2, 3)).sum(dim=0).numpy()
    mean, square = mean / len(pixels), square / len(pixels)
    std = np.sqrt((square - mean**2).clip(0))
    return mean.tolist(), np.where(std > 1e-6, std, 1.0).tolist()
