"""Parse the cells of a table: missing values, booleans, and the canonical spelling of labels and categories."""

import re
from collections.abc import Callable, Collection
from decimal import Decimal

import numpy as np
import pandas as pd

from errors import BrokenRecords
from preprocessing.cleaning import replace_surrogates

# Words for a missing value: those of pandas, and the "?" and "-" of older tables
NULLS = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null", "?", "-")
)  # fmt: skip
BOOLEANS = dict.fromkeys(("true", "yes", "y", "t", "on"), 1.0) | dict.fromkeys(("false", "no", "n", "f", "off"), 0.0)
# Words for a missing value among numbers and dates, in lower case: errors of spreadsheets, and what people write
MISSING_WORDS = frozenset(
    ("#div/0!", "#ref!", "#value!", "#name?", "#num!", "#null!", "#error!", "#calc!", "#spill!", "#nv", "#wert!",
     "#zahl!", "#bezug!", "#valeur!", "#nombre!", "n.a.", "n. a.", "n.a", "na", "n/a", "nan", "nil", "null", "none",
     "k.a.", "k. a.", "k.a", "n/v", "n.v.", "n.d.", "nd", "s/d", "unknown", "missing", "not available", "tbd", "--",
     "---", "–", "—", ".", "..", "...", "??", "???", "nat", "00.00.0000", "0000-00-00", "00000000",
     "0000-00-00 00:00:00")
)  # fmt: skip


def is_missing_word(text: str) -> bool:
    """Return whether a cell of numbers or dates stands for a missing value."""
    text = text.strip()
    return text in NULLS or text.casefold() in MISSING_WORDS


def holds_text(values: pd.Series) -> bool:
    """Return whether a column can hold text."""
    return values.dtype == object or pd.api.types.is_string_dtype(values.dtype)


def fix_or_empty(values: pd.Series, wrong: np.ndarray) -> str:
    """Return the advice for wrong cells where nothing else is known."""
    return "Fix the cell or empty it."


def missing_label(words: dict[str, int]) -> str:
    """Return "missing (k.A. 2×)" for the words that stood for missing values in training."""
    return "missing" + (
        f" ({', '.join(f'{word} {count}×' for word, count in list(words.items())[:5])})" if words else ""
    )


def count_missing_words(values: pd.Series) -> dict[str, int]:
    """Count the words (not the empty cells) that stand for missing values in a column of numbers or dates."""
    if not holds_text(values):
        return {}
    words = values[values.map(lambda cell: isinstance(cell, str) and is_missing_word(cell)).astype(bool)]
    return words.str.strip().loc[lambda cells: cells != ""].value_counts().to_dict()


def canonical(value, kept: Collection[str] = ()) -> str:
    """Return one spelling for a value, however it was read: 1, 1.0, "1" and "01" → "1"; True → "true"; null → "".

    Labels and categories are compared in this form, so that a csv, a parquet file and a JSON request agree.
    kept: words that stay as they are written, such as a class "None".
    """
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    text = str(value).strip()
    if text in kept:
        return text
    if text in NULLS:
        return ""
    if len(text) > 400:  # too long for a number
        return text
    if re.fullmatch(r"[+-]?\d+(\.0*)?", text):
        return str(int(text.split(".")[0]))
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", text):
        number = float(text)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
    return text.lower() if text.lower() in ("true", "false") else text


def canonical_codes(values: pd.Series, kept: Collection[str] = ()) -> tuple[np.ndarray, list[str]]:
    """Return (codes, keys): the canonical spelling of cell i is keys[codes[i]]; keys are distinct, in any order.

    kept: words that stay as they are written, such as a class "None".
    """
    if values.dtype == object:  # otherwise True and 1 would be one value
        values = values.map(lambda v: str(v).lower() if isinstance(v, (bool, np.bool_)) else v)
    try:
        raw_codes, raw = pd.factorize(values, use_na_sentinel=False)
    except TypeError:  # lists and dicts from JSON
        raw_codes, raw = pd.factorize(values.map(str), use_na_sentinel=False)
    keys: dict[str, int] = {}
    spelled = (canonical(value, kept) for value in raw.tolist())
    code_of = np.array([keys.setdefault(key, len(keys)) for key in spelled], dtype=np.int64)
    return code_of[raw_codes] if len(code_of) else raw_codes, list(keys)


