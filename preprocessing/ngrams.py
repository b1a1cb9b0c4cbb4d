"""Character n-grams of cleaned texts: hashed into buckets, of which the frequent ones get ids."""

from collections.abc import Iterable

import numpy as np

from preprocessing.ragged import UNKNOWN

MAX_NGRAM = 5  # characters; the edge of a word counts as one
BUCKET_BITS = 22  # of the hash of an n-gram: 4 million buckets


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Spread uint64 numbers over all 64 bits (the finaliser of SplitMix64, Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def hash_ngrams(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (buckets, offsets) of all n-grams of 1 … MAX_NGRAM characters inside the words of cleaned texts.

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
    buckets, owners = np.concatenate(buckets), np.concatenate(owners)
    order = np.argsort(owners, kind="stable")
    return buckets[order], np.searchsorted(owners[order], np.arange(len(texts) + 1))


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
    """Return (flat ids, length of each text) of hashed texts: the ids of the known n-grams, followed by a
    single UNKNOWN if any n-gram is unknown. A text without n-grams is one UNKNOWN."""
    ids = id_of_bucket[buckets]
    text_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    known = ids != UNKNOWN
    lengths = np.bincount(text_of[known], minlength=len(offsets) - 1)
    some_unknown = (np.diff(offsets) > lengths) | (lengths == 0)
    flat = np.full(lengths.sum() + some_unknown.sum(), UNKNOWN, dtype=np.int32)
    shift = np.cumsum(some_unknown) - some_unknown  # of a text: the UNKNOWNs of the texts before it
    flat[np.arange(known.sum()) + shift[text_of[known]]] = ids[known]
    return flat, lengths + some_unknown
