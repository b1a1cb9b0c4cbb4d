"""Parse the cells of a table: numbers, booleans, dates, and the canonical spelling of labels and categories."""

import re

import numpy as np
import pandas as pd

from errors import UserError

# Words for a missing value: those of pandas, and the "?" and "-" of older tables
NULLS = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null", "?", "-")
)  # fmt: skip
BOOLEANS = dict.fromkeys(("true", "yes", "y", "t", "on"), 1.0) | dict.fromkeys(("false", "no", "n", "f", "off"), 0.0)
DATE_FORMATS = (
    "ISO8601",
    *(d + t for d in ("%Y/%m/%d", "%Y.%m.%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%Y년 %m월 %d일",
                      "%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y")
      for t in ("", " %H:%M", " %H:%M:%S")),
)  # fmt: skip
DAY = 86_400.0  # seconds


def canonical(value) -> str:
    """Return one spelling for a value, however it was read: 1, 1.0, "1" and "01" → "1"; True → "true"; null → "".

    Labels and categories are compared in this form, so that a csv, a parquet file and a JSON request agree.
    """
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    text = str(value).strip()
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


def canonical_codes(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Return (codes, keys): the canonical spelling of cell i is keys[codes[i]]; keys are distinct, in any order."""
    if values.dtype == object:  # otherwise True and 1 would be one value
        values = values.map(lambda v: str(v).lower() if isinstance(v, (bool, np.bool_)) else v)
    try:
        raw_codes, raw = pd.factorize(values, use_na_sentinel=False)
    except TypeError:  # lists and dicts from JSON
        raw_codes, raw = pd.factorize(values.map(str), use_na_sentinel=False)
    keys: dict[str, int] = {}
    code_of = np.array([keys.setdefault(canonical(value), len(keys)) for value in raw.tolist()], dtype=np.int64)
    return code_of[raw_codes] if len(code_of) else raw_codes, list(keys)


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
            {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in record.items()}
            for record in records
        ]
        return pd.DataFrame.from_records(whole)


def to_text(values: pd.Series) -> pd.Series:
    """Return cells as stripped text, empty cells and words for a missing value as missing."""
    text = values.astype("str").str.strip()
    return text.mask(text.isin(NULLS) | values.isna())


def name_cell(values: pd.Series, wrong: np.ndarray) -> str:
    """Name the first wrong cell: "row 17, column 'age': 'abc'"."""
    at = int(np.flatnonzero(wrong)[0])
    return f"row {values.index[at]}, column {values.name!r}: {str(values.iloc[at])!r}"


DECIMAL_COMMA = r"^([+-]?\d*),(\d+)$"
AMBIGUOUS = r"[+-]?[1-9]\d{0,2}[.,]\d{3}"  # 1,234 and 1.234 have a decimal sign or a thousands separator


def decimal_sign(values: pd.Series) -> str:
    """Return "," for a column of text whose numbers have a decimal comma (1,5), else "."."""
    if pd.api.types.is_numeric_dtype(values.dtype) or not values.astype("str").str.contains(",", regex=False).any():
        return "."
    text = to_text(values).dropna()
    commas = text[text.str.contains(",", regex=False)]
    decimals = commas.str.fullmatch(DECIMAL_COMMA) & ~commas.str.fullmatch(AMBIGUOUS)
    return "," if text.str.fullmatch(r"[+-]?\d*(,\d+)?").all() and decimals.any() else "."


def parse_numbers(values: pd.Series, decimal: str = ".") -> tuple[np.ndarray, np.ndarray]:
    """Return (numbers, wrong): a column as float64 with NaN for missing cells, and a mask of cells that are neither.

    decimal: the sign that decides about 1,234 and 1.234; 1,5 and 1.5 are understood in any column.
    """
    if values.dtype == np.float64:
        return values.to_numpy(), np.zeros(len(values), dtype=bool)
    if pd.api.types.is_numeric_dtype(values.dtype):
        return values.to_numpy(dtype=np.float64, na_value=np.nan), np.zeros(len(values), dtype=bool)
    numbers = _cast(values) if decimal == "." else None
    if numbers is not None:
        return numbers, np.zeros(len(values), dtype=bool)
    text = to_text(values)
    written = values.map(lambda cell: isinstance(cell, str)) if values.dtype == object else True
    other = (
        text.str.fullmatch(AMBIGUOUS).fillna(False) & ~text.str.contains(decimal, regex=False).fillna(False) & written
    )
    text = text.mask(other, "ambiguous").str.replace(DECIMAL_COMMA, r"\1.\2", regex=True)
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers, np.isnan(numbers) & text.notna().to_numpy()


def _cast(values: pd.Series) -> np.ndarray | None:
    """Cast text to float64 in one pass, about ten times as fast as looking at each cell; None if that fails."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not isinstance(values.dtype, pd.StringDtype):
        return None
    cells = pa.array(values)
    try:
        numbers = pc.cast(cells, pa.float64())
    except pa.ArrowInvalid:
        try:  # empty cells are missing
            numbers = pc.cast(pc.if_else(pc.equal(cells, ""), pa.scalar(None, cells.type), cells), pa.float64())
        except pa.ArrowInvalid:
            return None
    array = numbers.to_numpy(zero_copy_only=False) if isinstance(numbers, pa.Array) else numbers.to_numpy()
    return array if np.isnan(array).sum() == numbers.null_count else None  # else "NaN", in some spelling


def name_wrong_number(values: pd.Series, wrong: np.ndarray) -> str:
    """Name the first wrong cell; in a column with decimal commas (1,5), the first one that is not such a number."""
    neither = wrong & parse_numbers(values, ",")[1]
    return name_cell(values, neither if neither.any() else wrong)


def to_numbers(values: pd.Series, hint: str = "", decimal: str = ".") -> np.ndarray:
    """Return a column as float64, missing cells as NaN.

    decimal: the decimal sign of numbers in text.  hint: what to do about a cell that is not a number.
    Raises UserError, naming the row, for a cell that is not a number or is infinite.
    """
    numbers, wrong = parse_numbers(values, decimal)
    if wrong.any():
        raise UserError(f"{name_wrong_number(values, wrong)} is not a plain number. {hint}".rstrip())
    if np.isinf(numbers).any():
        raise UserError(f"{name_cell(values, np.isinf(numbers))} is infinite. Empty the cell or leave out the row.")
    return numbers


def to_booleans(values: pd.Series) -> np.ndarray:
    """Return a column as float64 0 and 1, missing cells as NaN. Raises UserError, naming the row, for another word."""
    codes, keys = canonical_codes(values)
    known = BOOLEANS | {"0": 0.0, "1": 1.0, "": np.nan}
    numbers = np.array([known.get(key.lower(), np.inf) for key in keys])[codes]
    if np.isinf(numbers).any():
        raise UserError(f"{name_cell(values, np.isinf(numbers))} is not a boolean such as true, false, yes, no, 0, 1.")
    return numbers


def date_format(values: pd.Series) -> str:
    """Return the first of DATE_FORMATS that fits every cell; "" if none does."""
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        return "ISO8601"
    text = to_text(values.drop_duplicates()).dropna()
    looks_like_date = text.str.contains(r"\d.*[-/.:년 ].*\d", regex=True)
    if text.empty or not looks_like_date.all():
        return ""
    for form in DATE_FORMATS:
        if form == "ISO8601" and not text.str.match(r"\d{4}-\d{2}-\d{2}").all():
            continue  # the standard would accept 1234-05 and 2020 10 as well
        if all(
            pd.to_datetime(cells, format=form, errors="coerce", utc=True).notna().all() for cells in (text[:100], text)
        ):
            return form
    return ""


def to_days(values: pd.Series, form: str) -> np.ndarray:
    """Return dates as float64 days since 1970, missing cells as NaN.

    Raises UserError, naming the row, for a cell that is not written as `form` says.
    """
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        dates = values
    else:
        text = to_text(values)
        dates = pd.to_datetime(text, format=form, errors="coerce", utc=True)
        wrong = (dates.isna() & text.notna()).to_numpy()
        if wrong.any():
            raise UserError(f"{name_cell(values, wrong)} is not a date written as {form}, as in training.")
    dates = pd.DatetimeIndex(dates)
    dates = dates.tz_convert("UTC").tz_localize(None) if dates.tz is not None else dates
    return np.where(dates.isna(), np.nan, dates.as_unit("us").asi8 / (DAY * 1e6))
