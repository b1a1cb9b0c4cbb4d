"""Resolve ambiguous number and date formats from the other columns of the file.

2.053 is 2053 in one country and a little more than 2 in another, and 03/10/2023 is in March or in October.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd

from config import DataConfig
from preprocessing.date_format import ISO, Dates, find_dates, in_order, parse_days, to_days
from preprocessing.number_format import PLAIN, Numbers, find_numbers, parse_numbers, to_numbers, with_decimal
from preprocessing.parsing import holds_text

HEAD = 10_000  # rows used to detect formats; a column that is ambiguous in them is read in full
DECIMALS = {";": ",", ",": "."}  # usual decimal sign for each separator


def settle_formats(table: pd.DataFrame, config: DataConfig, separator: str, notes: list[str]) -> DataConfig:
    """Return the flags with the formats of numbers and dates, as --columns takes them.

    separator: of the file, "" if it has none.  notes: gets a line for each column that could be read in two ways.
    """
    kinds, formats = config.column_kinds(), config.column_formats()
    numbers, dates = {}, {}
    for name in table:
        values, kind = table[name], kinds.get(name, "")
        if not name or not holds_text(values) or name in formats or kind not in ("", "number", "date"):
            continue
        if kind != "date" and (found := _find(find_numbers, values)) and not found.codes:
            numbers[name] = found
        elif kind != "number" and (found := _find(find_dates, values)):
            dates[name] = found
    decimal, why = _vote({name: found.shows for name, found in numbers.items()})
    dotted = next((name for name, found in dates.items() if found.form.startswith("%d.")), None)
    if not decimal and dotted is not None and not any(found.likely for found in numbers.values()):
        decimal, why = ",", f"column {dotted!r} has dates with points"
    settled = _settle_dates(dates, decimal or DECIMALS.get(separator, ""), notes)
    for name, found in numbers.items():
        sign, reason = decimal, why
        if not sign and found.likely:
            sign, reason = found.likely, found.why
        if not sign and separator in DECIMALS:
            sign, reason = DECIMALS[separator], f"the file is separated by {separator!r}"
        if found.shows:  # the training split alone may not show it
            settled[name] = str(found.form)
        elif found.ambiguous or (sign == "," and decimal):
            settled[name] = str(with_decimal(found.form, sign or "."))
        elif sign == ",":  # only the separator says so: 2.053 in another file is then refused
            settled[name] = str(replace(found.form, decimal=","))
        if found.ambiguous:
            other = str(with_decimal(found.form, "." if sign == "," else ","))
            one, two = (parse_numbers(pd.Series([found.ambiguous]), form)[0][0] for form in (settled[name], other))
            notes.append(
                f"{name}: {found.ambiguous!r} is read as {one:.12g}, because {reason or 'that is more common'}; "
                f"--columns '{name}=number:{other}' reads it as {two:.12g}"
            )
    settled = {name: form for name, form in settled.items() if form not in (PLAIN, ISO)}
    return replace(config, columns=(*config.columns, *(f"{name}=:{form}" for name, form in settled.items())))


def _find(find, values: pd.Series) -> Numbers | Dates | None:
    found = find(values.head(HEAD))
    return found if found is None or found.shows or len(values) <= HEAD else find(values)


def _vote(shows: dict[str, str]) -> tuple[str, str]:
    """Return what most columns show, and why; "" if none shows anything."""
    winner = next(iter(Counter(shown for shown in shows.values() if shown).most_common(1)), ("", 0))[0]
    return winner, f"column {next(name for name in shows if shows[name] == winner)!r} is written so" if winner else ""


def _settle_dates(dates: dict[str, Dates], decimal: str, notes: list[str]) -> dict[str, str]:
    """Return the formats of the dates whose day and month could be swapped."""
    first, why = _vote({name: found.shows for name, found in dates.items()})
    if not first and any("%p" in found.form for found in dates.values()):
        first, why = "month", "of the 12-hour clock"
    if not first and decimal:
        first, why = {",": ("day", "of the decimal comma"), ".": ("month", "of the decimal point")}[decimal]
    settled = {}
    for name, found in dates.items():
        if not found.ambiguous:
            settled[name] = found.form
            continue
        settled[name] = in_order(found.form, first or "month")
        other = in_order(found.form, "day" if first != "day" else "month")
        day = np.datetime64(int(parse_days(pd.Series([found.ambiguous]), settled[name])[0][0]), "D")
        notes.append(
            f"{name}: {found.ambiguous!r} is read as {day}, the {first or 'month'} first, because "
            f"{why or 'that is more common'}; --columns '{name}=date:{other}' swaps day and month"
        )
    return settled


def to_moments(values: pd.Series, kind: str = "", form: str = "") -> np.ndarray | None:
    """Return numbers or dates as float64, NaN for missing cells; None if most cells are neither.

    kind, form: which of them, and how they are written; "" detects it.
    Raises BrokenRecords, naming the row, for a cell that is neither.
    """
    found = None if kind == "date" else find_numbers(values)
    if kind == "number" or (found and found.share == 1):
        return to_numbers(values, form or str(found.form if found else PLAIN))
    form = form or (found.form if (found := find_dates(values)) else "")
    return to_days(values, form) if form else None
