"""The networks: x → logits. No loss and no softmax in here; `Task` has those."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError

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


MODELS = {"mlp": MLP}


def build_model(name: str, facts: dict) -> nn.Module:
    """Build the network called `name`, handing its constructor those of the `facts` that its signature names.

    facts: what the data tell (in_features, category_sizes), what the task tells (out_features), and the model flags.
    Raises UserError where the constructor asks for a fact that this kind of data does not have.
    """
    wanted = inspect.signature(MODELS[name]).parameters.values()
    missing = [p.name for p in wanted if p.default is p.empty and p.name not in facts]
    if missing:
        raise UserError(f"--model {name} needs {', '.join(missing)}, which this kind of data does not provide.")
    return MODELS[name](**{p.name: facts[p.name] for p in wanted if p.name in facts})
