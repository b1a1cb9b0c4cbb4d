"""Texts in any language are cleaned, cut into parts and learned from, and answered the same however they come."""

import json
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

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

import text as text_module
from config import DataConfig, ModelConfig
from dataloader import BatchIndices, load_splits
from errors import UserError
from model import build_model
from pipeline import Pipeline, read_checkpoint
from reader import read_table
from text import CLEANING, PADDING, UNKNOWN, Ragged, TextPreprocessor, clean, hash_ngrams, read_texts

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
            epochs=4 if model == "bag" else 12,
            lr=1e-2 if model == "bag" else 3e-3,
        )
        for model in MODELS
        for target in ("binary", "multiclass", "regression")
    }


def fit(texts, **options):
    options = {"steps": list(CLEANING), "segment": "ngrams", "min_freq": 1, "vocab_size": 0, "max_length": 0} | options
    return TextPreprocessor.fit(pd.DataFrame({"t": texts}), column="t", **options)


# ---------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("step", "raw", "expected"),
    [
        ("unicode", "ﬁne ＡＢＣ cafe\u0301", "fine ABC café"),
        ("unicode", "ㅋㅠ \u1100\u1161", "ㅋㅠ 가"),
        ("html", "a <b>bold</b><br/> &lt;3 R&amp;D x < y", "a bold < 3 R & D x < y"),
        ("marks", "see https://a.bc/d?e=f or me.you@mail.example.org, 12.5%", "see xxurl or xxmail , 00 . 0 %"),
        ("repeats", "sooooo gooood!!! 1000 ㅋㅋㅋㅋ", "soo good ! ! 1000 ㅋㅋ"),
        ("case", "LOUD Ümlaut", "loud ümlaut"),
    ],
)
def test_each_step_of_cleaning(step, raw, expected):
    assert clean(raw, [step]) == expected
    assert clean(raw, [s for s in CLEANING if s != step]) != clean(raw, list(CLEANING))


def test_words_of_any_script_stay_whole():
    assert clean("नमस्ते दुनिया", []).split() == ["नमस्ते", "दुनिया"]
    assert clean("don't—stop，好。", []).split() == ["don", "'", "t", "—", "stop", "，", "好", "。"]
    assert clean("a\0b\u200bc\ud800d\u00a0e\n\tf", []) == "a bc d e f"


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_cleaning_twice_changes_no_word_edges(text):
    cleaned = clean(text, list(CLEANING))
    assert clean(cleaned, []) == cleaned
    assert "\n" not in cleaned and "  " not in cleaned and cleaned == cleaned.strip()


@pytest.mark.parametrize("length", [40, 100_000])
def test_no_text_takes_longer_than_its_length(length):
    """Random letters, and what entities, addresses and accents without an end are made of."""
    letters = "".join(random.Random(0).choices("abcdefgh", k=length))
    hooks = ["&", "<", "<!--", "www.", "a@", "a@b", "a.", "+", "Σ'", "\u0316\u0300", "&#9"]
    for text in [letters, "&#" + "9" * length + ";", *((hook * length)[:length] for hook in hooks)]:
        started = time.perf_counter()
        clean(text, list(CLEANING))
        assert time.perf_counter() - started < 1, text[:20]


@given(st.text(alphabet="ab@.+-é !", max_size=14))
@settings(max_examples=500, deadline=None)
def test_addresses_are_those_that_a_plain_search_finds(text):
    expected = re.sub(r"([\w.+-]+@[\w-]+\.\w[\w.-]*)+", " xxmail ", text)
    assert clean(text, ["marks"]) == clean(expected, [])


# ---------------------------------------------------------------- n-grams and ids


def slow_ngrams(text: str) -> list[str]:
    words = [f" {word} " for word in text.split()]
    return [w[i : i + k] for w in words for k in range(1, 6) for i in range(len(w) - k + 1) if w[i : i + k] != " "]


