"""Compare the default settings of train.py with others: on tables with LightGBM, CatBoost, a linear model and a plain
MLP, on images with a plain CNN and with frozen features of EfficientNet-lite0 and logistic regression.

  pip install -r requirements.txt -r benchmarks/requirements.txt
  python benchmarks/quality.py                                     scikit-learn's data and made-up ones
  python benchmarks/quality.py --folder tables --cache results.jsonl    also each known csv of a folder
  python benchmarks/quality.py images --folder pictures            scikit-learn's digits, made-up shapes, and each
                                                                   folder in pictures/ with images in class folders
  python benchmarks/quality.py folder --folder tables --targets sales=price --seeds 0
  python benchmarks/quality.py titanic art_title --folder tables --cache results.jsonl --fresh ours
  python benchmarks/quality.py wide --ours-flags "--model mlp" --ours-flags "--dropout 0.3"

All models get the same training, validation and test rows, and the kinds of columns that our preprocessor finds. The
validation rows stop the training of trees and networks early, and choose the penalty of the linear model. Nothing else
is tuned. The score is ROC AUC (binary), accuracy (multiclass) or RMSE (regression) on the test rows, the mean over the
seeds. The normalised score is 0 for a guess that ignores the columns, and 1 for the best of the peers.

--cache keeps one line per data set, seed and model: a rerun computes what is lacking, and what --fresh names. It does
not notice that data or code have changed. --only limits what is computed; others are shown if the cache has them. The
seconds are those of an idle machine only with --jobs 1, and do not include the reduction of texts for trees and mlp.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import quality_images
import tyro
from sklearn import datasets
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score, root_mean_squared_error
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

from config import Config, DataConfig, RunConfig, TrainConfig
from dataloader import load_splits
from preprocessing import Preprocessor
from preprocessing.column import Cells
from preprocessing.text import read_texts
from scaling.device import count_cores
from task import Task
from train import train

# ---------------------------------------------------------------- data

TARGETS = {
    "titanic": "Survived", "churn": "churn", "lending": "Class", "caravan": "Purchase", "cells": "class",
    "storms": "status", "housing": "median_house_value", "hotels": "avg_price_per_room",
    "deliveries": "time_to_delivery", "wages": "realrinc", "inspections": "inspection_score", "art": "year",
    "movies": "rating", "sms_spam": "label", "nsmc": "label",
}  # fmt: skip
TEXTS = {"sms_spam": ("text",), "nsmc": ("document",)}
ALONE = {"art_title": ("art", "title"), "art_medium": ("art", "medium")}  # one text column of a table


@dataclass(frozen=True)
class Source:
    """Where a data set comes from."""

    group: str  # sklearn, made-up, folder or images
    config: DataConfig
    make: Callable[[], pd.DataFrame] | None = None  # returns the table, if no file holds it

    @property
    def peers(self) -> dict[str, Callable]:
        return quality_images.PEERS if self.group == "images" else TABLE_PEERS

    def table(self) -> pd.DataFrame | None:
        return self.make() if self.make else None


def find_sources(folder: str, targets: dict[str, str]) -> dict[str, Source]:
    """Return all data sets by name."""
    sources = {name: Source("sklearn", DataConfig(data=name)) for name in ("breast_cancer", "wine", "diabetes")}
    sources["digits"] = Source("sklearn", DataConfig(target="target"), digits)
    for make in (friedman, interactions, wide, imbalanced, missing, levels, heavy_tail, classes, tiny):
        share = 0.3 if make is tiny else DataConfig.test_split
        sources[make.__name__] = Source("made-up", DataConfig(target="target", test_split=share), make)
    sources["digits_images"] = Source("images", DataConfig(data="digits"))
    sources["shapes"] = Source("images", DataConfig(target="target", image="image"), quality_images.shapes)
    for path in sorted(Path(folder).iterdir()) if folder else []:
        if path.is_dir() and quality_images.has_images(path):
            sources[path.name] = Source("images", DataConfig(data=str(path)))
    for path in sorted(Path(folder).glob("*.csv")) if folder else []:
        name = path.stem
        if name not in targets:
            print(f"{path} is left out: --targets {name}=COLUMN names its target", file=sys.stderr)
            continue
        config = DataConfig(data=str(path), target=targets[name], text=TEXTS.get(name, ()))
        sources[name] = Source("folder", config)
        for alone, (whole, text) in ALONE.items():
            if whole == name:
                others = set(pd.read_csv(path, nrows=0).columns) - {text, config.target}
                columns = (f"{text}=text", *(f"{other}=drop" for other in sorted(others)))
                sources[alone] = Source("folder", replace(config, columns=columns))
    return sources


def digits() -> pd.DataFrame:
    return datasets.load_digits(as_frame=True).frame.astype({"target": str})


def _numbers(rows: int, columns: int) -> tuple[np.random.Generator, np.ndarray, pd.DataFrame]:
    """Return (a random generator, standard normal numbers, the same as a table)."""
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, columns))
    return random, x, pd.DataFrame(x, columns=[f"x{i}" for i in range(columns)])


def friedman() -> pd.DataFrame:
    """Regression: 5 of 20 columns matter (Friedman 1991)."""
    x, y = datasets.make_friedman1(2000, n_features=20, noise=1.0, random_state=0)
    return pd.DataFrame(x, columns=[f"x{i}" for i in range(20)]).assign(target=y)


def interactions() -> pd.DataFrame:
    """Two categories of 30 levels: each level is odd or even, and the target is whether they differ (90 % of it)."""
    random = np.random.default_rng(0)
    codes, odd = random.integers(0, 30, (4000, 3)), random.permutation(60).reshape(2, 30) % 2
    target = odd[0, codes[:, 0]] ^ odd[1, codes[:, 1]] ^ (random.random(4000) < 0.1)
    return pd.DataFrame({f"c{i}": [f"level {code}" for code in codes[:, i]] for i in range(3)}).assign(target=target)


def wide() -> pd.DataFrame:
    """300 columns × 800 rows, of which 10 matter."""
    random, x, table = _numbers(800, 300)
    return table.assign(target=x[:, :10].sum(axis=1) + random.standard_normal(800) > 0)


def imbalanced() -> pd.DataFrame:
    """5 % of the rows are positive."""
    random, x, table = _numbers(6000, 10)
    score = x[:, 0] * x[:, 1] + x[:, 2] + np.abs(x[:, 3]) + 0.5 * random.standard_normal(6000)
    return table.assign(target=score > np.quantile(score, 0.95))


def missing() -> pd.DataFrame:
    """30 % of the cells are missing; that the first one is missing says something, too."""
    random, x, table = _numbers(4000, 10)
    holes = random.random(x.shape) < 0.3
    target = x[:, 0] + x[:, 1] - x[:, 2] + np.abs(x[:, 3]) + 2 * holes[:, 0] + 0.5 * random.standard_normal(4000)
    return table.mask(holes).assign(target=target)


def levels() -> pd.DataFrame:
    """A category of 1,000 levels, each with its own effect, beside three numbers."""
    random, x, table = _numbers(10_000, 3)
    codes, effects = random.integers(0, 1000, 10_000), random.standard_normal(1000)
    target = effects[codes] + x[:, 0] * (x[:, 1] > 0) + 0.5 * random.standard_normal(10_000)
    return table.assign(level=[f"level {code}" for code in codes], target=target)


def heavy_tail() -> pd.DataFrame:
    """A target over six powers of ten."""
    random, x, table = _numbers(4000, 8)
    power = 3 + x[:, :3].sum(axis=1) / 2 + 0.1 * random.standard_normal(4000)
    return table.assign(target=10.0 ** power.clip(0, 6))


def classes() -> pd.DataFrame:
    """26 classes, each of two clusters."""
    random, _, table = _numbers(5000, 16)
    labels = random.integers(0, 26, 5000)
    centres = 1.2 * random.standard_normal((52, 16))
    return (table + centres[2 * labels + random.integers(0, 2, 5000)]).assign(target=[chr(97 + i) for i in labels])


def tiny() -> pd.DataFrame:
    """30 rows."""
    random, x, table = _numbers(30, 4)
    return table.assign(target=x[:, 0] - x[:, 1] + 0.5 * random.standard_normal(30))


# ---------------------------------------------------------------- what the peers see


class Problem:
    """The splits as tables without the target, whose columns are named "number: …", "category: …" or "text: …".

    frames, targets: of train, validation and test.  targets: class indices, or standardised numbers.
    """

    def __init__(self, source: Source, seed: int):
        self.splits = splits = load_splits(source.config, seed, source.table())
        form = splits.config.column_formats().get(splits.target, "")
        self.task = Task.fit(splits.train[splits.target], splits.kind, form=form)
        parts = splits.train, splits.val, splits.test
        encoded = [self.task.encode(part[splits.target]) for part in parts]
        self.is_regression = self.task.kind == "regression"
        self.targets = [(y.double() if self.is_regression else y.long()).numpy() for y in encoded]
        records = splits.train.drop(columns=splits.target)
        self.preprocessor = Preprocessor.fit(records, splits.config, self.task.labels(encoded[0]))
        kinds = {name: kind for name, (kind, _) in self.preprocessor.left_out.items() if kind != "drop"}
        # Texts that ours leaves out, because they differ in nearly every row; row numbers stay out.
        self.ids = [name for name, kind in kinds.items() if kind == "id" and Cells(records[name]).numbers is None]
        column = self.preprocessor.lone
        self.pictures = None
        if column and column.kind == "image":
            self.pictures = quality_images.Pictures(column, parts)
        self.frames = [] if self.pictures else [self._read(part) for part in parts]
        self.with_reduced_texts: list[pd.DataFrame] = []
        columns = len(self.preprocessor.columns) + len(kinds)
        self.shape = {"rows": sum(map(len, parts)), "columns": columns, "task": self.task.kind}

    def _read(self, records: pd.DataFrame) -> pd.DataFrame:
        cells = {f"text: {name}": read_texts(records[name]) for name in self.ids}
        for column in self.preprocessor.columns:
            name, kind, values = column.name, column.kind, records[column.name]
            if kind == "text":
                cells[f"text: {name}"] = read_texts(values)
            elif kind == "category":
                cells[f"category: {name}"] = column.parse(values)
            elif kind == "date":
                days = column.parse(values)
                cells[f"number: {name}"] = days * 86400
                moments = pd.DatetimeIndex(pd.to_datetime(days, unit="D"))
                cells |= {f"period: {name} {part}": getattr(moments, part) for part in ("month", "weekday", "hour")}
            elif kind in ("number", "boolean"):
                cells[f"number: {name}"] = column.parse(values)
            else:
                raise ValueError(f"column {name!r}: the peers do not read columns of kind {kind}")
        return pd.DataFrame(cells)

    def reduce_texts(self) -> list[pd.DataFrame]:
        """Return the tables with 100 numbers in place of each text."""
        if self.frames and not self.with_reduced_texts:
            texts = named(self.frames[0], "text")
            parts = [[frame.drop(columns=texts)] for frame in self.frames]
            for name in texts:
                model = make_pipeline(tfidf(), TruncatedSVD(100, n_iter=2, random_state=0)).fit(self.frames[0][name])
                for part, frame in zip(parts, self.frames, strict=True):
                    part.append(pd.DataFrame(model.transform(frame[name])).add_prefix(f"number: {name} "))
            self.with_reduced_texts = [pd.concat(part, axis=1) for part in parts]
        return self.with_reduced_texts

    def evaluate(self, predicted: np.ndarray, part: int) -> dict[str, float]:
        """Return the score, the loss and the score of a guess, from probabilities (N, C) or standardised values."""
        y, seen = self.targets[part], self.targets[0]
        if self.is_regression:
            error, guess = (root_mean_squared_error(y, value) for value in (predicted, np.full(len(y), seen.mean())))
            return {"score": error * self.task.std, "loss": error, "guess": guess * self.task.std}
        probabilities = np.clip(predicted, 1e-7, 1.0)
        loss = log_loss(y, probabilities / probabilities.sum(axis=1, keepdims=True), labels=range(predicted.shape[1]))
        if self.task.kind == "binary":
            return {"score": roc_auc_score(y, predicted[:, 1]), "loss": loss, "guess": 0.5}
        accuracy = accuracy_score(y, predicted.argmax(axis=1))
        return {"score": accuracy, "loss": loss, "guess": float((y == np.bincount(seen).argmax()).mean())}


def named(frame: pd.DataFrame, *kinds: str) -> list[str]:
    return [name for name in frame if name.split(":")[0] in kinds]


def tfidf():
    """Words and pairs of words, and 2 to 5 characters within words."""
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\b\w+\b", sublinear_tf=True)
    return make_union(words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True))


def to_matrices(frames: list[pd.DataFrame], *, sparse: bool) -> list:
    """Return scaled numbers, categories as one column per value, and texts as TF-IDF."""
    numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    parts = [("numbers", numbers, named(frames[0], "number"))]
    parts += [("categories", OneHotEncoder(handle_unknown="ignore"), named(frames[0], "category", "period"))]
    parts += [(name, tfidf(), name) for name in named(frames[0], "text")]
    encoder = ColumnTransformer(parts, sparse_threshold=1 if sparse else 0)
    return [encoder.fit_transform(frames[0]), *map(encoder.transform, frames[1:])]


# ---------------------------------------------------------------- the peers: problem → predictions of the test rows


def lightgbm(problem: Problem, seed: int, threads: int) -> np.ndarray:
    from lightgbm import LGBMClassifier, LGBMRegressor, early_stopping

    frames = problem.reduce_texts()
    categories = named(frames[0], "category")
    known = {name: pd.CategoricalDtype(sorted(set(frames[0][name]))) for name in categories}
    train, val, test = (frame.astype(known).set_axis(range(frame.shape[1]), axis=1) for frame in frames)
    model = (LGBMRegressor if problem.is_regression else LGBMClassifier)(
        n_estimators=2000, learning_rate=0.05, n_jobs=threads, random_state=seed, verbose=-1
    )
    stop = early_stopping(50, verbose=False)
    model.fit(train, problem.targets[0], eval_X=val, eval_y=problem.targets[1], callbacks=[stop])
    return predict(model, test)


def catboost(problem: Problem, seed: int, threads: int) -> np.ndarray:
    from catboost import CatBoostClassifier, CatBoostRegressor

    train, val, test = problem.reduce_texts()
    model = (CatBoostRegressor if problem.is_regression else CatBoostClassifier)(
        iterations=2000, early_stopping_rounds=50, thread_count=threads, random_seed=seed,
        cat_features=named(train, "category"), allow_writing_files=False, verbose=False,
    )  # fmt: skip
    model.fit(train, problem.targets[0], eval_set=(val, problem.targets[1]))
    return predict(model, test)


def linear(problem: Problem, seed: int, threads: int) -> np.ndarray:
    train, val, test = to_matrices(problem.frames, sparse=True)
    if problem.is_regression:
        models = [Ridge(alpha) for alpha in (0.1, 0.3, 1, 3, 10, 100, 1000)]
    else:
        models = [LogisticRegression(C=c, max_iter=500) for c in (0.01, 0.1, 1, 10, 100)]
    for model in models:
        model.fit(train, problem.targets[0])
    return predict(min(models, key=lambda model: problem.evaluate(predict(model, val), 1)["loss"]), test)


def mlp(problem: Problem, seed: int, threads: int) -> np.ndarray:
    train, val, test = (part.astype(np.float32) for part in to_matrices(problem.reduce_texts(), sparse=False))
    network = MLPRegressor if problem.is_regression else MLPClassifier
    network = network(hidden_layer_sizes=(128, 64), batch_size=128, random_state=seed)
    labels = {} if problem.is_regression else {"classes": np.unique(problem.targets[0])}
    best, best_epoch, predicted = np.inf, 0, None
    for epoch in range(200):
        network.partial_fit(train, problem.targets[0], **labels)
        loss = problem.evaluate(predict(network, val), 1)["loss"]
        if loss < best:
            best, best_epoch, predicted = loss, epoch, predict(network, test)
        elif epoch - best_epoch >= 20:
            break
    return predicted


def predict(model, inputs) -> np.ndarray:
    return model.predict_proba(inputs) if hasattr(model, "predict_proba") else model.predict(inputs)


TABLE_PEERS = {"lightgbm": lightgbm, "catboost": catboost, "linear": linear, "mlp": mlp}
PEERS = TABLE_PEERS | quality_images.PEERS

# ---------------------------------------------------------------- ours


def parse(flags: str, config: Config) -> Config:
    return tyro.cli(Config, args=shlex.split(flags), default=config, config=(tyro.conf.OmitArgPrefixes,))


def ours(problem: Problem, source: Source, seed: int, flags: str) -> np.ndarray:
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        config = Config(
            data=source.config, training=TrainConfig(seed=seed), run=RunConfig(out=f"{folder}/run", report=False)
        )
        config = parse(flags, config)
        run = train(config.data, config.model, config.training, config.run, table=source.table())
    if run.predictions["row"].tolist() != problem.splits.test.index.tolist():
        raise ValueError(f"{flags} changes the rows of the test split")
    if problem.is_regression:
        return (run.predictions["prediction"].to_numpy() - problem.task.mean) / problem.task.std
    return run.predictions[[f"probability_{name}" for name in run.pipeline.task.classes]].to_numpy()


# ---------------------------------------------------------------- results

RESULT = ["data", "seed", "model", "rows", "columns", "task", "score", "loss", "guess", "seconds"]


def timed(model: str, problem: Problem, source: Source, seed: int, threads: int) -> tuple[np.ndarray, float]:
    """Return (predictions of the test rows, seconds)."""
    if model in PEERS:
        with threadpool_limits(1, user_api="blas"):  # small matrices: with more threads mlp takes ten times as long
            problem.reduce_texts()  # once for all peers: it is not in the seconds of any
            started = time.perf_counter()
            predicted = PEERS[model](problem, seed, threads)
    else:
        started = time.perf_counter()
        predicted = ours(problem, source, seed, model.removeprefix("ours"))
    return predicted, round(time.perf_counter() - started, 3)


def compute(job: tuple[str, int, list[str]], sources: dict[str, Source], cache: str, threads: int) -> list[dict]:
    """Return a result of each model on one data set and seed, and add those without an error to the cache."""
    (name, seed, models), source, problem, results = job, sources[job[0]], None, []
    warnings.simplefilter("ignore")  # of convergence
    for model in models:
        result = {"data": name, "seed": seed, "model": model}
        try:
            problem = problem or Problem(source, seed)
            result |= problem.shape
            predicted, result["seconds"] = timed(model, problem, source, seed, threads)
            result |= problem.evaluate(predicted, 2)
        except Exception as error:  # the other models go on
            result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        results.append(result)
        told = result.get("error") or f"{result['score']:.4g} in {result['seconds']:.1f} s"
        print(f"{name}, seed {seed}, {model}: {told}", file=sys.stderr, flush=True)
        if cache and "error" not in result:
            with open(cache, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    return results


def collect(args: argparse.Namespace, sources: dict[str, Source]) -> pd.DataFrame:
    """Return a row for each data set, seed and model: those in the cache, and the lacking ones of --only, computed."""
    cached, found = {}, []
    if args.cache and Path(args.cache).exists():
        for line in Path(args.cache).read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            cached[result["data"], result["seed"], result["model"]] = result
    lacking: dict[tuple[str, int], list[str]] = {}
    for seed, name, model in itertools.product(args.seeds, args.data, args.models):
        family, result = model.split()[0], cached.get((name, seed, model))
        if family in PEERS and family not in sources[name].peers:
            continue
        if family in args.only and (family in args.fresh or not result):
            lacking.setdefault((name, seed), []).append(model)
        elif result:
            found.append(result)
    jobs = [(*key, models) for key, models in lacking.items()]
    work = partial(compute, sources=sources, cache=args.cache, threads=max(1, count_cores() // args.jobs))
    if args.jobs == 1:
        computed = list(map(work, jobs))
    else:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            computed = list(pool.map(work, jobs))
    return pd.DataFrame([*found, *itertools.chain(*computed)])


def normalise(scores: pd.DataFrame, guess: pd.Series, is_regression: pd.Series) -> pd.DataFrame:
    """Return (score − guess) / (score of the best peer − guess); empty where no peer is better than a guess."""
    gain = scores.sub(guess, axis=0).mul(np.where(is_regression, -1, 1), axis=0)
    best = gain[[model for model in gain if model in PEERS]].max(axis=1)
    return gain.div(best.where(best > 0), axis=0)


def print_tables(results: pd.DataFrame, args: argparse.Namespace) -> None:
    """Print scores, log-losses and normalised scores: means over all seeds, or – if a result is lacking."""
    results = results.reindex(columns=[*RESULT, "error"])
    of_data, of_both = results.groupby("data"), results.groupby(["data", "model"])
    about = of_data[["rows", "columns", "task"]].first().join(of_data["guess"].mean()).reindex(args.data)
    means = of_both[["score", "loss", "seconds"]].mean()[of_both["score"].count() == len(args.seeds)].unstack("model")
    models = [model for model in args.models if ("score", model) in means]
    means = means.reindex(args.data)
    scores, losses, seconds = (means[value].reindex(columns=models) for value in ("score", "loss", "seconds"))
    normalised = normalise(scores, about["guess"], about["task"] == "regression")
    ours = normalised[[model for model in models if model not in PEERS]].map("{:.3f}".format, na_action="ignore")
    seconds = seconds.map("{:.1f}".format, na_action="ignore")
    table = about.astype({"rows": "Int64", "columns": "Int64"}).join(scores)
    table = table.join(ours.add_suffix(": normalised")).join(seconds.add_suffix(": s"))
    print(table.to_string(float_format="{:.4g}".format, na_rep="–"))
    print("\nlog-loss")
    print(losses[about["task"] != "regression"].to_string(float_format="{:.4f}".format, na_rep="–"))
    print("\nnormalised score: 0 = a guess, 1 = the best peer")
    for model in normalised.columns[normalised.notna().any()]:
        values, width = normalised[model].dropna(), max(map(len, models))
        worst = f"minimum {values.min():6.3f} ({values.idxmin()})"
        print(f"{model:<{width}}   mean {values.mean():6.3f}   {worst}, over {values.size} data sets")
    for error in results[results["error"].notna()].itertuples():
        print(f"failed: {error.data}, seed {error.seed}, {error.model}: {error.error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="*", help="data sets, or groups of them: sklearn, made-up, images, folder; default: all"
    )
    parser.add_argument(
        "--folder", default="", help="csv files and folders of images in this folder are data sets, too"
    )
    parser.add_argument("--targets", nargs="+", default=[], metavar="NAME=COLUMN", help="targets of these files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the splits and the models")
    parser.add_argument("--only", default="", metavar="MODEL,…", help=f"compute no others of ours, {', '.join(PEERS)}")
    parser.add_argument("--ours-flags", action="append", default=[], metavar="FLAGS", help="ours again, with flags")
    parser.add_argument("--cache", default="", metavar="FILE", help="a jsonl file that keeps the results")
    parser.add_argument("--fresh", nargs="+", default=[], metavar="MODEL", help="compute again, whatever the cache has")
    parser.add_argument("--jobs", type=int, default=1, help="processes; they share the cores")
    args = parser.parse_args()
    sources = find_sources(args.folder, TARGETS | dict(item.split("=", 1) for item in args.targets))
    groups: dict[str, list[str]] = {}
    for name, source in sources.items():
        groups.setdefault(source.group, []).append(name)
    chosen = [name for item in args.data or groups for name in groups.get(item, [item])]
    args.data = list(dict.fromkeys(chosen))
    if unknown := set(args.data) - set(sources):
        parser.error(f"{', '.join(unknown)}: no such data set; there are {', '.join(sources)}")
    args.only = args.only.split(",") if args.only else ["ours", *PEERS]
    if unknown := {*args.only, *args.fresh} - {"ours", *PEERS}:
        parser.error(f"{', '.join(unknown)}: no such model; there are ours, {', '.join(PEERS)}")
    for flags in args.ours_flags:
        parse(flags, Config())  # exits if they are wrong
    variants = [f"ours {' '.join(flags.split())}" for flags in args.ours_flags]
    has_images = any(sources[name].group == "images" for name in args.data)
    missing = quality_images.missing_peers() if has_images else {}
    for model, how in missing.items():
        print(f"{model} is left out: {how}", file=sys.stderr)
    args.models = ["ours", *variants, *(model for model in PEERS if model not in missing)]
    print_tables(collect(args, sources), args)


if __name__ == "__main__":
    main()