def check_flat(values: pd.Series, hint: str = ".") -> None:
    """Raise BrokenRecords for cells that hold a list or an object, as JSON and parquet can."""
    if values.dtype != object:
        return
    nested = np.array([isinstance(cell, (list, dict, np.ndarray)) for cell in values], dtype=bool)
    if nested.any():
        why = f"is a list or an object: write its parts as columns of their own{hint}"
        raise broken_cells(values, nested, lambda _: why)


def has_value(values: pd.Series) -> np.ndarray:
    """Return a mask of the cells that are neither missing nor a word for a missing value."""
    if pd.api.types.is_numeric_dtype(values.dtype):
        return values.notna().to_numpy()
    codes, keys = canonical_codes(values)
    return np.array([key != "" for key in keys], dtype=bool)[codes]


def frame_of(records: list[dict]) -> pd.DataFrame:
    """Return dicts as a table. A key that some of them lack is an empty cell there."""
    try:
        return pd.DataFrame.from_records(records)
    except UnicodeEncodeError:  # a lone surrogate: JSON can hold it, UTF-8 cannot
        whole = [
            {k: replace_surrogates(v) if isinstance(v, str) else v for k, v in record.items()} for record in records
        ]
        return pd.DataFrame.from_records(whole)


def without_words(table: pd.DataFrame, words: Collection[str]) -> pd.DataFrame:
    """Return a table in which the cells that are one of `words` (--missing) are missing."""
    keys, marks = {canonical(word) for word in words} - {""}, {}
    for name in table.columns if words else ():
        codes, spelled = canonical_codes(table[name], set(words))
        marks[name] = np.array([key in keys or key in words for key in spelled], dtype=bool)[codes]
    found = {name: table[name].mask(mask) for name, mask in marks.items() if mask.any()}
    return table.assign(**found) if found else table


def to_text(values: pd.Series) -> pd.Series:
    """Return cells as stripped text, empty cells and words for a missing value as missing."""
    try:
        text = values.astype("str").str.strip()
    except UnicodeDecodeError:  # of bytes, such as those of an image
        text = values.map(str).astype("str").str.strip()
    empty = text.isin(NULLS) | values.isna()
    return text.mask(empty) if empty.any() else text


def name_cell(values: pd.Series, wrong: np.ndarray) -> str:
    """Name the first wrong cell: "row 17, column 'age': 'abc'"."""
    at = int(np.flatnonzero(wrong)[0])
    return f"row {values.index[at]}, column {values.name!r}: {str(values.iloc[at])!r}"


def typed_numbers(values: pd.Series) -> tuple[np.ndarray, pd.Series | None]:
    """Return (numbers, text): float64 (N,) with NaN where a cell is no number yet, and the cells of text by position.

    text is None for a column that holds no text.
    """
    if values.dtype == np.float64:
        return values.to_numpy(), None
    if pd.api.types.is_numeric_dtype(values.dtype):
        return values.to_numpy(dtype=np.float64, na_value=np.nan), None
    present = values.notna().to_numpy()
    text = pd.Series(values.array, copy=False)
    if values.dtype != object:
        numbers = np.full(len(values), np.nan)
        return numbers, (text if present.all() else text[present]).astype("str")
    typed = np.array([is_number(cell) for cell in values], dtype=bool)
    numbers = np.array([float(cell) if known else np.nan for cell, known in zip(values, typed, strict=True)])
    return numbers, text[present & ~typed].map(str).astype("str")


def is_number(cell) -> bool:
    """Return whether a cell is a typed number, not text."""
    return isinstance(cell, (int, float, np.number, Decimal)) and not isinstance(cell, bool)


def broken_cells(values: pd.Series, wrong: np.ndarray, why: Callable[[object], str]) -> BrokenRecords:
    """Return the error for the wrong cells of a column: row 17, column 'age': 'abc' <why it is wrong>."""
    cells = zip(np.flatnonzero(wrong).tolist(), values.index[wrong], values[wrong], strict=True)
    return BrokenRecords({i: f"row {row}, column {values.name!r}: {str(cell)!r} {why(cell)}" for i, row, cell in cells})


def to_booleans(values: pd.Series) -> np.ndarray:
    """Return a column as float64 0 and 1, missing cells as NaN. Raises BrokenRecords for other words."""
    codes, keys = canonical_codes(values)
    known = BOOLEANS | {"0": 0.0, "1": 1.0, "": np.nan}
    numbers = np.array([known.get(key.lower(), np.inf) for key in keys])[codes]
    if np.isinf(numbers).any():
        raise broken_cells(values, np.isinf(numbers), lambda _: "is not a boolean such as true, false, yes, no, 0, 1.")
    return numbers
