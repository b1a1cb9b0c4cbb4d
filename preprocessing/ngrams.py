"""N-grams of cleaned texts, of characters and of words: hashed into buckets, of which the frequent ones get ids."""

from collections.abc import Iterable

import numpy as np

from preprocessing.ragged import UNKNOWN

MAX_NGRAM = 5  # characters; the edge of a word counts as one
WORD, PAIR = np.uint64(1 << 32), np.uint64(2 << 32)  # tell the hash of a word, or of two, from one of characters
BUCKET_BITS = 22  # of the hash of an n-gram: 4 million buckets


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Spread uint64 numbers over all 64 bits (the finaliser of SplitMix64, Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def hash_ngrams(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (buckets, offsets) of all n-grams of cleaned texts: of 1 … MAX_NGRAM characters inside the words, of words
    longer than that, and of pairs of words.

    A word's edge counts as a character: " un" is a beginning and "ed " an end. All texts are processed at once, as one
    array of code points; the hash of n characters is computed from the hash of n - 1. Source of the features:
    Bojanowski et al., "Enriching Word Vectors with Subword Information", 2017; of hashing: Weinberger et al., 2009.
    """
    joined = "".join(f" {text} \n" for text in texts)
    points = np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    ends, edge = points == ord("\n"), (points == ord("\n")) | (points == ord(" "))
    position, text_of = np.arange(len(points)), np.cumsum(ends) - ends
    next_edge = np.minimum.accumulate(np.where(edge, position, len(points))[::-1])[::-1]  # at a position or after it
    next_edge = np.append(next_edge[1:], len(points))  # after it
    empty = ends | (edge & (next_edge == position + 1))  # an edge that begins no word
    letters, hashes = _mix(points + np.uint64(1)), np.zeros(len(points), dtype=np.uint64)
    buckets, owners = [], []
    for size in range(1, MAX_NGRAM + 1):
        count = max(0, len(points) - size + 1)
        hashes = _mix(hashes[:count] * np.uint64(3) + letters[size - 1 :])
        inside = (position[:count] + size - 1 <= next_edge[:count]) & ~empty[:count]
        if size == 1:
            inside &= ~edge
        buckets.append((hashes[inside] >> np.uint64(64 - BUCKET_BITS)).astype(np.int32))
        owners.append(text_of[:count][inside])
    for hashes, position in _hash_words(points, letters, edge, text_of):
        buckets.append((hashes >> np.uint64(64 - BUCKET_BITS)).astype(np.int32))
        owners.append(text_of[position])
    buckets, owners = np.concatenate(buckets), np.concatenate(owners)
    order = np.argsort(owners, kind="stable")
    return buckets[order], np.searchsorted(owners[order], np.arange(len(texts) + 1))


def _hash_words(
    points: np.ndarray, letters: np.ndarray, edge: np.ndarray, text_of: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (hashes, where they start) of the words that are no n-gram of characters, and of the pairs of words.

    letters, edge, text_of: of each code point its hash, whether it separates words, and its text. Punctuation between
    two words is skipped.
    """
    after_edge = np.append(True, edge[:-1])
    starts, ends = np.flatnonzero(~edge & after_edge), np.flatnonzero(edge & ~after_edge)
    if not len(starts):
        return []
    word_of = np.cumsum(~edge & after_edge) - 1
    place = np.arange(len(letters)) - starts[word_of.clip(0)]
    letters = np.where(edge, np.uint64(0), _mix(letters + place.astype(np.uint64)))
    words = np.add.reduceat(letters, starts)
    long = ends - starts > MAX_NGRAM - 2
    firsts, which = np.unique(points[starts], return_inverse=True)
    is_word = np.array([chr(int(point)).isalnum() for point in firsts])[which]
    first, second = starts[is_word][:-1], starts[is_word][1:]
    pairs, together = words[is_word][:-1] * np.uint64(3) + words[is_word][1:], text_of[first] == text_of[second]
    return [(_mix(words[long] ^ WORD), starts[long]), (_mix(pairs[together] ^ PAIR), first[together])]


def frequent_buckets(hashed: Iterable[tuple[np.ndarray, np.ndarray]], min_freq: int, size: int) -> np.ndarray:
    """Return at most `size` buckets that at least `min_freq` texts contain, the most frequent first: int32.

    hashed: results of `hash_ngrams`.
    """
    counts = np.zeros(2**BUCKET_BITS, dtype=np.int64)
    for buckets, offsets in hashed:
        text_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        pairs = np.sort(text_of << BUCKET_BITS | buckets)  # np.unique takes forty times as long
        once = pairs[np.append(True, np.diff(pairs) > 0)[: len(pairs)]]
        counts += np.bincount(once & (2**BUCKET_BITS - 1), minlength=2**BUCKET_BITS)
    frequent = np.argsort(-counts, kind="stable")[: min(size, int((counts >= min_freq).sum()))]
    return frequent.astype(np.int32)


def number_buckets(frequent: np.ndarray) -> np.ndarray:
    """Return the id of every bucket: 2, 3, … in the order of `frequent`, UNKNOWN for all others."""
    ids = np.full(2**BUCKET_BITS, UNKNOWN, dtype=np.int32)
    ids[frequent] = np.arange(2, len(frequent) + 2)
    return ids


def known_ids(buckets: np.ndarray, offsets: np.ndarray, id_of_bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (flat ids, length of each text) of hashed texts: the ids of the known n-grams in rising order, followed by
    a single UNKNOWN if any n-gram is unknown. A text without n-grams is one UNKNOWN.

    An n-gram that occurs c times in a text is kept 1 + log2(c) times, rounded down: a sublinear term frequency
    (Manning et al., "Introduction to Information Retrieval", 2008, 6.4.1) in whole numbers.
    """
    text_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    pairs = np.sort(text_of << 32 | id_of_bucket[buckets])
    place = np.arange(len(pairs))
    is_first = np.append(True, np.diff(pairs) > 0)[: len(pairs)]
    occurrence = place - np.maximum.accumulate(np.where(is_first, place, 0))  # of the same n-gram, from 0
    text_of, ids = pairs >> 32, (pairs & (2**32 - 1)).astype(np.int32)
    known = (ids != UNKNOWN) & (occurrence & (occurrence + 1) == 0)  # the first, second, fourth, eighth …
    lengths = np.bincount(text_of[known], minlength=len(offsets) - 1)
    some_unknown = (np.bincount(text_of[ids == UNKNOWN], minlength=len(offsets) - 1) > 0) | (lengths == 0)
    flat = np.full(lengths.sum() + some_unknown.sum(), UNKNOWN, dtype=np.int32)
    shift = np.cumsum(some_unknown) - some_unknown  # of a text: the UNKNOWNs of the texts before it
    flat[np.arange(known.sum()) + shift[text_of[known]]] = ids[known]
    return flat, lengths + some_unknown
