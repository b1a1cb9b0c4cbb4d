"""For the audit: vectors that are close for texts or images that are nearly the same, and the words of texts."""

from contextlib import suppress

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

SIDE = 16  # pixels of a side of the images that are compared
COMPARABLE, COMPARED = 30, 300  # characters of a text: shorter ones are alike by coincidence; what is read of long ones
HASHES = 1024
FREQUENT, READ = 300, 3_000  # words, and characters of a text, that are counted


def fingerprints_of_texts(texts: list[str]) -> Tensor:
    """Return unit vectors (N, HASHES) of the parts of five characters within words; zeros for short texts."""
    from sklearn.feature_extraction.text import HashingVectorizer

    texts = [text[:COMPARED] if len(text) >= COMPARABLE else "" for text in texts]
    hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(5, 5), n_features=HASHES, dtype=np.float32)
    return torch.from_numpy(hashed.transform(texts).toarray())


def fingerprints_of_images(pixels: Tensor) -> Tensor:
    """Return unit vectors (N, D) of small versions without their mean.  pixels: uint8 (N, C, S, S)."""
    side = min(SIDE, pixels.shape[-1])
    small = torch.cat([adaptive_avg_pool2d(part.float(), side) for part in pixels.split(1024)]).flatten(1)
    return normalize(small - small.mean(dim=1, keepdim=True), eps=1.0)


def words_of_texts(texts: list[str]) -> pd.DataFrame:
    """Return the length of each text, and whether it has each of the frequent words."""
    from sklearn.feature_extraction.text import CountVectorizer

    found = {"the length": np.array([len(text) for text in texts])}
    words = CountVectorizer(binary=True, lowercase=False, token_pattern=r"\S+", max_features=FREQUENT)
    with suppress(ValueError):  # no words at all
        counts = words.fit_transform([text[:READ] for text in texts]).toarray().T
        found |= {f"the word {word!r}": row for word, row in zip(words.get_feature_names_out(), counts, strict=True)}
    return pd.DataFrame(found)
