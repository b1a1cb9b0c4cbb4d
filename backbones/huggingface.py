"""Encoders of Hugging Face for texts and images, if the `transformers` library is installed: --model hf:NAME."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.pretrained import Backbone, ImageInput
from errors import UserError
from preprocessing.hub import from_hugging_face


def build_encoder(config: dict) -> nn.Module:
    """Build an encoder from its configuration, without weights."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise UserError("this model needs another library: pip install transformers.") from None
    return AutoModel.from_config(AutoConfig.for_model(**config)).float()  # some are stored in half precision


class Encoder(Backbone):
    """What encoders of texts and images share. Their features have any scale; frozen ones are scaled to mean 0 and std
    1 in each record, so that a head learns equally fast on all of them."""

    def start_from(self, name: str, max_length: int = 0) -> None:
        """Load the weights of a pretrained model."""
        self.encoder.load_state_dict(from_hugging_face("AutoModel", name).state_dict())

    def scale(self, x: Tensor) -> Tensor:  # (N, width)
        return F.layer_norm(x, (self.width,)) if self.freeze else x


class Pretrained(Encoder):
    """An encoder of texts, and a head on the mean of its tokens.

    encoder: the encoder's configuration, which is enough to build it.
    """

    INPUT, TOKENIZER, MAX_LR = "text", "pretrained", 5e-5

    def __init__(self, *, encoder: dict, padding: int, out_features: int, dropout: float, freeze: bool = False):
        encoder = build_encoder(encoder)
        super().__init__(encoder, encoder.config.hidden_size, out_features=out_features, dropout=dropout, freeze=freeze)
        self.padding = padding

    def start_from(self, name: str, max_length: int = 0) -> None:
        """Load the weights of a pretrained model. Raises UserError if it cannot read max_length tokens."""
        super().start_from(name)
        some_token = int(self.encoder.config.pad_token_id == 0)
        try:  # each kind of encoder counts positions in its own way
            with torch.inference_mode():
                self(torch.full((1, max_length), some_token))
        except (IndexError, RuntimeError):
            message = f"--model hf:{name} cannot read {max_length} tokens: give a lower --max-length."
            raise UserError(message) from None

    def encode(self, text: Tensor) -> Tensor:  # (N, L) → (N, width)
        order = (text == self.padding).to(torch.uint8).argsort(dim=1, stable=True)
        text = text.gather(1, order)  # tokens first: between two columns of text there is padding
        is_token = text != self.padding
        tokens = text.masked_fill(~is_token, 0)  # any id; masked below
        x = self.encoder(input_ids=tokens, attention_mask=is_token.long()).last_hidden_state  # (N, L, width)
        return self.scale((x * is_token[..., None]).sum(dim=1) / is_token.sum(dim=1, keepdim=True))

    def features(self, text: Tensor) -> Tensor:
        return self.features_of(text)

    def forward(self, text: Tensor) -> Tensor:  # (N, L), or features (N, width) → (N, out_features)
        return self.head(self.features_of(text))


class PretrainedImage(Encoder):
    """An encoder of images, and a head on its class token, or else on the mean over the image.

    image_encoder: {"config": the encoder's configuration, "size", "mean", "std", "mode": its images, see ImageInput}.
    """

    INPUT, MAX_LR = "image", 1e-4
    RECIPE: ClassVar = {"label_smoothing": 0.1}

    def __init__(
        self,
        *,
        image_encoder: dict,
        image_size: int,
        image_mean: list[float],
        image_std: list[float],
        out_features: int,
        dropout: float,
        freeze: bool,
    ):
        encoder = build_encoder(image_encoder["config"])
        width = getattr(encoder.config, "hidden_size", 0) or [0, *getattr(encoder.config, "hidden_sizes", [])][-1]
        if not width:
            kind = encoder.config.model_type
            raise UserError(f"--model hf:NAME: {kind} cannot be used, its configuration has no hidden_size.")
        super().__init__(encoder, width, out_features=out_features, dropout=dropout, freeze=freeze)
        images = {name: value for name, value in image_encoder.items() if name != "config"}
        self.prepare = ImageInput(image_size=image_size, image_mean=image_mean, image_std=image_std, **images)
        self.has_class_token = any(name.endswith("cls_token") for name, _ in encoder.named_parameters())

    def start_from(self, name: str, max_length: int = 0) -> None:
        """Load the weights of a pretrained model. Raises UserError if it cannot read the images of its own file."""
        super().start_from(name)
        side = self.prepare.size
        try:
            with torch.inference_mode():
                self.eval()(torch.zeros(1, 3, side, side))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"--model hf:{name} does not read images of {side} × {side} pixels ({why}).") from None

    def encode(self, image: Tensor) -> Tensor:  # (N, 1 or 3, H, W) → (N, width)
        x = self.encoder(pixel_values=self.prepare(image)).last_hidden_state
        if x.dim() == 4:  # (N, width, H, W) of a convolutional network
            return self.scale(x.mean(dim=(2, 3)))
        return self.scale(x[:, 0] if self.has_class_token else x.mean(dim=1))  # (N, tokens, width)

    def features(self, image: Tensor) -> Tensor:
        return self.features_of(image)

    def forward(self, image: Tensor) -> Tensor:  # (N, 1 or 3, H, W), or features (N, width) → (N, out_features)
        return self.head(self.features_of(image))
