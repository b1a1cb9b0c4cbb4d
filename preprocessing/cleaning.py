"""Clean raw texts in named steps, the same way in training and in prediction, in any language."""

import html
import re
import unicodedata
from collections.abc import Callable


def _unicode(text: str) -> str:
    """Unicode NFKC normalisation, except that ㅋㅠ stay two letters, which NFKC would join to one syllable.

    At most 1,000 characters at a time, because sorting stacked accents takes time quadratic in their number. What
    would make a text much longer is cut off.
    """
    if unicodedata.is_normalized("NFKC", text):
        return text
    left = 2 * len(text) + 1000  # characters: one can become 18, and all following steps would read them

    def normalize(part: re.Match) -> str:
        nonlocal left
        normalized = unicodedata.normalize("NFKC", part[0])[:left] if left else ""
        left -= len(normalized)
        return normalized

    return re.sub(r"[^\s\u3131-\u318e]{1,1000}", normalize, text)


def _html(text: str) -> str:
    """Remove tags and comments, and replace entities by their characters."""
    text = re.sub(r"</?[a-zA-Z][^<>]{0,500}>|<!--[^<>]{0,500}-->", " ", text)
    return html.unescape(re.sub(r"(&#\d{100})\d+", r"\1", text))  # int() refuses numbers of thousands of digits


def _marks(text: str) -> str:
    """Replace each web address and each e-mail address by one word."""
    text = re.sub(r"(?:https?://|www\.)\S+", " xxurl ", text, flags=re.IGNORECASE)
    # Matched only at the start of a word and possessively, so that the time is linear in the length of the text
    return re.sub(r"(?<![\w.+-])(?:[\w.+-]++@[\w-]++\.\w[\w.-]*+)++", " xxmail ", text)


def _digits(text: str) -> str:
    """Replace each digit by 0: 2,499 → 0,000."""
    return re.sub(r"\d", "0", text)


def _repeats(text: str) -> str:
    """Shorten runs of three or more of the same character to two: sooooo → soo. Digits are kept."""
    return re.sub(r"(\D)\1{2,}", r"\1\1", text)


# In the order in which they are applied; --clean selects some of them
CLEANING: dict[str, Callable[[str], str]] = {
    "unicode": _unicode,
    "html": _html,
    "repeats": _repeats,
    "marks": _marks,
    "digits": _digits,
    "case": str.lower,
}


class _Spacing(dict):
    """A table for str.translate: puts spaces around punctuation and symbols, but not around letters and their marks;
    replaces control characters by spaces and removes invisible format characters."""

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        spaced = f" {character} " if category[0] in "PS" else character
        self[code] = {"Cc": " ", "Cf": ""}.get(category, spaced)
        return self[code]


SPACING = _Spacing()


def clean(text: str, steps: list[str]) -> str:
    """Apply the named steps of CLEANING, and separate words and punctuation by single spaces."""
    for name, step in CLEANING.items():
        if name in steps:
            text = step(text)
    return " ".join(text.translate(SPACING).split())


def replace_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold but UTF-8 cannot, by "?"."""
    return text.encode("utf-8", "replace").decode()
