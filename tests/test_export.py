"""An exported model answers as the checkpoint does, without torch, and is written only where it does."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import TARGETS, assert_refused, close, command, quick_run, table_for
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import text_run

import export as export_module
from config import DataConfig
from export import Options, export, quantile_scale
from pipeline import Pipeline, kind_of, weights_sha256
from preprocessing import _quantile_scale
from runtime import OnnxPipeline, feed_of
from serve import make_app
from service import Service

WITHOUT_TORCH = """
import json, sys
import numpy as np, onnxruntime
arrays = np.load(sys.argv[2], allow_pickle=True)
session = onnxruntime.InferenceSession(sys.argv[1])
names = [output.name for output in session.get_outputs()]
feed = {put.name: arrays[put.name] for put in session.get_inputs()}
found = dict(zip(names, session.run(None, feed)))
assert not {"torch", "pandas"} & set(sys.modules)
print(json.dumps({name: values.tolist() for name, values in found.items()}))
"""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["tabular", "text", "image"])
def test_the_export_answers_as_everything_else(everything, kind, target, tmp_path, capsys):
    """REST = predict.py = ONNX = notebook, on the golden rows, in any batch."""
    path = tmp_path / "model.onnx"
    export(Options(str(everything[kind, target]), str(path)))
    assert "in batches of 1, 2, 17" in capsys.readouterr().out
    pipeline, exported = Pipeline.load(everything[kind, target]), OnnxPipeline.load(path)
    records = pipeline.examples
    expected = pipeline.task.answer(pipeline.ask(records)[1])
    for size in (1, 2, 5, len(records)):
        assert all(map(close, exported.task.answer(exported.ask(records[:size])[1]), expected))
    with TestClient(make_app(Service(str(path)))) as client:
        assert all(map(close, client.post("/predict", json={"records": records}).json()["predictions"], expected))
    pd.testing.assert_frame_equal(exported.predict(records), pipeline.predict(records), rtol=1e-4, atol=1e-5)
    (tmp_path / "golden.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source, answers = tmp_path / "golden.jsonl", tmp_path / "answers.csv"
    done = command("predict.py", "--checkpoint", everything[kind, target], "--input", source, "--output", answers)
    assert done.returncode == 0, done.stderr
    told = pd.read_csv(answers, keep_default_na=False).drop(columns="file", errors="ignore")
    pd.testing.assert_frame_equal(
        told, pipeline.predict(records).reset_index(drop=True).drop(columns="file", errors="ignore"), check_dtype=False
    )
    x = pipeline.preprocessor(records)
    np.savez(tmp_path / "feed.npz", **feed_of(pipeline.preprocessor, records, x))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, path, tmp_path / "feed.npz"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if target == "regression":
        assert found["prediction"] == pytest.approx([a["prediction"] for a in expected], rel=1e-4, abs=1e-4)
    else:
        assert found["label"] == [str(a["prediction"]) for a in expected]
        assert np.allclose(found["probabilities"], [list(a["probabilities"].values()) for a in expected], atol=1e-5)
    if kind == "text":
        assert json.loads((tmp_path / "model.tokenizer.json").read_text())["column"] == pipeline.preprocessor.column


def test_predict_takes_an_export(everything, runs, tmp_path):
    export(Options(str(everything["tabular", "multiclass"]), str(tmp_path / "m.onnx")))
    answers = {}
    for checkpoint in (everything["tabular", "multiclass"], tmp_path / "m.onnx"):
        source, out = runs["multiclass"].out.parent / "multiclass.csv", tmp_path / "a.csv"
        done = command("predict.py", "--checkpoint", checkpoint, "--input", source, "--output", out)
        assert done.returncode == 0, done.stderr
        answers[str(checkpoint)[-3:]] = pd.read_csv(out), done.stdout
    pd.testing.assert_frame_equal(answers[".pt"][0], answers["nnx"][0], rtol=1e-4, atol=1e-5)
    assert answers[".pt"][1].split()[:3] == answers["nnx"][1].split()[:3]


def test_sequences_and_ranks_are_exported_too(tmp_path):
    text_run(tmp_path / "text", model="transformer", epochs=1)
    table = table_for("binary").assign(many=lambda t: np.arange(len(t)) % 5, when="2021-01-01 10:30")
    table.loc[::2, "when"] = "2021-06-05 23:15"
    quick_run(tmp_path / "table", table, data=DataConfig(target="binary", scaling="quantile"), epochs=1)
    for name in ("text", "table"):
        export(Options(str(tmp_path / name / "best.pt"), str(tmp_path / f"{name}.onnx")))
    pipeline, exported = Pipeline.load(tmp_path / "table" / "best.pt"), OnnxPipeline.load(tmp_path / "table.onnx")
    pd.testing.assert_frame_equal(exported.predict(table), pipeline.predict(table), rtol=1e-4, atol=1e-5)


def test_columns_may_be_called_as_anything_in_the_graph(tmp_path):
    names = ["label", "column label", "logits", "", "cat", "values", "column_1", "column_0", "network/column_0"]
    names += ["probabilities", "a b'\"/é"]
    random = np.random.default_rng(0)
    table = pd.DataFrame({name: random.normal(size=120) for name in names} | {"where": random.choice(list("xyz"), 120)})
    table["y"] = np.where(table["label"] > 0, "up", "down")
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y"), epochs=1)
    export(Options(str(tmp_path / "run" / "best.pt"), str(tmp_path / "m.onnx")))
    asked = OnnxPipeline.load(tmp_path / "m.onnx").predict(table)
    pd.testing.assert_frame_equal(asked, run.pipeline.predict(table), rtol=1e-4, atol=1e-5)
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
    torch.save(state, tmp_path / "turned.pt")
    with pytest.raises(export_module.UserError, match="golden row"):
        Pipeline.load(tmp_path / "turned.pt")


def test_a_category_of_which_nothing_is_frequent_is_exported(tmp_path):
    table = pd.DataFrame({"code": [f"c{i}" for i in range(120)], "n": np.arange(120) % 7, "y": ["a", "b"] * 60})
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y", columns=("code=category",)), epochs=1)
    assert run.pipeline.preprocessor.categories["code"]["values"] == []
    export(Options(str(tmp_path / "run" / "best.pt"), str(tmp_path / "m.onnx")))
    asked = OnnxPipeline.load(tmp_path / "m.onnx").predict(table)
    pd.testing.assert_frame_equal(asked, run.pipeline.predict(table), rtol=1e-4, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=30), st.floats(-6, 6))
def test_ranks_of_the_export_are_those_of_training(values, asked):
    quantiles = np.quantile(values, np.linspace(0, 1, len(values))).tolist()
    numbers = np.array([asked, *quantiles])
    expected = _quantile_scale(numbers, quantiles)
    assert np.allclose(quantile_scale(torch.from_numpy(numbers), quantiles).numpy(), expected, atol=1e-8)


def test_an_export_that_answers_otherwise_is_not_written(everything, tmp_path, monkeypatch):
    make = export_module.make_onnx

    def spoilt(pipeline):
        model = make(pipeline)
        bias = max((i for i in model.graph.initializer if i.name.endswith("bias")), key=lambda i: i.name)
        changed = onnx.numpy_helper.to_array(bias) + 0.5
        bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
        return model

    monkeypatch.setattr(export_module, "make_onnx", spoilt)
    with pytest.raises(export_module.UserError, match="golden row"):
        export(Options(str(everything["tabular", "binary"]), str(tmp_path / "model.onnx")))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_or_loaded_is_said(everything, tmp_path):
    checkpoint = everything["tabular", "binary"]
    assert_refused(command("export.py", "--checkpoint", tmp_path / "none.pt"), "no such checkpoint")
    assert_refused(command("export.py", "--checkpoint", checkpoint, "--output", "m.pt"), "must end in .onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    a, b = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["a"], ["b"])], "other", [a], [b])
    opset = [onnx.helper.make_opsetid("", 18)]
    other = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(other, tmp_path / "other.onnx")
    onnx.helper.set_model_props(other, {"pipeline": "{}"})
    onnx.save(other, tmp_path / "old.onnx")
    sample = checkpoint.parent / "sample.csv"
    for name, words in (
        ("bad", "no ONNX file"),
        ("other", "none that export.py made"),
        ("gone", "cannot be read"),
        ("old", "does not fit"),
    ):
        done = command("predict.py", "--checkpoint", tmp_path / f"{name}.onnx", "--input", sample, "--output", "-")
        assert_refused(done, f"{name}.onnx", words)
    assert kind_of(Pipeline.load(checkpoint).preprocessor) == "tabular"
