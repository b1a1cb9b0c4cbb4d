"""Augment training images: a whole batch of pixels at once, on its device."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Drawn for each image: shift up to this share of the side, rotation up to this many degrees, zoom, brightness,
# contrast and saturation as factors up to this far from 1, and the probability that a rectangle is erased.
STRENGTHS = {
    "light": {"shift": 0.10, "rotation": 0.0, "zoom": 0.0, "colour": 0.0, "erase": 0.0},
    "standard": {"shift": 0.10, "rotation": 10.0, "zoom": 0.10, "colour": 0.2, "erase": 0.0},
    "strong": {"shift": 0.15, "rotation": 20.0, "zoom": 0.25, "colour": 0.4, "erase": 0.5},
}

MIRROR_Z = 3.0  # standard deviations by which mirroring may lose by chance (McNemar's test)


@dataclass(frozen=True)
class Augmentation:
    """Random shift, zoom, rotation and flip (one resampling for all), colour jitter, and erasing.

    All random numbers come from torch's global CPU generator, which the trainer seeds by (seed, epoch).
    """

    shift: float
    rotation: float
    zoom: float
    colour: float
    erase: float
    flip: bool

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return augmented copies of uint8 pixels (N, C, H, W): float 0 … 255 on the same device."""
        images = self._move(pixels.float())
        if self.colour:
            images = self._jitter(images)
        return self._erase(images) if self.erase else images

    def _move(self, images: Tensor) -> Tensor:
        """Shift, zoom, rotate and flip by one affine map for each image; border pixels are repeated beyond the edge."""
        n = len(images)
        angle = math.radians(self.rotation) * _uniform(n)
        scale = 1 + self.zoom * _uniform(n)
        mirror = 1 - 2 * (torch.rand(n) < 0.5).float() if self.flip else torch.ones(n)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        shift = 2 * self.shift * _uniform(2, n)  # the grid runs from -1 to 1
        theta = torch.stack(
            [torch.stack([cos * mirror, -sin, shift[0]], dim=1), torch.stack([sin * mirror, cos, shift[1]], dim=1)],
            dim=1,
        )  # (N, 2, 3)
        grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    def _jitter(self, images: Tensor) -> Tensor:
        """Change brightness, saturation and contrast."""
        n, channels = images.shape[:2]
        factors = (1 + self.colour * _uniform(3, n)).to(images.device)[..., None, None, None]
        images = images * factors[0]  # brightness
        if channels == 3:  # saturation
            weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
            grey = (images * weights).sum(dim=1, keepdim=True)
            images = grey + (images - grey) * factors[2]
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + (images - mean) * factors[1]).clamp(0, 255)  # contrast

    def _erase(self, images: Tensor) -> Tensor:
        """Fill a rectangle of some images with the image's mean (Zhong et al., "Random Erasing", 2017)."""
        n, _, height, width = images.shape
        sides = 0.2 + 0.2 * torch.rand(2, n)  # share of the side
        starts = torch.rand(2, n) * (1 - sides)
        erased = torch.rand(n) < self.erase
        begin, end = starts[..., None], (starts + sides)[..., None]
        rows, columns = torch.arange(height) / height, torch.arange(width) / width
        rows, columns = (rows >= begin[0]) & (rows < end[0]), (columns >= begin[1]) & (columns < end[1])
        mask = (rows[:, :, None] & columns[:, None, :] & erased[:, None, None])[:, None]  # (N, 1, H, W)
        return torch.where(mask.to(images.device), images.mean(dim=(1, 2, 3), keepdim=True), images)


def _uniform(*shape: int) -> Tensor:
    """Draw from -1 … 1."""
    return 2 * torch.rand(*shape) - 1


def make_augmentation(strength: str, flip: bool) -> Augmentation | None:
    """Return the augmentation called `strength`, with or without a horizontal flip; None for "none"."""
    return None if strength == "none" else Augmentation(**STRENGTHS[strength], flip=flip)


def flip_is_harmless(pixels: Tensor, labels: Tensor) -> tuple[bool, str]:
    """Return whether mirrored training images still show their class (cats do, digits do not), and why.

    Each image is assigned to the class with the nearest mean of the other images, as it is and mirrored. If mirroring
    loses more than a tenth of the correct assignments, and more than chance explains, left and right are part of the
    class.
    """
    chosen = torch.linspace(0, len(pixels) - 1, min(len(pixels), 5000)).long()
    _, labels, counts = labels[chosen].unique(return_inverse=True, return_counts=True)
    small = F.adaptive_avg_pool2d(pixels[chosen].float(), min(16, pixels.shape[-1]))
    means = torch.stack([small[labels == c].mean(dim=0) for c in range(len(counts))])
    rows, of_own = torch.arange(len(labels)), counts[labels]
    others = small + (means[labels] - small) * (of_own / (of_own - 1))[:, None, None, None]  # NaN: it is the only one

    def is_correct(images: Tensor) -> Tensor:
        distances = torch.cdist(images.flatten(1), means.flatten(1))
        distances[rows, labels] = (images - others).flatten(1).norm(dim=1)
        return (distances.argmin(dim=1) == labels)[of_own > 1]

    plain, mirrored = is_correct(small), is_correct(small.flip(-1))
    if not len(plain):
        return True, "one image per class"
    share, share_mirrored = plain.float().mean().item(), mirrored.float().mean().item()
    lost, won = int((plain & ~mirrored).sum()), int((mirrored & ~plain).sum())
    why = f"closest to the mean of their own class: {share:.0%} of the images, {share_mirrored:.0%} when mirrored"
    return share_mirrored >= 0.9 * share or lost - won < MIRROR_Z * math.sqrt(lost + won), why


def contact_sheet(images: Tensor, columns: int = 8) -> Image.Image:
    """Arrange images (N, C, H, W), 0 … 255, in rows of one picture, enlarged to at least 64 pixels each."""
    images = images.round().clamp(0, 255).to(torch.uint8).cpu()
    n, channels, height, width = images.shape
    rows, gap = math.ceil(n / columns), 1
    cells = F.pad(images, (0, gap, 0, gap, 0, 0, 0, rows * columns - n), value=255)
    sheet = cells.view(rows, columns, channels, height + gap, width + gap).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (height + gap), columns * (width + gap), channels)
    picture = Image.fromarray(np.asarray(sheet.squeeze(2)))
    zoom = max(1, 64 // height)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
