"""A column of free text: cells → clean texts → n-grams or tokens → ids. Any language, with or without spaces."""

import base64
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from config import DataConfig
from errors import UserError
from preprocessing.cleaning import clean, replace_surrogates
from preprocessing.column import Cells, Column, shorten
from preprocessing.hub import load_tokenizer
from preprocessing.ngrams import frequent_buckets, hash_ngrams, known_ids, number_buckets
from preprocessing.ragged import PADDING, UNKNOWN, Ragged
from preprocessing.similarity import fingerprints_of_texts, words_of_texts
from scaling.device import count_cores

VOCAB_SIZES = {"ngrams": 2**18, "words": 30_000, "subwords": 8_000, "characters": 8_000}
MIN_LENGTH = 32  # of max_length, so that a model of short texts also reads somewhat longer ones
MAX_LENGTHS = {"ngrams": 32_768, "words": 512, "subwords": 512, "characters": 512}  # unless --max-length is given
CHUNK, CHUNK_CHARACTERS = 4096, 2**20  # texts and characters hashed at a time: about 180 bytes of memory a character
MAX_CELL = 100_000  # characters of a text in a request
SAMPLE = 10_000  # cells that tell names from ids
MADE_UP = (  # sentences with many letters, which no training text has to lend its words to
    "some text",
    "The quick brown fox jumps over the lazy dog 0123456789.",
    "Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich!",
    "Portez ce vieux whisky au juge blond qui fume",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío",
    "다람쥐 헌 쳇바퀴에 타고파, 키스의 고유조건은 입술끼리 만나야 하고",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "天地玄黃 宇宙洪荒 日月盈昃 辰宿列張",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
)
LONGEST_WORDS = 15  # mean number of characters of words, from which on they are sentences without spaces
MAX_PARTS = 60  # words of a text that are left out in turn
MANY_NAMES = 50  # a column of more different names made of words is a text, even if they recur

