"""How numbers are written in text: decimal and thousands signs, currencies, percent signs and units.

A form is given as an example number: "1,234.56", "1.234,56 €", "1234,56", "$1,234.56", "1234.56 kg", "1234.56%".
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from errors import UserError
from preprocessing.parsing import (
    broken_cells,
    fix_or_empty,
    holds_text,
    is_missing_word,
    is_number,
    to_text,
    typed_numbers,
)

PLAIN = "1234.56"
MANY = 20  # a column of numbers and words with at most this many distinct cells is a category
ENOUGH = 10_000  # distinct cells sampled to detect how a long column is written; the rest are then checked
NEARLY_ALL = 0.9  # share of cells that must match; the others are treated as mistakes
FEW_UNITS = 4  # different units in a column of measurements; with more they are the letters of codes such as 12A

_CURRENCY = (
    r"(?:[A-Z]{1,3})?[$£¥฿₠-⃀￡￥￦]|元|円|원|zł|Kč|Kr|kr|Rs|Fr|USD|EUR|GBP|CHF|JPY|KRW|CNY|RMB|INR|BRL|CAD|AUD|NZD|SEK|NOK"
    r"|DKK|PLN|CZK|HUF|TRY|RUB|ZAR|MXN|SGD|HKD|TWD|THB"
)
_IS_MONEY, OTHER = re.compile(_CURRENCY), {".": ",", ",": "."}
_PER = r"/[^\W\d_]{1,8}[²³23]?"  # per hour, per m²
_UNIT = rf"%|[^\w\s!-/:-@\[-`{{-~−’]|°?[^\W\d_]{{1,14}}[²³23]?(?:{_PER})?"  # %, ㎡, °C, km/h, months
# Powers of ten that are written as words; single letters only directly after the digits: 12K, but 300 K are kelvins
EXPONENTS = {"k": 3, "K": 3, "M": 6, "B": 9, "thousand": 3, "million": 6, "billion": 9, "mn": 6, "bn": 9,
             "Tsd": 3, "Mio": 6, "Mrd": 9, "lakh": 5, "Lakh": 5, "crore": 7, "Crore": 7, "천": 3, "만": 4,
             "백만": 6, "억": 8, "千": 3, "万": 4, "萬": 4, "亿": 8, "億": 8}  # fmt: skip
_WORDS = "|".join(word for word in EXPONENTS if len(word) > 1 or word > "z")
_ZERO = re.compile(rf"(?:{_CURRENCY})\s*-|-\s*(?:{_CURRENCY})")  # "$ -", which Excel's accounting format writes for 0
_WIDE = {0xFEE0 + code: code for code in range(0x21, 0x7F)}  # full-width digits and signs of East Asian keyboards
NUMBER = re.compile(
    rf"""(?P<open>\()?\s* (?P<sign>[+\-−–])?\s* (?P<prefix>(?:{_CURRENCY})\.?\s*)? (?P<open2>\()? (?P<sign2>[+\-−–])?\s*
    (?P<body>\d(?:[\d.,'’\s]*\d)?|[.,]\d+) (?:[.,][-–—]{{1,2}}|/-)? (?P<power>[eE][+-]?\d{{1,3}})?
    (?P<word>[kKMB](?![^\W\d_])|\s*(?:{_WORDS})\.?)?
    (?P<suffix>\s*(?:(?:{_CURRENCY})(?:{_PER})?|{_UNIT}|{_PER})\.?)? \s*(?P<minus>-)? \s*(?P<close>\))?""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class NumberForm:
    """How the numbers of a column are written. Made from an example by `form_of`, and written as one by `str`."""

    decimal: str = "."
    thousands: str = ""  # "" = none seen; an ambiguous 1,234 is then refused
    prefix: str = ""
    suffix: str = ""

    def __str__(self) -> str:
        return f"{self.prefix}1{self.thousands}234{self.decimal}56{self.suffix}"

    @property
    def unit(self) -> str:
        return _unit(self.prefix, self.suffix)

    @property
    def is_percent(self) -> bool:
        return self.unit == "%"


@dataclass(frozen=True)
class Cell:
    """The parts of a number in text."""

    text: str
    body: str  # digits and signs; spaces are " " and apostrophes "'"
    negative: bool
    prefix: str
    suffix: str
    power: int  # of ten
    thousands: str
    decimal: str
    is_ambiguous: bool  # 1,234 or 1.234: only the other cells can tell a thousands sign from a decimal sign

    @property
    def unit(self) -> str:
        return _unit(self.prefix, self.suffix)

    def value(self, thousands: str, decimal: str) -> float:
        """Return the number, with these signs."""
        digits = self.body.replace(thousands, "") if thousands else self.body
        return float(f"{'-' * self.negative}{digits.replace(decimal, '.') if decimal else digits}e{self.power}")


def _unit(prefix: str, suffix: str) -> str:
    """Return currency or unit in one spelling: "months." and "month" are one unit."""
    unit = (prefix.strip() + suffix.strip()).rstrip(".")
    if len(unit) > 2 or unit.lower() in ("kg", "km", "cm"):  # mW and MW differ
        unit = unit.lower()
    return unit[:-1] if len(unit) > 2 and unit.endswith("s") and unit.isalpha() else unit


def _signs(body: str) -> tuple[str, str, bool] | None:
    """Return (thousands sign, decimal sign, could be either) of a number's digits; None if they are no number."""
    signs = re.sub(r"\d", "", body)
    if not signs:
        return "", "", False
    kinds = list(dict.fromkeys(signs))
    last, whole = kinds[-1], body.rpartition(kinds[-1])[0]
    if len(kinds) > 2 or (len(kinds) == 2 and (signs.count(last) != 1 or last not in ".,")):
        return None
    if len(kinds) == 2:
        return (kinds[0], last, False) if _is_grouped(whole, kinds[0]) else None
    if len(signs) == 1 and last in ".,":
        is_ambiguous = re.fullmatch(r"[1-9]\d{0,2}[.,]\d{3}", body) is not None
        return "", last, is_ambiguous
    return (last, "", False) if _is_grouped(body, last) else None


def _is_grouped(digits: str, sign: str) -> bool:
    """Three digits after each thousands sign; with commas also the groups of two that India writes (12,34,567)."""
    groups = digits.split(sign)
    middle = (2, 3) if sign == "," else (3,)
    return 1 <= len(groups[0]) <= 3 and len(groups[-1]) == 3 and all(len(g) in middle for g in groups[1:-1])


@lru_cache(maxsize=4096)
def split_number(text: str) -> Cell | None:
    """Return the parts of a number in text; None if it is not a number."""
    text = text.translate(_WIDE).strip()
    text = text.replace("-", "0") if len(text) < 9 and _ZERO.fullmatch(text) else text
    if len(text) > 60 or not (found := NUMBER.fullmatch(text)):
        return None
    opened = found["open"] or found["open2"]
    is_negative = [found["sign"], found["sign2"], found["minus"], opened]
    if bool(opened) != bool(found["close"]) or sum(map(bool, is_negative)) > 1:
        return None
    body = re.sub(r"\s", " ", found["body"]).replace("’", "'")
    signs = _signs(body)
    prefix, suffix = found["prefix"] or "", found["suffix"] or ""
    if signs is None or (prefix and suffix and suffix.strip()[0] != "/") or (found["power"] and signs[0]):
        return None
    negative = any(sign not in (None, "+") for sign in is_negative)
    thousands, decimal, is_ambiguous = signs
    is_ambiguous = is_ambiguous and not found["power"]  # 1.234e+05 has a decimal sign
    power = int((found["power"] or "e0")[1:]) + EXPONENTS.get((found["word"] or "").strip(" ."), 0)
    return Cell(text, body, negative, prefix, suffix, power, thousands, decimal, is_ambiguous)


@lru_cache(maxsize=256)
def form_of(example: str) -> NumberForm:
    """Return the form that an example shows: 1.234,56 · 1,5 · 1.234 (a thousands sign) · $1,234.56 · 12 kg · 12%.

    Raises UserError for text that is not a number.
    """
    cell = split_number(example)
    if cell is None:
        raise UserError(f"{example!r} is not an example of a number such as 1.234,56 or $1,234.56 or 12 kg.")
    thousands, decimal = (cell.decimal, "") if cell.is_ambiguous else (cell.thousands, cell.decimal)
    other = OTHER.get(thousands, ".")
    return NumberForm(decimal or other, thousands, cell.prefix, cell.suffix)


# ---------------------------------------------------------------- which form a column has


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a column are written, with the evidence for it."""

    form: NumberForm
    ambiguous: str = ""  # a cell such as 2.053, if no cell of the column tells 2053 from 2.053
    likely: str = ""  # the more likely decimal sign for an ambiguous column; "" = unknown
    why: str = ""  # the reason
    shows: str = ""  # decimal sign that the cells prove; "" = none
    share: float = 1.0  # of the cells: numbers with the form's unit, or without one
    any_share: float = 1.0  # of the cells: numbers with any unit
    units: int = 1  # different units, no unit among them
    letters: bool = False  # all units are single letters behind the digits: codes such as 12A
    codes: bool = False  # digits with leading zeros: 01001


def find_numbers(values: pd.Series) -> Numbers | None:
    """Detect how the numbers of a column are written, from all of its cells; None if most cells are not numbers."""
    if pd.api.types.is_numeric_dtype(values.dtype):
        return None if pd.api.types.is_bool_dtype(values.dtype) else Numbers(NumberForm())
    if not holds_text(values):
        return None
    if (found := _find_plain(values)) is not None:
        return found
    text = typed_numbers(values)[1]  # typed numbers say nothing about how text is written
    text = to_text(text).dropna()
    if text.empty and len(values):
        return Numbers(NumberForm()) if values.map(is_number).any() else None
    counts = text.value_counts(sort=False).to_dict()
    cells = [cell for cell in counts if not is_missing_word(cell)]
    sample = cells[:: max(1, len(cells) // 200)]  # a column of words is recognised without looking at each of them
    if sum(split_number(cell) is not None for cell in sample) < 0.5 * len(sample) or not cells:
        return None
    if len(cells) > ENOUGH:
        found = _find({cell: counts[cell] for cell in cells[:: len(cells) // ENOUGH]})
        if found.shows and found.share == 1 and not parse_numbers(text, str(found.form))[1].any():
            return found
    return _find({cell: counts[cell] for cell in cells})


def _find(counts: dict[str, int]) -> Numbers:
    """Detect how numbers are written from {cell: count}, no missing ones among them."""
    cells = list(counts)
    parts = {cell: part for cell in cells if (part := split_number(cell)) is not None}
    units = Counter()
    for cell, part in parts.items():
        if part.unit or part.body.strip("0.,"):  # a zero needs no unit
            units[part.unit] += counts[cell]
    unit = units.most_common(1)[0][0] if units else ""
    total, of_unit = sum(counts.values()), [part for part in parts.values() if part.unit in (unit, "")]
    example = next((part for part in of_unit if part.unit), None)
    found = _decide(of_unit, (example.prefix, example.suffix) if example else ("", ""))
    return replace(
        found,
        share=sum(counts[cell] for cell, part in parts.items() if part.unit in (unit, "")) / total,
        any_share=sum(counts[cell] for cell in parts) / total,
        units=len(units),
        letters=all(len(part.suffix) == 1 and part.suffix.isalpha() for part in parts.values() if part.unit)
        and any(units),
        codes=_are_codes([part.body + part.unit for part in parts.values()]),
    )


def _are_codes(cells: list[str]) -> bool:
    """Return whether cells are codes of digits with leading zeros, such as 01001: more than one in twenty has some."""
    padded = sum(cell[0] == "0" and len(cell) > 1 for cell in cells)
    return padded > 0.05 * len(cells) and all(cell.isdigit() for cell in cells)


def _find_plain(values: pd.Series) -> Numbers | None:
    """Fast path of `find_numbers` for plain numbers (1234.56); None for other columns."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if values.dtype == object:
        return None
    cells = pa.array(values, pa.large_string())
    if _cast_plain(cells) is None:
        return None

    def has(pattern: str) -> bool:
        return any(pc.any(pc.match_substring_regex(part, pattern)).as_py() for part in (cells[:1000], cells))

    if not has(r"[^\d+-]"):
        if has(r"^0\d"):
            return None
        return Numbers(NumberForm()) if has(r"\d") else None
    return Numbers(NumberForm(), shows=".") if has(r"\.\d{0,2}$|\.\d*[eE]|\.\d{4}|\d{4}\.|^[+-]?0?\.") else None


def _cast_plain(cells) -> np.ndarray | None:
    """Cast an Arrow array of text such as 1234.56 to float64, NaN for empty cells; None if a cell is anything else."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        numbers = pc.cast(pc.if_else(pc.equal(cells, ""), pa.scalar(None, cells.type), cells), pa.float64())
    except pa.ArrowInvalid:
        return None
    return numbers.to_numpy(zero_copy_only=False)


def _decide(parts: list[Cell], affixes: tuple[str, str]) -> Numbers:
    """Choose decimal and thousands sign from the cells of one unit."""
    thousands, decimals = Counter(p.thousands for p in parts), Counter(p.decimal for p in parts if not p.is_ambiguous)
    points = decimals["."] + thousands[","]
    commas = decimals[","] + thousands["."]
    spaces = next((sign for sign in (" ", "'") if thousands[sign]), "")
    ambiguous = [p for p in parts if p.is_ambiguous]
    if points or commas:
        decimal = "," if commas > points else "."
        other = OTHER[decimal]
        proven = not (points and commas)
        used = thousands[other] or (proven and any(other in p.body for p in ambiguous))
        return Numbers(NumberForm(decimal, spaces or (other if used else ""), *affixes), shows=decimal)
    if spaces or not ambiguous:
        return Numbers(NumberForm(".", spaces, *affixes))
    signs = Counter(p.decimal for p in ambiguous)
    sign = signs.most_common(1)[0][0]
    short = any(p.body.isdigit() and len(p.body) <= 3 and p.body != "0" for p in parts)
    likely, why = "", ""
    if len(signs) == 1 and _IS_MONEY.fullmatch((affixes[0] + affixes[1]).strip()):
        likely, why = OTHER[sign], "money has two decimals"
    elif len(signs) == 1 and short and any(p.body.endswith("0") for p in ambiguous):
        likely, why = OTHER[sign], "shorter numbers of the column have no sign"
    thousands_sign = "," if signs[","] else ""
    return Numbers(NumberForm(".", thousands_sign, *affixes), ambiguous=ambiguous[0].text, likely=likely, why=why)


def with_decimal(form: NumberForm, decimal: str) -> NumberForm:
    """Return a form with this decimal sign, and the other sign for thousands unless these have a space."""
    return replace(form, decimal=decimal, thousands=form.thousands if form.thousands in (" ", "'") else OTHER[decimal])


# ---------------------------------------------------------------- cells → numbers


def parse_numbers(values: pd.Series, form: str = PLAIN) -> tuple[np.ndarray, np.ndarray]:
    """Return (numbers, wrong): a column as float64 with NaN for missing cells, and a mask of cells that are neither.

    form: how the column's numbers are written. 1,5 and 1.5 are understood in any column; the form decides whether 1,234
    is 1234 or 1.234. The unit may be omitted but must not differ.
    """
    numbers, text = typed_numbers(values)
    if text is None:
        is_percent = form != PLAIN and form_of(form).is_percent
        return numbers, _is_no_percent(numbers) if is_percent else np.zeros(len(values), dtype=bool)
    numbers, wrong, form = numbers.copy(), np.zeros(len(values), dtype=bool), form_of(form)
    known, at = _parse_most(text, form), text.index.to_numpy()
    numbers[at] = known
    rest = np.isnan(known)
    if rest.any():
        codes, cells = pd.factorize(text[rest])
        parsed = [_parse_one(cell, form) for cell in cells]
        numbers[at[rest]] = np.array([np.nan if value is None else value for value in parsed], dtype=float)[codes]
        wrong[at[rest]] = np.array([value is None for value in parsed], dtype=bool)[codes]
    return numbers, wrong


def _is_no_percent(numbers: np.ndarray) -> np.ndarray:
    """Mark numbers without a percent sign that could be shares: 0.2 may mean 20 %."""
    return (np.abs(numbers) <= 1) & (numbers != 0)


def _parse_most(text: pd.Series, form: NumberForm) -> np.ndarray:
    """Parse the cells that are written exactly in the form, with Arrow, about ten times as fast as one by one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = pa.array(text, pa.large_string())
    if not form.thousands and not form.unit and form.decimal == "." and (numbers := _cast_plain(cells)) is not None:
        return numbers
    for spelled, sign in (
        ("[\u00a0\u202f\u2009]", " "),
        ("’", "'"),
        ("^[−–]", "-"),
        (r"^\s*\((.*)\)\s*$", r"-\1"),
        (r"^(.*\d)-$", r"-\1"),
    ):
        cells = pc.replace_substring_regex(cells, spelled, sign)
    sign, decimal = re.escape(form.thousands), re.escape(form.decimal)
    grouped = rf"\d{{1,3}}(?:{sign}\d{{3}})+|" if sign else ""
    pattern = rf"^\s*{_affix(form.prefix)}([+-]?(?:{grouped}\d+)(?:{decimal}\d+)?){_affix(form.suffix)}\s*$"
    fits = pc.match_substring_regex(cells, pattern)
    bodies = pc.if_else(fits, cells, pa.scalar(None, cells.type))
    bodies = pc.replace_substring_regex(bodies, pattern, r"\1")
    for sign, instead in ((form.thousands, ""), (form.decimal, ".")):
        bodies = pc.replace_substring(bodies, sign, instead) if sign and sign != instead else bodies
    return pc.cast(bodies, pa.float64()).to_numpy(zero_copy_only=False)


def _affix(text: str) -> str:
    return rf"\s*{re.escape(text.strip())}\s*" if text.strip() else ""


def _parse_one(text: str, form: NumberForm) -> float | None:
    """Return the number in one cell, NaN if it is missing, None if it is neither."""
    if is_missing_word(text):
        return np.nan
    cell = split_number(text)
    if cell is None:
        return float(text) if re.fullmatch(r"\s*[+-]?inf(inity)?\s*", text, re.IGNORECASE) else None
    if cell.unit != form.unit and cell.unit:
        return None
    thousands, decimal = cell.thousands, cell.decimal
    if cell.is_ambiguous:
        if cell.decimal == form.thousands:
            thousands, decimal = cell.decimal, ""
        elif cell.decimal != form.decimal:
            return None
    number = cell.value(thousands, decimal)
    return None if form.is_percent and not cell.unit and _is_no_percent(number) else number


def to_numbers(values: pd.Series, form: str = PLAIN, hint: Callable = fix_or_empty) -> np.ndarray:
    """Return a column as float64, missing cells as NaN.

    hint: (values, mask of wrong cells) → what to do about them.
    Raises BrokenRecords, naming the row, for cells that are not numbers in this form, or are infinite.
    """
    numbers, wrong = parse_numbers(values, form)
    if wrong.any():
        advice = hint(values, wrong)
        raise broken_cells(values, wrong, lambda cell: f"{_why_not(cell, form)} {advice}")
    if np.isinf(numbers).any():
        raise broken_cells(values, np.isinf(numbers), lambda _: "is infinite. Empty the cell or leave out the row.")
    return numbers


def _why_not(cell: object, example: str) -> str:
    """Say why a cell is not a number of a form."""
    form, part = form_of(example), split_number(str(cell))
    written = f" written like {example}" if example != PLAIN else ""
    if part is None or not (part.unit or part.is_ambiguous or form.is_percent):
        return f"is not a number{written}."
    if part.unit and part.unit != form.unit:
        return f"has the unit {part.unit!r}, but most cells are written like {example}: convert it."
    if form.is_percent and not part.unit:
        return "has no % sign, unlike the training cells, so it may be a share or a percentage: add the sign."
    whole, decimals = part.body.split(part.decimal)
    both = f"{whole}{decimals} or {whole}.{decimals}"
    return f"may be {both}, and the column does not show which: write it one of these ways."


def missing_hint(values: pd.Series, wrong: np.ndarray) -> str:
    """Say which flag treats the words among the wrong cells of a column as missing."""
    words = values[wrong].astype(str).str.strip().drop_duplicates()
    words = [word for word in words if not re.search(r"\d", word)]
    if not words:
        return f"Fix the cell, or leave the column out with --columns {values.name}=drop."
    shown = " ".join(f"'{word}'" if re.search(r"[^\w.-]", word) else word for word in words[:5])
    return f"Fix the cell, or treat it as missing with --missing {shown}{' …' if len(words) > 5 else ''}."