@given(st.lists(st.text(alphabet="abc 가나!👍", max_size=20), max_size=6))
@settings(max_examples=100, deadline=None)
def test_hashed_ngrams_are_those_of_a_plain_loop(texts):
    texts = [clean(text, []) for text in texts]
    buckets, offsets = hash_ngrams(texts)
    assert len(offsets) == len(texts) + 1
    bucket_of = {}
    for text, start, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
        grams = slow_ngrams(text)
        assert end - start == len(grams)
        for gram in set(grams):  # each alone has the same bucket, wherever it stands
            alone, _ = hash_ngrams([gram.strip()])
            alike = slow_ngrams(gram.strip())
            if gram in alike and alike.count(gram) == 1 and len(set(alone)) == len(alone):
                bucket_of.setdefault(gram, set()).update(set(buckets[start:end]) & set(alone))
    assert all(found for found in bucket_of.values())


def test_frequent_ngrams_are_known_in_order_of_frequency():
    fitted = fit(["ab", "ab", "ab", "cd", "cd", "e"], min_freq=2, max_length=5)
    assert fitted.vocab_size - 2 == 2 * len(set(slow_ngrams("ab")))
    ids = fitted(["ab", "cd", "e", "", "ab zz"])
    n = len(slow_ngrams("ab"))
    assert set(ids[0].tolist()) - {PADDING} == set(range(2, n + 2))  # the most frequent first
    assert set(ids[1].tolist()) - {PADDING} == set(range(n + 2, 2 * n + 2))
    assert [row[row != PADDING].tolist() for row in ids[2:4]] == [[UNKNOWN], [UNKNOWN]]
    assert ids[4].tolist().count(UNKNOWN) == 1
    assert fit(["ab", "ab", "cd"], vocab_size=4).vocab_size == 4
    with pytest.raises(ValueError, match="--min-freq 1"):
        fit(["ab", "cd"], min_freq=3)


@pytest.mark.parametrize("segment", ["words", "subwords", "characters"])
def test_tokens(segment):
    texts = ["the film was good", "the film was bad", "the 영화 was good"] * 5 + ["rare 龍"]
    fitted = fit(texts, segment=segment, min_freq=2, max_length=17)
    ids = fitted(["the film was good", "the film was good " * 9, "龍", ""])
    assert (ids[2] != PADDING).sum() >= 1 and UNKNOWN in ids[2]
    assert ids[3].tolist()[0] == UNKNOWN and (ids[3][1:] == PADDING).all()
    expected = {"words": 4, "characters": 17}
    if segment in expected:
        assert (ids[0] != PADDING).sum() == expected[segment]
    assert ids.shape[1] <= fitted.max_length and (ids[1] != PADDING).sum() == fitted.max_length
    assert fit(texts, segment=segment, min_freq=2, max_length=17) == fitted
    again = TextPreprocessor(**json.loads(json.dumps(asdict(fitted))))
    assert torch.equal(again(texts), fitted(texts))


def test_equally_frequent_characters_make_one_vocabulary_no_larger_than_asked():
    """Chinese has no spaces, and more characters than --vocab-size: the trainer's own choice of them is random."""
    texts = ["".join(chr(0x4E00 + (i * 7 + j) % 600) for j in range(20)) for i in range(90)]
    for options in ({"min_freq": 3}, {"vocab_size": 50}, {"vocab_size": 4}):
        fits = [fit(texts, segment="subwords", **options) for _ in range(3)]
        assert fits[0] == fits[1] == fits[2] and fits[0].vocab_size <= options.get("vocab_size", 8000)
    assert fits[0].decisions()[0][2].endswith("2 subwords there 1 times or more; at most 32 tokens")
    with pytest.raises(UserError, match="nothing in it is there 3 times or more"):
        fit(["龍", "馬"], segment="subwords", min_freq=3)


def test_statistics_are_of_the_training_texts_alone(tmp_path):
    table = reviews().assign(review=lambda t: [f"{w} unique{i:03}" for i, w in enumerate(t["review"])])
    run = text_run(tmp_path / "run", table=table, data={"min_freq": 1, "segment": "words", "clean": ("case",)})
    known = set(json.loads(run.pipeline.preprocessor.vocabulary)["model"]["vocab"])
    splits = load_splits(DataConfig(target="binary", text="review"), 0, table)
    assert {w.split()[-1] for w in splits.train["review"]} <= known
    assert not {w.split()[-1] for w in [*splits.val["review"], *splits.test["review"]]} & known


def test_the_number_of_processes_changes_nothing(monkeypatch):
    texts = reviews(900)["review"].tolist()
    one = fit(texts)
    ids = one(texts)
    for characters in (10**6, 100):
        monkeypatch.setattr(text_module, "CHUNK", 50)
        monkeypatch.setattr(text_module, "CHUNK_CHARACTERS", characters)
        monkeypatch.setattr(text_module, "count_cores", lambda: 3)
        assert fit(texts) == one and torch.equal(one(texts), ids)


