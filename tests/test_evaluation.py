"""Intervals cover the truth, baselines and findings are true, and the report is one page that needs nothing else."""

import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import mixed_csv, quick_run

from config import Config, DataConfig, ModelConfig, RunConfig
from dataloader import load_splits
from evaluation.baselines import compare_with_baselines
from evaluation.intervals import bootstrap, weighted_metrics, with_interval
from preprocessing.pixels import to_data_url
from task import Task
from train import assemble


def make_task(kind: str) -> Task:
    targets = {"binary": ["a", "b"], "multiclass": ["a", "b", "c"], "regression": np.linspace(10, 90, 40)}[kind]
    return Task.fit(pd.Series([*targets] * 20, name="y"), kind)


def draw(task, rows: int, random) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and targets that have something to do with each other."""
    if task.kind == "regression":
        targets = torch.from_numpy(random.normal(size=rows)).float()
        return (targets + torch.from_numpy(random.normal(size=rows)).float())[:, None], targets
    targets = torch.from_numpy(random.integers(0, len(task.classes), rows))
    noise = torch.from_numpy(random.normal(size=(rows, task.out_features))).float()
    if task.kind == "binary":
        return noise + (targets[:, None] * 2 - 1), targets.float()
    return noise + 1.5 * torch.nn.functional.one_hot(targets, 3), targets


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_the_metrics_of_a_bootstrap_are_those_of_the_task(kind):
    task = make_task(kind)
    logits, targets = draw(task, 200, np.random.default_rng(0))
    logits = logits.round(decimals=1)  # ties
    values, labels = task.activate(logits).numpy(), task.decode(targets).numpy()
    found, expected = weighted_metrics(task, values, labels)(np.ones(200)), task.evaluate(logits, targets)
    assert found == pytest.approx({name: value for name, value in expected.items() if name != "loss"}, abs=1e-6)
    twice = weighted_metrics(task, values, labels)(np.r_[np.full(100, 2.0), np.zeros(100)])
    half = task.evaluate(logits[:100], targets[:100])
    assert twice == pytest.approx({name: value for name, value in half.items() if name != "loss"}, abs=1e-6)
    for name, (low, high) in bootstrap(task, logits, targets).items():
        assert low <= expected[name] <= high and low < high


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_intervals_cover_the_truth(kind):
    task, random = make_task(kind), np.random.default_rng(1)
    truth = task.evaluate(*draw(task, 200_000, random))
    names = ["mae", "rmse"] if kind == "regression" else ["accuracy", "roc_auc", "f1"]
    covered = {name: [] for name in names}
    for _ in range(100):
        intervals = bootstrap(task, *draw(task, 300, random))
        for name in names:
            covered[name].append(intervals[name][0] <= truth[name] <= intervals[name][1])
    assert all(np.mean(each) >= 0.9 for each in covered.values()), covered  # 0.95, and chance over 100 draws


def test_groups_are_drawn_whole():
    task, random = make_task("binary"), np.random.default_rng(0)
    logits, targets = draw(task, 50, random)
    copies = bootstrap(task, logits.repeat(20, 1), targets.repeat(20), np.tile(np.arange(50), 20))
    alone, naive = (
        bootstrap(task, logits, targets, np.arange(50)),
        bootstrap(task, logits.repeat(20, 1), targets.repeat(20)),
    )
    assert np.ptp(copies["accuracy"]) == pytest.approx(np.ptp(alone["accuracy"]), rel=0.15)
    assert np.ptp(naive["accuracy"]) < 0.5 * np.ptp(copies["accuracy"])


def test_no_more_digits_than_the_interval_supports():
    assert with_interval(0.94737, [0.9123, 0.9811]) == "0.95 (0.91 to 0.98)"
    assert with_interval(44521.3, [43610.0, 45433.0]) == "44500 (43600 to 45400)"
    assert with_interval(1.0, [1.0, 1.0]) == "1" and with_interval(0.12345, None) == "0.1235"
    assert with_interval(-0.31, [-1.2, 0.4]) == "-0.3 (-1.2 to 0.4)"


def test_a_difference_to_a_baseline_must_be_beyond_noise():
    task, random = make_task("binary"), np.random.default_rng(0)
    logits, targets = draw(task, 400, random)
    noise = torch.from_numpy(random.normal(size=(400, 1))).float()
    said = compare_with_baselines(task, logits, targets, {"guess": 0 * logits, "linear": logits + 3 * noise})
    assert said == ""
    assert "is better than the network" in compare_with_baselines(task, logits + 3 * noise, targets, {"linear": logits})
    other = torch.from_numpy(random.normal(size=(400, 1))).float()
    said = compare_with_baselines(task, logits + 0.5 * noise, targets, {"linear": logits + 0.5 * other})
    assert "not better" in said and "beyond noise" in said and "400 test rows" in said


# ---------------------------------------------------------------- audit


def audit_of(table: pd.DataFrame | None, **data) -> dict[str, str]:
    config = Config(data=DataConfig(**data))
    return {each["check"]: each["finding"] for each in assemble(load_splits(config.data, 0, table), config)[3]}


def clean_table(rows: int = 400) -> pd.DataFrame:
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.normal(size=(rows, 3)), columns=["height", "width", "depth"])
    table["y"] = np.where(table["height"] + random.normal(size=rows) > 0, "yes", "no")
    return table


def test_clean_data_raise_no_alarm():
    assert audit_of(clean_table(), target="y") == {}
    for name in ("breast_cancer", "diabetes"):
        assert audit_of(None, data=name) == {}
    few_values = pd.DataFrame({"a": [0, 1] * 200, "b": [0, 0, 1, 1] * 100, "y": ["no", "yes", "no", "yes"] * 100})
    assert "duplicates" not in audit_of(few_values, target="y")  # equal rows are no surprise there


def test_a_column_that_gives_the_target_away_is_found():
    table = clean_table()
    table["code"] = table["y"].map({"yes": "A7", "no": "B2"})
    found = audit_of(table, target="y")["target leak"]
    assert "'code'" in found and "--columns code=drop" in found
    prices = clean_table(2000).drop(columns="y")
    prices["price"] = 3 * prices["height"] + prices["width"]
    prices["gross"] = prices["price"] * 1.19
    assert "'gross'" in audit_of(prices, target="price")["target leak"]


def test_records_in_two_splits_are_found():
    table = clean_table()
    copies = pd.concat([table, table.iloc[:150]], ignore_index=True)
    found = audit_of(copies, target="y", keep_duplicates=True)
    row, twin = map(int, re.search(r"row (\d+), which equals row (\d+)", found["duplicates"]).groups())
    assert row != twin and copies.loc[row].equals(copies.loc[twin])
    changed = table.iloc[:150].assign(y=lambda t: t["y"].map({"yes": "no", "no": "yes"}))
    both = pd.concat([table, changed], ignore_index=True)
    found = audit_of(both, target="y")
    row, twin = map(int, re.search(r"rows (\d+) and (\d+)", found["conflicting targets"]).groups())
    assert (both.loc[row].drop("y") == both.loc[twin].drop("y")).all() and both["y"][row] != both["y"][twin]


def test_copies_of_texts_and_of_images_are_found(digit_files):
    random = np.random.default_rng(0)
    words = np.array(["red", "green", "blue", "old", "new", "shoe", "hat", "coat", "cheap", "fine", "worn", "warm"])
    texts = [" ".join(random.choice(words, 9)) for _ in range(300)]
    table = pd.DataFrame({"text": texts + texts[:100], "y": ["a", "b"] * 200})
    assert "duplicates" in audit_of(table, target="y", text=("text",), keep_duplicates=True)
    assert "duplicates" in audit_of(None, data=str(digit_files), keep_duplicates=True)


@pytest.fixture
def digit_files(tmp_path):
    """A folder of pictures, half of which are copies with another name."""
    from PIL import Image

    random = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / label).mkdir()
        for i in range(30):
            pixels = random.integers(0, 128, (8, 8), dtype=np.uint8) + 127 * (label == "light")
            for copy in ("", "-copy"):
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / label / f"{i}{copy}.png")
    return tmp_path


def sentences(rows: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(random.choice(letters, 6)) for _ in range(12)) for _ in range(rows)]


def test_texts_that_are_nearly_the_same_are_found():
    texts = sentences(300)
    table = pd.DataFrame({"text": texts + [f"{text.upper()} !!" for text in texts[:60]], "y": ["a", "b"] * 180})
    found = audit_of(table, target="y", text=("text",))["near-duplicates"]
    row, twin = map(int, re.search(r"rows (\d+) and (\d+)", found).groups())
    assert table.loc[row, "text"][:30].lower() == table.loc[twin, "text"][:30].lower() and row != twin
    assert "near-duplicates" not in audit_of(table.head(300), target="y", text=("text",))


def test_images_that_are_nearly_the_same_are_found(tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(60):
        label = "ab"[i % 2]
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 48))
        image.save(tmp_path / "photos" / label / f"{i}.png")
        if i < 30:
            image.save(tmp_path / "photos" / label / f"{i}-again.jpg", quality=80)
    assert "near-duplicates" in audit_of(None, data=str(tmp_path / "photos"))
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.unlink()
    assert "near-duplicates" not in audit_of(None, data=str(tmp_path / "photos"))


def test_copies_in_one_split_are_counted():
    table = clean_table()
    found = audit_of(pd.concat([table, table.iloc[:100]], ignore_index=True), target="y")["duplicates"]
    assert "100 of 500 records (20%) are copies of another one" in found


def test_ids_are_named():
    table = clean_table().assign(number=np.arange(400), place=[f"{i % 190}th" for i in range(400)])
    found = audit_of(table, target="y")
    assert "'number' is different in nearly every row, and is left out" in found["ids"]
    found = audit_of(table, target="y", columns=("number=category", "place=category"), min_freq=3)
    assert "is like an id" in found["ids"] and "--columns place=drop" in found["ids"]


def test_a_split_at_random_of_a_series_is_found():
    random = np.random.default_rng(0)
    table = clean_table(600).assign(day=pd.date_range("2020-01-01", periods=600).strftime("%Y-%m-%d"))
    assert "time overlap" not in audit_of(table, target="y")
    table["y"] = np.where(np.convolve(random.normal(size=620), np.ones(21), "valid") > 0, "up", "down")
    assert "--time day" in audit_of(table, target="y")["time overlap"]
    assert "time overlap" not in audit_of(table, target="y", time="day")


def test_a_column_that_is_as_good_as_all_is_suspicious():
    random, table = np.random.default_rng(0), clean_table(1500)
    table["status"] = np.where(random.random(1500) < 0.97, table["y"].map({"yes": "A", "no": "B"}), "C")
    found = audit_of(table, target="y")["target leak"]
    assert "'status' alone" in found and "as well as all columns together" in found


def test_words_and_files_that_tell_the_classes_apart_are_found(tmp_path):
    from PIL import Image

    texts = [text[i % 31 :] for i, text in enumerate(sentences(300))]
    table = pd.DataFrame({"text": texts, "y": ["ham", "spam"] * 150, "size": range(300)})
    assert "target leak" not in audit_of(table, target="y")
    table["text"] += np.where(table["y"] == "spam", " [ref:77]", "")
    found = audit_of(table, target="y")["target leak"]
    assert "'[ref:77]'" in found and "In column 'text'" in found
    random = np.random.default_rng(0)
    for i in range(200):
        label = "ab"[i % 2]
        (tmp_path / label).mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (20, 20 + 4 * (i % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    assert "the form of the files" in audit_of(None, data=str(tmp_path))["target leak"]


def test_rare_classes_are_named():
    table = clean_table().assign(y=["rare" if i % 40 == 0 else "usual" for i in range(400)])
    found = audit_of(table, target="y")
    assert "rare (7 of 280 rows)" in found["rare classes"] and "few test records" in found


# ---------------------------------------------------------------- report


@pytest.mark.parametrize("target", ["label", "price"])
def test_the_report_is_one_page_that_needs_nothing_else(tmp_path, target):
    table = clean_table().rename(columns={"y": "label", "depth": "<b>깊이</b>"})
    table["price"] = 2 * table["height"] + np.random.default_rng(1).normal(size=len(table))
    run = quick_run(tmp_path / "run", table, data=DataConfig(target=target), report=True)
    page, metrics = (run.out / "report.html").read_text(), json.loads((run.out / "metrics.json").read_text())
    assert not re.search(r'(src|href)="(?!#|data:image/)|url\((?!#)|@import|<script', page)
    assert "<b>깊이</b>" not in page and "&lt;b&gt;깊이&lt;/b&gt;" in page
    shown = ["Residuals"] if target == "price" else ["Confusion matrix", "ROC curve", "Reliability"]
    assert all(word in page for word in ["boosted trees", "Importance of columns", "Worst predictions", *shown])
    assert list(metrics["baselines"]) == ["guess", "linear", "boosted trees"]
    for name, (low, high) in metrics["intervals"].items():
        assert low <= metrics["test"][name] <= high
    without = quick_run(tmp_path / "without", table, data=DataConfig(target=target))
    assert not (without.out / "report.html").exists() and without.test == run.test
    assert dataclasses.asdict(RunConfig())["report"]


def test_the_report_shows_pictures_and_the_parts_that_decided(tmp_path):
    path = mixed_csv(tmp_path, "binary", 200)
    run = quick_run(
        tmp_path / "run", data=DataConfig(data=str(path), target="binary"), model=ModelConfig(), report=True
    )
    page = (run.out / "report.html").read_text()
    worst = page.split("Worst predictions")[1]
    assert worst.count('<img src="data:image/png;base64,') == 10
    decided = page.split("What decided")[1].split("Worst predictions")[0]
    assert decided.count("<svg viewBox") == 6 and "Words that decide most" in decided
    words = re.findall(r"<tr><td>(\w+)</td><td>(high|low)</td><td class=.number.>\d+</td>", decided)
    assert words[0][0] in ("excellent", "poor")


def test_texts_and_images_have_parts():
    from preprocessing.image import ImageColumn
    from preprocessing.text import TextColumn

    text = TextColumn.fit(pd.Series(["good old shoe", "a bad hat"] * 3, name="t"), DataConfig(min_freq=1))
    assert text.occlusions("good old shoe") == [("good", "old shoe"), ("old", "good shoe"), ("shoe", "good old")]
    assert text.occlusions("天地玄黃宇宙洪荒日月盈昃辰宿列張")[0] == ("天地", "玄黃宇宙洪荒日月盈昃辰宿列張")
    assert text.occlusions("shoe") == [] and text.occlusions(None) == []
    image = ImageColumn("photo", 16, 3, [0.5] * 3, [0.2] * 3)
    cell = to_data_url(np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8))
    parts, (pixels,) = image.occlusions(cell), image.encode(pd.Series([cell]))
    assert len(parts) == 64 and parts[9][0] == (0.125, 0.125, 0.125)
    changed = torch.from_numpy(parts[9][1].array) != pixels
    assert changed.any(dim=0)[2:4, 2:4].all() and changed.any(dim=0).sum() == 4


def test_the_slice_in_which_a_model_is_worst_is_found(tmp_path):
    table = clean_table(2000).assign(shop=np.random.default_rng(1).choice(["north", "south", "west"], 2000))
    wrong = np.random.default_rng(2).choice(["yes", "no"], 2000)
    table["y"] = np.where(table["shop"] == "south", wrong, np.where(table["height"] > 0, "yes", "no"))
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y"), model=ModelConfig(), epochs=6, report=True)
    section = (run.out / "report.html").read_text().split("Where it is worst")[1].split("<section>")[0]
    assert section.index("<td>shop</td><td>south</td>") < 700 and "north" not in section and "width" not in section
