"""Pretrained backbones: an encoder, frozen or fine-tuned, and a head on its features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.processes import gather, part

BATCH_SIZE = 16  # records without gradients: the activations of more do not fit a CPU's caches


class Backbone(nn.Module):
    """A pretrained encoder, and a linear layer on its features.

    freeze: the encoder stays as it is, in evaluation mode, and its features can be computed once for all records (see
    `cache_features`). Otherwise it is trained as well, with a learning rate of at most MAX_LR: large steps would
    destroy what it knows.
    The constructor needs no pretrained weights: `load_state_dict` loads them, or, when a training starts, `start_from`.
    """

    MAX_LR = 3e-4

    def __init__(self, encoder: nn.Module, width: int, *, out_features: int, dropout: float, freeze: bool):
        super().__init__()
        self.encoder, self.width, self.freeze = encoder.requires_grad_(not freeze), width, freeze
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, out_features))

    def start_from(self, name: str, max_length: int = 0) -> None:
        """Load the pretrained weights called `name`. max_length: tokens of a text that it must be able to read.

        Raises UserError if the weights cannot be loaded.
        """
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Return the features (N, width) of a batch."""
        raise NotImplementedError

    def features_of(self, x: Tensor) -> Tensor:
        """Return the features (N, width) of a batch, or the batch itself if `cache_features` has computed them."""
        if x.dim() == 2 and x.is_floating_point():
            return x
        needs_gradients = torch.is_grad_enabled() and not self.freeze
        whole = needs_gradients or torch.compiler.is_exporting()
        parts = [x] if whole or len(x) <= BATCH_SIZE else x.split(BATCH_SIZE)
        return torch.cat([self.encode(part) for part in parts])

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self


class ImageInput(nn.Module):
    """Images as a column gives them, in grey or colour → images as an encoder was trained with.

    image_size, image_mean, image_std: the side in pixels, and what the column has subtracted from each channel and
    divided it by.  size, mean, std: the same for the encoder, which reads RGB.  mode: how images are resized.
    """

    def __init__(
        self,
        *,
        image_size: int,
        image_mean: list[float],
        image_std: list[float],
        size: int,
        mean: list[float],
        std: list[float],
        mode: str = "bicubic",
    ):
        super().__init__()
        self.size = size
        self.resize = {"size": (size, size), "mode": mode, "align_corners": False} if size != image_size else {}
        image_mean, image_std, mean, std = (
            torch.tensor(values, device="cpu")[:, None, None] for values in (image_mean, image_std, mean, std)
        )
        self.register_buffer("scale", image_std / std, persistent=False)  # (3, 1, 1)
        self.register_buffer("shift", (image_mean - mean) / std, persistent=False)

    def forward(self, image: Tensor) -> Tensor:  # (N, 1 or 3, H, W) → (N, 3, size, size)
        image = F.interpolate(image, **self.resize) if self.resize else image
        return (image * self.scale + self.shift).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- training


def parameter_groups(model: nn.Module, lr: float) -> list[dict]:
    """Return the parameters to train, for an optimizer: fine-tuned encoders have groups and learning rates of their
    own, after the group of all others."""
    tuned = [module for module in model.modules() if isinstance(module, Backbone) and not module.freeze]
    groups = [{"params": list(m.encoder.parameters()), "lr": min(lr, m.MAX_LR)} for m in tuned]
    in_encoders = {id(p) for group in groups for p in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in in_encoders]
    return [{"params": others, "lr": lr}, *groups]


def cache_features(model: nn.Module, datasets: list, preprocessor, device: torch.device) -> bool:
    """Compute the features of frozen backbones once for all records; return whether there were any.

    datasets: of encoded records, see TensorBatches; others are left as they are.  preprocessor: None if there is none.
    """
    frozen = [module for module in model.modules() if isinstance(module, Backbone) and module.freeze]
    datasets = [dataset for dataset in datasets if isinstance(getattr(dataset, "inputs", None), dict)]
    for backbone in frozen:
        for dataset in (each for each in datasets if backbone.INPUT not in each.features):
            dataset.features[backbone.INPUT] = _compute(backbone, dataset.inputs[backbone.INPUT], preprocessor, device)
    return bool(frozen and datasets)


@torch.no_grad()
def _compute(backbone: Backbone, encoded, preprocessor, device: torch.device) -> Tensor:
    lengths = getattr(encoded, "lengths", None)  # of texts: similar lengths in a batch need little padding
    order = torch.arange(len(encoded)) if lengths is None else lengths.argsort(stable=True)
    parts = []
    for rows in part(order).split(BATCH_SIZE):
        inputs = {backbone.INPUT: encoded[rows].to(device)}
        inputs = inputs if preprocessor is None else preprocessor.batch(inputs)
        parts.append(backbone.eval().features_of(inputs[backbone.INPUT]).cpu())
    computed = torch.cat(parts) if parts else torch.empty(0, backbone.width)
    return gather(computed, len(order))[order.argsort()]