def test_long_texts_are_hashed_a_few_at_once():
    parts = list(text_module._in_parts(lambda part: [len(text) for text in part], ["", "x" * 700_000, "y"] * 3))
    assert parts == [[0, 700_000, 1, 0], [700_000, 1, 0], [700_000, 1]]


def test_the_end_of_a_very_long_text_is_not_cleaned():
    fitted = fit(["ab cd"] * 3, max_length=5)
    texts = ["ab cd" + "<>" * 50_000, " " * 9_995 + "ab cd", " " * 9_996 + "ab cd"]
    ids = fitted(texts)
    assert torch.equal(ids[1], fitted(["ab cd"])[0]) and (ids[2] == UNKNOWN).any()
    records = fitted.examples(pd.DataFrame({"t": texts}), 3)
    assert [len(record["t"]) for record in records] == [10_000] * 3 and torch.equal(fitted(records), ids)


def test_cells_of_any_type_are_texts():
    assert read_texts(pd.DataFrame({"t": [1.0, 2.5, None]}), "t") == ["1", "2.5", ""]
    assert read_texts(pd.DataFrame({"t": ["NA", None, 7, float("nan")]}), "t") == ["NA", "", "7", ""]
    assert read_texts(["a", "b"], "t") == ["a", "b"] and read_texts({"t": "x"}, "t") == ["x"]
    with pytest.raises(ValueError, match="column 't' is missing"):
        read_texts([{"T": "x"}], "t")


# ---------------------------------------------------------------- batches


def test_ragged_batches_are_padded_to_their_longest():
    flat, lengths = torch.arange(1, 11, dtype=torch.int32), torch.tensor([3, 1, 4, 2])
    texts = Ragged(flat, lengths)
    assert texts[torch.tensor([1, 3])].tolist() == [[4, 0], [9, 10]]
    assert texts[torch.tensor([0])].tolist() == [[1, 2, 3]] and texts[torch.tensor([], dtype=torch.int64)].shape == (
        0,
        0,
    )


