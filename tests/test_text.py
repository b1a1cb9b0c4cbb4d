"""Texts in any language are learned from and predicted, the same way wherever they come from."""

import io
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_refused, command, quick_run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import fingerprint, interrupted_run
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

import predict
from backbones.huggingface import Pretrained
from config import DataConfig, ModelConfig
from dataloader import LengthBatchSampler, load_splits
from errors import UserError
from model import build_model
from pipeline import Pipeline, read_checkpoint
from preprocessing import Preprocessor
from preprocessing.ragged import UNKNOWN
from scaling.randomness import seed_weights

GOOD = ["lovely", "great", "참 재밌어요", "wonderful 👍", "최고예요", "brilliant!!!"]
BAD = ["awful", "boring", "정말 지루해요", "terrible 👎", "별로예요", "a waste..."]
REST = ["the film was", "이 영화는", "I thought it was", "배우들은", "this one:", "האמת", "<b>plot</b> &amp; cast"]


def reviews(rows: int = 160, seed: int = 0) -> pd.DataFrame:
    """Short reviews in English, Korean and a little Hebrew, a label, and a number that goes with it."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 2, rows)
    words = [f"{draw.choice(REST)} {draw.choice(GOOD if y else BAD)} {draw.choice(REST)}" for y in label]
    stars = (1 + 3 * label + draw.random(rows)).round(2)
    grade = np.where(label == 0, "bad", np.where(stars > 4.5, "best", "good"))
    return pd.DataFrame(
        {"review": words, "binary": np.where(label, "pos", "neg"), "multiclass": grade, "regression": stars}
    )


def text_run(out, target="binary", *, table=None, data=None, model="auto", **training):
    table = reviews() if table is None else table
    table = table[["review", target]] if target in table else table
    data = DataConfig(target=target, text="review", **(data or {}))
    hidden = () if model == "auto" else (32, 32)
    return quick_run(out, table, data=data, model=ModelConfig(model=model, hidden=hidden), **training)


def predict_file(checkpoint, source, out) -> pd.DataFrame:
    """Predictions of predict.py, without a process of its own."""
    predict.predict(predict.Options(str(checkpoint), str(source), str(out)))
    return pd.read_csv(out)


MODELS = ("bag", "transformer")


@pytest.fixture(scope="module")
def text_runs(tmp_path_factory):
    """A run of each network and kind of problem."""
    folder = tmp_path_factory.mktemp("texts")
    return {
        (model, target): text_run(
            folder / f"{model}-{target}",
            target,
            model=model,
            epochs=8 if model == "bag" else 12,
            lr=1e-2 if model == "bag" else 3e-3,
        )
        for model in MODELS
        for target in ("binary", "multiclass", "regression")
    }


# ---------------------------------------------------------------- training records


def test_statistics_are_of_the_training_texts_alone(tmp_path):
    table = reviews().assign(review=lambda t: [f"{w} unique{i:03}" for i, w in enumerate(t["review"])])
    run = text_run(tmp_path / "run", table=table, data={"min_freq": 1, "tokenizer": "words", "clean": ("case",)})
    known = set(json.loads(run.pipeline.preprocessor.lone.vocabulary)["model"]["vocab"])
    splits = load_splits(DataConfig(target="binary", text="review"), 0, table[["review", "binary"]])
    assert {w.split()[-1] for w in splits.train["review"]} <= known
    assert not {w.split()[-1] for w in [*splits.val["review"], *splits.test["review"]]} & known


@given(st.integers(1, 200), st.integers(2, 40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_batches_by_length_hold_every_record_once(count, size, seed):
    torch.manual_seed(seed)
    lengths = torch.randint(1, 100, (count,))
    batches = list(LengthBatchSampler(count, size, shuffle=True, lengths=lengths))
    assert torch.cat(batches).sort().values.tolist() == list(range(count))
    assert len(batches) == len(LengthBatchSampler(count, size, shuffle=True)) and min(map(len, batches)) > (count > 1)


def test_batches_by_length_are_random_and_hardly_padded():
    lengths = torch.randint(1, 500, (4096,), generator=torch.Generator().manual_seed(0))
    sampler = LengthBatchSampler(4096, 32, shuffle=True, lengths=lengths)
    batches = list(sampler)
    padded = sum(int(lengths[b].max()) * len(b) for b in batches) / int(lengths.sum())
    assert padded < 1.1
    assert {tuple(b.tolist()) for b in batches}.isdisjoint(tuple(b.tolist()) for b in sampler)
    means = torch.tensor([lengths[b].float().mean() for b in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # short and long texts alternate


# ---------------------------------------------------------------- networks

ARGS = {
    "vocab_size": 50, "known_sizes": [48], "padding": 0, "out_features": 3, "activation": "relu", "dropout": 0.1,
}  # fmt: skip


def embedding(model) -> nn.Module:
    """The table of vectors of a network's ids."""
    return model.table if hasattr(model, "table") else model.token_embedding


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_neighbours_never_change_logits(name):
    torch.manual_seed(0)
    model = build_model([name], ARGS | {"max_length": 30, "hidden": [32, 32], "batch_norm": True}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    texts = [torch.randint(1, 50, (n,), dtype=torch.int32) for n in (1, 5, 20, 30)]
    together = model(nn.utils.rnn.pad_sequence(texts, batch_first=True))
    alone = torch.cat([model(text[None]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5) and together.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_the_unknown_id_is_trained(text_runs, name):
    """Its vector differs from the initial one: no text of the test split would train it, if training did not."""
    run = text_runs[name, "binary"]
    trained = embedding(run.pipeline.model).weight[UNKNOWN].detach()
    seed_weights(0)
    initial = embedding(build_model(**run.pipeline.model_spec)).weight
    assert not torch.allclose(trained, initial[UNKNOWN].detach(), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_unknown_id_is_trained_even_if_all_are_known(name):
    """As with --min-freq 1. (Weight decay alone would change its vector: the gradient tells.)"""
    torch.manual_seed(0)
    model, ids = build_model([name], ARGS | {"max_length": 9}), torch.randint(2, 50, (64, 9), dtype=torch.int32)
    before = ids.clone()
    model(ids).square().sum().backward()
    assert embedding(model).weight.grad[UNKNOWN].abs().max() > 0 and torch.equal(ids, before)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("model", MODELS)
def test_it_learns(text_runs, model):
    assert text_runs[model, "binary"].test["accuracy"] > 0.9
    assert text_runs[model, "regression"].test["r2"] > 0.5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", ["binary", "multiclass", "regression"])
def test_every_way_to_predict_gives_the_same_predictions(text_runs, model, target, tmp_path, capfd):
    run, records = text_runs[model, target], reviews(40, seed=7)
    records.loc[3, "review"] = ""
    records.loc[4, "review"] = 'quoted "text", with\na line break'
    expected = run.pipeline.predict(records)
    checkpoint = run.out / "best.pt"
    loaded = Pipeline.load(checkpoint)
    texts = records["review"].tolist()
    for again in (loaded.predict(records), loaded.predict(texts), pd.concat([loaded.predict([t]) for t in texts])):
        pd.testing.assert_frame_equal(again.reset_index(drop=True), expected, rtol=1e-5, atol=1e-6)
    if target != "multiclass" and model == "transformer":
        return  # the same code reads the files
    records[["review"]].to_csv(tmp_path / "a.csv", index=False)
    records[["review"]].to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    records[["review"]].to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n".join(t.replace("\n", " ") for t in texts) + "\n", encoding="utf-8")
    for name in ("a.csv", "b.jsonl", "c.parquet", "d.txt"):
        predictions = predict_file(checkpoint, tmp_path / name, tmp_path / "o.csv")
        pd.testing.assert_frame_equal(predictions, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert "metrics" not in capfd.readouterr().out  # there are no targets
    records.to_csv(tmp_path / "e.csv", index=False)
    predict_file(checkpoint, tmp_path / "e.csv", tmp_path / "o.csv")
    assert "metrics" in capfd.readouterr().out


def test_standard_input_is_a_table_or_lines(text_runs, tmp_path, monkeypatch):
    run = text_runs["bag", "binary"]
    expected = run.pipeline.predict(["lovely film", "a waste, boring"])["prediction"].tolist()
    lines, table = b"lovely film\na waste, boring\n", b'id,review\n1,lovely film\n2,"a waste, boring"\n'
    done = command("predict.py", "--checkpoint", run.out / "best.pt", "--input", "-", stdin=lines)
    assert done.returncode == 0, done.stderr.decode()
    assert [line.split(",")[0] for line in done.stdout.decode().splitlines()[1:]] == expected
    for data in (lines, table):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert predict_file(run.out / "best.pt", "-", tmp_path / "o.csv")["prediction"].tolist() == expected


def test_text_columns_are_found_in_any_table():
    table = reviews()[["review", "binary"]]

    def kinds(table, **options) -> dict:
        splits = load_splits(DataConfig(target="binary", **options), 0, table)
        assert list(splits.train) == list(table)
        return Preprocessor.fit(splits.train.drop(columns="binary"), splits.config).kinds

    assert kinds(table) == kinds(table, text="review") == {"review": "text"}
    assert kinds(table.assign(customer_id=np.arange(len(table)))) == {"review": "text"}
    with_number = table.assign(age=np.random.default_rng(0).normal(size=len(table)))
    assert kinds(with_number) == {"review": "text", "age": "number"}
    assert kinds(with_number, text="review") == {"review": "text", "age": "number"}  # which is learned from as well
    assert kinds(with_number, columns=("age=drop",)) == {"review": "text"}
    assert kinds(with_number.assign(note=table["review"][::-1].tolist())) == {
        "review": "text", "age": "number", "note": "text",
    }  # fmt: skip


def test_other_columns_are_learned_from_beside_a_text(tmp_path):
    """The texts are shuffled, so only the number predicts the target."""
    table = (
        reviews()
        .sample(frac=1, random_state=0)[["review"]]
        .assign(stars=reviews()["regression"].tolist(), binary=reviews()["binary"].tolist())
    )
    table = table.reset_index(drop=True)
    run = quick_run(
        tmp_path / "run",
        table,
        data=DataConfig(target="binary", text="review"),
        model=ModelConfig(),
        epochs=12,
        lr=1e-2,
    )
    assert run.pipeline.preprocessor.kinds == {"review": "text", "stars": "number"}
    assert run.pipeline.model_spec["names"] == ["tabm"] and run.test["accuracy"] > 0.9
    with pytest.raises(UserError, match="column 'stars' is missing"):
        run.pipeline.predict([{"review": "lovely"}])


def test_cells_are_taken_letter_by_letter(tmp_path):
    """What is null or a number in a table of numbers is a word here, in training as in prediction."""
    table = reviews()[["review", "binary"]]
    table.loc[:40, "review"] = ["NA", "?", "007", "1.50"] * 10 + ["None"]
    table.to_csv(tmp_path / "a.csv", index=False)
    for config in (
        DataConfig(data=str(tmp_path / "a.csv"), target="binary"),
        DataConfig(target="binary", text="review"),
    ):
        splits = load_splits(config, 0, None if config.data != "breast_cancer" else table)
        words = pd.concat([splits.train, splits.val, splits.test])["review"]
        assert {"NA", "?", "007", "1.50", "None"} <= set(words)
    numbers = pd.DataFrame({"code": ["007", "100", "012", "3.50"] * 20, "y": list("abab") * 20})
    numbers.to_csv(tmp_path / "b.csv", index=False)
    splits = load_splits(DataConfig(data=str(tmp_path / "b.csv"), target="y", text="code"), 0)
    assert set(splits.train["code"]) == {"007", "100", "012", "3.50"}


def test_folders_of_texts(tmp_path):
    table = reviews(60)
    for i, (words, label) in enumerate(zip(table["review"], table["binary"], strict=True)):
        (tmp_path / "texts" / label).mkdir(parents=True, exist_ok=True)
        encoding = "cp949" if "이" in words and i % 2 else "utf-8"
        (tmp_path / "texts" / label / f"{i}.txt").write_bytes(words.encode(encoding, "ignore"))
    splits = load_splits(DataConfig(data=str(tmp_path / "texts")), 0)
    assert splits.config.column_kinds() == {"text": "text", "file": "drop"} and splits.target == "label"
    assert any("이 영화는" in words for words in splits.train["text"])
    done = command("train.py", "--data", tmp_path / "texts", "--epochs", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["model"] == "tabm"


def test_the_bundled_example(tmp_path):
    done = command("train.py", "--data", "docstrings", "--epochs", 12, "--lr", 0.005, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr.decode()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.75 and "asyncio" in metrics["classes"]
    assert len(predict_file(tmp_path / "run" / "best.pt", tmp_path / "run" / "sample.csv", tmp_path / "o.csv")) == 5


@pytest.mark.parametrize(("model", "where"), [("bag", "step"), ("transformer", "step"), ("bag", "evaluate")])
def test_interrupted_and_resumed(tmp_path, monkeypatch, model, where):
    table = reviews()[["review", "binary"]]
    data = DataConfig(target="binary", text="review", batch_size=16)
    model = ModelConfig(model=model, hidden=(32, 32))
    interrupted_run(tmp_path / "a", where, 3, monkeypatch, table=table, data=data, model=model)
    quick_run(tmp_path / "b", table, data=data, model=model)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


TRAIN_EACH = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from config import DataConfig, ModelConfig, RunConfig, TrainConfig
from train import train
for model in {MODELS}:
    data = DataConfig(data=sys.argv[1], target="binary")
    train(data, ModelConfig(model=model), TrainConfig(epochs=2), RunConfig(out=sys.argv[2] + model))
"""


def test_the_same_seed_gives_the_same_bits_in_another_process(tmp_path):
    """Sub-word training, hashing and the order of words must not follow Python's random hash of strings."""
    reviews()[["review", "binary"]].to_csv(tmp_path / "a.csv", index=False)
    for seed in ("0", "1"):
        code = [sys.executable, "-c", TRAIN_EACH, tmp_path / "a.csv", tmp_path / seed]
        done = subprocess.run(code, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
    for model in MODELS:
        assert fingerprint(tmp_path / f"0{model}")[0] == fingerprint(tmp_path / f"1{model}")[0]


def test_the_checkpoint_is_plain(text_runs):
    for run in text_runs.values():
        state = read_checkpoint(run.out / "best.pt")
        json.dumps({k: v for k, v in state.items() if k != "state_dict"}, allow_nan=False)
        assert [column["kind"] for column in state["preprocessor"]["columns"]] == ["text"]
        assert set(state["self_check"]["records"][0]) == {"review"}


# ---------------------------------------------------------------- bad input


def test_strange_texts_are_predicted(text_runs):
    strange = ["", "x", "👍" * 50, "\0\0", "\ud800", "עברית " * 3, "word " * 200_000, "가" * 1_000_000, "   ", "ㅋ"]
    strange.append("".join(random.Random(0).choices("abcdefgh", k=1_000_000)))
    for model in MODELS:
        predictions = text_runs[model, "binary"].pipeline.predict(strange)
        assert len(predictions) == len(strange) and predictions["probability"].between(0.5, 1).all()


def test_no_texts_and_a_column_that_occurs_twice(text_runs):
    for run in text_runs.values():
        expected = list(run.pipeline.predict(["lovely"]))
        for records in ([], reviews(5).head(0)):
            predictions = run.pipeline.predict(records)
            assert predictions.empty and list(predictions) == expected
    twice = reviews(5)[["review", "review"]]
    with pytest.raises(UserError, match="column 'review' occurs twice: rename one of them"):
        run.pipeline.predict(twice)


def test_strange_texts_are_trained_on(tmp_path):
    table = reviews(120)[["review", "binary"]]
    table.loc[:9, "review"] = [None, "", "x", "👍" * 50, "a\0b", "שלום", "word " * 20_000, "   ", "ㅋ", "12"]
    for model in MODELS:
        run = text_run(tmp_path / model, table=table, model=model, epochs=1)
        assert np.isfinite(run.test["loss"]) and (run.out / "sample.csv").exists()


def test_a_long_cell_and_zero_bytes_in_a_file(text_runs, tmp_path):
    checkpoint = text_runs["bag", "binary"].out / "best.pt"
    rows = ["review", "lovely", '"' + "great 최고 " * 150_000 + '"', "a\0b", *["boring"] * 50]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert len(predict_file(checkpoint, tmp_path / "a.csv", tmp_path / "o.csv")) == 53


def test_damaged_utf8_is_named_by_its_row(text_runs, tmp_path):
    rows = [f"{words},{label}" for words, label in reviews(60)[["review", "binary"]].itertuples(index=False)]
    raw = "\n".join(["review,binary", *rows]).encode().split(b"\n")
    raw[17] = b"broken \xff\xfe letter,pos"
    (tmp_path / "a.csv").write_bytes(b"\n".join(raw))
    (tmp_path / "a.txt").write_bytes(b"\n".join(raw))
    flags = ["--data", tmp_path / "a.csv", "--target", "binary", "--text", "review", "--out", tmp_path / "run"]
    assert_refused(command("train.py", *flags), "a.csv: row 17 contains bytes that are not valid UTF-8")
    checkpoint = text_runs["bag", "binary"].out / "best.pt"
    with pytest.raises(UserError, match=r"a\.csv: row 17 contains bytes that are not valid UTF-8"):
        predict_file(checkpoint, tmp_path / "a.csv", tmp_path / "o.csv")
    done = command("predict.py", "--checkpoint", checkpoint, "--input", tmp_path / "a.txt")
    assert_refused(done, "a.txt", "not valid UTF-8")


def test_bad_flags_are_refused(tmp_path):
    reviews()[["review", "binary"]].to_csv(tmp_path / "a.csv", index=False)
    base = ["--data", tmp_path / "a.csv", "--target", "binary", "--out", tmp_path / "run"]
    for flags, words in (
        (["--text", "reviews"], ["--text reviews", "Did you mean 'review'"]),
        (["--text", "binary"], ["--text binary", "is the target"]),
        (["--text", "review", "--image", "review"], ["--image review", "--text"]),
        (["--text", "review", "--model", "cnn"], ["--model cnn reads image, but the records have numbers"]),
        (["--clean", "lower"], ["--clean", "lower"]),
        (["--model", "hf"], ["--model hf needs a name"]),
        (["--model", "hf:x", "--clean", "--vocab-size", "50"], ["--clean, --vocab-size: not with --model hf:x"]),
        (["--model", "transformer", "--tokenizer", "ngrams"], ["--model transformer", "--tokenizer ngrams"]),
        *((["--vocab-size", n], ["--vocab-size must be 4 or more, not"]) for n in (1, 3)),
        (["--text", "review", "--min-freq", "1000"], ["--min-freq 1"]),
        (["--model", "transformer", "--hidden", "32", "64"], ["--hidden takes the same width for each layer"]),
    ):
        assert_refused(command("train.py", *base, *flags), *words)
        assert not (tmp_path / "run").exists()


def test_no_cleaning_at_all(tmp_path):
    reviews()[["review", "binary"]].to_csv(tmp_path / "a.csv", index=False)
    flags = ["--data", tmp_path / "a.csv", "--target", "binary", "--epochs", 1, "--out", tmp_path / "run", "--clean"]
    done = command("train.py", *flags)
    assert done.returncode == 0 and "no cleaning" in done.stdout.decode(), done.stderr.decode()


# ---------------------------------------------------------------- Hugging Face


def test_without_transformers_it_says_what_to_install(tmp_path):
    reviews()[["review", "binary"]].to_csv(tmp_path / "a.csv", index=False)
    code = "import sys; sys.modules['transformers'] = None; sys.argv[0] = 'train.py'; "
    code += f"sys.path.insert(0, {str(ROOT)!r}); import train, console; console.run(train.main)"
    flags = ["--data", str(tmp_path / "a.csv"), "--target", "binary", "--model", "hf:some/model"]
    done = command("-c", code, *flags, cwd=tmp_path)
    assert_refused(done, "--model hf:some/model needs another library: pip install transformers")


def test_a_pretrained_encoder_is_fine_tuned_and_kept_in_the_checkpoint(tmp_path, monkeypatch):
    """A tiny encoder with random weights, made here, represents one from the hub."""
    transformers = pytest.importorskip("transformers")
    words = sorted({w for t in reviews()["review"] for w in re.findall(r"\w+|\S", t.lower())})
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(str(tmp_path / "hub" / "vocab.txt"), strip_accents=False).save_pretrained(
        tmp_path / "hub"
    )
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    encoder = transformers.BertModel(config)
    encoder.save_pretrained(tmp_path / "hub")
    run = text_run(tmp_path / "still", model=f"hf:{tmp_path / 'hub'}", epochs=1, lr=1e-30, data={})
    for name, weight in encoder.state_dict().items():
        assert torch.allclose(run.pipeline.model.encoder.state_dict()[name], weight), name
    monkeypatch.setattr(Pretrained, "MAX_LR", 3e-3)  # there is nothing in these weights to lose
    tuned = ModelConfig(model=f"hf:{tmp_path / 'hub'}", fine_tune=True)
    data = DataConfig(target="binary", text="review")
    table = reviews(600)[["review", "binary"]]
    run = quick_run(tmp_path / "run", table, data=data, model=tuned, epochs=12, lr=3e-3)
    assert run.test["accuracy"] > 0.9
    (tmp_path / "hub").rename(tmp_path / "gone")  # the checkpoint does not need it any more
    loaded = Pipeline.load(run.out / "best.pt")
    records = reviews(20, seed=4)
    pd.testing.assert_frame_equal(loaded.predict(records), run.pipeline.predict(records), rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gone")
    assert loaded.preprocessor(["this one: great"])["text"][0].tolist() == tokenizer("this one: great")["input_ids"]


@pytest.fixture
def hub(tmp_path):
    """A decoder and an encoder-decoder; their tokenizer, of bytes, has neither padding nor other special tokens."""
    transformers = pytest.importorskip("transformers")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(reviews()["review"], trainer)
    tokenizer, size = transformers.PreTrainedTokenizerFast(tokenizer_object=inner), inner.get_vocab_size()
    gpt = transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    t5 = transformers.T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    transformers.GPT2Model(gpt).save_pretrained(tmp_path / "gpt2")
    for name, config in (("gpt2", gpt), ("t5", t5)):
        tokenizer.save_pretrained(tmp_path / name)
        config.save_pretrained(tmp_path / name)
    return tmp_path


def test_a_pretrained_tokenizer_gets_raw_texts_and_needs_no_padding(hub):
    from transformers import AutoTokenizer

    table, tokenizer = reviews()[["review", "binary"]], AutoTokenizer.from_pretrained(hub / "gpt2")
    table.loc[:20, "review"] = "lovely film " * 100  # longer than there are positions
    run = text_run(hub / "run", table=table, model=f"hf:{hub / 'gpt2'}", epochs=1)
    column, raw = run.pipeline.preprocessor.lone, ["Don't stop, it's great!", "a\u200bb\tc  d", tokenizer.decode([0])]
    for text, ids in zip(raw, run.pipeline.preprocessor(raw)["text"], strict=True):
        assert ids[ids != column.padding].tolist() == tokenizer(text)["input_ids"]
    assert column.max_length == 64 and tokenizer(raw[2])["input_ids"] == [0]
    predictions = run.pipeline.predict([*raw, "", "\ud800"])
    alone = pd.concat([run.pipeline.predict([text]) for text in raw])
    assert np.allclose(predictions["probability"][:3], alone["probability"], atol=1e-6)
    assert predictions.notna().all(axis=None)


def test_what_a_pretrained_network_cannot_read_is_refused(hub):
    for name, words in (("gpt2", "cannot read 65 tokens: give a lower --max-length"), ("t5", "is a t5.*only encoders")):
        with pytest.raises(UserError, match=words):
            text_run(hub / "run", model=f"hf:{hub / name}", data={"max_length": 65})


def test_a_folder_of_texts_is_learned_from_and_predicted_by_file(tmp_path):
    for i, row in enumerate(reviews(60).itertuples()):
        path = tmp_path / "texts" / row.binary / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row.review, encoding="utf-8")
    run = quick_run(tmp_path / "run", None, data=DataConfig(data=str(tmp_path / "texts")), epochs=2)
    predictions = predict_file(run.out / "best.pt", tmp_path / "texts", tmp_path / "a.csv")
    files = sorted((tmp_path / "texts").rglob("*.txt"))
    assert predictions["file"].tolist() == list(map(str, files))
    in_memory = run.pipeline.predict([path.read_text(encoding="utf-8") for path in files])
    assert np.allclose(predictions["probability"], in_memory["probability"], atol=1e-6)
