"""Read raw targets: which kind of problem they make, which are missing, and which values are one class."""

import json
from collections.abc import Collection, Iterable

import numpy as np
import pandas as pd

from errors import UserError
from preprocessing.number_format import MANY, NEARLY_ALL, PLAIN, find_numbers, form_of, parse_numbers
from preprocessing.parsing import NULLS, canonical, canonical_codes, holds_text, is_missing_word

FREQUENT = 0.05  # of the rows: a class called "None" or "-" needs as many, rarer ones are missing values


def infer_kind(targets: pd.Series, form: str = "") -> str:
    """Infer binary, multiclass or regression from target values without nulls.

    Words, booleans and codes with leading zeros are classes. Numbers are classes if there are two of them, or few and
    all whole.  form: how numbers in text are written, see preprocessing/number_format.py; "" detects it.
    """
    found = numbers_form(targets)
    if found and len(np.unique(parse_numbers(targets, form or found)[0])) > MANY:
        return "regression"
    distinct = set(class_codes(targets, form)[1])
    if len(distinct) == 2:
        return "binary"
    numbers = pd.to_numeric(pd.Series(sorted(distinct)), errors="coerce")
    if numbers.isna().any():
        return "multiclass"
    few_and_whole = len(distinct) <= MANY and len(targets) >= 5 * len(distinct) and bool((numbers % 1 == 0).all())
    return "multiclass" if few_and_whole else "regression"


def numbers_form(targets: pd.Series) -> str:
    """Return how targets that are numbers are written, as an example; "" for classes that are words or codes."""
    found = find_numbers(targets)
    if found is None or found.codes or found.share < NEARLY_ALL:
        return ""
    return str(found.form) if found.share == 1 or targets.nunique() > MANY else ""


def words_that_are_classes(targets: pd.Series) -> set[str]:
    """Return the words for a missing value, such as "None", "NA", "-" and "?", that are frequent among other words."""
    if not holds_text(targets):
        return set()
    counts = targets[targets.map(lambda cell: isinstance(cell, str)).astype(bool)].str.strip().value_counts()
    return {word for word in counts.index[counts >= max(3, FREQUENT * len(targets))] if word and word in NULLS}


def is_missing(targets: pd.Series, is_number: bool, classes: Collection[str] = ()) -> np.ndarray:
    """Return a mask of the rows without a target.

    is_number: words such as "k.A." and "#DIV/0!" are missing too.  classes: words that are not.
    """
    is_text = targets.map(lambda cell: isinstance(cell, str)).to_numpy(dtype=bool)
    words = targets.where(is_text, "x").astype("str").str.strip()
    missing = words.map(is_missing_word) if is_number else words.isin(NULLS - set(classes))
    return targets.isna().to_numpy() | missing.to_numpy(dtype=bool)


def class_codes(targets: pd.Series, form: str) -> tuple[np.ndarray, list[str]]:
    """Return what `canonical_codes` does for targets without missing values: every word is a class.

    Codes with leading zeros keep them, unless 01 and 1 both occur.
    """
    words = {cell.strip() for cell in targets.unique() if isinstance(cell, str)}
    kept = words & NULLS
    if (found := find_numbers(targets)) and found.codes and len({canonical(word) for word in words}) == len(words):
        kept = {word for word in words if canonical(word) != word}
    return canonical_codes(with_points(targets, form or numbers_form(targets) or PLAIN), kept)


def with_points(targets: pd.Series, form: str) -> pd.Series:
    """Return text targets with their numbers written as 1234.56, so that 1.000,0 and 1000 are one class."""
    if form == PLAIN or form_of(form).unit or not holds_text(targets):
        return targets
    numbers, wrong = parse_numbers(targets, form)
    return targets.astype(object).mask(~wrong & ~np.isnan(numbers), pd.Series(numbers, targets.index, dtype=object))


def sorted_classes(keys: Iterable[str]) -> list:
    """Return classes, given in canonical spelling, as plain values in order: True, 1, 0.5 or a word."""
    keys, classes = list(keys), []
    for key in keys:
        try:
            value = json.loads(key)
        except ValueError:
            value = key
        classes.append(value if isinstance(value, (bool, int, float)) and canonical(value) == key else key)
    types = {int if isinstance(c, float) else type(c) for c in classes}
    return sorted(classes if len(types) == 1 else keys)  # mixed types become words: a column has one type


def stratify_labels(targets: pd.Series, kind: str, min_rows: int, form: str = "") -> np.ndarray | None:
    """Return the class of each row as an integer from 0, for splits that keep class shares; None for regression.

    Raises UserError if the classes do not make a `kind` problem with `min_rows` rows each.
    """
    if kind == "regression":
        return None
    codes, keys = class_codes(targets, form)
    count_classes(codes, keys, str(targets.name), kind, min_rows)
    return codes


def count_classes(codes: np.ndarray, keys: list[str], name: str, kind: str, min_rows: int = 1) -> dict[str, int]:
    """Return the rows of each class by its canonical spelling, from the result of `canonical_codes`.

    Raises UserError if they do not make a `kind` problem with `min_rows` rows per class.
    """
    counts = dict(zip(keys, np.bincount(codes).tolist(), strict=True))
    target = f"target {name!r} has {len(counts)} different values"
    if len(counts) == 1:
        raise UserError(f"target {name!r} has one class only ({keys[0]!r}): there is nothing to learn.")
    if kind == "binary" and len(counts) > 2:
        other = "multiclass" if len(counts) <= MANY else "regression"
        raise UserError(f"{target} and --task binary needs 2: give --task {other}.")
    if len(counts) > MANY and len(counts) > 0.5 * len(codes):
        raise UserError(
            f"{target} in {len(codes)} rows: it looks like names or text. Choose another target (to predict numbers: "
            "--task regression)."
        )
    label, rows = min(counts.items(), key=lambda item: item[1])
    if rows < min_rows:
        raise UserError(
            f"target {name!r}: class {label!r} has {rows} row{'s' * (rows > 1)} and needs {min_rows}, one per split: "
            "add rows, merge the class with another, or leave it out (to predict numbers: --task regression)."
        )
    return counts
