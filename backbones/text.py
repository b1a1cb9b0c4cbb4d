"""Networks that read the ids of texts: a bag of n-grams, and a small Transformer."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import ACTIVATIONS, Dropout
from errors import UserError
from preprocessing.ragged import UNKNOWN


class NGramBag(nn.Module):
    """Wide and deep over the n-grams of a text, regardless of their order (Cheng et al., "Wide & Deep Learning", 2016).

    Wide is a linear model with a weight for each n-gram and class; deep is a small network on the sum of learned
    vectors. N-grams are weighted as in tf-idf: ids are numbered from the most frequent n-gram down, so by Zipf's law
    the logarithm of the number approximates the inverse document frequency (Spärck Jones, 1972). In training half of
    the n-grams are dropped: with as many n-grams as texts, the model would memorise single ones. In some texts the
    first n-gram is replaced by the unknown id, so that it is trained even if training knows all n-grams.
    """

    TOKENIZER, HIDDEN = "ngrams", (32,)
    NGRAM_DROPOUT, UNK_DROPOUT = 0.5, 0.1

    def __init__(
        self,
        *,
        known_sizes: list[int],
        padding: int,
        out_features: int,
        hidden: list[int],
        activation: str,
        dropout: float,
    ):
        super().__init__()
        self.out_features = out_features
        # Each text column numbers its own n-grams from the most frequent one down.
        ranks = torch.cat([torch.arange(2), *(torch.arange(2, 2 + size) for size in known_sizes)])
        self.register_buffer("idf", (ranks + math.e).log(), persistent=False)
        self.table = nn.EmbeddingBag(len(ranks), out_features + hidden[0], mode="sum", padding_idx=padding)
        nn.init.zeros_(self.table.weight[:, :out_features].data)  # the linear model starts at zero
        nn.init.normal_(self.table.weight[:, out_features:].data, std=0.1)
        layers: list[nn.Module] = [ACTIVATIONS[activation](), Dropout(dropout)]
        for width, size in itertools.pairwise(hidden):
            layers += [nn.Linear(width, size), ACTIVATIONS[activation](), Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(hidden[-1], out_features)
        self.width = out_features + hidden[-1]

    def wide_and_deep(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the linear model and the last hidden layer of the small network."""
        if self.training:
            unknown = torch.rand(len(text), device=text.device) < self.UNK_DROPOUT
            text = torch.cat([text[:, :1].masked_fill(unknown[:, None], UNKNOWN), text[:, 1:]], dim=1)
        idf = self.idf.index_select(0, text.flatten()).view(text.shape)
        weights = (text != self.table.padding_idx) * idf
        if self.training:
            weights = weights * (torch.rand_like(weights) >= self.NGRAM_DROPOUT)
        weights = weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-6)
        if torch.compiler.is_exporting():  # ONNX has no EmbeddingBag
            summed = (self.table.weight[text.long()] * weights[..., None]).sum(dim=1)
        else:
            summed = self.table(text, per_sample_weights=weights)
        wide, deep = summed.tensor_split([self.out_features], dim=1)
        return wide, self.layers(deep)

    def features(self, text: Tensor) -> Tensor:
        return torch.cat(self.wide_and_deep(text), dim=1)

    def forward(self, text: Tensor) -> Tensor:  # (N, L) → (N, out_features)
        wide, deep = self.wide_and_deep(text)
        return wide + self.head(deep)


class EncoderLayer(nn.Module):
    """A layer of a Transformer encoder: self-attention, then a small network at each position.

    Vaswani et al., "Attention Is All You Need", 2017; layer normalisation before each half, as in GPT-2.
    """

    def __init__(self, width: int, activation: str, dropout: float):
        super().__init__()
        self.heads = max(1, width // 32)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.body = nn.Sequential(nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:  # (N, L, width), (N, L) → (N, L, width)
        n, length, width = x.shape
        split = self.queries_keys_values(self.norms[0](x)).view(n, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (N, heads, L, width / heads)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=is_token[:, None, None, :])
        x = x + self.dropout(self.out_proj(seen.transpose(1, 2).reshape(n, length, width)))
        return x + self.dropout(self.body(self.norms[1](x)))


class Transformer(nn.Module):
    """Small Transformer encoder over the tokens of a text: a layer for each number in `hidden`, all of one width; the
    mean over the tokens; a linear layer. In training some tokens are replaced by the unknown id, which trains it and
    keeps the network from memorising texts."""

    TOKENIZER, HIDDEN = "subwords", (64, 64)
    UNK_DROPOUT = 0.15

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        padding: int,
        out_features: int,
        hidden: list[int],
        activation: str,
        dropout: float,
    ):
        super().__init__()
        self.width = hidden[0]
        if len(set(hidden)) > 1 or (self.width > 32 and self.width % (self.width // 32)):
            raise UserError("--model transformer: --hidden takes the same width for each layer, a multiple of 32.")
        self.padding = padding
        self.token_embedding = nn.Embedding(vocab_size, self.width, padding_idx=padding)
        self.position_embedding = nn.Embedding(max_length, self.width)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.1)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(self.width, activation, dropout) for _ in hidden)
        self.norm, self.head = nn.LayerNorm(self.width), nn.Linear(self.width, out_features)

    def features(self, text: Tensor) -> Tensor:
        is_token = text != self.padding
        if self.training:
            unknown = is_token & (torch.rand(text.shape, device=text.device) < self.UNK_DROPOUT)
            text = text.masked_fill(unknown, UNKNOWN)
        # Positions count tokens alone: between two text columns there may be padding.
        positions = (is_token.cumsum(dim=1) - 1).clamp_min(0)
        x = self.dropout(self.token_embedding(text) + self.position_embedding(positions))
        for layer in self.layers:
            x = layer(x, is_token)
        x = self.norm(x) * is_token[..., None]
        return x.sum(dim=1) / is_token.sum(dim=1, keepdim=True)

    def forward(self, text: Tensor) -> Tensor:  # (N, L) → (N, out_features)
        return self.head(self.features(text))
