"""Every hyperparameter on one page: a field is a flag, its default and its help text.

Standard library only, so that --help, a typo and an impossible value are answered before torch is imported.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from errors import UserError, did_you_mean

BUNDLED = ("breast_cancer", "wine", "diabetes", "digits", "docstrings")
TABLE = "(a DataFrame)"  # in place of a file's name, where `train` was given one
INF = float("inf")
CLEANING = ("unicode", "html", "repeats", "marks", "case")
COLUMN_KINDS = ("number", "category", "boolean", "date", "drop")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _within(config, **ranges: tuple[float, float]) -> None:
    """Raise UserError where a field is not between its two bounds, or is infinite."""
    for name, (low, high) in ranges.items():
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        upper = "up" if high == INF else f"to {high:g}"
        _check(low <= value <= high and value != INF, f"{flag} is a number from {low:g} {upper}, not {value}.")


def model_names() -> list[str]:
    """The names in MODELS of model.py, read as text: asking model.py itself would import torch."""
    source = Path(__file__).with_name("model.py").read_text(encoding="utf-8")
    block = source.split("\nMODELS = {")[1].split("}")[0]
    return re.findall(r'"(\w+)":', block) + re.findall(r'^MODELS\["(\w+)"\]', source, flags=re.MULTILINE)


@dataclass(frozen=True)
class DataConfig:
    """what to learn from, and what to learn"""

    data: str = "breast_cancer"
    """A csv, tsv, jsonl or parquet file (also .gz), a log of serve.py (.db), a folder of images or of .txt files
    (<class>/*, or train, val and test of these), or a bundled example: breast_cancer, wine, diabetes, digits,
    docstrings."""
    target: str = ""
    """The column to predict. Bundled examples and folders know theirs."""
    image: str = ""
    """The column of a table that holds paths of images, from the table's folder."""
    text: str = ""
    """The column of a table that holds text; found without asking where nothing else is there to learn from."""
    task: Literal["auto", "binary", "multiclass", "regression"] = "auto"
    """The kind of problem; auto tells it from the target's values."""
    columns: tuple[str, ...] = ()
    """Overrule the kind of a column: NAME=KIND …, KIND one of number, category, boolean, date, drop."""
    val_data: str = ""
    """A file of validation rows, in place of a share of --data."""
    test_data: str = ""
    """A file of test rows, in place of a share of --data."""
    val_split: float = 0.15
    """Share of the rows for validation: it picks the best epoch."""
    test_split: float = 0.15
    """Share of the rows for the test, which is made once, after training."""
    group: str = ""
    """Rows with the same value in this column stay in the same split."""
    time: str = ""
    """Split by this column: the newest rows are the test, those before them validation."""
    drop_nulls: bool = False
    """Leave out rows with an empty cell in place of filling it in."""
    scaling: Literal["standard", "quantile", "none"] = "standard"
    """Numbers: to mean 0 and deviation 1, to a normal distribution by rank, or as they are."""
    min_freq: int = 3
    """Categories and n-grams in fewer training rows than this, and words and tokens that are there fewer times, share
    the code of unknown ones."""
    clean: tuple[Literal["unicode", "html", "repeats", "marks", "case"], ...] = CLEANING
    """Steps of cleaning texts: one code for what looks the same, tags and entities, sooo → soo, marks for addresses
    and digits, lower case. None given = none."""
    segment: Literal["auto", "ngrams", "words", "subwords", "characters"] = "auto"
    """Parts of texts: n-grams of characters in words, words, byte-pair sub-words, characters; auto: the network's own
    (ngrams for bag, subwords for transformer)."""
    vocab_size: int = 0
    """Known parts of texts at most, the most frequent; 0 = 262144 n-grams, 30000 words, 8000 sub-words."""
    max_length: int = 0
    """Longest text that is read, in characters (ngrams) or tokens; 0 = all but the longest 1 % of training texts."""
    image_size: int = 0
    """Pixels of an image's side for the network; 0 = chosen from the training images, 128 at most."""
    augment: Literal["none", "light", "standard", "strong"] = "standard"
    """Random changes of training images: light crops and flips, standard turns, zooms and tints as well."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Mirror training images at random; auto: unless that makes them look like another class."""
    skip_broken: bool = False
    """Leave out images that cannot be read in place of stopping."""
    batch_size: int = 0
    """Rows per step; 0 = chosen from the number of training rows."""

    def __post_init__(self):
        _within(self, val_split=(0, 1), test_split=(0, 1), image_size=(0, 4096), min_freq=(1, INF), batch_size=(0, INF))
        _within(self, vocab_size=(0, 2**22), max_length=(0, INF))
        shares = self.val_split, self.test_split
        _check(min(shares) > 0 and sum(shares) < 1, "--val-split and --test-split leave no rows to one of the splits.")
        _check(not (self.image and self.text), "--image and --text: a network reads one of them, not both.")
        _check(not (self.group and self.time), "--group and --time are two ways to split: give one of them.")
        _check(self.batch_size != 1, "--batch-size is 2 rows or more, which batch normalisation needs, not 1.")
        _check(self.image_size not in (1, 2, 3), f"--image-size is 4 or more, not {self.image_size}.")
        _check(self.vocab_size not in (1, 2, 3), f"--vocab-size is 4 or more, not {self.vocab_size}.")
        self.column_kinds()

    def column_kinds(self) -> dict[str, str]:
        """`columns` as a dict: name → kind."""
        kinds = {}
        for item in self.columns:
            name, separator, kind = item.rpartition("=")
            _check(bool(separator and name), f"--columns takes NAME=KIND, not {item!r}.")
            _check(kind in COLUMN_KINDS, f"--columns {item}: no such kind.{did_you_mean(kind, COLUMN_KINDS)}")
            kinds[name] = kind
        return kinds

    def check_files(self) -> None:
        """Raise UserError where a file named by a flag does not exist."""
        for flag, path in (("--data", self.data), ("--val-data", self.val_data), ("--test-data", self.test_data)):
            if path == TABLE:
                raise UserError("that run was given a DataFrame: resume it in Python, train(…, table=the same one).")
            if not path or (flag == "--data" and path in BUNDLED) or Path(path).exists():
                continue
            folder = Path(path).parent
            names = [str(folder / p.name) for p in sorted(folder.iterdir())] if folder.is_dir() else []
            raise UserError(f"{flag} {path}: no such file.{did_you_mean(path, names or BUNDLED)}")


@dataclass(frozen=True)
class ModelConfig:
    """the network"""

    model: str = "auto"
    """A name in MODELS of model.py; auto: mlp for tables, cnn for images, bag for texts. transformer reads texts in
    order; hf:NAME fine-tunes a Hugging Face encoder (where transformers is installed)."""
    hidden: tuple[int, ...] = ()
    """Widths of the hidden layers, or channels of a cnn's stages; none given = 128 64 for mlp, 32 64 128 for cnn,
    32 for bag, 64 64 for transformer."""
    activation: Literal["relu", "sigmoid", "tanh", "softmax", "gelu", "silu", "leaky_relu"] = "relu"
    """What follows each hidden layer."""
    batch_norm: bool = True
    """Batch normalisation in each hidden layer."""
    dropout: float = 0.1
    """Share of a hidden layer's outputs set to zero in training."""

    def __post_init__(self):
        names = ["auto", *model_names()]
        _check(self.model != "hf", "--model hf needs a name: hf:bert-base-multilingual-cased.")
        _check(
            self.model in names or self.model.startswith("hf:"),
            f"--model {self.model}: no such network.{did_you_mean(self.model, names)}",
        )
        hidden = " ".join(map(str, self.hidden))
        _check(all(width >= 1 for width in self.hidden), f"--hidden takes widths of 1 or more, not {hidden}.")
        _within(self, dropout=(0, 0.99))


@dataclass(frozen=True)
class TrainConfig:
    """how to learn"""

    epochs: int = 100
    """Passes over the training rows, at most."""
    loss: Literal["auto", "mse", "l1", "huber"] = "auto"
    """For regression: squared, absolute or Huber error. Classification has cross-entropy, binary or softmax."""
    class_weights: bool = False
    """Let each class count the same, however rare it is."""
    label_smoothing: float = 0.0
    """Share of each label spread over the classes."""
    optimizer: Literal["Adam", "AdamW", "SGD", "RMSprop"] = "Adam"
    """When in doubt, Adam."""
    lr: float = 1e-3
    """Learning rate; OneCycleLR takes it as the peak."""
    weight_decay: float = 1e-4
    """Pull of the weights towards zero."""
    momentum: float = 0.9
    """For SGD."""
    scheduler: Literal[
        "none",
        "LambdaLR",
        "StepLR",
        "MultiStepLR",
        "ExponentialLR",
        "CosineAnnealingLR",
        "ReduceLROnPlateau",
        "OneCycleLR",
    ] = "ReduceLROnPlateau"
    """How the learning rate moves, by torch's names; LambdaLR is lr / (1 + gamma · epoch)."""
    warmup: int = 0
    """Epochs in which the learning rate rises from zero, before the scheduler begins."""
    step_size: int = 10
    """StepLR: epochs between two drops."""
    milestones: tuple[int, ...] = ()
    """MultiStepLR: epochs of the drops; none given = at half and at three quarters of --epochs."""
    gamma: float = 0.0
    """Factor of a drop, or rate of decay; 0 = 0.95 for ExponentialLR, 0.1 for the others."""
    lr_patience: int = 5
    """ReduceLROnPlateau: epochs without improvement before a drop."""
    min_lr: float = 0.0
    """CosineAnnealingLR, ReduceLROnPlateau: the lowest learning rate."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    amp: bool = False
    """Train in bfloat16 where that is safe: faster on GPUs and on CPUs with AMX, slower on others."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 = no limit."""
    monitor: str = "loss"
    """What picks the best epoch on validation: loss, or a metric such as accuracy, roc_auc, f1, rmse, mae, r2."""
    patience: int = 20
    """Stop after this many epochs without improvement; 0 = never."""
    seed: int = 0
    """Of the split, the first weights, the order of the rows, dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps …"""
    threads: int = 0
    """CPU threads; 0 = one for small networks, all for large ones."""
    out: str = ""
    """Run folder; default runs/<data>-<time>."""
    resume: str = ""
    """Go on from a last.pt, with its flags unless others are typed."""

    def __post_init__(self):
        _within(self, epochs=(1, INF), step_size=(1, INF), accumulate=(1, INF), warmup=(0, INF), lr_patience=(0, INF))
        _within(self, patience=(0, INF), seed=(0, 2**32 - 1), threads=(0, INF), weight_decay=(0, INF), gamma=(0, INF))
        _within(self, min_lr=(0, INF), clip_norm=(0, INF), momentum=(0, 0.9999), label_smoothing=(0, 0.99))
        _check(0 < self.lr < INF, f"--lr is a number above 0, not {self.lr}.")
        _check(self.warmup < self.epochs, f"--warmup {self.warmup} leaves no epoch of --epochs {self.epochs}.")
        milestones = list(self.milestones)
        _check(
            milestones == sorted(set(milestones)) and all(m > self.warmup for m in milestones),
            f"--milestones are epochs after the warm-up, in rising order, not {' '.join(map(str, milestones))}.",
        )
        _check(
            re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", self.device) is not None,
            f"--device {self.device}: no such device.{did_you_mean(self.device, ('auto', 'cpu', 'cuda', 'mps'))}",
        )


@dataclass(frozen=True)
class Config:
    """The three together, as a checkpoint keeps them."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        name, data = self.model.model, self.data
        _check(
            (name, data.segment) != ("transformer", "ngrams"),
            "--model transformer reads parts in their order, which --segment ngrams have not: give words, subwords or "
            "characters, or --model bag.",
        )
        own = [n for n in ("clean", "segment", "vocab_size") if getattr(data, n) != getattr(DataConfig, n)]
        _check(
            not (own and name.startswith("hf:")),
            f"--{', --'.join(own).replace('_', '-')}: not for --model {name}, which has a tokenizer of its own.",
        )

    def to_dict(self) -> dict:
        """Plain containers, ready for JSON."""
        return {
            group: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
            for group, values in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, state: dict) -> "Config":
        """The inverse of `to_dict`; fields that this version does not have are passed over."""

        def plain(group: type, values: dict):
            known = {f.name for f in fields(group)}
            return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})

        return cls(*(plain(f.default_factory, state.get(f.name, {})) for f in fields(cls)))