# Processes that clean texts are forked after tokenizers used its threads; without this it would print a warning
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@dataclass(frozen=True)
class TextColumn(Column):
    """A fitted column of texts. Every text becomes at least one id; rare parts share the id UNKNOWN."""

    name: str
    steps: list[str]  # of CLEANING
    tokenizer: str  # ngrams, words, subwords, characters, or pretrained
    max_length: int  # longer texts are truncated: characters for ngrams, otherwise tokens
    min_freq: int
    vocabulary: str  # ngrams: base64 of the int32 buckets, the most frequent first; otherwise a tokenizer as JSON
    padding: int = PADDING
    offset: int = 0  # added to the known ids, so that several text columns have different ids
    empty: bool = False  # training had empty texts

    kind: ClassVar[str] = "text"
    input: ClassVar[str] = "text"
    eval_batch_size: ClassVar[int] = 256
    read_rows: ClassVar[int] = 1024
    file_endings: ClassVar[tuple[str, ...]] = (".txt",)
    long_cells: ClassVar[bool] = True
    near: ClassVar[float] = 0.9
    is_content: ClassVar[bool] = True
    encodes_outside_graph: ClassVar[bool] = True
    unknown_cells: ClassVar[str] = "texts empty or without known words"

    @classmethod
    def detect(cls, cells: Cells, config: DataConfig) -> bool:
        present = cells.present
        if not (cells.distinct > 0.5 * len(present) and cells.distinct > 10):
            # As a text, an unseen name of known words says something; as a category it would be unknown
            return cells.distinct > MANY_NAMES and holds_words(present)
        is_long = present.str.len().mean() > 40 and not _are_codes(present)
        return bool(cells.words >= 3 or is_long or holds_words(present))

    @classmethod
    def fit_encode(
        cls, values: pd.Series, config: DataConfig, labels: np.ndarray | None = None
    ) -> tuple["TextColumn", Ragged]:
        """Learn which parts of the training texts are frequent enough to be known; return the encoded texts as well.

        Raises UserError if none is, or if a pretrained tokenizer cannot be loaded.
        """
        name, tokenizer = str(values.name), "ngrams" if config.tokenizer == "auto" else config.tokenizer
        if tokenizer.startswith("hf:"):
            vocabulary, longest = load_tokenizer(tokenizer.removeprefix("hf:"))
            # -1 is never a token id
            empty = not all(map(str.strip, read_texts(values)))
            column = cls(name, [], "pretrained", config.max_length or longest, 1, vocabulary, padding=-1, empty=empty)
            return column, column.encode(values)
        limit = _max_raw_chars(config.max_length or MAX_LENGTHS[tokenizer])
        texts = [text[:limit] for text in read_texts(values)]
        steps, size = list(config.clean), (config.vocab_size or VOCAB_SIZES[tokenizer]) - 2  # padding and unknown
        fit = _fit_ngrams if tokenizer == "ngrams" else partial(_fit_tokens, tokenizer=tokenizer)
        vocabulary, max_length, encoded = fit(
            texts, steps, min_freq=config.min_freq, size=size, max_length=config.max_length
        )
        empty = not all(map(str.strip, texts))
        column = cls(name, steps, tokenizer, max_length, config.min_freq, vocabulary, empty=empty)
        if not column.known:
            raise UserError(
                f"column {name!r}: none of its {tokenizer} {column.frequency}. Give more texts, or --min-freq 1."
            )
        return column, encoded

    @classmethod
    def model_args(cls, columns: list["TextColumn"]) -> dict:
        """vocab_size: ids 0 … vocab_size - 1 of all columns.  known_sizes: known parts of each.  max_length: ids of the
        longest record.  padding: its id."""
        pretrained = columns[0].tokenizer == "pretrained"  # one tokenizer for all columns
        known = [column.known for column in columns]
        return {
            "vocab_size": known[0] if pretrained else 2 + sum(known),
            "known_sizes": known,
            "max_length": sum(column.max_length for column in columns),
            "padding": columns[0].padding,
        }

    @classmethod
    def comparable(cls, train: pd.Series, config: DataConfig) -> Callable[[pd.Series], np.ndarray]:
        """Compare texts as they are, apart from spaces around them."""
        return lambda cells: np.array([text.strip() for text in read_texts(cells)], dtype=object)

    @property
    def known(self) -> int:
        """How many parts of texts have an id of their own."""
        if self.tokenizer == "ngrams":
            return len(self._buckets)
        return self._tokenizer.get_vocab_size() - (0 if self.tokenizer == "pretrained" else 2)

    @property
    def own_ids(self) -> int:
        return 0 if self.tokenizer == "pretrained" else self.known

    @property
    def frequency(self) -> str:
        """What makes a part known, in words."""
        how = "occur in at least {} texts" if self.tokenizer == "ngrams" else "occur at least {} times"
        return how.format(self.min_freq)

    @property
    def max_raw_chars(self) -> int:
        """Characters of a raw text that are read: enough for max_length, and a bound on the time to clean it."""
        return _max_raw_chars(self.max_length)

    @cached_property
    def _buckets(self) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.vocabulary), dtype="<i4")

    @cached_property
    def _id_of_bucket(self) -> np.ndarray:
        return number_buckets(self._buckets)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.vocabulary)
        tokenizer.enable_truncation(self.max_length)
        return tokenizer

    def encode(self, values: pd.Series) -> Ragged:
        texts = [text[: self.max_raw_chars] for text in read_texts(values)]
        if self.tokenizer == "ngrams":
            hashed = _in_parts(partial(_clean_and_hash, steps=self.steps, max_length=self.max_length), texts)
            encoded = _ids_of_hashed(hashed, self._id_of_bucket)
        else:  # a pretrained tokenizer cleans texts itself
            cleaned = texts if self.tokenizer == "pretrained" else _clean_all(texts, self.steps)
            rows = [tokens.ids or [UNKNOWN] for tokens in self._tokenizer.encode_batch_fast(cleaned)]
            encoded = Ragged.from_rows(rows, self.padding)
        return encoded.shift(self.offset)

    def summary(self) -> str:
        if self.tokenizer == "pretrained":
            return f"the network's own tokenizer; at most {self.max_length} tokens"
        unit = "characters" if self.tokenizer == "ngrams" else "tokens"
        steps = ", ".join(self.steps) or "no cleaning"
        known = f"{self.known:,} known {self.tokenizer} (they {self.frequency})"
        return f"{steps} → {known}; truncated to {self.max_length} {unit}"

    def json_schema(self, profile: dict, examples: list) -> dict:
        return {"type": ["string", "number", "boolean", "null"], "maxLength": MAX_CELL, "x-kind": self.kind}

    def profile_values(self, values: pd.Series, encoded: Ragged) -> dict[str, np.ndarray]:
        """Return the length of each text in characters, and whether it has unknown parts, as 0 and 1."""
        lengths = np.array([len(text) for text in read_texts(values)], dtype=float)
        unknown = encoded.count(encoded.flat == UNKNOWN) > 0
        if self.tokenizer == "pretrained":  # its id 1 is a token like any other
            unknown = torch.zeros(len(encoded))
        return {f"{self.name}: length": lengths, f"{self.name}: unknown parts": unknown.double().numpy()}

    def fingerprints(self, values: pd.Series, encoded: Ragged) -> Tensor:
        return fingerprints_of_texts(read_texts(values))

    def shortcuts(self, parts: list[pd.Series]) -> pd.DataFrame:
        return words_of_texts([text for part in parts for text in read_texts(part)])

    def occlusions(self, cell) -> list[tuple[str, str]]:
        text = read_texts(pd.Series([cell]))[0]
        words, joint = text[: 20 * MAX_PARTS].split(), " "
        if len(text) > LONGEST_WORDS * len(words):  # a language without spaces
            words, joint = [text[i : i + 2] for i in range(0, min(len(text), 2 * MAX_PARTS), 2)], ""
        words = words[:MAX_PARTS]
        return [(word, joint.join(words[:i] + words[i + 1 :])) for i, word in enumerate(words)] if words[1:] else []

    def unknown(self, values: pd.Series, encoded: Ragged) -> Tensor:
        """Mark the texts without any known part, but not the empty ones if training had such. A pretrained tokenizer
        knows every part: marked are texts that give it no more ids than an empty one."""
        if self.tokenizer == "pretrained":
            marked = encoded.lengths <= self._empty_length
        else:
            marked = encoded.count(encoded.flat > UNKNOWN) == 0
        if self.empty and marked.any():
            at = marked.nonzero().squeeze(1)
            marked[at] = torch.tensor([bool(text.strip()) for text in read_texts(values.iloc[at.numpy()])])
        return marked

    @cached_property
    def _empty_length(self) -> int:
        return max(1, len(self._tokenizer.encode("").ids))

    def why_unknown(self, cell) -> str:
        text = read_texts(pd.Series([cell], dtype=object))[0].strip()
        return f"{shorten(text)} has no known words" if text else "the text is empty"

    def made_up(self, profile: dict, position: float | None = None) -> str:
        return MADE_UP[0 if position is None else round(position * (len(MADE_UP) - 1))]

    def examples(self, values: pd.Series) -> list[str]:
        return [text[: self.max_raw_chars] for text in read_texts(values)]

    def parse(self, values: pd.Series) -> np.ndarray:
        """Return padded ids, int32 (N, ids)."""
        encoded = self.encode(values)
        return encoded[torch.arange(len(encoded))].numpy()

    def transform(self, x: Tensor) -> Tensor:
        return x


