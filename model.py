"""The networks: x → logits. No loss and no softmax in here; `Task` has those."""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError
from huggingface import Pretrained

UNKNOWN = 1  # the id of what training texts did not hold often enough
ACTIVATIONS = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(dim=-1),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


class Dropout(nn.Module):
    """nn.Dropout, at half the price on a CPU: there 16 random bits decide on an element, not a random float."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dropped = round(self.p * 2**16)  # of the 65,536 patterns
        kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class CategoryEmbedding(nn.Module):
    """Replace the last columns of x, which are category codes, by learned vectors.

    Code 0 stands for every unknown category. In training a few known codes are hidden behind it, so that it is
    trained even where the training rows hold no rare category.
    """

    HIDDEN_SHARE = 0.02

    def __init__(self, sizes: list[int]):
        super().__init__()
        # The usual rule of thumb for the width: half the number of categories, up to 32.
        self.tables = nn.ModuleList(nn.Embedding(size, min(32, (size + 1) // 2)) for size in sizes)
        self.out_features = sum(table.embedding_dim for table in self.tables)

    def forward(self, x: Tensor) -> Tensor:  # (N, F) → (N, F - categories + out_features)
        split = x.shape[1] - len(self.tables)
        codes = x[:, split:].long()  # (N, categories)
        if self.training:
            codes = codes.masked_fill(torch.rand_like(x[:, split:]) < self.HIDDEN_SHARE, 0)
        vectors = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        return torch.cat([x[:, :split], *vectors], dim=1)


class MLP(nn.Module):
    """Multi-layer perceptron: (linear → batch norm → activation → dropout) for each width, then linear."""

    HIDDEN = (128, 64)

    def __init__(
        self,
        *,
        in_features: int,
        category_sizes: list[int],
        out_features: int,
        hidden: list[int],
        activation: str,
        batch_norm: bool,
        dropout: float,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        width = in_features
        if category_sizes:
            layers.append(CategoryEmbedding(category_sizes))
            width += layers[0].out_features - len(category_sizes)
        for size in hidden:
            layers.append(nn.Linear(width, size, bias=not batch_norm))  # batch norm has a bias of its own
            if batch_norm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(Dropout(dropout))
            width = size
        layers.append(nn.Linear(width, out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_features) → (N, out_features)
        return self.layers(x)


class Residual(nn.Module):
    """Two 3×3 convolutions and a shortcut around them (He et al., "Deep Residual Learning", 2015)."""

    def __init__(self, width_in: int, width: int, stride: int, activation: str, batch_norm: bool):
        super().__init__()

        def conv(i: int, o: int, kernel: int, stride: int) -> nn.Sequential:
            layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=not batch_norm)]
            return nn.Sequential(*layers, *([nn.BatchNorm2d(o)] if batch_norm else []))

        self.body = nn.Sequential(conv(width_in, width, 3, stride), ACTIVATIONS[activation](), conv(width, width, 3, 1))
        same = width_in == width and stride == 1
        self.shortcut = nn.Identity() if same else conv(width_in, width, 1, stride)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:  # (N, width_in, H, W) → (N, width, H / stride, W / stride)
        return self.activation(self.body(x) + self.shortcut(x))


class CNN(nn.Module):
    """Compact residual network: a stage for each number in `hidden`, each half as wide and high as the one before,
    then the mean over the image, dropout, and a linear layer. Large images are halved to about 32 pixels first."""

    HIDDEN = (32, 64, 128)

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
        halvings = max(0, round(math.log2(image_size / 32)))
        strides = [2] * halvings or [1]
        widths = [in_channels] + [hidden[0]] * len(strides)
        stem = [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1) for i, stride in enumerate(strides)]
        stages = [
            Residual(hidden[max(0, i - 1)], width, 1 if i == 0 else 2, activation, batch_norm)
            for i, width in enumerate(hidden)
        ]
        self.features = nn.Sequential(*stem, *stages)
        self.head = nn.Sequential(Dropout(dropout), nn.Linear(hidden[-1], out_features))
        self.to(memory_format=torch.channels_last)  # the faster layout of convolutions, on CPUs and GPUs

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) → (N, out_features)
        return self.head(self.features(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3)))


class Bag(nn.Module):
    """Wide and deep over the n-grams of a text, in whatever order: a linear model with a weight for each n-gram and
    class, and a network over the sum of learned vectors beside it (Cheng et al., "Wide & Deep Learning", 2016).

    Ids are numbered from the most frequent n-gram down. By Zipf's law their logarithm stands for the inverse document
    frequency (Spärck Jones, 1972), so n-grams are weighted as in tf-idf without another table. Half of them are left
    out at random in training: a few thousand texts have as many n-grams as texts, and each alone would be believed.
    In some texts the first is hidden behind the unknown id, so that it is trained even where training knows them all.
    """

    SEGMENT, HIDDEN = "ngrams", (32,)
    LEFT_OUT, HIDDEN_SHARE = 0.5, 0.1

    def __init__(
        self, *, vocab_size: int, padding: int, out_features: int, hidden: list[int], activation: str, dropout: float
    ):
        super().__init__()
        self.out_features = out_features
        self.table = nn.EmbeddingBag(vocab_size, out_features + hidden[0], mode="sum", padding_idx=padding)
        nn.init.zeros_(self.table.weight[:, :out_features].data)  # the linear model begins with no opinion
        nn.init.normal_(self.table.weight[:, out_features:].data, std=0.1)
        layers: list[nn.Module] = []
        for width, size in zip(hidden, [*hidden[1:], out_features], strict=True):
            layers += [ACTIVATIONS[activation](), Dropout(dropout), nn.Linear(width, size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, ids: Tensor) -> Tensor:  # (N, L) → (N, out_features)
        if self.training:
            hidden = torch.rand(len(ids), device=ids.device) < self.HIDDEN_SHARE
            ids = torch.cat([ids[:, :1].masked_fill(hidden[:, None], UNKNOWN), ids[:, 1:]], dim=1)
        weights = (ids != self.table.padding_idx) * (ids + math.e).log()
        if self.training:
            weights = weights * (torch.rand_like(weights) >= self.LEFT_OUT)
        weights = weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-6)
        wide, deep = self.table(ids, per_sample_weights=weights).tensor_split([self.out_features], dim=1)
        return wide + self.layers(deep)


class Attention(nn.Module):
    """A layer of a Transformer encoder: each token gathers from all others, then a small network at each place.

    Vaswani et al., "Attention Is All You Need", 2017; normalised before each half as in GPT-2.
    """

    def __init__(self, width: int, activation: str, dropout: float):
        super().__init__()
        self.heads = max(1, width // 32)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.gathered = nn.Linear(width, width)
        self.body = nn.Sequential(nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:  # (N, L, width), (N, L) → (N, L, width)
        n, length, width = x.shape
        split = self.queries_keys_values(self.norms[0](x)).view(n, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (N, heads, L, width / heads)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=is_token[:, None, None, :])
        x = x + self.dropout(self.gathered(seen.transpose(1, 2).reshape(n, length, width)))
        return x + self.dropout(self.body(self.norms[1](x)))


class Transformer(nn.Module):
    """Small Transformer encoder over tokens in their order: a layer for each number in `hidden`, all of one width;
    the mean over the tokens; a linear layer. In training some tokens are hidden behind the unknown one, which trains
    it, and keeps the network from learning texts by heart."""

    SEGMENT, HIDDEN = "subwords", (64, 64)
    HIDDEN_SHARE = 0.15

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
        width = hidden[0]
        if len(set(hidden)) > 1 or (width > 32 and width % (width // 32)):
            raise UserError("--model transformer: --hidden is one width, again for each layer, a multiple of 32.")
        self.padding = padding
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=padding)
        self.places = nn.Embedding(max_length, width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.1)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(Attention(width, activation, dropout) for _ in hidden)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out_features)

    def forward(self, ids: Tensor) -> Tensor:  # (N, L) → (N, out_features)
        is_token = ids != self.padding
        if self.training:
            ids = ids.masked_fill(is_token & (torch.rand(ids.shape, device=ids.device) < self.HIDDEN_SHARE), UNKNOWN)
        x = self.dropout(self.tokens(ids) + self.places.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, is_token)
        x = self.norm(x) * is_token[..., None]
        return self.head(x.sum(dim=1) / is_token.sum(dim=1, keepdim=True))


MODELS = {"mlp": MLP, "cnn": CNN, "bag": Bag, "transformer": Transformer, "hf": Pretrained}


def network_class(name: str) -> type[nn.Module]:
    """Return the class that a --model names; "hf:bert-base-cased" is that of "hf"."""
    return MODELS[name.split(":")[0]]


def build_model(name: str, facts: dict) -> nn.Module:
    """Build the network called `name`, handing its constructor those of the `facts` that its signature names.

    facts: what the data tell (in_features, category_sizes), what the task tells (out_features), and the model flags.
    `hidden`, where it is empty, is the network's own HIDDEN.
    Raises UserError where the constructor asks for a fact that this kind of data does not have.
    """
    network = network_class(name)
    facts = facts | {"hidden": list(facts.get("hidden") or getattr(network, "HIDDEN", ()))}
    wanted = inspect.signature(network).parameters.values()
    missing = [p.name for p in wanted if p.default is p.empty and p.name not in facts]
    if missing:
        raise UserError(f"--model {name} needs {', '.join(missing)}, which this kind of data does not provide.")
    return network(**{p.name: facts[p.name] for p in wanted if p.name in facts})
