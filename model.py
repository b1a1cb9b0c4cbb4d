"""The networks: named tensors → logits. No loss and no softmax in here; `Task` has those.

A network's `forward` names the inputs that it reads (numbers, categories, text, image); `features` gives what its last
layer reads, (N, width), so that JointNetwork can put several networks under one head.
"""

import inspect
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.huggingface import Pretrained
from errors import UserError
from preprocessing.column import memory

UNKNOWN = 1  # the id of parts of texts that training saw too rarely
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
    """nn.Dropout at half the cost on a CPU, where 16 random bits instead of a random float decide about an element."""

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
    """A learned vector for each category code of each column, side by side.

    Code 0 stands for every unknown category. In training a few known codes are replaced by it, so that its vector is
    trained even if the training rows hold no rare category.
    """

    UNK_DROPOUT = 0.02

    def __init__(self, sizes: list[int]):
        super().__init__()
        # The usual rule of thumb for the width: half the number of categories, up to 32.
        self.tables = nn.ModuleList(nn.Embedding(size, min(32, (size + 1) // 2)) for size in sizes)
        self.width = sum(table.embedding_dim for table in self.tables)

    def forward(self, codes: Tensor) -> Tensor:  # (N, columns) → (N, width)
        if self.training:
            codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < self.UNK_DROPOUT, 0)
        return torch.cat([table(codes[:, i]) for i, table in enumerate(self.tables)], dim=1)


class MLP(nn.Module):
    """Multi-layer perceptron: (linear → batch norm → activation → dropout) for each width, then linear."""

    HIDDEN = (128, 64)

    def __init__(
        self,
        *,
        in_features: int = 0,
        category_sizes: list[int] | None = None,
        out_features: int,
        hidden: list[int],
        activation: str,
        batch_norm: bool,
        dropout: float,
    ):
        super().__init__()
        self.embedding = CategoryEmbedding(category_sizes) if category_sizes else None
        width = in_features + (self.embedding.width if self.embedding else 0)
        layers: list[nn.Module] = []
        for size in hidden:
            layers.append(nn.Linear(width, size, bias=not batch_norm))  # batch norm has a bias of its own
            if batch_norm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(Dropout(dropout))
            width = size
        self.layers = nn.Sequential(*layers)
        self.width = width
        self.head = nn.Linear(width, out_features)

    def features(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        inputs = [] if numbers is None else [numbers]
        if categories is not None:
            inputs.append(self.embedding(categories))
        return self.layers(torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0])

    def forward(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        return self.head(self.features(numbers, categories))  # (N, in_features), (N, columns) → (N, out_features)


class ResidualBlock(nn.Module):
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
    """Compact residual network: a stage for each number in `hidden`, each with half the resolution of the one before,
    then the mean over the image, dropout, and a linear layer. Large images are first reduced to about 32 pixels."""

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
            ResidualBlock(hidden[max(0, i - 1)], width, 1 if i == 0 else 2, activation, batch_norm)
            for i, width in enumerate(hidden)
        ]
        self.layers = nn.Sequential(*stem, *stages)
        self.width = hidden[-1]
        self.head = nn.Sequential(Dropout(dropout), nn.Linear(self.width, out_features))
        self.to(memory_format=torch.channels_last)  # the faster layout for convolutions, on CPUs and GPUs

    def features(self, image: Tensor) -> Tensor:
        return self.layers(image.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:  # (N, in_channels, H, W) → (N, out_features)
        return self.head(self.features(image))


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


class JointNetwork(nn.Module):
    """Several networks under one head: a small network on their concatenated features."""

    WIDTH = 64

    def __init__(self, networks: list[nn.Module], *, out_features: int, activation: str, dropout: float):
        super().__init__()
        for network in networks:
            if not hasattr(network, "features"):
                name = type(network).__name__
                raise UserError(
                    f"{name} reads only a part of the inputs: it needs `features` and `width` for a joint network."
                )
            network.head = nn.Identity()
        self.networks = nn.ModuleList(networks)
        self.head = nn.Sequential(
            nn.Linear(sum(network.width for network in networks), self.WIDTH),
            ACTIVATIONS[activation](),
            Dropout(dropout),
            nn.Linear(self.WIDTH, out_features),
        )

    def forward(self, **inputs: Tensor) -> Tensor:  # named tensors (N, …) → (N, out_features)
        features = [network.features(**pick(inputs, inputs_of(network))) for network in self.networks]
        return self.head(torch.cat(features, dim=1))


MODELS = {"mlp": MLP, "cnn": CNN, "bag": NGramBag, "transformer": Transformer, "hf": Pretrained}
DEFAULTS = {"numbers": "mlp", "categories": "mlp", "text": "bag", "image": "cnn"}  # network of each input


def network_class(name: str) -> type[nn.Module]:
    """Return the class that a --model names; "hf:bert-base-cased" maps to Pretrained."""
    return MODELS[name.split(":")[0]]


def inputs_of(network: type[nn.Module] | nn.Module) -> list[str]:
    """Return the named tensors that a network reads: the parameters of its `forward`."""
    return [name for name in inspect.signature(network.forward).parameters if name != "self"]


def pick(values: dict, names) -> dict:
    """Return the items of a dict that `names` lists."""
    return {name: values[name] for name in names if name in values}


def choose_networks(names: tuple[str, ...], inputs: list[str]) -> list[str]:
    """Return the networks that together read all `inputs`: those that --model names, and the default for the rest.

    Raises UserError for a network that reads none of these inputs, or two for the same one.
    """
    chosen: dict[str, list[str]] = {}  # name → inputs
    for name in [name for name in names if name != "auto"] + [DEFAULTS[name] for name in inputs]:
        reads = [i for i in inputs_of(network_class(name)) if i in inputs]
        new = [i for i in reads if not any(i in others for others in chosen.values())]
        if new:
            chosen[name] = reads
        elif name in names and name not in chosen:
            if reads:
                raise UserError(f"--model {' '.join(names)}: two networks read {', '.join(reads)}: give one of them.")
            needs = ", ".join(inputs_of(network_class(name)))
            raise UserError(f"--model {name} reads {needs}, but the records have {', '.join(inputs)}.")
    return list(chosen)


def build_model(names: list[str], args: dict) -> nn.Module:
    """Build the networks called `names`; several of them become one JointNetwork.

    args: what the data give (in_features, category_sizes, …), out_features, and the flags of ModelConfig. Each
    constructor gets those that its signature names. An empty `hidden` means the network's own HIDDEN.
    Raises UserError if a constructor needs something that these data do not provide, or if training takes more
    memory than there is.
    """
    flags = " ".join(["--model", *names, *(["--hidden", *map(str, args["hidden"][:8])] if args.get("hidden") else [])])
    try:
        weights = sum(map(math.prod, outline(names, args).values()))
    except (RuntimeError, OverflowError):  # of torch, for more than 2^63 bytes
        raise UserError(f"{flags}: a network of this size cannot be built.") from None
    if (size := 16 * weights) > memory():  # float32: the weights, their gradients, and two moments of Adam
        raise UserError(
            f"{flags}: the network has {weights:,} weights; to train it takes {size / 2**30:,.0f} GB of memory, "
            f"this machine has {memory() / 2**30:,.0f} GB: give smaller widths."
        )
    return _build(names, args)


def _build(names: list[str], args: dict) -> nn.Module:
    networks = [_build_network(name, args) for name in names]
    if len(networks) == 1:
        return networks[0]
    return JointNetwork(networks, **pick(args, ("out_features", "activation", "dropout")))


def _build_network(name: str, args: dict) -> nn.Module:
    network = network_class(name)
    args = args | {"hidden": list(args.get("hidden") or getattr(network, "HIDDEN", ()))}
    wanted = inspect.signature(network).parameters.values()
    missing = [p.name for p in wanted if p.default is p.empty and p.name not in args]
    if missing:
        raise UserError(f"--model {name} needs {', '.join(missing)}, which these data do not provide.")
    return network(**pick(args, [p.name for p in wanted]))


def outline(names: list[str], args: dict, limit: int = 10_000) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a network, without the memory that it takes.

    limit: parameters while it is built. Raises RuntimeError for more.
    """
    parameters = itertools.count(1)

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(parameters) > limit:
            raise RuntimeError(f"it has more than {limit:,} parameters")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return {name: tuple(weight.shape) for name, weight in _build(names, args).state_dict().items()}
    finally:
        hook.remove()


def rebuild_model(spec: dict, state_dict: dict[str, Tensor]) -> nn.Module:
    """Build the network of a checkpoint, once it is known that the weights fit. Raises RuntimeError if they do not."""
    limit = 2 * len(state_dict) + 100  # heads are replaced in a JointNetwork
    needed, stored = outline(**spec, limit=limit), {name: tuple(x.shape) for name, x in state_dict.items()}
    for name in needed | stored:
        if needed.get(name) != stored.get(name):
            raise RuntimeError(f"{name} has the shape {stored.get(name)} instead of {needed.get(name)}")
    return _build(**spec)
