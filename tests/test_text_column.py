"""Texts in any language are cleaned, cut into parts and encoded, the same way in training and in prediction."""

import base64
import itertools
import json
import random
import re
import string
import time
import uuid
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import preprocessing.text as text_module
from config import DataConfig, from_plain
from errors import UserError
from preprocessing.cleaning import CLEANING, clean, replace_surrogates
from preprocessing.column import Cells
from preprocessing.ngrams import hash_ngrams
from preprocessing.preprocessor import Preprocessor, as_frame
from preprocessing.ragged import PADDING, UNKNOWN, Ragged, RaggedColumns
from preprocessing.text import TextColumn, holds_words, read_texts

GOOD = ["lovely", "great", "참 재밌어요", "wonderful 👍", "최고예요", "brilliant!!!"]
BAD = ["awful", "boring", "정말 지루해요", "terrible 👎", "별로예요", "a waste..."]
REST = ["the film was", "이 영화는", "I thought it was", "배우들은", "this one:", "האמת", "<b>plot</b> &amp; cast"]
TOKENIZERS = ("ngrams", "words", "subwords", "characters")


def reviews(rows: int) -> list[str]:
    """Short reviews in English, Korean and a little Hebrew."""
    draw = np.random.default_rng(0)
    return [f"{draw.choice(REST)} {draw.choice(GOOD + BAD)} {draw.choice(REST)}" for _ in range(rows)]


def column(texts, name="t") -> pd.Series:
    return pd.Series(texts, index=pd.RangeIndex(1, len(texts) + 1), name=name, dtype=None if len(texts) else "str")


def fit(texts, **options) -> TextColumn:
    return TextColumn.fit_encode(column(texts), DataConfig(**{"min_freq": 1} | options))[0]


def padded(encoded):
    return encoded[torch.arange(len(encoded))]


def ids(fitted, texts):
    """Padded ids (N, ids of the longest text)."""
    return padded(fitted.encode(column(texts)))


# ---------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("step", "raw", "expected"),
    [
        ("unicode", "ﬁne ＡＢＣ cafe\u0301", "fine ABC café"),
        ("unicode", "ㅋㅠ \u1100\u1161", "ㅋㅠ 가"),
        ("html", "a <b>bold</b><br/> &lt;3 R&amp;D x < y", "a bold < 3 R & D x < y"),
        ("marks", "see https://a.bc/d?e=f or me.you@mail.example.org, 12.5%", "see xxurl or xxmail , 12 . 5 %"),
        ("digits", "2,499 for 1 or ٣", "0 , 000 for 0 or 0"),
        ("repeats", "sooooo gooood!!! 1000 ㅋㅋㅋㅋ", "soo good ! ! 1000 ㅋㅋ"),
        ("case", "LOUD Ümlaut", "loud ümlaut"),
    ],
)
def test_each_step_of_cleaning(step, raw, expected):
    assert clean(raw, [step]) == expected
    assert clean(raw, [s for s in CLEANING if s != step]) != clean(raw, list(CLEANING))


def test_numbers_in_texts_are_kept_unless_digits_are_cleaned():
    """The year in a title says more than that it is a number."""
    assert "digits" in CLEANING and "digits" not in DataConfig().clean


def test_words_of_any_script_stay_whole():
    assert clean("नमस्ते दुनिया", []).split() == ["नमस्ते", "दुनिया"]
    assert clean("don't—stop，好。", []).split() == ["don", "'", "t", "—", "stop", "，", "好", "。"]
    assert clean("a\0b\u200bc\u00a0e\n\tf", []) == "a bc e f"


def test_halves_of_surrogate_pairs_are_replaced_in_every_cell():
    assert replace_surrogates("c\ud800d 👍") == "c?d 👍"
    strange = pd.Series(["c\ud800d", "x"], name="t", dtype=object)
    assert read_texts(strange) == ["c?d", "x"]
    for tokenizer in TOKENIZERS:
        fitted, encoded = TextColumn.fit_encode(strange, DataConfig(min_freq=1, tokenizer=tokenizer))
        assert len(encoded) == 2 and torch.equal(padded(encoded), padded(fitted.encode(strange)))
        json.dumps(fitted.examples(strange), ensure_ascii=False).encode()


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_cleaning_twice_changes_no_word_edges(text):
    cleaned = clean(text, list(CLEANING))
    assert clean(cleaned, []) == cleaned
    assert "\n" not in cleaned and "  " not in cleaned and cleaned == cleaned.strip()


