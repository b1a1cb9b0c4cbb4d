"""Text: cells → clean → segments → ids, the same way in training and when the model is asked. Any language."""

import ast
import base64
import html
import itertools
import re
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from errors import UserError
from huggingface import from_hugging_face
from preprocessing import as_frame, count_cores, spread

PADDING, UNKNOWN = 0, 1  # the first ids; those of known segments follow, the most frequent first
LONGEST_NGRAM = 5  # characters, the mark of a word's edge among them
BUCKET_BITS = 22  # of the hash of an n-gram: 4 million buckets, of which the frequent ones get ids
VOCAB_SIZES = {"ngrams": 2**18, "words": 30_000, "subwords": 8_000, "characters": 8_000}
SHORTEST = 32  # so that a model of short texts reads somewhat longer ones, too
LONGEST = {"ngrams": 8192, "words": 512, "subwords": 512, "characters": 512}  # of what is chosen without being asked
TEXTS_AT_ONCE = 1024  # of those that predict.py pads to one length
CHUNK, CHUNK_CHARACTERS = 4096, 2**20  # that are hashed at once, at most: about 180 bytes of memory a character

# ---------------------------------------------------------------- clean


def _unicode(text: str) -> str:
    """One code for what looks the same (NFKC), but ㅋㅠ stay two letters, where NFKC would join them to a syllable.

    At most 1,000 characters at once: the time to sort accents that lie upon each other grows with their square.
    """
    if unicodedata.is_normalized("NFKC", text):
        return text
    return re.sub(r"[^\s\u3131-\u318e]{1,1000}", lambda part: unicodedata.normalize("NFKC", part[0]), text)


def _html(text: str) -> str:
    """Tags and comments go, entities become their characters."""
    text = re.sub(r"</?[a-zA-Z][^<>]{0,500}>|<!--[^<>]{0,500}-->", " ", text)
    return html.unescape(re.sub(r"(&#\d{100})\d+", r"\1", text))  # Python reads no number of thousands of digits


def _marks(text: str) -> str:
    """Web addresses and e-mails become one word each, and each digit 0: 2,499 is 0,000."""
    text = re.sub(r"(?:https?://|www\.)\S+", " xxurl ", text, flags=re.IGNORECASE)
    # Tried at the beginning of a word alone, and never again for less: the time grows with the text, not its square
    text = re.sub(r"(?<![\w.+-])(?:[\w.+-]++@[\w-]++\.\w[\w.-]*+)++", " xxmail ", text)
    return re.sub(r"\d", "0", text)


def _repeats(text: str) -> str:
    """Of the same character three times or more in a row, two are left: sooooo is soo. Digits stay."""
    return re.sub(r"(\D)\1{2,}", r"\1\1", text)


# In this order; --clean names those that are wanted
CLEANING: dict[str, Callable[[str], str]] = {
    "unicode": _unicode,
    "html": _html,
    "repeats": _repeats,
    "marks": _marks,
    "case": str.lower,
}


class _Spaced(dict):
    """For str.translate: spaces around punctuation and symbols, none around letters of any script with their marks;
    control characters, and halves of surrogate pairs, are spaces, invisible format characters nothing."""

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        edges = f" {character} " if category[0] in "PS" else character
        self[code] = {"Cc": " ", "Cs": " ", "Cf": ""}.get(category, edges)
        return self[code]


SPACED = _Spaced()


def clean(text: str, steps: list[str]) -> str:
    """Return a text after the named steps of CLEANING, its words and punctuation parted by single spaces."""
    for name, step in CLEANING.items():
        if name in steps:
            text = step(text)
    return " ".join(text.translate(SPACED).split())


# ---------------------------------------------------------------- segments


