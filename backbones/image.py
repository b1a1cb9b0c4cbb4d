"""The network that learns images from scratch."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones.layers import ACTIVATIONS, Dropout


class CNN(nn.Module):
    """Convolutional network: strided convolutions reduce large images to about 32 pixels; then, for each number in
    `hidden`, a convolution, max pooling to half the resolution, and a second convolution; then the mean over the image,
    dropout, and a linear layer. All convolutions are 3×3, with batch norm and activation (Simonyan and Zisserman, "Very
    Deep Convolutional Networks", 2014)."""

    HIDDEN = (32, 64, 128)
    PLANNED_WORK = 3e12  # for the number of epochs, see trainer.py
    # One cycle of the learning rate needs all its epochs (Smith and Topin, "Super-Convergence", 2018). Smoothed labels
    # keep a network that learns its few images by heart from being sure of itself (Müller et al., "When Does Label
    # Smoothing Help?", 2019).
    RECIPE: ClassVar = {"lr": 0.01, "scheduler": "OneCycleLR", "patience": 0, "label_smoothing": 0.1}

    def __init__(
        self,
        *,
        in_channels: int,
        image_size: int,
        out_features: int,
        hidden: list[int],
        activation: str,
        batch_norm: bool,
        dropout: float,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        width_in = in_channels

        def convolution(width: int, *, stride: int = 1, pool: bool = False) -> None:
            nonlocal width_in
            layers.append(nn.Conv2d(width_in, width, 3, stride, 1, bias=not batch_norm))
            layers.extend([nn.MaxPool2d(2, ceil_mode=True)] if pool else [])  # first: the rest has less to compute
            layers.extend([nn.BatchNorm2d(width)] if batch_norm else [])
            layers.append(ACTIVATIONS[activation]())
            width_in = width

        for stride in [2] * max(0, round(math.log2(image_size / 32))) or [1]:
            convolution(hidden[0], stride=stride)
        for width in hidden:
            convolution(width, pool=True)
            convolution(width)
        self.layers = nn.Sequential(*layers)
        self.width = width_in
        self.head = nn.Sequential(Dropout(dropout), nn.Linear(self.width, out_features))
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions, on CPUs and GPUs

    def features(self, image: Tensor) -> Tensor:
        return self.layers(image.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:  # (N, in_channels, H, W) → (N, out_features)
        return self.head(self.features(image))