@pytest.mark.parametrize("length", [40, 100_000])
def test_no_text_takes_longer_than_its_length(length):
    """Random letters, and the beginnings of entities, addresses and accents without an end."""
    letters = "".join(random.Random(0).choices("abcdefgh", k=length))
    hooks = ["&", "<", "<!--", "www.", "a@", "a@b", "a.", "+", "Σ'", "\u0316\u0300", "&#9"]
    for text in [letters, "&#" + "9" * length + ";", *((hook * length)[:length] for hook in hooks)]:
        started = time.perf_counter()
        clean(text, list(CLEANING))
        assert time.perf_counter() - started < 1, text[:20]
    assert len(clean("ﷺ" * length, list(CLEANING))) < 2 * length + 2000  # each becomes 18 letters
    assert clean("محمد ﷺ", ["unicode"]) == "محمد صلى الله عليه وسلم"


@given(st.text(alphabet="ab@.+-é !", max_size=14))
@settings(max_examples=500, deadline=None)
def test_addresses_are_those_that_a_plain_search_finds(text):
    expected = re.sub(r"([\w.+-]+@[\w-]+\.\w[\w.-]*)+", " xxmail ", text)
    assert clean(text, ["marks"]) == clean(expected, [])


# ---------------------------------------------------------------- n-grams and ids


def slow_ngrams(text: str) -> list[str]:
    words = text.split()
    grams = [f" {w} "[i : i + k] for w in words for k in range(1, 6) for i in range(len(w) + 3 - k)]
    named = [word for word in words if word[0].isalnum()]
    return [g for g in grams if g != " "] + [w for w in words if len(w) > 3] + list(itertools.pairwise(named))


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
        for gram in set(grams):  # each alone has the same bucket, wherever it occurs
            gram_text = gram.strip() if isinstance(gram, str) else " ".join(gram)
            alone, _ = hash_ngrams([gram_text])
            alike = slow_ngrams(gram_text)
            if gram in alike and alike.count(gram) == 1 and len(set(alone)) == len(alone):
                bucket_of.setdefault(gram, set()).update(set(buckets[start:end]) & set(alone))
    assert all(found for found in bucket_of.values())


def test_frequent_ngrams_are_known_in_order_of_frequency():
    fitted = fit(["ab", "ab", "ab", "cd", "cd", "e"], min_freq=2, max_length=5)
    assert fitted.known == 2 * len(set(slow_ngrams("ab")))
    rows = ids(fitted, ["ab", "cd", "e", "", "ab zz"])
    n = len(slow_ngrams("ab"))
    assert set(rows[0].tolist()) - {PADDING} == set(range(2, n + 2))  # the most frequent first
    assert set(rows[1].tolist()) - {PADDING} == set(range(n + 2, 2 * n + 2))
    assert [row[row != PADDING].tolist() for row in rows[2:4]] == [[UNKNOWN], [UNKNOWN]]
    assert rows[4].tolist().count(UNKNOWN) == 1
    small = fit(["ab", "ab", "cd"], vocab_size=4)
    assert TextColumn.model_args([small])["vocab_size"] == 4
    with pytest.raises(UserError, match=r"column 't': none of its ngrams occur in at least 3 texts.*--min-freq 1"):
        fit(["ab", "cd"], min_freq=3)


@pytest.mark.parametrize("tokenizer", ["words", "subwords", "characters"])
def test_tokens(tokenizer):
    texts = ["the film was good", "the film was bad", "the 영화 was good"] * 5 + ["rare 龍"]
    options = {"tokenizer": tokenizer, "min_freq": 2, "max_length": 17}
    fitted = fit(texts, **options)
    rows = ids(fitted, ["the film was good", "the film was good " * 9, "龍", ""])
    assert (rows[2] != PADDING).sum() >= 1 and UNKNOWN in rows[2]
    assert rows[3].tolist()[0] == UNKNOWN and (rows[3][1:] == PADDING).all()
    expected = {"words": 4, "characters": 17}
    if tokenizer in expected:
        assert (rows[0] != PADDING).sum() == expected[tokenizer]
    assert rows.shape[1] <= fitted.max_length and (rows[1] != PADDING).sum() == fitted.max_length
    assert fit(texts, **options) == fitted
    again = from_plain(TextColumn, json.loads(json.dumps(asdict(fitted))))
    assert again == fitted and torch.equal(ids(again, texts), ids(fitted, texts))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("max_length", [0, 7])