class Ragged:
    """Ids of many texts without padding, one after the other."""

    def __init__(self, flat: Tensor, lengths: Tensor, padding: int = PADDING):
        self.lengths, self.padding = lengths, padding  # int64 (N,)
        self.starts = lengths.cumsum(0) - lengths
        beyond = flat.new_full((int(lengths.max()) if len(lengths) else 0,), padding)
        self.flat = torch.cat([flat, beyond])  # int32; a window as long as any text can begin at each text

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the texts of a batch, (N, ids of the longest), padded at their ends."""
        lengths = self.lengths[rows]
        longest = int(lengths.max()) if len(rows) else 0
        windows = self.flat.unfold(0, max(1, longest), 1)[:, :longest]  # a view: (all places, longest)
        ids = windows.index_select(0, self.starts[rows])
        return ids.masked_fill_(torch.arange(longest) >= lengths[:, None], self.padding)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Spread uint64 numbers over all 64 bits (the finaliser of SplitMix64, Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def hash_ngrams(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (buckets, offsets) of all n-grams of 1 … 5 characters inside the words of cleaned texts.

    A word's edge counts as a character, so that " un" is a beginning and "ed " an end. All texts are gone through at
    once, as one array of code points: a hash of n characters comes from that of n - 1. Source of the features:
    Bojanowski et al., "Enriching Word Vectors with Subword Information", 2017; of hashing: Weinberger et al., 2009.
    """
    joined = "".join(f" {text} \n" for text in texts)
    points = np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    ends, edge = points == ord("\n"), (points == ord("\n")) | (points == ord(" "))
    place, text_of = np.arange(len(points)), np.cumsum(ends) - ends
    next_edge = np.minimum.accumulate(np.where(edge, place, len(points))[::-1])[::-1]  # at a place or after it
    next_edge = np.append(next_edge[1:], len(points))  # after it
    empty = ends | (edge & (next_edge == place + 1))  # begins no word
    letters, hashes = _mixed(points + np.uint64(1)), np.zeros(len(points), dtype=np.uint64)
    buckets, owners = [], []
    for size in range(1, LONGEST_NGRAM + 1):
        count = max(0, len(points) - size + 1)
        hashes = _mixed(hashes[:count] * np.uint64(3) + letters[size - 1 :])
        inside = (place[:count] + size - 1 <= next_edge[:count]) & ~empty[:count]
        if size == 1:
            inside &= ~edge
        buckets.append((hashes[inside] >> np.uint64(64 - BUCKET_BITS)).astype(np.int32))
        owners.append(text_of[:count][inside])
    buckets, owners = np.concatenate(buckets), np.concatenate(owners)
    order = np.argsort(owners, kind="stable")
    return buckets[order], np.searchsorted(owners[order], np.arange(len(texts) + 1))


def _clean_part(texts: list[str], steps: list[str]) -> list[str]:
    return [clean(text, steps) for text in texts]


def _as_utf8(texts: list[str]) -> list[str]:
    """Leave texts to a tokenizer that knows how to clean them, but halves of surrogate pairs, which none can read."""
    return [text.encode("utf-8", "replace").decode() for text in texts]


def _hash_part(texts: list[str], steps: list[str], longest: int | None) -> tuple[np.ndarray, np.ndarray]:
    return hash_ngrams([clean(text, steps)[:longest] for text in texts])


def _in_parts(function: Callable, texts: list[str]) -> Iterator:
    """Call a function on parts of the texts, on all cores where there are many. The parts do not depend on that."""
    parts, room = [], -1  # characters
    for text in texts:
        room -= len(text)
        if room < 0 or len(parts[-1]) == CHUNK:
            parts.append([])
            room = CHUNK_CHARACTERS - len(text)
        parts[-1].append(text)
    if len(texts) < 8 * CHUNK or count_cores() == 1:
        yield from map(function, parts)
    else:
        with ProcessPoolExecutor(count_cores()) as pool:
            yield from pool.map(function, parts)


# ---------------------------------------------------------------- the preprocessor


