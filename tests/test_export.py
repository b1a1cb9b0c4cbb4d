"""An exported model predicts as its checkpoint does, without torch, and is written only if it does."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import TARGETS, WORDS, assert_refused, close, command, mixed_csv, quick_run, table_for
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import text_run

import export as export_module
from config import DataConfig, ModelConfig
from errors import UserError
from export import Options, export, graph_inputs, verify
from pipeline import Pipeline, content_sha256, weights_sha256
from preprocessing import Preprocessor
from preprocessing.quantiles import normal_scores, onnx_normal_scores

WITHOUT_TORCH = """
import json, sys
import numpy as np, onnxruntime
arrays = np.load(sys.argv[2], allow_pickle=True)
session = onnxruntime.InferenceSession(sys.argv[1])
names = [output.name for output in session.get_outputs()]
feed = {put.name: arrays[str(i)] for i, put in enumerate(session.get_inputs())}
found = dict(zip(names, session.run(None, feed)))
assert not {"torch", "pandas"} & set(sys.modules)
print(json.dumps({name: values.tolist() for name, values in found.items()}))
"""


def run_onnx(path, preprocessor, records) -> dict[str, np.ndarray]:
    """Run an exported file in onnxruntime; return its outputs by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    feed = dict(zip(names, graph_inputs(preprocessor, records).values(), strict=True))
    return dict(zip([put.name for put in session.get_outputs()], session.run(None, feed), strict=True))


def assert_same_predictions(path, pipeline, records) -> None:
    """All that the exported file returns for some records agrees with `Pipeline.predict`."""
    outputs, expected = run_onnx(path, pipeline.preprocessor, records), pipeline.predict(records)
    frame = pipeline.to_frame(torch.from_numpy(outputs["logits"]), pipeline.preprocessor.as_frame(records))
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-4, atol=1e-5)
    if pipeline.task.kind == "regression":
        scale = {"rtol": 1e-4, "atol": 1e-4 * pipeline.task.std}
        np.testing.assert_allclose(outputs["prediction"], expected["prediction"], **scale)
    else:
        assert outputs["label"].tolist() == expected["prediction"].astype(str).tolist()
        probabilities = expected[[f"probability_{c}" for c in pipeline.task.classes]]
        np.testing.assert_allclose(outputs["probabilities"], probabilities, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["tabular", "text", "image", "mixed"])
def test_the_export_predicts_as_everything_else(everything, kind, target, tmp_path, capsys):
    """ONNX = predict.py = notebook, on the self-check rows, in any batch (test_serve.py adds REST)."""
    path = tmp_path / "model.onnx"
    export(Options(str(everything[kind, target]), str(path)))
    assert "in batches of 1, 2, 17" in capsys.readouterr().out
    pipeline = Pipeline.load(everything[kind, target])
    records, preprocessor = pipeline.examples, pipeline.preprocessor
    expected = pipeline.task.to_json(pipeline.predict_logits(records)[1])
    for size in (1, 2, 5, len(records)):
        logits = torch.from_numpy(run_onnx(path, preprocessor, records[:size])["logits"])
        assert all(map(close, pipeline.task.to_json(logits), expected[:size]))
    assert_same_predictions(path, pipeline, records)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.csv"]
    done = command("predict.py", "--checkpoint", everything[kind, target], *files)
    assert done.returncode == 0, done.stderr
    written = pd.read_csv(tmp_path / "out.csv", keep_default_na=False).drop(columns="file", errors="ignore")
    in_memory = pipeline.predict(records).reset_index(drop=True).drop(columns="file", errors="ignore")
    pd.testing.assert_frame_equal(written, in_memory, check_dtype=False)
    beside = tmp_path / "model.preprocessor.json"
    assert beside.exists() == ("text" in preprocessor.kinds.values())
    if beside.exists():  # it alone makes the ids that the graph takes
        assert Preprocessor.from_state(json.loads(beside.read_text())) == preprocessor
    feed = graph_inputs(preprocessor, records)
    np.savez(tmp_path / "feed.npz", **{str(i): values for i, values in enumerate(feed.values())})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, path, tmp_path / "feed.npz"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if target == "regression":
        assert found["prediction"] == pytest.approx([e["prediction"] for e in expected], rel=1e-4, abs=1e-4)
    else:
        assert found["label"] == [str(e["prediction"]) for e in expected]
        assert np.allclose(found["probabilities"], [list(e["probabilities"].values()) for e in expected], atol=1e-5)