# ---------------------------------------------------------------- cells


def read_texts(values: pd.Series) -> list[str]:
    """Return cells of any type as strings: missing ones as "", whole numbers without a decimal point."""

    def read(cell) -> str:
        if isinstance(cell, float):
            return str(int(cell)) if cell.is_integer() else str(cell)
        return replace_surrogates(str(cell))

    return ["" if missing else read(cell) for cell, missing in zip(values.tolist(), values.isna(), strict=True)]


# Chinese, Japanese, Korean and Thai: words are not separated by spaces, or change their endings
UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\U00020000-\U0003ffff]")
CODE = re.compile(r"(?=.*\d)[\w+/=.:-]+", flags=re.ASCII)  # hashes, base64, long keys
NOT_A_WORD = re.compile(r".*\d|[a-f]+\Z")  # a token with digits, or one that could be hexadecimal


def holds_words(present: pd.Series) -> bool:
    """Return whether cells are names made of words (shops, films, jobs, people), rather than ids.

    Words recur: at least half of the different cells must hold a word that another one also holds. A word has two or
    more letters and no digits, case is ignored, and cells are split at spaces and punctuation. In scripts that do not
    separate words by spaces, pairs of characters take the place of words. Words in more than 90 % of the cells say
    nothing: they are the prefix of numbered ids such as CUST-00123. Hexadecimal tokens are not words, because pairs of
    hexadecimal letters recur by chance.

    present: strings, without missing cells.
    """
    cells = present.drop_duplicates()
    cells = cells.iloc[:: -(-len(cells) // SAMPLE) or 1]
    words_of = [_words(text[:1000]) for text in cells.tolist()]
    counts = Counter(itertools.chain.from_iterable(words_of))
    recurring = {word for word, count in counts.items() if 2 <= count <= 0.9 * len(words_of)}
    return bool(words_of) and sum(not words.isdisjoint(recurring) for words in words_of) >= 0.5 * len(words_of)


def _words(text: str) -> set[str]:
    words = set()
    for token in clean(text.casefold(), ["unicode"]).split():
        if NOT_A_WORD.match(token):
            continue
        if UNSPACED.search(token):
            words.update(map("".join, itertools.pairwise(token)))
        elif sum(map(str.isalpha, token)) >= 2:
            words.add(token)
    return words


def _are_codes(present: pd.Series) -> bool:
    """Return whether most cells are one token of Latin letters and digits, as hashes, keys and base64 are."""
    return bool(present.str.fullmatch(CODE).mean() > 0.5)


# ---------------------------------------------------------------- fitting


def _max_raw_chars(max_length: int) -> int:
    return max(10_000, 10 * max_length)


def _usual_length(lengths: Iterable[int], longest: int) -> int:
    """Return the length of all but the longest 1 % of the training texts, between MIN_LENGTH and `longest`."""
    return min(longest, max(MIN_LENGTH, int(np.percentile(list(lengths), 99, method="higher"))))


def _fit_ngrams(
    texts: list[str], steps: list[str], *, min_freq: int, size: int, max_length: int
) -> tuple[str, int, Ragged]:
    """Return (vocabulary, max_length, encoded texts). Each text is cleaned and hashed once."""
    cleaned = _clean_all(texts, steps)
    max_length = max_length or _usual_length(map(len, cleaned), MAX_LENGTHS["ngrams"])
    limit = _max_raw_chars(max_length)  # a lower limit than before: clean these texts again
    cleaned = [
        clean(raw[:limit], steps) if len(raw) > limit else text for raw, text in zip(texts, cleaned, strict=True)
    ]
    hashed = list(_in_parts(partial(_hash, max_length=max_length), cleaned))
    frequent = frequent_buckets(hashed, min_freq, size)
    vocabulary = base64.b64encode(frequent.astype("<i4").tobytes()).decode()
    return vocabulary, max_length, _ids_of_hashed(hashed, number_buckets(frequent))


def _fit_tokens(
    texts: list[str], steps: list[str], *, tokenizer: str, min_freq: int, size: int, max_length: int
) -> tuple[str, int, Ragged]:
    """Return (vocabulary, max_length, encoded texts). Each text is cleaned and encoded once."""
    cleaned = _clean_all(texts, steps)
    trained = _train_tokenizer(cleaned, tokenizer, min_freq, size + 2)
    rows = [tokens.ids for tokens in trained.encode_batch_fast(cleaned)]
    max_length = max_length or _usual_length(map(len, rows), MAX_LENGTHS[tokenizer])
    return trained.to_str(), max_length, Ragged.from_rows([row[:max_length] or [UNKNOWN] for row in rows])


def _train_tokenizer(cleaned: list[str], kind: str, min_freq: int, size: int) -> Tokenizer:
    """Train a tokenizer of words, byte-pair subwords (Sennrich et al., 2016) or characters on cleaned texts."""
    special = {"special_tokens": ["[PAD]", "[UNK]"], "vocab_size": size, "min_frequency": min_freq}
    special["show_progress"] = False
    if kind == "subwords":
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        counts = Counter(itertools.chain.from_iterable(cleaned))
        known = [c for c in sorted(counts, key=lambda c: (-counts[c], c)) if counts[c] >= min_freq and c not in " ▁"]
        # The trainer would choose among equally frequent characters at random, and exceed vocab_size to keep all
        alphabet = ["▁", *known[: size - 3]] if known else []
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, limit_alphabet=len(alphabet), **special)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = (
            pre_tokenizers.WhitespaceSplit() if kind == "words" else pre_tokenizers.Split("", "isolated")
        )
        trainer = trainers.WordLevelTrainer(**special)
    tokenizer.train_from_iterator(cleaned, trainer)
    return tokenizer


# ---------------------------------------------------------------- many texts, on all cores


def _in_parts(function: Callable, texts: list[str]) -> Iterator:
    """Call a function on parts of the texts, on all cores if they are many. The parts do not depend on the cores."""
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


def _clean_all(texts: list[str], steps: list[str]) -> list[str]:
    return [text for part in _in_parts(partial(_clean, steps=steps), texts) for text in part]


def _clean(texts: list[str], steps: list[str]) -> list[str]:
    return [clean(text, steps) for text in texts]


def _hash(texts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    return hash_ngrams([text[:max_length] for text in texts])


def _clean_and_hash(texts: list[str], steps: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    return _hash(_clean(texts, steps), max_length)


def _ids_of_hashed(hashed: Iterable[tuple[np.ndarray, np.ndarray]], id_of_bucket: np.ndarray) -> Ragged:
    parts = [known_ids(buckets, offsets, id_of_bucket) for buckets, offsets in hashed]
    flat = np.concatenate([flat for flat, _ in parts] or [np.empty(0, np.int32)])
    lengths = np.concatenate([lengths for _, lengths in parts] or [np.empty(0, np.int64)])
    return Ragged(torch.from_numpy(flat), torch.from_numpy(lengths))
