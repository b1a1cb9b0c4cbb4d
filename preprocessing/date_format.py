"""How dates are written in text, and how they become days.

A form is a format of strptime, or ISO8601; several are joined by " | " where a column mixes them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from errors import UserError
from preprocessing.parsing import broken_cells, fix_or_empty, is_missing_word, to_text

ISO, JOINT = "ISO8601", " | "
DAYS = ("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y. %m. %d.", "%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%d.%m.%Y",
        "%Y년 %m월 %d일", "%Y年%m月%d日", "%d %b %Y", "%d. %b %Y", "%d-%b-%Y", "%d/%b/%Y", "%b %d, %Y", "%b %d %Y",
        "%Y-%b-%d", "%m/%d/%y", "%d/%m/%y", "%m-%d-%y", "%d-%m-%y", "%d.%m.%y", "%y.%m.%d", "%y-%m-%d",
        "%y/%m/%d", "%d %b %y", "%d-%b-%y", "%d%b%Y", "%Y%m%d")  # fmt: skip
MONTHS_ALONE = ("%m.%Y", "%m/%Y", "%Y-%m", "%Y.%m", "%b %Y", "%b-%y", "%b-%Y")
TIMES = (
    "%H:%M",
    "%H:%M:%S",
    "%H:%M:%S.%f",
    "%I:%M %p",
    "%I:%M:%S %p",
    "%I:%M%p",
    "%p %I:%M",
    "%p %I:%M:%S",
    "%Hh%M",
    "%H.%M",
    "%H%M%S",
)
FORMS = [
    ISO,
    *DAYS,
    *MONTHS_ALONE,
    "%d/%b/%Y:%H:%M:%S%z",
    "%b %d %H:%M:%S %Y",
    *(d + gap + t + z for gap in (" ", ", ", " - ", "T") for d in DAYS for t in TIMES for z in ("", "%z")),
]
ENOUGH = 5_000  # distinct cells sampled to detect how a long column is written; the rest are then checked
COULD_BE_CODES = (*MONTHS_ALONE, "%Y%m%d")
CALENDAR = re.compile(
    r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])|(0[1-9]|1[0-2])[./](19|20)\d\d|(19|20)\d\d\.(0[1-9]|1[0-2])"
)
STYLES = 4  # in one column, at most
SECONDS = 86_400.0  # of a day

# How the names of months begin in English, German, French, Spanish, Italian, Portuguese and Dutch
MONTHS = {"Jan": "jan jän ene gen", "Feb": "feb fév fev", "Mar": "mar mär mrz mrt maart", "Apr": "apr abr avr",
          "May": "may mai mag mei maj", "Jun": "jun juin giu", "Jul": "jul juil lug", "Aug": "aug ago aoû aou",
          "Sep": "sep set", "Oct": "oct okt ott out", "Nov": "nov", "Dec": "dec dez dic déc"}  # fmt: skip
MONTH_OF = {start: month for month, starts in MONTHS.items() for start in starts.split()}
_STARTS = "|".join(sorted(MONTH_OF, key=len, reverse=True))
_MONTH = re.compile(rf"(?<![^\W\d_])({_STARTS})[^\W\d_]*\.?(?=[\W\d_]|$)", re.I)
_WEEKDAY = re.compile(
    r"^(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+|^(?:mo|di|mi|do|fr|sa|so)\.?,?\s+|\([월화수목금토일]\)", re.I
)
_FILLERS = re.compile(r"\b(?:de|at|uhr|um)\b|(?<=\d)(?:st|nd|rd|th|er)\b|\[[\w/+-]+\]$", re.I)
_NOON = re.compile(r"(오전|오후|上午|下午|\b[ap]\.\s?m\.|\b[ap]m\b)", re.I)
ZONES = {"Z": 0, "UTC": 0, "GMT": 0, "WET": 0, "CET": 1, "CEST": 2, "EET": 2, "MSK": 3, "KST": 9, "JST": 9, "EST": -5,
         "EDT": -4, "CDT": -5, "MST": -7, "MDT": -6, "PST": -8, "PDT": -7}  # fmt: skip
_ZONE = re.compile(rf"(?<=\d|M)\s*({'|'.join(ZONES)})$")


@dataclass(frozen=True)
class Dates:
    """How the dates of a column are written, with the evidence for it."""

    form: str
    share: float = 1.0  # of the cells that are such dates
    ambiguous: str = ""  # a cell such as 03/10/2023, if every day and month of the column could be swapped
    shows: str = ""  # "day" or "month": what the cells prove to come first; "" = nothing


def _swapped(form: str) -> str:
    """Return a form with day and month in the other order, if that is in use; else the form itself."""
    other = form.translate({ord("d"): "m", ord("m"): "d"})
    return other if other in FORMS else form


def _first(form: str) -> str:
    """Return "day" or "month", whichever comes first; "" if no other order is in use."""
    return "" if _swapped(form) == form else "day" if form.find("%d") < form.find("%m") else "month"


def in_order(form: str, first: str) -> str:
    """Return a form with `first`, "day" or "month", first, where both orders are in use (03/10/2023, 03-10-2023)."""
    return JOINT.join(_swapped(each) if _first(each) not in ("", first) else each for each in form.split(JOINT))


def _normalise(text: str) -> str:
    """Write month names, weekdays, a.m. and p.m. and time zones as strptime reads them."""
    text = " ".join(_FILLERS.sub("", _WEEKDAY.sub("", text.strip())).split())
    text = re.sub(r"(:\d\d),(\d{3})$", r"\1.\2", text)  # milliseconds of a log
    text = _NOON.sub(lambda m: "AM" if m[0].lower()[0] in "a上" or m[0] == "오전" else "PM", text)
    text = _MONTH.sub(lambda m: MONTH_OF[m[1].lower()], text)
    text = _ZONE.sub(lambda m: f"{ZONES[m[1]]:+03}:00", text)
    return re.sub(r"(:\d\d(?:\.\d+)?|M) ?([+-]\d\d):?(\d\d)$", r"\1\2:\3", text)


def _shape(text: str) -> str:
    """Return text with 9 for digits, A for letters and Z for a time zone: a format and its dates have the same."""
    text = re.sub(r"(?<=[\dAM])[+-]\d\d:\d\d$", "Z", text)
    return re.sub(r"\d+", "9", re.sub(r"[^\W\d_]+(?<!Z)|Z(?!$)", "A", text))


FORMS_OF = defaultdict(list)  # shape → formats
for _form in FORMS[1:]:
    _example = _form.replace("%z", "+00:00").replace("%b", "A").replace("%p", "A")
    FORMS_OF[_shape(re.sub("%.", "9", _example))].append(_form)


def _parse(text: pd.Series, form: str) -> pd.Series:
    """Parse normalised text in one form; NaT for cells that are not written so."""
    # As ISO, pandas would accept 1234-05 and 2020 10 as well, and in any form "now" and "today", by the clock
    fits = text.str.contains(r"^\d{4}-\d{2}-\d{2}(?!\d)" if form == ISO else r"\d", regex=True)
    text = text if fits.all() else text.where(fits)
    dates = pd.to_datetime(text, format=form.replace("%B", "%b"), errors="coerce", utc=True)
    return dates.where(dates.dt.year.between(1900, 2099)) if form in COULD_BE_CODES else dates


def find_dates(values: pd.Series) -> Dates | None:
    """Detect how the dates of a column are written, from all of its cells; None if most cells are not dates."""
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        return Dates(ISO)
    text = to_text(_whole(values).drop_duplicates()).dropna()
    sample = text.iloc[:: max(1, len(text) // 200)]
    sample = sample[~sample.map(is_missing_word).astype(bool) & (sample.str.len() <= 40)]
    sample = sample[sample.str.contains(r"\d", regex=True)].map(_normalise).astype("str")[:30]
    if sum(bool(_candidates(sample[i : i + 1])) for i in range(len(sample))) <= 0.5 * len(sample):
        return None
    if len(text) > ENOUGH:
        found = _find(text.iloc[:: len(text) // ENOUGH])
        if found and not found.ambiguous and found.share == 1 and not parse_days(text, found.form)[1].any():
            return found
    return _find(text)


def _find(text: pd.Series) -> Dates | None:
    """Detect how dates are written from different cells."""
    text = text[~text.map(is_missing_word).astype(bool)].map(_normalise).astype("str")
    forms, proofs, ambiguous, rest = [], Counter(), "", text
    while len(rest) and len(forms) < STYLES:
        candidates = next(filter(None, (_candidates(rest[i : i + 1]) for i in range(min(5, len(rest))))), [])
        if not candidates:
            break
        fits = {form: _parse(rest, form).notna() for form in candidates}
        form = max(candidates, key=lambda form: (fits[form].sum(), -_count_years(rest, form)))  # the first of equals
        if first := _first(form):
            other = _swapped(form)
            only = fits[form] & ~fits[other] if other in fits else fits[form]
            proofs[first] += int(only.sum())
            if not only.any() and (_parse(rest, form) != _parse(rest, other))[fits[form]].any():
                ambiguous = ambiguous or rest[fits[form]].iloc[0]
        forms.append(form)
        rest = rest[~fits[form]]
    if not forms:
        return None
    shows = next((first for first, count in proofs.most_common(1) if count), "")
    forms = list(dict.fromkeys(in_order(form, shows or "month") for form in forms))
    is_date = np.any([_parse(text, form).notna() for form in forms], axis=0)
    return Dates(JOINT.join(forms), float(is_date.mean()), "" if shows else ambiguous, shows)


def _count_years(text: pd.Series, form: str) -> int:
    """Return the number of years, where two digits could be a year or a day: 23.01.02 beside 23.01.03 is of 2023."""
    return _parse(text, form).dt.year.nunique() if "%y" in form else 0


def _candidates(text: pd.Series) -> list[str]:
    """Return the formats in which a cell can be read."""
    alike = (ISO, *FORMS_OF.get(_shape(text.iloc[0]), ()))
    return [form for form in alike if _parse(text, form).notna().all()]


def are_calendar_dates(values: pd.Series) -> bool:
    """Return whether cells that could be numbers are dates without a doubt: 20230711, 07.2023 or 2023.07 in each."""
    for cells in (values.head(100), values):
        text = to_text(_whole(cells)).dropna()
        if len(text) and not (text.str.fullmatch(CALENDAR).astype(bool) | text.map(is_missing_word)).all():
            return False
    return text.nunique() >= 3


def _whole(values: pd.Series) -> pd.Series:
    """Return whole floats, such as 20230711.0 beside missing cells, as integers."""
    if not pd.api.types.is_float_dtype(values.dtype) or (values.dropna() % 1 != 0).any():
        return values
    return values.astype("Int64") if (values.abs().fillna(0) < 2**53).all() else values


def parse_days(values: pd.Series, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (days, wrong): days since 1970 as float64 with NaN for missing cells, and a mask of what is neither.

    ISO dates are understood whatever the form.
    """
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        return _days(pd.DatetimeIndex(values)), np.zeros(len(values), dtype=bool)
    text = to_text(_whole(values)).reset_index(drop=True)
    forms = list(dict.fromkeys([*form.split(JOINT), ISO]))
    days, wrong = _days(pd.DatetimeIndex(_parse(text, forms[0]))), np.zeros(len(values), dtype=bool)
    rest = np.isnan(days) & text.notna().to_numpy()
    if rest.any():
        codes, cells = pd.factorize(text[rest])
        cells = pd.Series(cells, dtype="str")
        normal, found = cells.map(_normalise).astype("str"), np.full(len(cells), np.nan)
        for each in forms:
            found = np.where(np.isnan(found), _days(pd.DatetimeIndex(_parse(normal, each))), found)
        missing = cells.map(is_missing_word).to_numpy(dtype=bool)
        days[rest], wrong[rest] = found[codes], (np.isnan(found) & ~missing)[codes]
    return days, wrong


