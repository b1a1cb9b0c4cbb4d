"""Every flag on one page: a field is a flag, its default and its help text.

Standard library only, so that --help, a typo and an impossible value are reported before torch is imported.
"""

import ast
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from errors import UserError, did_you_mean

BUNDLED = ("breast_cancer", "wine", "diabetes", "digits", "docstrings")
TABLE = "(a DataFrame)"  # in place of a file's name, if `train` was given a DataFrame
INF = float("inf")
CLEANING = ("unicode", "html", "repeats", "marks", "case")  # by default
FORMATTED = ("number", "date", "")  # kinds of columns that can be written in several ways
COLUMN_KINDS = ("number", "category", "boolean", "date", "text", "image", "drop")


@dataclass(frozen=True)
class Search:
    """What tune.py tries for a flag: numbers from low to high, on a log scale or not, or one of some choices."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple = ()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _within(config, **ranges: tuple[float, float]) -> None:
    """Raise UserError for a field that is not between its two bounds, or is infinite."""
    for name, (low, high) in ranges.items():
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        upper = "up" if high == INF else f"to {high:g}"
        _check(low <= value <= high and value != INF, f"{flag} must be a number from {low:g} {upper}, not {value}.")


def _as_tuples(config) -> None:
    """Let one value stand for a tuple of one: ModelConfig(hidden=64), DataConfig(text="review")."""
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(f.default, tuple) and not isinstance(value, tuple):
            value = tuple(value) if isinstance(value, list) else (value,) if value != "" else ()
            object.__setattr__(config, f.name, value)


def _split_column(item: str) -> tuple[str, str, str]:
    """Split NAME=KIND or NAME=KIND:FORMAT; the name and the format may hold any sign. An empty kind is detected."""
    kinds = "|".join(COLUMN_KINDS)
    known = re.fullmatch(rf"(.+)=({kinds}|)(?::(.+))?", item, re.DOTALL)
    found = known or re.fullmatch(r"(.*?)=([^:]*)(?::(.*))?", item, re.DOTALL)
    return (found[1], found[2], found[3] or "") if found else ("", "", "")


def model_names() -> list[str]:
    """Return the names in MODELS of model.py, read from its syntax tree: importing it would import torch."""
    tree = ast.parse(Path(__file__).with_name("model.py").read_text(encoding="utf-8"))
    assignments = (node for node in tree.body if isinstance(node, ast.Assign))
    models = next(node.value for node in assignments if ast.unparse(node.targets[0]) == "MODELS")
    return [ast.literal_eval(key) for key in models.keys]


def from_plain(cls: type, values: dict):
    """Build a dataclass from plain values: unknown names are ignored, missing ones take the field's default.

    Raises TypeError if a field without a default is missing.
    """
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(frozen=True)
class DataConfig:
    """what to learn from, and what to predict"""

    data: str = "breast_cancer"
    """A csv, tsv, jsonl, parquet, xlsx, xls or ods file (also .gz), a log of serve.py (.db), a folder of images or of
    .txt files (<class>/*, or train, val and test with such folders), or a bundled example: breast_cancer, wine,
    diabetes, digits, docstrings."""
    target: str = ""
    """The column to predict. Bundled examples and folders have their own."""
    task: Literal["auto", "binary", "multiclass", "regression"] = "auto"
    """The kind of problem; auto decides from the target's values."""
    text: tuple[str, ...] = ()
    """Columns of text, found automatically in most tables; short for --columns NAME=text."""
    image: str = ""
    """The column of image paths, relative to the table's folder; short for --columns NAME=image."""
    columns: tuple[str, ...] = ()
    """Set the kind of a column: NAME=KIND …, KIND one of number, category, boolean, date, text, image, drop; and how
    its numbers or dates are written: price=number:1.234,56 when=date:%d/%m/%Y."""
    missing: tuple[str, ...] = ()
    """Words that stand for a missing value in any column, beside the usual ones: --missing unbekannt -999."""
    encoding: str = ""
    """Encoding of text files, such as utf-8, cp1252 or cp949; by default it is detected."""
    sheet: str = ""
    """The sheet of a spreadsheet; by default the first."""
    skip_rows: int = -1
    """Lines above the header of a csv or a sheet, such as a title; -1 = detect."""
    val_split: float = 0.15
    """Share of the rows for the validation split, which selects the best epoch."""
    test_split: float = 0.15
    """Share of the rows for the test split, evaluated once after training."""
    val_data: str = ""
    """A file of validation rows, instead of a share of --data."""
    test_data: str = ""
    """A file of test rows, instead of a share of --data."""
    add: tuple[str, ...] = ()
    """More files of training rows, such as logs of serve.py with feedback. --data is split as without them."""
    group: str = ""
    """Rows with the same value in this column stay in the same split."""
    time: str = ""
    """Split by this column: the newest rows are the test split, those before them validation."""
    folds: int = 0
    """Cross-validation: train on each of so many folds in turn, evaluate on all rows, and keep the models as one
    ensemble; 0 = one split."""
    keep_duplicates: bool = False
    """Split equal rows, texts and images as they come; by default they stay in the same split."""
    batch_size: int = 0
    """Rows per step; 0 = chosen from the number of training rows."""
    drop_nulls: bool = False
    """Leave out rows with a missing cell instead of filling it."""
    skip_broken: bool = False
    """Leave out records that cannot be read, such as broken images, instead of stopping."""
    scaling: Literal["standard", "quantile", "none"] = "quantile"
    """Numbers: to mean 0 and std 1, by rank to a normal distribution, or unchanged."""
    min_freq: int = 2
    """Rarer values are unknown: training rows for categories and n-grams, occurrences for words and tokens."""
    clean: tuple[Literal["unicode", "html", "repeats", "marks", "digits", "case"], ...] = CLEANING
    """Steps of cleaning texts: Unicode NFKC normalisation, tags and entities, sooo → soo, placeholders for addresses,
    digits → 0, lower case. --clean without a value applies none."""
    tokenizer: Literal["auto", "ngrams", "words", "subwords", "characters"] = "auto"
    """Parts of texts: n-grams of characters within words, words, byte-pair subwords, characters; auto = what the
    network reads (ngrams for bag, subwords for transformer)."""
    vocab_size: int = 0
    """Maximum number of known parts of texts; 0 = 262144 n-grams, 30000 words, 8000 subwords."""
    max_length: int = 0
    """Maximum length of a text (characters for n-grams, otherwise tokens); longer texts are truncated; 0 = chosen so
    that 99 % of the training texts fit."""
    image_size: int = 0
    """Side of the network's images in pixels; 0 = chosen from the training images, at most 128, or what a pretrained
    network was trained with; -N = chosen, at most N."""
    augment: Literal["none", "light", "standard", "strong"] = "standard"
    """Random changes of training images; light: shifts; standard: also rotation, zoom and colour; strong: more of
    these, and erased rectangles."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Mirror training images at random; auto: unless mirrored images look like another class."""

    def __post_init__(self):
        _as_tuples(self)
        _within(self, val_split=(0, 1), test_split=(0, 1), min_freq=(1, INF), batch_size=(0, INF), skip_rows=(-1, INF))
        _within(self, image_size=(-4096, 4096), vocab_size=(0, 2**22), max_length=(0, 2**20))
        shares = self.val_split, self.test_split
        _check(min(shares) > 0 and sum(shares) < 1, "--val-split and --test-split leave no rows for one of the splits.")
        _check(not (self.group and self.time), "--group and --time are two ways to split: give one of them.")
        _check(self.folds == 0 or 3 <= self.folds <= 50, f"--folds must be 0 or from 3 to 50, not {self.folds}.")
        for name in ("time", "val_data", "test_data"):
            given = f"--{name.replace('_', '-')}"
            _check(not (self.folds and getattr(self, name)), f"--folds makes its own splits: leave out {given}.")
        _check(self.batch_size != 1, "--batch-size must be 2 or more, because batch normalisation needs 2 rows, not 1.")
        _check(abs(self.image_size) not in (1, 2, 3), f"--image-size must be 4 or more, not {self.image_size}.")
        _check(self.vocab_size not in (1, 2, 3), f"--vocab-size must be 4 or more, not {self.vocab_size}.")
        self.column_kinds()

    def column_kinds(self) -> dict[str, str]:
        """Return name → kind of the columns that --columns, --text and --image name."""
        kinds = dict.fromkeys(self.text, "text") | ({self.image: "image"} if self.image else {})
        _check(self.image not in self.text, f"--image {self.image}: the column is also given as --text.")
        for item in self.columns:
            name, kind, written = _split_column(item)
            _check(bool(name and (kind or written)), f"--columns takes NAME=KIND or NAME=KIND:FORMAT, not {item!r}.")
            known = kind in COLUMN_KINDS or not kind
            _check(known, f"--columns {item}: unknown kind.{did_you_mean(kind, COLUMN_KINDS)}")
            _check(not written or kind in FORMATTED, f"--columns {item}: only a number or a date takes a format.")
            same = not kind or kinds.get(name, kind) == kind
            _check(same, f"--columns {item}: {name} is given as {kinds.get(name)} as well.")
            kinds |= {name: kind} if kind else {}
        return kinds

    def column_formats(self) -> dict[str, str]:
        """Return name → how the cells are written, of the columns for which --columns says it."""
        columns = map(_split_column, self.columns)
        return {name: written for name, _, written in columns if written}

    def check_files(self) -> None:
        """Raise UserError for a file that a flag names and that does not exist."""
        files = (("--data", self.data), ("--val-data", self.val_data), ("--test-data", self.test_data))
        for flag, path in (*files, *(("--add", path) for path in self.add)):
            if path == TABLE:
                raise UserError(
                    "that run used a DataFrame: resume it in Python with train(…, table=the same DataFrame)."
                )
            if not path or (flag == "--data" and path in BUNDLED) or os.path.exists(path):
                is_root = path and Path(path).resolve() == Path(path).resolve().parent
                _check(not is_root, f"{flag} {path}: give a folder of class folders, not the whole disk.")
                continue
            folder = Path(path).parent
            names = [str(folder / p.name) for p in sorted(folder.iterdir())] if os.path.isdir(folder) else []
            raise UserError(f"{flag} {path}: no such file.{did_you_mean(path, names or BUNDLED)}")


@dataclass(frozen=True)
class ModelConfig:
    """the network"""

    model: tuple[str, ...] = ("auto",)
    """One network per input: tabm or mlp (numbers, categories), bag or transformer (text), cnn or lite0 (image; lite0
    is trained on ImageNet), hf:NAME (text or image, from Hugging Face). auto, and inputs without one: tabm; cnn, or
    lite0 if that is better on validation (few images in colour); texts without one become numbers."""
    freeze: bool = False
    """A pretrained network (lite0, hf:NAME) stays as it is: its features are computed once, and only a head on them is
    trained."""
    fine_tune: bool = False
    """All of a pretrained network is trained, with a lower learning rate than its head. Neither: frozen on a CPU or
    with few rows, otherwise fine-tuned."""
    hidden: Annotated[tuple[int, ...], Search(choices=(0.5, 1.0, 2.0))] = ()  # times the network's own widths
    """Widths of the hidden layers, or channels of a cnn's stages; none given = 192 192 for tabm, 128 64 for mlp,
    32 64 128 for cnn, 32 for bag, 64 64 for transformer."""
    activation: Annotated[
        Literal["relu", "sigmoid", "tanh", "softmax", "gelu", "silu", "leaky_relu"], Search(choices=("relu", "silu"))
    ] = "relu"
    """Activation function after each hidden layer."""
    batch_norm: bool = True
    """Batch normalisation in each hidden layer."""
    dropout: Annotated[float, Search(0.0, 0.6)] = -1.0
    """Share of a hidden layer's outputs that are set to zero in training; -1 = 0.1, or 0.3 for tabm on classes with
    fewer than 10,000 training rows."""

    def __post_init__(self):
        _as_tuples(self)
        names = ["auto", *model_names()]
        for name in self.model:
            _check(name not in ("hf", "hf-image"), "--model hf needs a name: hf:bert-base-multilingual-cased.")
            known = name in names or name.startswith("hf:")
            _check(known, f"--model {name}: unknown network.{did_you_mean(name, names)}")
        hidden = " ".join(map(str, self.hidden))
        _check(all(width >= 1 for width in self.hidden), f"--hidden takes widths of 1 or more, not {hidden}.")
        _check(
            self.dropout == -1 or 0 <= self.dropout <= 0.99, f"--dropout must be from 0 to 0.99, not {self.dropout}."
        )
        _check(not (self.freeze and self.fine_tune), "--freeze and --fine-tune are two ways to train: give one.")

    @property
    def pretrained(self) -> str:
        """The Hugging Face model that --model names; "" without one."""
        return next((name.removeprefix("hf:") for name in self.model if name.startswith("hf:")), "")


@dataclass(frozen=True)
class TrainConfig:
    """how to train"""

    epochs: Annotated[int, Search()] = -1  # from a few to the planned ones
    """Passes over the training rows, at most; -1 = planned from the rows and the size of the network."""
    time_budget: float = 0.0
    """Seconds that training may take: epochs, and where needed their length, are planned from the measured speed; 0 =
    no limit."""
    loss: Literal["auto", "mse", "l1", "huber"] = "auto"
    """For regression: squared, absolute or Huber error. Classification always uses cross-entropy."""
    class_weights: bool = False
    """Weight the loss so that all classes count the same, however rare."""
    label_smoothing: float = -1.0
    """Share of each label that is spread over all classes; -1 = 0.1 if images are the only input, and 0 for
    all else."""
    optimizer: Literal["Adam", "AdamW", "SGD", "RMSprop"] = "AdamW"
    """Optimizer of torch.optim."""
    lr: Annotated[float, Search(5e-4, 2e-2, log=True)] = -1.0
    """Learning rate; OneCycleLR takes it as the peak. -1 = 0.01 for a cnn alone, 0.001 for lite0 alone, and 0.003 for
    all else."""
    weight_decay: Annotated[float, Search(1e-5, 0.5, log=True)] = 3e-4
    """L2 penalty on the weights (for AdamW, decoupled)."""
    momentum: float = 0.9
    """Momentum of SGD."""
    scheduler: Literal[
        "auto",
        "none",
        "LambdaLR",
        "StepLR",
        "MultiStepLR",
        "ExponentialLR",
        "CosineAnnealingLR",
        "ReduceLROnPlateau",
        "OneCycleLR",
    ] = "auto"
    """Learning rate schedule, by torch's names; LambdaLR is lr / (1 + gamma · epoch); auto = OneCycleLR for a cnn
    alone, and CosineAnnealingLR for all else."""
    warmup: int = 0
    """Epochs in which the learning rate rises from zero, before the scheduler starts."""
    step_size: int = 10
    """StepLR: epochs between two drops."""
    milestones: tuple[int, ...] = ()
    """MultiStepLR: epochs of the drops; none given = after half and three quarters of --epochs."""
    gamma: float = 0.0
    """Factor of a drop, or rate of decay; 0 = 0.95 for ExponentialLR, 0.1 for the others."""
    lr_patience: int = 5
    """ReduceLROnPlateau: epochs without improvement before a drop."""
    min_lr: float = 0.0
    """CosineAnnealingLR, ReduceLROnPlateau: the lowest learning rate."""
    accumulate: int = 1
    """Batches whose gradients are accumulated into one step."""
    amp: bool = False
    """Mixed precision: bfloat16, or float16 on GPUs without it. Faster on GPUs and on CPUs with AMX, many times slower
    on others."""
    clip_norm: float = 1.0
    """Maximum norm of the gradient; 0 = no limit."""
    monitor: str = "loss"
    """Validation metric that selects the best epoch: loss, or a metric such as accuracy, roc_auc, f1, rmse, mae, r2.
    Unless it is accuracy, a rare class of two gets a decision threshold below 0.5, which suits F1."""
    patience: int = -1
    """Stop after this many epochs without improvement; 0 = never; -1 = never for a cnn alone, and 16 for all else."""
    seed: int = 0
    """Seed of the split, the initial weights, the order of the rows, and dropout."""

    def __post_init__(self):
        _as_tuples(self)
        _check(self.epochs >= 1 or self.epochs == -1, f"--epochs must be a number from 1 up, not {self.epochs}.")
        _within(self, step_size=(1, INF), accumulate=(1, INF), warmup=(0, INF), lr_patience=(0, INF))
        _within(self, patience=(-1, INF), seed=(0, 2**32 - 1), weight_decay=(0, INF), gamma=(0, INF))
        _within(self, time_budget=(0, INF))
        _within(self, min_lr=(0, INF), clip_norm=(0, INF), momentum=(0, 0.9999))
        _check(0 < self.lr < INF or self.lr == -1, f"--lr must be a number above 0, not {self.lr}.")
        smooths = 0 <= self.label_smoothing <= 0.99 or self.label_smoothing == -1
        _check(smooths, f"--label-smoothing must be from 0 to 0.99, not {self.label_smoothing}.")
        leaves = self.epochs == -1 or self.warmup < self.epochs
        _check(leaves, f"--warmup {self.warmup} leaves no epoch of --epochs {self.epochs}.")
        milestones = list(self.milestones)
        _check(
            milestones == sorted(set(milestones)) and all(m > self.warmup for m in milestones),
            f"--milestones must be epochs after the warm-up, in rising order, not {' '.join(map(str, milestones))}.",
        )

    def settled(self, recipe: dict) -> "TrainConfig":
        """Return the flags with values in place of -1 and auto: those of a `RECIPE` of a network, or the usual ones."""
        usual = {"lr": 3e-3, "scheduler": "CosineAnnealingLR", "label_smoothing": 0.0, "patience": 16} | recipe
        return replace(self, **{name: x for name, x in usual.items() if getattr(self, name) in (-1, "auto")})


@dataclass(frozen=True)
class RunConfig:
    """where and on what"""

    out: str = ""
    """Run folder; default runs/<data>-<time>."""
    resume: str = ""
    """Continue a run from its last.pt; flags that are given override the saved ones."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps … Under torchrun, cuda is one GPU for each process."""
    report: bool = True
    """Write report.html and compare the model with simple baselines; --no-report saves some seconds."""
    learning_curve: bool = False
    """Train on parts of the training rows as well, and say whether more rows would help."""
    coverage: float = 0.0
    """Predict sets of classes, or intervals, that hold the target of this share of the records, such as 0.9; 0 =
    none."""
    examples: bool = True
    """Keep a few training rows in the checkpoint for its self-check; --no-examples makes such rows up instead."""
    threads: int = 0
    """CPU threads of each process; 0 = one for small networks, all for large ones."""
    compile: bool = False
    """Compile the network with torch.compile: faster for large networks on a GPU, slower for small ones."""
    deterministic: bool = False
    """Let a GPU give the same bits each time; slower."""

    def __post_init__(self):
        _within(self, threads=(0, 1024), coverage=(0, 0.999))
        _check(
            re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", self.device) is not None,
            f"--device {self.device}: unknown device.{did_you_mean(self.device, ('auto', 'cpu', 'cuda', 'mps'))}",
        )


@dataclass(frozen=True)
class Config:
    """All flags, as a checkpoint keeps them."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        names, data = self.model.model, self.data
        _check(not (data.folds and self.run.learning_curve), "--learning-curve needs one split: leave out --folds.")
        _check(
            not ("transformer" in names and data.tokenizer == "ngrams"),
            "--model transformer reads tokens in their order, and --tokenizer ngrams gives no order: give words, "
            "subwords or characters, or --model bag.",
        )
        given = [n for n in ("clean", "tokenizer", "vocab_size") if getattr(data, n) != getattr(DataConfig, n)]
        _check(
            not (given and self.model.pretrained),
            f"--{', --'.join(given).replace('_', '-')}: not with --model hf:{self.model.pretrained}, which has its own "
            "tokenizer.",
        )

    def to_dict(self) -> dict:
        """Plain containers, ready for JSON."""
        return {
            group: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
            for group, values in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, state: dict) -> "Config":
        """The inverse of `to_dict`; flags that this version does not have are ignored."""
        return cls(*(from_plain(f.default_factory, state.get(f.name, {})) for f in fields(cls)))