def test_fitting_encodes_the_training_texts_as_encode_does(tokenizer, max_length):
    texts = [*reviews(80), "", "word " * 3_000, " " * 9_996 + "ab cd", "x" * 90_000]
    values = column(texts)
    fitted, encoded = TextColumn.fit_encode(values, DataConfig(tokenizer=tokenizer, max_length=max_length))
    again = fitted.encode(values)
    assert torch.equal(encoded.flat, again.flat) and torch.equal(encoded.lengths, again.lengths)
    assert encoded.flat.dtype == torch.int32 and (encoded.lengths >= 1).all()


def test_each_training_text_is_cleaned_once(monkeypatch):
    cleaned = []
    monkeypatch.setattr(text_module, "clean", lambda text, steps: (cleaned.append(text), clean(text, steps))[1])
    texts = [f"{text} {i}" for i, text in enumerate(reviews(50))]
    for tokenizer in TOKENIZERS:
        cleaned.clear()
        fit(texts, tokenizer=tokenizer)
        assert cleaned == texts


def test_equally_frequent_characters_make_one_vocabulary_no_larger_than_requested():
    """Chinese has no spaces, and more characters than --vocab-size: the trainer's own choice of them is random."""
    texts = ["".join(chr(0x4E00 + (i * 7 + j) % 600) for j in range(20)) for i in range(90)]
    for options in ({"min_freq": 3}, {"vocab_size": 50}, {"vocab_size": 4}):
        fits = [fit(texts, tokenizer="subwords", **options) for _ in range(3)]
        assert fits[0] == fits[1] == fits[2]
        assert TextColumn.model_args(fits[:1])["vocab_size"] <= options.get("vocab_size", 8000)
    assert fits[0].summary().endswith("2 known subwords (they occur at least 1 times); truncated to 32 tokens")
    with pytest.raises(UserError, match="none of its subwords occur at least 3 times"):
        fit(["龍", "馬"], tokenizer="subwords", min_freq=3)


def test_the_number_of_processes_changes_nothing(monkeypatch):
    texts = reviews(900)
    one = fit(texts)
    expected = ids(one, texts)
    for characters in (10**6, 100):
        monkeypatch.setattr(text_module, "CHUNK", 50)
        monkeypatch.setattr(text_module, "CHUNK_CHARACTERS", characters)
        monkeypatch.setattr(text_module, "count_cores", lambda: 3)
        assert fit(texts) == one and torch.equal(ids(one, texts), expected)


def test_long_texts_are_hashed_a_few_at_a_time():
    parts = list(text_module._in_parts(lambda part: [len(text) for text in part], ["", "x" * 700_000, "y"] * 3))
    assert parts == [[0, 700_000, 1, 0], [700_000, 1, 0], [700_000, 1]]


def test_the_end_of_a_very_long_text_is_not_cleaned():
    fitted = fit(["ab cd"] * 3, max_length=5)
    texts = ["ab cd" + "<>" * 50_000, " " * 9_995 + "ab cd", " " * 9_996 + "ab cd"]
    rows = ids(fitted, texts)
    assert torch.equal(rows[1], ids(fitted, ["ab cd"])[0]) and (rows[2] == UNKNOWN).any()
    examples = fitted.examples(column(texts))
    assert [len(text) for text in examples] == [fitted.max_raw_chars] * 3 == [10_000] * 3
    assert torch.equal(ids(fitted, examples), rows)


def test_cells_of_any_type_are_texts():
    assert read_texts(pd.Series([1.0, 2.5, None])) == ["1", "2.5", ""]
    assert read_texts(pd.Series(["NA", None, 7, float("nan")])) == ["NA", "", "7", ""]
    assert read_texts(pd.Series([7.0, "a", np.float64(0.5), True, pd.NA, float("inf")])) == [
        *("7", "a", "0.5", "True", "", "inf")
    ]
    fitted = Preprocessor((fit(["a", "b", "x"]),), {})
    for records, expected in ((["a", "b"], ["a", "b"]), ({"t": "x"}, ["x"]), ([], [])):
        assert read_texts(as_frame(records, "t")["t"]) == expected
        assert torch.equal(fitted(records)["text"], ids(fitted.columns[0], expected))
    with pytest.raises(UserError, match="column 't' is missing"):
        fitted([{"T": "x"}])


def test_replacing_a_field_of_a_column_makes_a_new_one():
    fitted = fit(["abc def"] * 3)
    shorter = replace(fitted, max_length=3)
    assert ids(shorter, ["abc def"]).shape[1] < ids(fitted, ["abc def"]).shape[1]