@given(st.integers(1, 200), st.integers(2, 40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_batches_by_length_hold_every_record_once(count, size, seed):
    torch.manual_seed(seed)
    lengths = torch.randint(1, 100, (count,))
    batches = list(BatchIndices(count, size, shuffle=True, lengths=lengths))
    assert torch.cat(batches).sort().values.tolist() == list(range(count))
    assert len(batches) == len(BatchIndices(count, size, shuffle=True)) and min(map(len, batches)) > (count > 1)


def test_batches_by_length_are_random_and_hardly_padded():
    lengths = torch.randint(1, 500, (4096,), generator=torch.Generator().manual_seed(0))
    sampler = BatchIndices(4096, 32, shuffle=True, lengths=lengths)
    batches = list(sampler)
    padded = sum(int(lengths[b].max()) * len(b) for b in batches) / int(lengths.sum())
    assert padded < 1.1
    assert {tuple(b.tolist()) for b in batches}.isdisjoint(tuple(b.tolist()) for b in sampler)
    means = torch.tensor([lengths[b].float().mean() for b in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3  # short and long ones take turns


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_neighbours_never_change_logits(name):
    facts = {"vocab_size": 50, "max_length": 30, "padding": 0, "out_features": 3, "activation": "relu", "dropout": 0.1}
    torch.manual_seed(0)
    model = build_model(name, facts | {"hidden": [32, 32], "batch_norm": True}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    texts = [torch.randint(1, 50, (n,), dtype=torch.int32) for n in (1, 5, 20, 30)]
    together = model(nn.utils.rnn.pad_sequence(texts, batch_first=True))
    alone = torch.cat([model(text[None]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5) and together.isfinite().all()


def test_the_unknown_id_is_trained(text_runs):
    """Its vector is not where it began: no text of the test would train it, were it not seen in training."""
    for model in MODELS:
        run = text_runs[model, "binary"]
        torch.manual_seed(0)
        facts = run.pipeline.network["facts"]
        table = run.pipeline.model.table if model == "bag" else run.pipeline.model.tokens
        torch.manual_seed(0)
        trained = table.weight[UNKNOWN].detach().clone()
        training = quick_run_weights(run, facts, model)
        assert not torch.allclose(trained, training, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_unknown_id_is_trained_where_all_are_known(name):
    """As with --min-freq 1. (Weight decay alone would change its vector: the gradient tells.)"""
    facts = {"vocab_size": 50, "max_length": 9, "padding": 0, "out_features": 3, "activation": "relu", "dropout": 0.1}
    torch.manual_seed(0)
    model, ids = build_model(name, facts), torch.randint(2, 50, (64, 9), dtype=torch.int32)
    before = ids.clone()
    model(ids).square().sum().backward()
    table = model.table if name == "bag" else model.tokens
    assert table.weight.grad[UNKNOWN].abs().max() > 0 and torch.equal(ids, before)


def quick_run_weights(run, facts, model):
    from trainer import seed_all

    seed_all(0, 0)
    fresh = build_model(run.pipeline.network["name"], facts)
    return (fresh.table if model == "bag" else fresh.tokens).weight[UNKNOWN].detach()


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("model", MODELS)
def test_it_learns(text_runs, model):
    assert text_runs[model, "binary"].test["accuracy"] > 0.9
    assert text_runs[model, "regression"].test["r2"] > 0.5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", ["binary", "multiclass", "regression"])
def test_every_way_to_ask_gives_the_same_answers(text_runs, model, target, tmp_path):
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
    records.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    records.to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n".join(t.replace("\n", " ") for t in texts) + "\n", encoding="utf-8")
    for name in ("a.csv", "b.jsonl", "c.parquet", "d.txt"):
        done = command(
            "predict.py", "--checkpoint", checkpoint, "--input", tmp_path / name, "--output", tmp_path / "o.csv"
        )
        assert done.returncode == 0, done.stderr.decode()
        answers = pd.read_csv(tmp_path / "o.csv")
        pd.testing.assert_frame_equal(answers, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert ("accuracy" in done.stdout.decode()) is False


def test_standard_input_is_a_table_or_lines(text_runs):
    run = text_runs["bag", "binary"]
    expected = run.pipeline.predict(["lovely film", "a waste, boring"])["prediction"].tolist()
    for text in ("lovely film\na waste, boring\n", 'id,review\n1,lovely film\n2,"a waste, boring"\n'):
        done = command("predict.py", "--checkpoint", run.out / "best.pt", "--input", "-", stdin=text.encode())
        assert done.returncode == 0, done.stderr.decode()
        assert [line.split(",")[0] for line in done.stdout.decode().splitlines()[1:]] == expected


def test_the_text_column_is_found_where_nothing_else_is(tmp_path):
    table = reviews()[["review", "binary"]]
    splits = load_splits(DataConfig(target="binary"), 0, table)
    assert splits.text == "review" and "--text review" in splits.notes[0]
    with_id = table.assign(customer_id=np.arange(len(table)))
    assert load_splits(DataConfig(target="binary"), 0, with_id).text == "review"
    with_number = table.assign(age=np.random.default_rng(0).normal(size=len(table)))
    assert load_splits(DataConfig(target="binary"), 0, with_number).text == ""
    assert load_splits(DataConfig(target="binary", columns=("age=drop",)), 0, with_number).text == "review"
    assert list(load_splits(DataConfig(target="binary", text="review"), 0, with_number).train) == ["review", "binary"]


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
    assert splits.text == "text" and splits.target == "label"
    assert any("이 영화는" in words for words in splits.train["text"])
    done = command("train.py", "--data", tmp_path / "texts", "--epochs", 2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["model"] == "bag"


def test_the_bundled_example(tmp_path):
    done = command("train.py", "--data", "docstrings", "--epochs", 12, "--lr", 0.005, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr.decode()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.75 and "asyncio" in metrics["classes"]
    done = command(
        "predict.py", "--checkpoint", tmp_path / "run" / "best.pt", "--input", tmp_path / "run" / "sample.csv"
    )
    assert done.returncode == 0 and done.stdout.count(b"\n") == 6


@pytest.mark.parametrize(("model", "where"), [("bag", "step"), ("transformer", "step"), ("bag", "evaluate")])
def test_interrupted_and_resumed(tmp_path, monkeypatch, model, where):
    table = reviews()[["review", "binary"]]
    data = DataConfig(target="binary", text="review", batch_size=16)
    model = ModelConfig(model=model, hidden=(32, 32))
    interrupted_run(tmp_path / "a", where, 3, monkeypatch, table=table, data=data, model=model)
    quick_run(tmp_path / "b", table, data=data, model=model)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_the_same_seed_gives_the_same_bits_in_another_process(tmp_path):
    """Sub-word training, hashing and the order of words must not follow Python's random hash of strings."""
    reviews()[["review", "binary"]].to_csv(tmp_path / "a.csv", index=False)
    for model in MODELS:
        seen = set()
        for i in range(2):
            out = tmp_path / f"{model}{i}"
            flags = ["--data", tmp_path / "a.csv", "--target", "binary", "--epochs", 2, "--model", model, "--out", out]
            done = command("train.py", *flags, env={"PYTHONHASHSEED": str(i)})
            assert done.returncode == 0, done.stderr.decode()
            seen.add(fingerprint(out)[0])
        assert len(seen) == 1


def test_the_checkpoint_is_plain(text_runs):
    for run in text_runs.values():
        state = read_checkpoint(run.out / "best.pt")
        json.dumps({k: v for k, v in state.items() if k != "state_dict"}, allow_nan=False)
        assert state["kind"] == "text" and set(state["golden"]["records"][0]) == {"review"}


# ---------------------------------------------------------------- bad input


def test_strange_texts_are_answered(text_runs):
    strange = ["", "x", "👍" * 50, "\0\0", "\ud800", "עברית " * 3, "word " * 200_000, "가" * 1_000_000, "   ", "ㅋ"]
    strange.append("".join(random.Random(0).choices("abcdefgh", k=1_000_000)))
    for model in MODELS:
        answers = text_runs[model, "binary"].pipeline.predict(strange)
        assert len(answers) == len(strange) and answers["probability"].between(0.5, 1).all()


def test_no_texts_and_a_column_that_is_there_twice(text_runs):
    for run in text_runs.values():
        expected = list(run.pipeline.predict(["lovely"]))
        for records in ([], reviews(5).head(0)):
            answers = run.pipeline.predict(records)
            assert answers.empty and list(answers) == expected
    twice = reviews(5)[["review", "review"]]
    with pytest.raises(UserError, match="column 'review' is there twice: rename one of them"):
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
    done = command("predict.py", "--checkpoint", checkpoint, "--input", tmp_path / "a.csv")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"\n") == 54


def test_damaged_utf8_is_named_by_its_row(text_runs, tmp_path):
    rows = [f"{words},{label}" for words, label in reviews(60)[["review", "binary"]].itertuples(index=False)]
    raw = "\n".join(["review,binary", *rows]).encode().split(b"\n")
    raw[17] = b"broken \xff\xfe letter,pos"
    (tmp_path / "a.csv").write_bytes(b"\n".join(raw))
    (tmp_path / "a.txt").write_bytes(b"\n".join(raw))
    flags = ["--data", tmp_path / "a.csv", "--target", "binary", "--text", "review", "--out", tmp_path / "run"]
    assert_refused(command("train.py", *flags), "a.csv: row 17 holds bytes that are no UTF-8")
    checkpoint = text_runs["bag", "binary"].out / "best.pt"
    assert_refused(command("predict.py", "--checkpoint", checkpoint, "--input", tmp_path / "a.csv"), "row 17")
    assert_refused(
        command("predict.py", "--checkpoint", checkpoint, "--input", tmp_path / "a.txt"), "a.txt", "no UTF-8"
    )


def test_bad_flags_are_refused(tmp_path):
    reviews()[["review", "binary"]].to_csv(tmp_path / "a.csv", index=False)
    base = ["--data", tmp_path / "a.csv", "--target", "binary", "--out", tmp_path / "run"]
    for flags, words in (
        (["--text", "reviews"], ["--text reviews", "Did you mean 'review'"]),
        (["--text", "binary"], ["--text binary is the target"]),
        (["--text", "review", "--image", "review"], ["--image and --text"]),
        (["--text", "review", "--model", "mlp"], ["--model mlp reads no texts"]),
        (["--clean", "lower"], ["--clean", "lower"]),
        (["--model", "hf"], ["--model hf needs a name"]),
        (["--model", "hf:x", "--clean", "--vocab-size", "50"], ["--clean, --vocab-size: not for --model hf:x"]),
        (["--model", "transformer", "--segment", "ngrams"], ["--model transformer", "--segment ngrams"]),
        *((["--vocab-size", n], ["--vocab-size is 4 or more, not"]) for n in (1, 3)),
        (["--text", "review", "--min-freq", "1000"], ["--min-freq 1"]),
        (["--model", "transformer", "--hidden", "32", "64"], ["--hidden is one width"]),
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
    code += f"sys.path.insert(0, {str(ROOT)!r}); import train, errors; errors.run(train.main)"
    flags = ["--data", str(tmp_path / "a.csv"), "--target", "binary", "--model", "hf:some/model"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, cwd=tmp_path, check=False)
    assert_refused(done, "--model hf:some/model needs another library: pip install transformers")


def test_a_pretrained_encoder_is_tuned_and_travels(tmp_path):
    """A tiny encoder with random weights, made here, stands for one from the hub."""
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
    run = text_run(tmp_path / "run", table=reviews(600), model=f"hf:{tmp_path / 'hub'}", epochs=12, lr=3e-3)
    assert run.test["accuracy"] > 0.9
    (tmp_path / "hub").rename(tmp_path / "gone")  # the checkpoint needs it no more
    loaded = Pipeline.load(run.out / "best.pt")
    records = reviews(20, seed=4)
    pd.testing.assert_frame_equal(loaded.predict(records), run.pipeline.predict(records), rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gone")
    assert loaded.preprocessor(["this one: great"])[0].tolist() == tokenizer("this one: great")["input_ids"]


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
    known, raw = run.pipeline.preprocessor, ["Don't stop, it's great!", "a\u200bb\tc  d", tokenizer.decode([0])]
    for text, ids in zip(raw, known(raw), strict=True):
        assert ids[ids != known.padding].tolist() == tokenizer(text)["input_ids"]
    assert known.max_length == 64 and tokenizer(raw[2])["input_ids"] == [0]
    answers = run.pipeline.predict([*raw, "", "\ud800"])
    alone = pd.concat([run.pipeline.predict([text]) for text in raw])
    assert np.allclose(answers["probability"][:3], alone["probability"], atol=1e-6) and answers.notna().all(axis=None)


def test_what_a_pretrained_network_cannot_read_is_refused(hub):
    for name, words in (("gpt2", "reads no 65 tokens: give a lower --max-length"), ("t5", "is a t5: only encoders")):
        with pytest.raises(UserError, match=words):
            text_run(hub / "run", model=f"hf:{hub / name}", data={"max_length": 65})


def test_replacing_a_field_of_a_preprocessor_makes_a_new_one():
    fitted = fit(["abc def"] * 3)
    shorter = replace(fitted, max_length=3)
    assert shorter(["abc def"]).shape[1] < fitted(["abc def"]).shape[1]


def test_a_folder_of_texts_is_learned_and_answered_by_file(tmp_path):
    for i, row in enumerate(reviews(60).itertuples()):
        path = tmp_path / "texts" / row.binary / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row.review, encoding="utf-8")
    run = quick_run(tmp_path / "run", None, data=DataConfig(data=str(tmp_path / "texts")), epochs=2)
    command(
        "predict.py", "--checkpoint", run.out / "best.pt", "--input", tmp_path / "texts", "--output", tmp_path / "a.csv"
    )
    answers = pd.read_csv(tmp_path / "a.csv")
    files = sorted((tmp_path / "texts").rglob("*.txt"))
    assert answers["file"].tolist() == list(map(str, files))
    asked = run.pipeline.predict([path.read_text(encoding="utf-8") for path in files])
    assert np.allclose(answers["probability"], asked["probability"], atol=1e-6)


@pytest.mark.parametrize("letters", ["", "\nfílm è,pos"])
def test_a_byte_that_is_no_utf8_is_named_by_its_row(tmp_path, letters):
    rows = "".join(f"\nfine film {i},pos\nbad film {i},neg" for i in range(20))
    (tmp_path / "t.csv").write_bytes(f"text,label{letters}{rows}\nbro".encode() + b"\xffken,pos" + rows.encode())
    with pytest.raises(UserError, match=f"row {41 + bool(letters)} holds bytes that are no UTF-8"):
        read_table(tmp_path / "t.csv")
