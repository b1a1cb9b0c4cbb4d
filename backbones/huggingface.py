"""Fine-tune text encoders of Hugging Face, if the `transformers` library is installed: --model hf:NAME."""

import torch
from torch import Tensor, nn

from errors import UserError
from preprocessing.hub import from_hugging_face


class Pretrained(nn.Module):
    """A Hugging Face encoder and a linear layer over the mean of its tokens; all of it is trained.

    encoder: the encoder's configuration, which is enough to build it. Its weights are loaded by `load_state_dict`, or
    at the beginning of a training by `start_from`.
    """

    TOKENIZER = "pretrained"

    def __init__(self, *, encoder: dict, padding: int, out_features: int, dropout: float):
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError:
            raise UserError("this model needs another library: pip install transformers.") from None
        self.padding = padding
        self.encoder = AutoModel.from_config(AutoConfig.for_model(**encoder))
        self.width = self.encoder.config.hidden_size
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.width, out_features))

    def start_from(self, name: str, max_length: int) -> None:
        """Load the weights of a pretrained model. Raises UserError if it cannot read max_length tokens."""
        self.encoder.load_state_dict(from_hugging_face("AutoModel", name).state_dict())
        some_token = int(self.encoder.config.pad_token_id == 0)
        try:  # each kind of encoder counts positions in its own way
            with torch.inference_mode():
                self(torch.full((1, max_length), some_token))
        except (IndexError, RuntimeError):
            message = f"--model hf:{name} cannot read {max_length} tokens: give a lower --max-length."
            raise UserError(message) from None

    def features(self, text: Tensor) -> Tensor:  # (N, L) → (N, width)
        order = (text == self.padding).to(torch.uint8).argsort(dim=1, stable=True)
        text = text.gather(1, order)  # tokens first: between two columns of text there is padding
        is_token = text != self.padding
        tokens = text.masked_fill(~is_token, 0)  # any id; masked below
        x = self.encoder(input_ids=tokens, attention_mask=is_token.long()).last_hidden_state  # (N, L, width)
        return (x * is_token[..., None]).sum(dim=1) / is_token.sum(dim=1, keepdim=True)

    def forward(self, text: Tensor) -> Tensor:  # (N, L) → (N, out_features)
        return self.head(self.features(text))