@dataclass(frozen=True)
class TextPreprocessor:
    """What was learned of the training texts; `__call__` applies it."""

    column: str
    steps: list[str]  # of CLEANING
    segment: str  # ngrams, words, subwords, characters, or pretrained: a tokenizer that came with a network
    max_length: int  # longest text that is read: characters for ngrams, else tokens
    min_freq: int
    vocabulary: str  # ngrams: base64 of the int32 buckets, the most frequent first; else a tokenizer as JSON
    padding: int = PADDING  # the id of it

    @classmethod
    def fit(
        cls,
        records: pd.DataFrame,
        *,
        column: str,
        steps: list[str],
        segment: str,
        min_freq: int,
        vocab_size: int,
        max_length: int,
    ) -> "TextPreprocessor":
        """Learn from training records which segments are frequent enough to be known.

        segment: ngrams (of characters, in words), words, subwords (byte-pair encoding) or characters.
        min_freq: fewer texts with an n-gram, or occurrences of a token, make it unknown.
        vocab_size: of the most frequent; 0 = VOCAB_SIZES.  max_length: 0 = that of all but 1 % of the texts.
        Raises UserError where no segment is frequent enough.
        """
        texts = read_texts(records, column)
        size = (vocab_size or VOCAB_SIZES[segment]) - 2  # padding and unknown
        cleaned = [text for part in _in_parts(partial(_clean_part, steps=steps), texts) for text in part]
        if segment == "ngrams":
            longest = max_length or _usual_length(map(len, cleaned), LONGEST[segment])
            vocabulary = _frequent_buckets(cleaned, longest, min_freq, size)
        else:
            tokenizer = _train_tokenizer(cleaned, segment, min_freq, size + 2)
            lengths = (len(tokens.ids) for tokens in tokenizer.encode_batch_fast(cleaned))
            longest = max_length or _usual_length(lengths, LONGEST[segment])
            vocabulary = tokenizer.to_str()
        fitted = cls(column, list(steps), segment, longest, min_freq, vocabulary)
        if fitted.vocab_size <= 2:
            raise UserError(f"column {column!r}: nothing in it is {fitted.often}. Give more texts, or --min-freq 1.")
        return fitted

    @classmethod
    def from_pretrained(cls, name: str, *, column: str, max_length: int) -> "TextPreprocessor":
        """Take the tokenizer of a Hugging Face model (a name or a folder), and no cleaning but its own.

        Raises UserError where `transformers` is not installed, or there is no such tokenizer, or no encoder of texts.
        """
        config = from_hugging_face("AutoConfig", name)
        if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
            raise UserError(f"--model hf:{name} is a {config.model_type}: only encoders of texts can be tuned.")
        tokenizer = from_hugging_face("AutoTokenizer", name)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"--model hf:{name}: its tokenizer is none of the `tokenizers` library.")
        inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        inner.no_padding()
        inner.no_truncation()
        positions = getattr(config, "max_position_embeddings", None) or LONGEST["subwords"]
        longest = max_length or min(LONGEST["subwords"], positions, tokenizer.model_max_length)
        return cls(column, [], "pretrained", longest, 1, inner.to_str(), padding=-1)  # no token, not even one in a text

    @property
    def often(self) -> str:
        """What makes a segment known, in words."""
        how = "in {} texts or more" if self.segment == "ngrams" else "there {} times or more"
        return how.format(self.min_freq)

    @property
    def vocab_size(self) -> int:
        return len(self._buckets) + 2 if self.segment == "ngrams" else self._tokenizer.get_vocab_size()

    @property
    def looked_at(self) -> int:
        """Characters of a raw text that are cleaned: enough for max_length, and no service waits for the rest."""
        return max(10_000, 10 * self.max_length)

    @property
    def model_args(self) -> dict:
        """vocab_size: ids 0 … vocab_size - 1.  max_length: ids of the longest text."""
        return {"vocab_size": self.vocab_size, "max_length": self.max_length, "padding": self.padding}

    @cached_property
    def _buckets(self) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.vocabulary), dtype="<i4")

    @cached_property
    def _id_of_bucket(self) -> np.ndarray:
        ids = np.full(2**BUCKET_BITS, UNKNOWN, dtype=np.int32)
        ids[self._buckets] = np.arange(2, len(self._buckets) + 2)
        return ids

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.vocabulary)
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def __call__(self, records) -> Tensor:
        """Turn records (DataFrame, dict, list of dicts or of strings) into ids, int32 (N, ids of the longest text).

        Raises UserError where the column is missing.
        """
        ids = self.ids(records)
        return ids[torch.arange(len(ids))]

    def ids(self, records) -> Ragged:
        """Turn records into ids without padding. Every text has one id at least."""
        texts = [text[: self.looked_at] for text in read_texts(records, self.column)]
        if self.segment == "ngrams":
            parts = _in_parts(partial(_hash_part, steps=self.steps, longest=self.max_length), texts)
            parts = [self._known(buckets, offsets) for buckets, offsets in parts]
            flat = np.concatenate([flat for flat, _ in parts] or [np.empty(0, np.int32)])
            lengths = np.concatenate([lengths for _, lengths in parts] or [np.empty(0, np.int64)])
        else:
            tidy = _as_utf8 if self.segment == "pretrained" else partial(_clean_part, steps=self.steps)
            cleaned = [text for part in _in_parts(tidy, texts) for text in part]
            rows = [tokens.ids or [UNKNOWN] for tokens in self._tokenizer.encode_batch_fast(cleaned)]
            lengths = np.array([len(row) for row in rows], dtype=np.int64)
            flat = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=lengths.sum())
        return Ragged(torch.from_numpy(flat), torch.from_numpy(lengths), self.padding)

    def _known(self, buckets: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (flat ids, how many each text has) of hashed texts: the known n-grams, then one UNKNOWN for all
        others together, which nearly every training text has."""
        ids = self._id_of_bucket[buckets]
        text_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        known = ids != UNKNOWN
        lengths = np.bincount(text_of[known], minlength=len(offsets) - 1)
        some_unknown = (np.diff(offsets) > lengths) | (lengths == 0)
        flat = np.full(lengths.sum() + some_unknown.sum(), UNKNOWN, dtype=np.int32)
        shift = np.cumsum(some_unknown) - some_unknown  # of a text, by the UNKNOWNs of those before
        flat[np.arange(known.sum()) + shift[text_of[known]]] = ids[known]
        return flat, lengths + some_unknown

    def examples(self, records: pd.DataFrame, count: int) -> list[dict]:
        """Return some records as dicts that JSON can hold."""
        texts = read_texts(spread(records, count), self.column)
        return [{self.column: text[: self.looked_at]} for text in texts]

    def measure(self, records, x: Tensor) -> dict[str, np.ndarray]:
        """Return the length of each text in characters, and whether anything in it is unknown, as 0 and 1."""
        lengths = [len(text) for text in read_texts(records, self.column)]
        unknown = (x == UNKNOWN).any(dim=1) if self.segment != "pretrained" else torch.zeros(len(x))
        return {"length": np.array(lengths, dtype=float), "unknown parts": unknown.double().numpy()}

    def count_unknown(self, x: Tensor) -> dict[str, int]:
        """Count the texts of which nothing was known, in a tensor that `__call__` returned."""
        count = 0 if self.segment == "pretrained" else int((x <= UNKNOWN).all(dim=1).sum())
        return {self.column: count} if count else {}

    def decisions(self) -> list[tuple[str, str, str]]:
        """(column, kind, what becomes of it), to show to a person."""
        if self.segment == "pretrained":
            return [(self.column, "text", f"its network's own tokenizer; at most {self.max_length} tokens")]
        parts = f"{self.vocab_size - 2:,} {self.segment} {self.often}"
        unit = "characters" if self.segment == "ngrams" else "tokens"
        steps = ", ".join(self.steps) or "no cleaning"
        return [(self.column, "text", f"{steps} → {parts}; at most {self.max_length} {unit}")]


def read_texts(records, column: str) -> list[str]:
    """Return a column as strings: empty cells as "", whole numbers without a point. Raises UserError without it."""
    values = as_frame(records, column)[column]
    if pd.api.types.is_float_dtype(values.dtype):
        return ["" if pd.isna(v) else str(int(v)) if v.is_integer() else repr(v) for v in values.tolist()]
    return ["" if empty else str(v) for v, empty in zip(values.tolist(), values.isna(), strict=True)]


def _usual_length(lengths: Iterable[int], longest: int) -> int:
    """Return the length of all but the longest 1 % of the training texts, within reason."""
    return min(longest, max(SHORTEST, int(np.percentile(list(lengths), 99, method="higher"))))


def _frequent_buckets(cleaned: list[str], longest: int, min_freq: int, size: int) -> str:
    """Count the texts that hold each n-gram, in constant memory; return the frequent ones as `vocabulary`."""
    counts = np.zeros(2**BUCKET_BITS, dtype=np.int64)
    for buckets, offsets in _in_parts(partial(_hash_part, steps=[], longest=longest), cleaned):
        text_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        pairs = np.sort(text_of << BUCKET_BITS | buckets)  # (np.unique takes forty times as long)
        once = pairs[np.append(True, np.diff(pairs) > 0)[: len(pairs)]]
        counts += np.bincount(once & (2**BUCKET_BITS - 1), minlength=2**BUCKET_BITS)
    frequent = np.argsort(-counts, kind="stable")[: min(size, int((counts >= min_freq).sum()))]
    return base64.b64encode(frequent.astype("<i4").tobytes()).decode()


def _train_tokenizer(cleaned: list[str], segment: str, min_freq: int, size: int) -> Tokenizer:
    """Train a tokenizer of words, byte-pair sub-words (Sennrich et al., 2016) or characters on cleaned texts."""
    special = {"special_tokens": ["[PAD]", "[UNK]"], "vocab_size": size, "min_frequency": min_freq}
    special["show_progress"] = False
    if segment == "subwords":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        counts = Counter(itertools.chain.from_iterable(cleaned))
        known = [c for c in sorted(counts, key=lambda c: (-counts[c], c)) if counts[c] >= min_freq and c not in " ▁"]
        # The trainer would choose among equally frequent ones at random, and make room for all
        alphabet = ["▁", *known[: size - 3]] if known else []
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, limit_alphabet=len(alphabet), **special)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = (
            pre_tokenizers.WhitespaceSplit() if segment == "words" else pre_tokenizers.Split("", "isolated")
        )
        trainer = trainers.WordLevelTrainer(**special)
    tokenizer.train_from_iterator(cleaned, trainer)
    return tokenizer


# ---------------------------------------------------------------- the bundled example


PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")


def load_docstrings() -> pd.DataFrame:
    """Return the docstrings of Python's own library, and the package that each comes from.

    Read from the source files beside the interpreter; nothing is imported. Raises UserError where they are not there.
    """
    library, rows = Path(sysconfig.get_paths()["stdlib"]), {}
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text and len(text.split()) >= 4:
                    rows.setdefault(text, package)
    if len(set(rows.values())) < len(PACKAGES):
        raise UserError(f"--data docstrings: Python's library is not there as source files in {library}.")
    index = pd.RangeIndex(1, len(rows) + 1, name="row")
    return pd.DataFrame({"docstring": list(rows), "package": list(rows.values())}, index=index)
