"""Decode images of any format, mode, size and orientation into uint8 pixels, as a person sees them."""

import base64
import contextlib
import hashlib
import io
import os
import shutil
import struct
import tempfile
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from errors import BrokenRecords, UserError, error_prefix
from preprocessing.parsing import NULLS
from scaling.device import count_cores
from scaling.processes import gather_values, host_file, host_part, is_shared
from sources.disk import folder_with_room, memory
from sources.layout import IMAGE_ENDINGS, UNREAD_IMAGE_ENDINGS

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # Pillow reads some others with external programs
ENDINGS = IMAGE_ENDINGS
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # of FORMATS
GREY_MODES = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
DATA_URL = "data:image/"  # …png;base64,iVBOR…
LARGE_IMAGE = 16_000_000  # pixels; larger images are decoded one at a time, to bound the memory
MANY_IMAGES = 1_000  # from which on decoding shows a progress bar
MAX_SCANS = 50  # of a JPEG, which is decoded once per scan; encoders write about 10
UNREADABLE = (  # what Pillow raises
    OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, NotImplementedError, LookupError,
    ArithmeticError, struct.error
)  # fmt: skip
_one_large_image = threading.Lock()
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_open` raises an error instead


# ---------------------------------------------------------------- cells


def is_data_url(cell) -> bool:
    return isinstance(cell, str) and cell.startswith(DATA_URL)


def is_path(cell) -> bool:
    """Return whether a cell names a file, rather than holding the image itself or nothing."""
    return isinstance(cell, (str, os.PathLike)) and not is_data_url(cell) and not is_missing(cell)


def is_missing(cell) -> bool:
    if isinstance(cell, str):
        return cell.strip() in NULLS
    return cell is None or (pd.api.types.is_scalar(cell) and pd.isna(cell))


def is_image(cell) -> bool:
    """Return whether a cell looks like an image, without opening it. A web address does not: it is not downloaded."""
    if isinstance(cell, bytes):
        return cell.startswith(SIGNATURES)
    return is_data_url(cell) or (
        is_path(cell) and "://" not in str(cell) and str(cell).lower().endswith(ENDINGS + UNREAD_IMAGE_ENDINGS)
    )


def image_bytes(cell: str | bytes) -> bytes:
    """Return the bytes of an image file: of a path, of a data URL, or the bytes themselves."""
    if isinstance(cell, bytes):
        return cell
    return base64.b64decode(cell.partition(",")[2]) if is_data_url(cell) else Path(cell).read_bytes()


def hash_content(values: pd.Series) -> np.ndarray:
    """Return a hash of the bytes of each image, uint64 (N,). Files whose size no other one has are not read."""
    cells, sizes = values.tolist(), {}
    for cell in set(filter(is_path, cells)):
        with contextlib.suppress(OSError, ValueError):
            sizes[cell] = os.stat(cell).st_size
    shared = {size for size, count in Counter(sizes.values()).items() if count > 1}

    def content(cell) -> bytes:
        if not is_path(cell) or sizes.get(cell) in shared:
            with contextlib.suppress(OSError, ValueError, TypeError):  # unreadable images are reported when decoded
                return image_bytes(cell)
        return f"{sizes.get(cell, cell)} bytes".encode("utf-8", "replace")

    def digest(cell) -> int:
        return int.from_bytes(hashlib.blake2b(content(cell), digest_size=8).digest(), "little")

    with ThreadPoolExecutor(count_cores()) as pool:
        return np.fromiter(pool.map(digest, cells), dtype=np.uint64, count=len(cells))


def to_data_url(pixels: np.ndarray) -> str:
    """Return uint8 pixels (channels, H, W) as a png in text that JSON can hold."""
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return f"{DATA_URL}png;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---------------------------------------------------------------- one image


@dataclass(frozen=True, eq=False)
class Pixels:
    """A cell whose image is decoded already."""

    array: np.ndarray  # uint8 (channels, size, size)


def _prefix(cell: str | bytes) -> str:
    return f"{cell}: " if is_path(cell) else ""


def open_image(cell: str | bytes) -> Image.Image:
    """Open an image without decoding it: a path, the bytes of a file, or a data URL.

    Raises UserError, naming the file, if there is none, or it is not an image or is too large.
    """
    if is_missing(cell):
        raise UserError("the cell is empty, an image is needed (--skip-broken leaves such rows out).")
    try:
        image = Image.open(cell if is_path(cell) else io.BytesIO(image_bytes(cell)), formats=FORMATS)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself refuses only twice as many
            raise Image.DecompressionBombError
        if image.format in ("JPEG", "MPO") and _count_scans(image) > MAX_SCANS:
            raise UserError(f"{_prefix(cell)}refused, it has more than {MAX_SCANS} scans: save it again.")
        return image
    except FileNotFoundError:
        raise UserError(f"{_prefix(cell)}no such image.") from None
    except Image.DecompressionBombError:
        raise UserError(f"{_prefix(cell)}refused, it has more pixels than {Image.MAX_IMAGE_PIXELS:,}.") from None
    except UserError:
        raise
    except UNREADABLE as error:
        if found := _unread_format(cell):
            why = f"this is {'an' if found == 'AVIF' else 'a'} {found} image: convert it to JPEG or PNG."
            raise UserError(_prefix(cell) + why) from None
        raise UserError(f"{_prefix(cell)}not a readable image ({type(error).__name__}).") from None


def _unread_format(cell: str | bytes) -> str:
    """Return HEIC or AVIF if the file says that it is one of these, otherwise ""."""
    with contextlib.suppress(*UNREADABLE):
        head = image_bytes(cell)[:64]
        if head[4:8] == b"ftyp":  # brands of an ISO media file: the main one, a version, and compatible ones
            brands = {head[i : i + 4] for i in range(8, min(len(head), int.from_bytes(head[:4])), 4)}
            if brands & {b"avif", b"avis"}:
                return "AVIF"
            if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
                return "HEIC"
    return ""


def _count_scans(image: Image.Image) -> int:
    """Return how often the marker of a scan occurs in a JPEG file; pixels cannot hold it."""
    position = image.fp.tell()
    image.fp.seek(0)
    scans = image.fp.read().count(b"\xff\xda")
    image.fp.seek(position)
    return scans


def _as_seen(image: Image.Image, channels: int) -> Image.Image:
    """Return what a person sees: turned by its EXIF tag, transparent parts white, 16 bits as 8, grey or RGB."""
    with contextlib.suppress(*UNREADABLE):  # of damaged EXIF; of damaged pixels, `convert` raises it again
        ImageOps.exif_transpose(image, in_place=True)
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        scale = 1 if image.mode == "F" and values.max(initial=0) <= 255 else 257  # 65,535 / 255
        strips = np.array_split(values, 1 + len(values) // 256)  # float64 takes four times the memory: a part at a time
        image = Image.fromarray(np.concatenate([(s / scale).clip(0, 255).round().astype(np.uint8) for s in strips]))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        seen = Image.new(mode, image.size, "white")
        seen.paste(image, mask=image.getchannel("A"))
        return seen
    return image.convert(mode)


def read_pixels(cell: str | bytes | Pixels, size: int, channels: int) -> np.ndarray:
    """Decode one image: short side to `size`, centre crop; uint8 (channels, size, size).

    Raises UserError, naming the file, if there is none, or it is not an image, is broken or is too large.
    """
    if isinstance(cell, Pixels):
        return cell.array
    with (
        open_image(cell) as image,
        _one_large_image if image.width * image.height > LARGE_IMAGE else contextlib.nullcontext(),
    ):
        try:
            image.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))  # jpeg: decode no larger than needed
            seen = _as_seen(image, channels)
        except UNREADABLE as error:
            raise UserError(f"{_prefix(cell)}the image is broken ({error}).") from None
        if seen.size != (size, size):  # the short side fills the square, the long side is cropped
            seen = ImageOps.fit(seen, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(seen)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


# ---------------------------------------------------------------- many images


def _located(values: pd.Series, i: int):
    """Prefix errors of the i-th cell with its row and column; errors of a path name the file themselves."""
    named = is_path(values.iloc[i])
    return contextlib.nullcontext() if named else error_prefix(f"row {values.index[i]}, column {values.name!r}")


def read_headers(values: pd.Series) -> tuple[list[tuple[int, int, str]], dict[int, str]]:
    """Return (width, height, mode) of each image that can be opened, and what is wrong with the others by position."""
    headers, broken = [], {}
    for i, cell in enumerate(values.tolist()):
        try:
            with _located(values, i), open_image(cell) as image:
                headers.append((image.width, image.height, image.mode))
        except UserError as error:
            broken[i] = str(error)
    return headers, broken


def decode(values: pd.Series, size: int, channels: int, *, progress: bool) -> Tensor:
    """Decode a column of images on all cores: uint8 (N, channels, size, size).

    Several processes of one machine decode a part each, into memory that they share.
    Raises BrokenRecords, once all are decoded, if some cannot be read.
    """
    cells, pixels, broken = values.tolist(), allocate((len(values), channels, size, size)), {}

    def decode_one(i: int) -> None:
        try:
            with _located(values, i):
                pixels[i] = read_pixels(cells[i], size, channels)
        except UserError as error:
            broken[i] = str(error)

    rows = host_part(len(cells)) if is_shared() else range(len(cells))
    with ThreadPoolExecutor(count_cores()) as pool:
        decoded = pool.map(decode_one, rows)
        for _ in tqdm(decoded, "decoding", len(rows), unit=" images", disable=None if progress else True):
            pass
    if is_shared():
        broken = {i: message for found in gather_values(broken) for i, message in found.items()}
    if broken:
        raise BrokenRecords(broken)
    return torch.from_numpy(pixels)


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate uint8 pixels in memory, or in a temporary file if they exceed a quarter of the memory, or are shared by
    several processes.

    The file is mapped into memory and has no name: it vanishes with the process, however that ends.
    Raises UserError if the disk has not enough space.
    """
    size = int(np.prod(shape))
    if size and is_shared():
        return _allocate_shared(shape, size)
    if size <= memory() / 4:
        return np.empty(shape, dtype=np.uint8)
    return np.memmap(tempfile.TemporaryFile(dir=_folder_for(size)), dtype=np.uint8, mode="w+", shape=shape)


def _allocate_shared(shape: tuple[int, ...], size: int) -> np.ndarray:
    def create() -> str:
        with tempfile.NamedTemporaryFile(dir=_folder_for(size), delete=False) as file:
            file.truncate(size)
        return file.name

    path = host_file(create)
    pixels = np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
    gather_values(None)  # all processes have opened it
    Path(path).unlink(missing_ok=True)
    return pixels


def _folder_for(size: int) -> str:
    """Return a folder for a temporary file: in memory, if it takes at most a quarter, or on disk."""
    shared_memory = Path("/dev/shm")
    if size <= memory() / 4 and shared_memory.exists() and size < shutil.disk_usage(shared_memory).free:
        return str(shared_memory)
    return folder_with_room(size, f"the pixels take {size:,} bytes", "give a smaller --image-size")