def _days(dates: pd.DatetimeIndex) -> np.ndarray:
    dates = dates.tz_convert("UTC").tz_localize(None) if dates.tz is not None else dates
    return np.where(dates.isna(), np.nan, dates.as_unit("us").asi8 / (SECONDS * 1e6))


def to_days(values: pd.Series, form: str, hint: Callable = fix_or_empty) -> np.ndarray:
    """Return dates as float64 days since 1970, missing cells as NaN.

    hint: (values, mask of wrong cells) → what to do about them.

    Raises BrokenRecords, naming the row, for cells that are not written as `form` says.
    """
    days, wrong = parse_days(values, form)
    if wrong.any():
        advice = hint(values, wrong)
        raise broken_cells(values, wrong, lambda _: f"is not a date written as {form}, as in training. {advice}")
    return days


def check_form(form: str) -> str:
    """Return a form that a person gave. Raises UserError if strptime does not know it."""
    for each in form.split(JOINT):
        if each not in ("", ISO):
            try:
                pd.to_datetime(pd.Series(["x"], dtype="str"), format=each, errors="coerce")
            except ValueError as error:
                raise UserError(f"{each!r} is not a date format such as %d/%m/%Y ({error}).") from None
            if "%" not in each:
                raise UserError(f"{each!r} is not a date format such as %d/%m/%Y.")
    return form