# ---------------------------------------------------------------- what others use of a column


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_several_columns_have_different_ids(tokenizer):
    texts = reviews(40)
    first, second = fit(texts, tokenizer=tokenizer), fit(texts[::2], tokenizer=tokenizer)
    moved = replace(second, offset=first.known)
    values = column([*texts, "zzz qqq", ""])
    plain, shifted = second.encode(values), moved.encode(values)
    assert torch.equal(plain.shift(first.known).flat, shifted.flat)
    assert torch.equal(shifted.flat <= UNKNOWN, plain.flat <= UNKNOWN)
    args = TextColumn.model_args([first, moved])
    assert args["known_sizes"] == [first.known, second.known] and args["padding"] == PADDING
    assert args["vocab_size"] == 2 + first.known + second.known
    assert args["max_length"] == first.max_length + second.max_length
    known = [set(part.flat.tolist()) - {PADDING, UNKNOWN} for part in (first.encode(values), shifted)]
    assert not known[0] & known[1] and max(known[1]) < args["vocab_size"] and min(known[1]) >= 2 + first.known


def test_unknown_texts_are_counted():
    fitted = fit(["good film", "bad film"] * 3, tokenizer="words", max_length=4)
    values = column(["good film", "film zzz", "zzz", "", "zzz qqq"])
    encoded = fitted.encode(values)
    assert fitted.unknown(values, encoded).tolist() == [False, False, True, True, True]
    assert replace(fitted, empty=True).unknown(values, encoded).tolist() == [False, False, True, False, True]
    why = [fitted.why_unknown(cell) for cell in ("zzz", "", " ", None)]
    assert why == ["'zzz' has no known words", *["the text is empty"] * 3]
    measured = fitted.profile_values(values, encoded)
    assert measured["t: length"].tolist() == [9, 8, 3, 0, 7]
    assert measured["t: unknown parts"].tolist() == [0, 1, 1, 1, 1]
    assert fitted.unknown(values, replace(fitted, offset=50).encode(values)).sum() == 3
    assert not len(fitted.unknown(column([]), fitted.encode(column([]))))
    np.testing.assert_array_equal(fitted.parse(values), padded(encoded).numpy())
    assert fitted.json_schema({}, []) == {
        "type": ["string", "number", "boolean", "null"],
        "maxLength": 100_000,
        "x-kind": "text",
    }


# ---------------------------------------------------------------- batches


def test_ragged_batches_are_padded_to_their_longest():
    flat, lengths = torch.arange(1, 11, dtype=torch.int32), torch.tensor([3, 1, 4, 2])
    texts = Ragged(flat, lengths)
    assert texts[torch.tensor([1, 3])].tolist() == [[4, 0], [9, 10]]
    assert texts[torch.tensor([0])].tolist() == [[1, 2, 3]]
    assert texts[torch.tensor([], dtype=torch.int64)].shape == (0, 0)
    assert texts.count(texts.flat > 4).tolist() == [0, 0, 4, 2]
    assert texts.shift(7)[torch.tensor([0])].tolist() == [[1, 9, 10]] and texts.shift(0) is texts
    assert Ragged.from_rows([[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]]).flat.tolist() == texts.flat.tolist()


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_ragged_columns_stand_side_by_side(rows, seed):
    others = [row[::-1] * 2 for row in rows]
    both = RaggedColumns([Ragged.from_rows(rows, -1), Ragged.from_rows(others, -1)])
    chosen = torch.randint(0, len(rows), (4,), generator=torch.Generator().manual_seed(seed))
    assert len(both) == len(rows)
    for i, ids_of_row in zip(chosen.tolist(), both[chosen], strict=True):
        assert ids_of_row[ids_of_row != -1].tolist() == rows[i] + others[i]
        assert both.lengths[i] == len(rows[i]) + len(others[i])


# ---------------------------------------------------------------- text or not


def is_text(texts) -> bool:
    return TextColumn.detect(Cells(column(texts)), DataConfig())


def code(kind: str, size: int, draw: random.Random, i: int) -> str:
    raw = draw.randbytes(size)
    return {
        "hexadecimal": raw.hex(),
        "uuid": str(uuid.UUID(bytes=draw.randbytes(16))),
        "base64": base64.b64encode(raw).decode(),
        "base64 for addresses": base64.urlsafe_b64encode(raw).decode(),
        "mac address": ":".join(raw[:6].hex()[j : j + 2] for j in range(0, 12, 2)),
        "letters and digits": "".join(draw.choices(string.ascii_uppercase + string.digits, k=size)),
        "prefix and number": f"CUST-{i:05}",
        "word and number": f"invoice {i}",
        "korean prefix": f"주문-{i:05}",
        "number": str(draw.randrange(10**size)),
    }[kind]


CODES = ("hexadecimal", "uuid", "base64", "base64 for addresses", "mac address", "letters and digits")
CODES += ("prefix and number", "word and number", "korean prefix", "number")


