"""The networks: named tensors → logits. No loss and no softmax in here; `Task` has those.

A network's `forward` names the inputs that it reads (numbers, categories, text, image); `features` gives what its last
layer reads, (N, width), so that JointNetwork can put several networks under one head.
"""

import inspect
import itertools
import math

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbones.embeddings import CategoryEmbedding, NumberEmbedding
from backbones.huggingface import Pretrained, PretrainedImage
from backbones.image import CNN
from backbones.layers import ACTIVATIONS, Dropout
from backbones.lite0 import Lite0
from backbones.text import NGramBag, Transformer
from errors import UserError
from scaling.randomness import seed_weights
from sources.disk import memory


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


class MemberLinear(nn.Module):
    """A linear layer of its own for each member of an ensemble."""

    def __init__(self, members: int, in_features: int, out_features: int):
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:  # (N, members, in_features) → (N, members, out_features)
        return torch.einsum("nmi,mio->nmo", x, self.weight) + self.bias


class TabM(nn.Module):
    """An ensemble of `members` multi-layer perceptrons that share their weights, except for a factor for each input of
    the first layer and for their last layers (Gorishniy et al., "TabM: Advancing Tabular Deep Learning with
    Parameter-Efficient Ensembling", 2024: TabM-mini). Numbers and categories are embedded."""

    HIDDEN = (192, 192)

    def __init__(
        self,
        *,
        bins: list[list[float]] | None = None,
        levels: list[list[float]] | None = None,
        category_sizes: list[int] | None = None,
        out_features: int,
        hidden: list[int],
        activation: str,
        dropout: float,
        members: int = 8,
    ):
        super().__init__()
        self.embeddings = nn.ModuleDict()
        if bins:
            self.embeddings["numbers"] = NumberEmbedding(bins, levels)
        if category_sizes:
            self.embeddings["categories"] = CategoryEmbedding(category_sizes)
        width = sum(embedding.width for embedding in self.embeddings.values())
        self.factors = nn.Parameter(2.0 * torch.randint(0, 2, (members, width), device="cpu") - 1)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), ACTIVATIONS[activation](), *([Dropout(dropout)] if dropout else [])]
            width = size
        self.layers = nn.Sequential(*layers)
        self.width = width
        self.head = MemberLinear(members, width, out_features)

    def hidden(self, numbers: Tensor | None, categories: Tensor | None) -> Tensor:
        """Return the last hidden layer of each member, (N, members, width)."""
        inputs = {"numbers": numbers, "categories": categories}
        embedded = [embedding(inputs[name]) for name, embedding in self.embeddings.items()]
        return self.layers(torch.cat(embedded, dim=1)[:, None] * self.factors)

    def features(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        return self.hidden(numbers, categories).mean(dim=1)

    def forward(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(numbers, categories))  # (N, F), (N, columns) → (N, members, out_features)


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


MODELS = {
    "tabm": TabM,
    "mlp": MLP,
    "cnn": CNN,
    "lite0": Lite0,
    "bag": NGramBag,
    "transformer": Transformer,
    "hf": Pretrained,
    "hf-image": PretrainedImage,  # hf:NAME, if that is an encoder of images
}
DEFAULTS = {"numbers": "tabm", "categories": "tabm", "text": "bag", "image": "cnn"}  # network of each input


def network_class(name: str) -> type[nn.Module]:
    """Return the class that a --model names; "hf:bert-base-cased" maps to Pretrained."""
    return MODELS[name.split(":")[0]]


def inputs_of(network: type[nn.Module] | nn.Module) -> list[str]:
    """Return the named tensors that a network reads: the parameters of its `forward`."""
    return [name for name in inspect.signature(network.forward).parameters if name != "self"]


def read_ids_of_texts(names: tuple[str, ...]) -> bool:
    """Return whether a network that --model names reads texts itself; otherwise they become numbers."""
    return any(hasattr(network_class(name), "TOKENIZER") for name in names if name != "auto")


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


def choose_dropout(names: list[str], has_classes: bool, rows: int) -> float:
    """Return 0.3 for a tabm on few rows with classes, which it would otherwise memorise, and 0.1 for all else.

    Measured with benchmarks/quality.py: regressions, and classes with more rows, are worse with 0.3.
    """
    return 0.3 if names == ["tabm"] and has_classes and rows < 10_000 else 0.1


def initial_model(names: list[str], args: dict, seed: int) -> nn.Module:
    """Build networks with their initial weights: random ones, which follow from the seed, or pretrained ones."""
    seed_weights(seed)
    model = build_model(names, args)
    for name, network in zip(names, getattr(model, "networks", [model]), strict=True):
        if hasattr(network, "start_from"):
            network.start_from(name.partition(":")[2], args.get("max_length", 0))
    return model


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


class _WithoutRandom(TorchFunctionMode):
    """Skip nn.init.normal_: without memory to fill, it would import torch's compiler, 70 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


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
        with torch.device("meta"), _WithoutRandom():
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