def test_sequences_and_ranks_are_exported_too(tmp_path):
    text_run(tmp_path / "text", model="transformer", epochs=1)
    export(Options(str(tmp_path / "text" / "best.pt"), str(tmp_path / "text.onnx")))
    table = table_for("binary").assign(many=lambda t: np.arange(len(t)) % 5, when="2021-01-01 10:30")
    table.loc[::2, "when"] = "2021-06-05 23:15"
    run = quick_run(tmp_path / "table", table, data=DataConfig(target="binary", scaling="quantile"), epochs=1)
    export(Options(str(tmp_path / "table" / "best.pt"), str(tmp_path / "table.onnx")))
    assert_same_predictions(tmp_path / "table.onnx", run.pipeline, table)


def test_two_texts_beside_other_columns_are_exported_in_any_batch(tmp_path):
    """Between the texts of a record there is padding, as long as the batch's longest first text needs."""
    data = DataConfig(data=str(mixed_csv(tmp_path, "multiclass", rows=60)), target="multiclass")
    model = ModelConfig(model=("mlp", "transformer"), hidden=(32,))
    pipeline = quick_run(tmp_path / "run", data=data, model=model, epochs=1).pipeline
    export(Options(str(tmp_path / "run" / "best.pt"), str(tmp_path / "m.onnx")))
    records = [dict(record) for record in pipeline.examples]
    records[0]["title"], records[1]["note"], records[2]["title"] = "", "house", "unseen words of a longer title " * 3
    for part in (records[:1], records[1:2], records):
        assert_same_predictions(tmp_path / "m.onnx", pipeline, part)


def test_columns_may_be_called_as_anything_in_the_graph(tmp_path):
    names = ["label", "column label", "logits", "", "cat", "values", "column_1", "column_0", "network/column_0"]
    names += ["probabilities", "a b'\"/é"]
    random = np.random.default_rng(0)
    table = pd.DataFrame({name: random.normal(size=120) for name in names} | {"where": random.choice(list("xyz"), 120)})
    table["y"] = np.where(table["label"] > 0, "up", "down")
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y"), epochs=1)
    export(Options(str(tmp_path / "run" / "best.pt"), str(tmp_path / "m.onnx")))
    assert_same_predictions(tmp_path / "m.onnx", run.pipeline, table)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == {
        *(f"column {name}" if name in ("", "logits", "probabilities") else name for name in names if name != "label"),
        *("where", "column column label"),
    }


def test_values_far_from_zero_keep_their_digits_and_their_check(tmp_path):
    table = pd.DataFrame({"a": np.linspace(-1, 1, 120)}).assign(seconds=lambda t: 1.7e9 + 1000 * t["a"])
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="seconds"), epochs=30)
    export(Options(str(tmp_path / "run" / "best.pt"), str(tmp_path / "m.onnx")))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    plain = session.run(["prediction"], {"a": table["a"].to_numpy()})[0]
    assert np.abs(plain - run.pipeline.predict(table)["prediction"]).max() < 0.1
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    for name in [name for name in state["state_dict"] if name.endswith("weight")][-1:]:
        state["state_dict"][name] *= -1
    state["weights_sha256"] = weights_sha256(state["state_dict"])
    state["sha256"] = content_sha256(state)
    torch.save(state, tmp_path / "turned.pt")
    with pytest.raises(UserError, match="self-check row"):
        Pipeline.load(tmp_path / "turned.pt")


def test_a_category_without_frequent_values_is_exported(tmp_path):
    table = pd.DataFrame({"code": [f"c{i}" for i in range(120)], "n": np.arange(120) % 7, "y": ["a", "b"] * 60})
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y", columns=("code=category",)), epochs=1)
    assert [column.values for column in run.pipeline.preprocessor.inputs["categories"]] == [[]]
    export(Options(str(tmp_path / "run" / "best.pt"), str(tmp_path / "m.onnx")))
    assert_same_predictions(tmp_path / "m.onnx", run.pipeline, table)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=30), st.floats(-6, 6))