@pytest.mark.parametrize("kind", CODES)
@given(st.integers(6, 48), st.integers(20, 300), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_codes_and_ids_are_not_texts(kind, size, rows, seed):
    draw = random.Random(seed)
    codes = [code(kind, size, draw, i) for i in range(1, rows + 1)]
    assert not holds_words(pd.Series(codes))
    assert not is_text(codes)


SYLLABLES = ["ka", "ro", "mi", "ten", "sol", "bur", "ga", "lin", "pe", "vo", "strand", "ny"]
KOREAN = ["가", "나", "다", "라", "마", "바", "사", "아", "자", "차", "국", "밥", "집", "점", "강", "남"]


@given(st.integers(20, 60), st.integers(2, 4), st.integers(0, 2**32), st.sampled_from([SYLLABLES, KOREAN]))
@settings(max_examples=80, deadline=None)
def test_names_built_of_words_are_texts(vocabulary, length, seed, syllables):
    draw = random.Random(seed)
    words = sorted({"".join(draw.choices(syllables, k=3)) for _ in range(vocabulary)})
    separator = draw.choice([" ", "-", ", ", " & "])
    names = [separator.join(draw.sample(words, length)) for _ in range(200)]
    names = [draw.choice([name, name.title(), name.upper(), f"{name} No. {i}"]) for i, name in enumerate(names)]
    assert holds_words(pd.Series(names))
    assert is_text(names)


def test_what_is_text_and_what_is_not():
    korean = [
        "김밥천국 강남점",
        "김밥천국 서초점",
        "스타벅스 강남점",
        "스타벅스 잠실점",
        "이디야 서초점",
        "이디야 잠실점",
    ]
    assert is_text([f"{name} {i}" for i, name in enumerate(korean * 3)])
    endings = [f"{a} {b}" for a in ("Villa", "Roma", "Bella", "Luna") for b in ("Pizza", "Cafe", "Pasta", "House")]
    assert holds_words(pd.Series(endings)) and is_text(endings)  # words that end in hexadecimal letters
    people = [f"{a}{b}" for a in ("김민", "이서", "박지") for b in ("수", "준", "연", "우", "아")]
    assert holds_words(pd.Series(people)) and is_text(people)
    assert is_text(reviews(300) + [f"another good film {i}" for i in range(300)])
    assert not is_text(["red", "blue", "green"] * 50)  # a category
    assert not is_text([f"a text of many words {i}" for i in range(10)])  # too few to tell
    sequences = ["".join(random.Random(i).choices("ACGT", k=60)) for i in range(50)]
    assert is_text(sequences)  # long, and no codes
    assert not holds_words(pd.Series([], dtype="str"))


# ---------------------------------------------------------------- Hugging Face


def test_a_pretrained_tokenizer_and_its_network(tmp_path):
    """A tiny encoder with random weights, made here, represents one from the hub."""
    transformers = pytest.importorskip("transformers")
    from backbones.huggingface import Pretrained

    words = sorted({w for text in reviews(200) for w in re.findall(r"\w+|\S", text.lower())})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), strip_accents=False).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    values = pd.Series(["this one: great", "the film was", "\ud800", ""], name="t", dtype=object)
    fitted, encoded = TextColumn.fit_encode(values, DataConfig(tokenizer=f"hf:{tmp_path}"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert padded(encoded)[0].tolist()[: encoded.lengths[0]] == tokenizer("this one: great")["input_ids"]
    args = TextColumn.model_args([fitted, fitted])
    assert (args["vocab_size"], args["padding"], args["max_length"]) == (len(words) + 5, -1, 1024)
    marked = [fitted.unknown(values, encoded), replace(fitted, empty=False).unknown(values, encoded)]
    assert [mask.tolist() for mask in marked] == [[False] * 4, [False] * 3 + [True]] and fitted.own_ids == 0
    model = Pretrained(encoder=json.loads(config.to_json_string(use_diff=False)), padding=-1, out_features=3, dropout=0)
    model.start_from(str(tmp_path), 40)
    with pytest.raises(UserError, match="cannot read 1024 tokens: give a lower --max-length"):
        model.start_from(str(tmp_path), 1024)
    model.eval()
    assert model.features(padded(encoded)).shape == (4, model.width)
    side_by_side = RaggedColumns([encoded, fitted.encode(values[::-1])])
    batch = padded(side_by_side)  # padding between two texts changes nothing
    for i, row in enumerate(batch):
        assert torch.allclose(model(batch)[i], model(row[row != -1][None])[0], atol=1e-5)
