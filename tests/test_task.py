"""Kinds, losses, metrics and predictions follow the textbook, and do not depend on how records are batched."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from config import DataConfig
from dataloader import load_splits
from errors import UserError
from evaluation.calibration import calibrate
from preprocessing.targets import infer_kind, stratify_labels
from task import Task

LABELS = {"binary": ["no", "yes"], "multiclass": ["a", "b", "c"], "regression": None}


def make_task(kind: str, **options) -> Task:
    targets = np.linspace(100, 900, 50) if kind == "regression" else (LABELS[kind] * 30)[:50]
    return Task.fit(pd.Series(targets, name="y"), kind, **options)


def make_targets(kind: str, n: int, seed: int = 0) -> pd.Series:
    random = np.random.default_rng(seed)
    return pd.Series(random.normal(500, 200, n) if kind == "regression" else random.choice(LABELS[kind], n), name="y")


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (["a", "b"] * 9, "binary"),
        ([True, False] * 9, "binary"),
        ([0, 1] * 9, "binary"),
        (["0", "1.0", "1"] * 9, "binary"),
        ([3, 4, 5] * 9, "multiclass"),
        (["3", "4", "5"] * 9, "multiclass"),
        ([3.0, 4.5, 5.25] * 9, "regression"),
        (range(90), "regression"),
        (["x", "y", "z"] * 9, "multiclass"),
    ],
)
def test_kind_of_problem(targets, kind):
    assert infer_kind(pd.Series(list(targets))) == kind


def test_classes_are_plain_and_ordered_and_spellings_are_merged():
    assert make_task("multiclass").classes == ["a", "b", "c"]
    task = Task.fit(pd.Series([10, 2, 2.0, 10.0] * 3))
    assert task.classes == [2, 10] and all(type(c) is int for c in task.classes)
    assert task.encode(pd.Series(["2", "10.0", 2])).tolist() == [0.0, 1.0, 0.0]
    assert Task.fit(pd.Series([True, False])).classes == [False, True]


def test_unknown_label_and_missing_number_name_their_row():
    with pytest.raises(UserError, match=r"row 7, column 'y': 'd' is not a class"):
        make_task("multiclass").encode(pd.Series(["a", "d"], index=[6, 7]))
    with pytest.raises(UserError, match="row 3 has no 'y'"):
        make_task("regression").encode(pd.Series([1.0, None], index=[2, 3]))


def test_losses_are_the_textbook_ones():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), torch.randint(3, (40,))
    assert torch.allclose(make_task("multiclass").loss(logits, labels), F.cross_entropy(logits, labels))
    smooth = make_task("multiclass", label_smoothing=0.1)
    assert torch.allclose(smooth.loss(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.1))
    p, y = torch.sigmoid(logits[:, :1]), (labels > 0).float()
    by_hand = -(y * p[:, 0].log() + (1 - y) * (1 - p[:, 0]).log()).mean()
    assert torch.allclose(make_task("binary").loss(logits[:, :1], y), by_hand, atol=1e-6)
    values = torch.randn(40)
    for loss, function in (("mse", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss)):
        assert torch.allclose(
            make_task("regression", loss=loss).loss(logits[:, :1], values), function(logits[:, 0], values)
        )


def test_class_weights_balance_and_stay_with_the_record():
    targets = pd.Series(["a"] * 30 + ["b"] * 10)
    task = Task.fit(targets, class_weights=True)
    assert task.class_weights == pytest.approx([40 / 60, 40 / 20])
    labels = task.encode(targets)
    one_sided = torch.full((40, 1), 2.0)
    per_class = [F.binary_cross_entropy_with_logits(torch.tensor(2.0), torch.tensor(float(c))) for c in (0, 1)]
    assert float(task.loss(one_sided, labels)) == pytest.approx(float(sum(per_class) / 2))  # each class counts the same
    parts = [task.loss(one_sided[i : i + 5], labels[i : i + 5]) for i in range(0, 40, 5)]
    assert torch.allclose(torch.stack(parts).mean(), task.loss(one_sided, labels))


@pytest.mark.parametrize("kind", LABELS)
def test_wrong_shape_is_refused_not_broadcast(kind):
    task, targets = make_task(kind), make_targets(kind, 8)
    with pytest.raises(ValueError, match="must return logits of shape"):
        task.loss(torch.randn(8), task.encode(targets))
    with pytest.raises(ValueError, match="must return logits of shape"):
        task.loss(torch.randn(8, task.out_features + 1), task.encode(targets))


@pytest.mark.parametrize("kind", LABELS)
def test_ensemble_axis(kind):
    task, targets = make_task(kind), make_targets(kind, 8)
    members = torch.randn(8, 4, task.out_features)
    each = [task.loss(members[:, k], task.encode(targets)) for k in range(4)]
    assert torch.allclose(task.loss(members, task.encode(targets)), torch.stack(each).mean())
    probabilities = torch.stack([task.activate(members[:, k]) for k in range(4)]).mean(dim=0)
    assert torch.allclose(task.activate(members), probabilities)
    same = members[:, :1].repeat(1, 4, 1)
    assert task.evaluate(same, task.encode(targets)) == pytest.approx(task.evaluate(same[:, 0], task.encode(targets)))


def test_metrics_equal_scikit_learn():
    random = np.random.default_rng(0)
    task, y = make_task("binary"), make_targets("binary", 200)
    logits = torch.from_numpy(random.normal(size=(200, 1))).float()
    got, p = task.evaluate(logits, task.encode(y)), torch.sigmoid(logits[:, 0]).numpy()
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y == "yes", p > 0.5))
    assert got["f1"] == pytest.approx(sk.f1_score(y == "yes", p > 0.5))
    assert got["roc_auc"] == pytest.approx(sk.roc_auc_score(y == "yes", p))
    task, y = make_task("multiclass"), pd.Series(["a"] * 120 + ["b"] * 50 + ["c"] * 30)
    logits = torch.from_numpy(random.normal(size=(200, 3))).float()
    got, p = task.evaluate(logits, task.encode(y)), torch.softmax(logits, dim=1).numpy()
    best = np.array(["a", "b", "c"])[p.argmax(axis=1)]
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, best))
    assert got["f1"] == pytest.approx(sk.f1_score(y, best, average="macro"))
    assert got["roc_auc"] == pytest.approx(np.mean([sk.roc_auc_score(y == c, p[:, i]) for i, c in enumerate("abc")]))
    task, y = make_task("regression"), make_targets("regression", 200) + 1e6
    logits = torch.from_numpy(random.normal(size=(200, 1))).float()
    got, values = task.evaluate(logits, task.encode(y)), task.activate(logits)[:, 0].numpy()
    assert got["rmse"] == pytest.approx(sk.root_mean_squared_error(y, values), rel=1e-6)
    assert got["mae"] == pytest.approx(sk.mean_absolute_error(y, values), rel=1e-6)
    assert got["mse"] == pytest.approx(got["rmse"] ** 2)


def test_roc_auc_of_one_class_is_nan():
    task = make_task("binary")
    assert np.isnan(task.evaluate(torch.randn(5, 1), torch.zeros(5))["roc_auc"])
    task = make_task("multiclass")
    perfect = torch.eye(3)[[0, 1, 0, 1]] * 9
    assert task.evaluate(perfect, torch.tensor([0, 1, 0, 1]))["roc_auc"] == 1  # not 2/3, with 0 for the absent class


def test_direction_of_metrics():
    task = make_task("binary")
    assert [task.higher_is_better(m) for m in ("loss", "accuracy", "roc_auc", "f1")] == [False, True, True, True]
    task = make_task("regression")
    assert [task.higher_is_better(m) for m in ("rmse", "mae", "mse", "r2")] == [False, False, False, True]
    with pytest.raises(UserError, match="--monitor accuracy: a regression task has loss"):
        task.higher_is_better("accuracy")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.sampled_from(sorted(LABELS)))
def test_columns_and_json_agree(seed, kind):
    task = make_task(kind)
    logits = torch.randn(6, task.out_features, generator=torch.Generator().manual_seed(seed)) * 5
    table, predictions = pd.DataFrame(task.to_columns(logits)), task.to_json(logits)
    assert table["prediction"].tolist() == [p["prediction"] for p in predictions]
    if kind != "regression":
        for row, prediction in zip(table.to_dict("records"), predictions, strict=True):
            assert sum(prediction["probabilities"].values()) == pytest.approx(1)
            assert prediction["probability"] == max(prediction["probabilities"].values()) == row["probability"]
            assert prediction["probabilities"] == {c: row[f"probability_{c}"] for c in task.classes}


def test_regression_predictions_are_in_the_units_of_the_data():
    task = Task.fit(pd.Series([1e9, 1e9 + 1, 1e9 + 2.5], name="y"), "regression")
    targets = pd.Series([1e9 + 0.5])
    assert task.activate(task.encode(targets)[:, None]).item() == pytest.approx(1e9 + 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["a"] * 9, {}, "one class only"),
        ([1.0] * 9, {"kind": "regression"}, "one value only"),
        (np.linspace(0, 1, 40), {"kind": "binary"}, "40 different values and --task binary needs 2"),
        (["a", "b", "c"] * 3, {"kind": "regression"}, "--task multiclass"),
        (["a", "b"] * 3, {"loss": "huber"}, "--loss huber is for regression"),
        (np.linspace(0, 1, 40), {"class_weights": True}, "for classes; this is a regression"),
    ],
)
def test_impossible_tasks(targets, options, message):
    with pytest.raises(UserError, match=message):
        Task.fit(pd.Series(targets, name="y"), **options)


def test_classes_of_mixed_types_become_words():
    task = Task.fit(pd.Series([True, False, 2] * 3, dtype=object, name="y"))
    assert task.classes == ["2", "false", "true"]
    assert set(task.to_columns(torch.randn(9, 3))["prediction"]) <= set(task.classes)
    assert Task.fit(pd.Series(["1", "2", "unknown"] * 3)).classes == ["1", "2", "unknown"]


def test_r2_of_one_row_is_nan():
    metrics = make_task("regression").evaluate(torch.zeros(1, 1), torch.zeros(1))
    assert np.isnan(metrics["r2"]) and metrics["rmse"] == 0


def test_smoothed_and_weighted_loss_is_the_weighted_smoothed_loss():
    targets = pd.Series(["a"] * 6 + ["b"] * 3 + ["c"])
    task = Task.fit(targets, class_weights=True, label_smoothing=0.2)
    logits, labels = torch.randn(10, 3), task.encode(targets)
    each = F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    assert torch.allclose(task.loss(logits, labels), (each * torch.tensor(task.class_weights)[labels]).mean())


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_smoothing_is_for_training_alone(kind):
    plain, smooth = make_task(kind), make_task(kind, label_smoothing=0.1)
    logits, targets = torch.randn(8, plain.out_features), torch.tensor([0, 1] * 4)
    targets = targets if kind == "multiclass" else targets.float()
    assert smooth.loss(logits, targets) != plain.loss(logits, targets)
    assert smooth.evaluate(logits, targets) == plain.evaluate(logits, targets)


TABLES = {
    "regression": [0.25 * i for i in range(40)],
    "integers": list(range(40)),
    "whole numbers": [3.0, 4.0, 5.0] * 9,
    "few values": [3.0, 4.5, 5.25] * 9,
    "zero and one": [0, 1] * 9,
    "booleans": [True, False] * 9,
    "words": ["x", "y", "z"] * 9,
    "numbers and a word": [*range(9), "none of these"] * 4,
}


@pytest.mark.parametrize("name", TABLES)
def test_text_cells_make_the_same_task_as_typed_ones(name):
    """A csv holds the text of the cells that a DataFrame holds."""
    typed = pd.Series(TABLES[name], name="y")
    text = typed.astype("str")
    assert infer_kind(text) == infer_kind(typed)
    assert Task.fit(text, infer_kind(typed)) == Task.fit(typed, infer_kind(typed))
    assert torch.equal(Task.fit(text).encode(typed), Task.fit(typed).encode(text))


def test_an_older_file_without_later_fields_loads():
    task = Task(kind="regression", target="y")
    assert (task.classes, task.mean, task.std, task.form) == ([], 0.0, 1.0, "1234.56")
    assert task.loss(torch.ones(4, 1), torch.zeros(4)) == 1


def test_decimal_commas_in_targets():
    text = pd.Series(["1,5", "2,25", "-0,5", "3"] * 9, name="y")
    typed = pd.Series([1.5, 2.25, -0.5, 3] * 9, name="y")
    task = Task.fit(text)
    assert task.form == "1234,56" and task.kind == "regression"
    assert (task.mean, task.std) == (typed.mean(), typed.std(ddof=0))
    assert torch.equal(task.encode(text), task.encode(typed))
    assert task.errors([{"prediction": 1.0}], ["1,5"]) == task.errors([{"prediction": 1.0}], [1.5]) == [0.5]
    classes = Task.fit(pd.Series(["0,0", "1,5"] * 9, name="y"))
    assert classes.classes == [0, 1.5] and classes.encode(pd.Series(["0", "1,5", 1.5])).tolist() == [0, 1, 1]
    assert Task.fit(text, "multiclass", form="1234.56").classes == ["-0,5", "1,5", "2,25", "3"]


def test_labels_and_stratification():
    assert make_task("regression").labels(torch.zeros(3)) is None
    assert make_task("binary").labels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    targets = pd.Series(["b", "a", "b", "a"], name="y")
    codes = stratify_labels(targets, "binary", 2)
    assert (codes == np.where(targets == "b", codes[0], codes[1])).all() and set(codes) == {0, 1}
    assert stratify_labels(targets, "regression", 2) is None
    with pytest.raises(UserError, match="class 'c' has 1 row and needs 3"):
        stratify_labels(pd.Series([*"aaabbbc"], name="y"), "multiclass", 3)


def test_summary():
    assert Task.fit(pd.Series([1.0, 3.0], name="price"), "regression").summary() == "price: regression (mean 2, std 1)"
    assert make_task("multiclass").summary() == "y: multiclass (a, b, c)"
    many = Task.fit(pd.Series(list("abcdefghij") * 5, name="y"))
    assert many.summary() == "y: multiclass (a, b, c, d, e, f, g, h, …)"


@pytest.mark.parametrize("kind", LABELS)
def test_outcomes_are_counted_by_class(kind):
    task = make_task(kind)
    predictions = task.to_json(torch.randn(5, task.out_features))
    expected = ["number" if kind == "regression" else p["prediction"] for p in predictions]
    assert [task.outcome(p) for p in predictions] == expected


@pytest.mark.parametrize("kind", LABELS)
def test_same_prediction_allows_rounding_alone(kind):
    task, logits = make_task(kind), torch.linspace(-2, 2, 6)[:, None].expand(6, 3)[:, : make_task(kind).out_features]
    before = task.to_json(logits)
    assert all(map(task.same_prediction, before, task.to_json(logits + 1e-6)))
    changed = logits.clone()
    changed[:, 0] += 1e-3
    assert not any(map(task.same_prediction, before, task.to_json(changed)))
    assert kind == "regression" or not task.same_prediction(before[0], {"prediction": "z", "probabilities": {"z": 1.0}})


@pytest.mark.parametrize("kind", LABELS)
def test_outputs_of_an_exported_graph(kind):
    task, logits = make_task(kind), torch.randn(5, make_task(kind).out_features)
    outputs = dict(zip(task.output_names, task.graph_outputs(logits), strict=True))
    columns = task.to_columns(logits)
    assert outputs["logits"] is logits
    if kind == "regression":
        assert outputs["prediction"].tolist() == columns["prediction"].tolist()
    else:
        assert [task.classes[i] for i in outputs["label"]] == columns["prediction"].tolist()
        assert outputs["probabilities"].dtype == torch.float32
        assert torch.allclose(outputs["probabilities"].double(), task.activate(logits))


def test_errors_of_predictions():
    classes = make_task("multiclass")
    predictions = [{"prediction": c, "probabilities": {"a": 0, "b": 0, "c": 0}} for c in "abc"]
    assert classes.errors(predictions, ["a", "c", "c"]) == [0, 1, 0]
    with pytest.raises(UserError, match="row 2: 'd' is not a class"):
        classes.errors(predictions, ["a", "d", "c"])
    older = [{"prediction": "1", "probabilities": {"0": 0, "1": 0}}]  # of a model with other classes
    assert classes.errors(older, [1.0]) == [0] and classes.errors(older, [0]) == [1]
    values, predictions = make_task("regression"), [{"prediction": 2.0}, {"prediction": 5.0}]
    assert values.errors(predictions, [2.5, 4]) == [0.5, 1.0]
    for target, message in (("x", "row 2, column 'y'"), (None, "row 2: None"), (1e160, "row 2: 1e[+]160")):
        with pytest.raises(UserError, match=message):
            values.errors(predictions, [2.5, target])


def test_live_score_has_the_textbook_interval():
    task = make_task("binary")
    assert task.live_score(0, 0.0, 0.0) == {"targets": 0}
    score = task.live_score(100, 0.1, 0.1)
    assert (score["targets"], score["accuracy"]) == (100, 0.9)
    assert score["interval"] == pytest.approx([0.8256, 0.9448], abs=1e-4)  # Wilson's, from a table
    assert task.live_score(5, 0.0, 0.0)["interval"][1] == 1.0
    task = make_task("regression")
    errors = np.array([1.0, 2.0, 3.0, 6.0])
    score, half = task.live_score(4, errors.mean(), (errors**2).mean()), 1.96 * errors.std() / 2
    assert score["mae"] == 3
    assert score["interval"] == pytest.approx([3 - half, 3 + half])


def test_words_for_missing_among_targets(tmp_path):
    """A frequent "None" is a class among words; among numbers, words for a missing value are rows without a target."""
    x, rare = np.linspace(0, 1, 300), ["NA"] * 5
    words = [*rare, *["None", "low", "high", "-"] * 73, "", None, "low"]
    table = pd.DataFrame({"x": x, "y": words}).sample(frac=1, random_state=0).reset_index(drop=True)
    splits = load_splits(DataConfig(target="y"), 0, table)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 293 and splits.kind == "multiclass"
    assert "7 rows without y left out (NA 5×)" in " ".join(splits.notes)
    assert "y: 'None' is frequent, so it is a class; --missing 'None'" in " ".join(splits.notes)
    task = Task.fit(splits.train["y"], splits.kind)
    assert task.classes == ["-", "None", "high", "low"]
    cells = pd.Series(["None", "-", "low", "NA", None], name="y")
    assert task.has_target(cells).tolist() == [True, True, True, False, False]
    assert task.encode(cells[:3]).tolist() == [1, 0, 3]
    answered = task.to_json(torch.eye(4)[[1, 0]] * 9)
    assert task.errors(answered, ["None", "low"]) == [0.0, 1.0]
    left_out = load_splits(DataConfig(target="y", missing=("None", "-")), 0, table)
    assert left_out.kind == "binary" and "153 rows without y left out" in " ".join(left_out.notes)

    prices = pd.DataFrame({"x": x, "y": [f"{1000 + i:,} €".replace(",", ".") for i in range(296)] + ["k.A.", "-"] * 2})
    splits = load_splits(DataConfig(target="y"), 0, prices)
    assert splits.kind == "regression" and "(k.A. 2×, - 2×)" in " ".join(splits.notes)
    task = Task.fit(splits.train["y"], splits.kind, form=splits.config.column_formats().get("y", ""))
    assert 1000 < task.mean < 1300 and task.has_target(pd.Series(["1.100 €", "#DIV/0!"])).tolist() == [True, False]
    given = DataConfig(target="y", columns=("y=number:1,234.56 €",))
    assert load_splits(given, 0, prices.replace("1.000 €", "1,001 €")).kind == "regression"


def test_codes_with_leading_zeros_are_classes_as_they_are_written():
    codes = pd.Series(["007", "010", "123"] * 9, name="y")
    task = Task.fit(codes)
    assert task.kind == "multiclass" and task.classes == ["007", "010", "123"]
    assert task.encode(codes[:3]).tolist() == [0, 1, 2]
    assert Task.fit(pd.Series(["01", "1", "2"] * 9, name="y")).classes == [1, 2]  # one class, written in two ways


def test_targets_written_in_other_ways():
    table = pd.DataFrame({"x": np.linspace(0, 1, 90), "y": ["1.000", "2.000", "500"] * 30})
    splits = load_splits(DataConfig(target="y", columns=("y=:1.234,56",), task="multiclass"), 0, table)
    task = Task.fit(splits.train["y"], splits.kind, form="1.234,56")
    assert task.classes == [500, 1000, 2000] and task.encode(table["y"][:3]).tolist() == [1, 2, 0]
    with pytest.raises(UserError, match=r"row 0, column 'y': .* is a list or an object"):
        load_splits(DataConfig(target="y"), 0, table.assign(y=[["a"], ["b"], ["c"]] * 30))
    booleans = Task.fit(pd.Series([True, False] * 9, name="y"))
    assert booleans.errors(booleans.to_json(torch.tensor([[9.0], [-9.0]])), [True, "true"]) == [0.0, 1.0]
    rates = Task.fit(pd.Series([f"{i / 9:.3f}%" for i in range(50)], name="y"))
    assert rates.kind == "regression" and rates.errors([{"prediction": 0.75}] * 2, [0.5, 0.5]) == [0.25, 0.25]


def draw_records(seed: int, rows: int, share: float, sharpness: float):
    """Return (logits, targets) of a binary problem whose true log-odds are the logits divided by `sharpness`."""
    generator = torch.Generator().manual_seed(seed)
    log_odds = 1.5 * torch.randn(rows, 1, generator=generator) + math.log(share / (1 - share))
    targets = (torch.rand(rows, generator=generator) < torch.sigmoid(log_odds[:, 0])).float()
    return sharpness * log_odds, targets


def test_temperature_undoes_overconfidence_and_leaves_calibrated_probabilities():
    task = make_task("binary")
    assert calibrate(task, *draw_records(0, 5000, 0.5, 3.0)).temperature == pytest.approx(3, rel=0.1)
    assert calibrate(task, *draw_records(0, 5000, 0.5, 0.4)).temperature == pytest.approx(0.4, rel=0.1)
    kept = [calibrate(task, *draw_records(seed, 300, 0.5, 1.0)).temperature == 1 for seed in range(40)]
    assert np.mean(kept) > 0.85
    assert calibrate(make_task("regression"), torch.randn(9, 1), torch.randn(9)) == make_task("regression")


def test_temperature_keeps_the_order_of_an_ensemble():
    task = make_task("multiclass")
    logits = 5 * torch.randn(500, 8, 3)
    hot = dataclasses.replace(task, temperature=2.5)
    before, after = task.activate(logits), hot.activate(logits)
    assert torch.equal(before.argsort(dim=1), after.argsort(dim=1)) and (after.max(dim=1).values < 0.999).all()
    assert torch.allclose(after.sum(dim=1), torch.ones(500, dtype=torch.float64))


@pytest.mark.parametrize("rare", [0, 1])
def test_a_rare_class_is_found(rare):
    task, (logits, targets) = make_task("binary"), draw_records(1, 6000, 0.05, 1.0)
    if rare == 0:
        logits, targets = -logits, 1 - targets

    def recall(fitted) -> float:
        return float((fitted.decide(fitted.activate(logits)) == rare)[targets == rare].float().mean())

    fitted = calibrate(task, logits, targets)
    assert recall(fitted) > 2 * recall(task) and recall(fitted) > 0.35
    assert calibrate(task, logits, targets, monitor="accuracy").threshold == 0.5
    metrics, p = fitted.evaluate(logits, targets), fitted.activate(logits)[:, 1]
    assert metrics["f1"] == pytest.approx(sk.f1_score(targets, p > fitted.threshold))
    assert metrics["accuracy"] == pytest.approx(sk.accuracy_score(targets, p > fitted.threshold))
    columns, lines = fitted.to_columns(logits), fitted.to_json(logits)
    label = fitted.graph_outputs(logits)[0].numpy()
    assert (columns["prediction"] == np.array(fitted.classes, object)[label]).all()
    assert [line["prediction"] for line in lines] == list(columns["prediction"])
    assert min(columns["probability"]) < 0.5  # of the predicted class, which may be the less probable one