def test_ranks_of_the_export_equal_those_of_training(values, number):
    quantiles = np.quantile(values, np.linspace(0, 1, len(values))).tolist()
    numbers = torch.tensor([number, *quantiles], dtype=torch.float64)
    expected = normal_scores(numbers, quantiles)
    assert np.allclose(onnx_normal_scores(numbers, quantiles), expected, atol=1e-8)


def test_an_export_that_predicts_differently_is_not_written(everything, tmp_path, monkeypatch):
    make = export_module.make_onnx

    def spoilt(pipeline):
        model = make(pipeline)
        bias = [i for i in model.graph.initializer if "head" in i.name and i.name.endswith("bias")][-1]
        changed = onnx.numpy_helper.to_array(bias) + 0.5
        bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
        return model

    monkeypatch.setattr(export_module, "make_onnx", spoilt)
    with pytest.raises(UserError, match="self-check row"):
        export(Options(str(everything["tabular", "binary"]), str(tmp_path / "model.onnx")))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_in_one_line(everything, tmp_path):
    checkpoint = everything["tabular", "binary"]
    assert_refused(command("export.py", "--checkpoint", tmp_path / "none.pt"), "no such checkpoint")
    assert_refused(command("export.py", "--checkpoint", checkpoint, "--output", "m.pt"), "must end in .onnx")
    pipeline = Pipeline.load(checkpoint)
    pipeline.examples = []
    pipeline.save(tmp_path / "unchecked.pt")
    with pytest.raises(UserError, match="it has no self-check rows"):
        export(Options(str(tmp_path / "unchecked.pt"), str(tmp_path / "m.onnx")))
    assert not (tmp_path / "m.onnx").exists()


def test_an_export_is_no_checkpoint(everything, tmp_path):
    checkpoint = everything["tabular", "binary"]
    export(Options(str(checkpoint), str(tmp_path / "m.onnx")))
    files = ["--input", checkpoint.parent / "sample.csv", "--output", "-"]
    done = command("predict.py", "--checkpoint", tmp_path / "m.onnx", *files)
    assert_refused(done, "m.onnx", "ONNX files are not supported")


def test_a_damaged_export_is_noticed(everything, tmp_path):
    """A flipped bit moves probabilities in silence; the checksums beside the graph are those of `sha256sum`."""
    export(Options(str(everything["mixed", "binary"]), str(tmp_path / "m.onnx")))
    verify(str(tmp_path / "m.onnx"))
    sums = (tmp_path / "m.onnx.sha256").read_text().splitlines()
    names = [line.split("  ")[1] for line in sums]
    assert names == ["m.onnx", "m.preprocessor.json"] and all(len(line.split("  ")[0]) == 64 for line in sums)
    random = np.random.default_rng(0)
    for name in names * 20:
        good = (tmp_path / name).read_bytes()
        damaged = bytearray(good)
        damaged[random.integers(len(good))] ^= 1 << int(random.integers(8))
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: the file is damaged or missing"):
            verify(str(tmp_path / "m.onnx"))
        (tmp_path / name).write_bytes(good)
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match="damaged or missing"):
        verify(str(tmp_path / "m.onnx"))


def test_a_text_that_is_empty_in_the_first_records_is_exported(tmp_path):
    """The exporter takes a length of 1 for a constant; texts of other lengths must work all the same."""
    random = np.random.default_rng(0)
    notes = [" ".join(random.choice(WORDS, 4)) + f" {i}" if i % 3 == 2 else "" for i in range(90)]
    table = pd.DataFrame({"n": random.normal(size=90), "note": notes, "y": ["a", "b"] * 45})
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y", text="note"), model=ModelConfig("transformer"))
    run.pipeline.examples[:2] = [record | {"note": ""} for record in run.pipeline.examples[:2]]
    serialized = export_module.make_onnx(run.pipeline).SerializeToString()
    export_module.check(run.pipeline, serialized)


def test_codes_are_exported(tmp_path):
    random = np.random.default_rng(0)
    table = pd.DataFrame({"code": random.integers(100, 112, 1000), "size": random.normal(0, 1, 1000)})
    table["y"] = (table["code"] * 7919 % 13) + table["size"]
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y"))
    assert len(run.pipeline.model_spec["args"]["levels"][0]) == 12
    export(Options(str(tmp_path / "run" / "best.pt"), str(tmp_path / "model.onnx")))
    assert_same_predictions(tmp_path / "model.onnx", run.pipeline, table.drop(columns="y").tail(50))
