"""Hugging Face encoders, where the `transformers` library is installed: --model hf:NAME."""

import torch
from torch import Tensor, nn

from errors import UserError


def from_hugging_face(kind: str, name: str):
    """Return transformers' `kind` (AutoTokenizer, AutoModel) of a model by its name or folder.

    Raises UserError where the library, or such a model, is not there.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"--model hf:{name} needs another library: pip install transformers.") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model hf:{name}: no model that can be loaded ({str(error).splitlines()[0]}).") from None


class Pretrained(nn.Module):
    """A Hugging Face encoder and a linear layer over the mean of its tokens, all of it trained on.

    encoder: the encoder's configuration, which is all that it takes to build it; its weights come by `load_state_dict`,
    or, at the beginning of a training, from `start_from`.
    """

    SEGMENT = "pretrained"

    def __init__(self, *, encoder: dict, padding: int, out_features: int, dropout: float):
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError:
            raise UserError("this model needs another library: pip install transformers.") from None
        self.padding = padding
        self.encoder = AutoModel.from_config(AutoConfig.for_model(**encoder))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.encoder.config.hidden_size, out_features)

    def start_from(self, name: str, max_length: int) -> None:
        """Take over the weights of a pretrained model. Raises UserError where it cannot read max_length tokens."""
        self.encoder.load_state_dict(from_hugging_face("AutoModel", name).state_dict())
        some_token = int(self.encoder.config.pad_token_id == 0)
        try:  # positions are counted in another way by each kind of encoder
            with torch.inference_mode():
                self(torch.full((1, max_length), some_token))
        except (IndexError, RuntimeError):
            raise UserError(f"--model hf:{name} reads no {max_length} tokens: give a lower --max-length.") from None

    def forward(self, ids: Tensor) -> Tensor:  # (N, L) → (N, out_features)
        is_token = ids != self.padding
        tokens = ids.masked_fill(~is_token, 0)  # whichever: it is not looked at
        x = self.encoder(input_ids=tokens, attention_mask=is_token.long()).last_hidden_state  # (N, L, width)
        mean = (x * is_token[..., None]).sum(dim=1) / is_token.sum(dim=1, keepdim=True)
        return self.head(self.dropout(mean))
