"""What the training data looked like, column by column, and how far newer data has moved from it."""

from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.2  # PSI from which a distribution is usually said to have moved (Siddiqi, "Credit Risk Scorecards", 2006)
MISSING_RISE = 0.1  # more missing or unknown cells than in training, as a share of all
BINS, CATEGORIES, FEWEST = 10, 30, 5  # of a number, of a category at most, and rows of each of these
PROFILE_ROWS = 2_000  # of the training data, from all over it


@dataclass(frozen=True)
class Profile:
    """The distribution of each column of the training data, in plain values, as a checkpoint keeps it.

    columns: name → {"edges"} of a number or {"values"} of a category, and {"counts"} of the training rows: one for each
    bin or value, then of other values (categories) and of missing cells. Numbers also have "low" and "high".
    """

    columns: dict[str, dict]

    @classmethod
    def fit(cls, measured: dict[str, np.ndarray]) -> "Profile":
        """Learn from what a preprocessor's `measure` returns of training records: floats with NaN, or words with ""."""
        columns = {}
        for name, values in measured.items():
            if values.dtype == object:
                words, counts = np.unique(values[values != ""].astype(str), return_counts=True)
                if len(words) > CATEGORIES or counts.min(initial=FEWEST) < FEWEST:
                    # The frequent ones of half of the rows, counted in the other half: in the same, those chosen would
                    # seem more frequent than they are
                    values = np.random.default_rng(0).permutation(values)
                    half, values = values[::2], values[1::2]
                    words, counts = np.unique(half[half != ""].astype(str), return_counts=True)
                    most = np.argsort(-counts, kind="stable")[:CATEGORIES]
                    words = words[most[counts[most] >= FEWEST]]
                state = {"values": words.tolist()}
            else:
                known = values[~np.isnan(values)]
                if not len(known):
                    continue
                edges, times = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1]), return_counts=True)
                # A value that fills a decile or more has a bin of its own, from just below it on
                edges = np.union1d(edges, np.nextafter(edges[times > 1], -np.inf))
                state = {"edges": edges.tolist(), "low": float(known.min()), "high": float(known.max())}
            columns[name] = state | {"counts": _count(values, state).tolist()}
        return cls(columns)

    def count(self, measured: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Count newer records in the bins of the training data; a `collections.Counter` adds such counts."""
        return {name: _count(values, self.columns[name]) for name, values in measured.items() if name in self.columns}

    def compare(self, counts: dict[str, np.ndarray]) -> dict[str, dict]:
        """Return for each column {"psi", "missing", "other", "rows", "drifted", "why"} of counted records.

        psi: population stability index, the sum of (p - q) · ln(p / q) over the bins. Of n rows that have not moved it
        is about chi²(bins - 1) · (1/n + 1/N) (Yurdakul, "Statistical Properties of PSI", 2018): below that
        distribution's 0.999 quantile nothing is said, so that a few rows raise no alarm.
        missing, other: shares of the records; `other` are categories that the profile does not list.
        """
        return {name: _compare(np.array(self.columns[name]["counts"]), new, self.columns[name])
                for name, new in counts.items() if new.sum()}  # fmt: skip


def _count(values: np.ndarray, state: dict) -> np.ndarray:
    if "values" in state:
        index = {value: i for i, value in enumerate(state["values"])} | {"": len(state["values"]) + 1}
        bins = np.fromiter((index.get(v, len(state["values"])) for v in values), np.int64, len(values))
        return np.bincount(bins, minlength=len(state["values"]) + 2)
    edges = np.asarray(state["edges"])
    bins = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="left"))
    return np.bincount(bins, minlength=len(edges) + 2)


def _compare(old: np.ndarray, new: np.ndarray, state: dict) -> dict:
    # Half a row in each bin: an empty one would make the index infinite
    p, q = (new + 0.5) / (new + 0.5).sum(), (old + 0.5) / (old + 0.5).sum()
    psi = float(((p - q) * np.log(p / q)).sum())
    by_chance = _chi_squared_quantile(len(old) - 1) * (1 / new.sum() + 1 / old.sum())
    shares, before = new / new.sum(), old / old.sum()
    other, was_other = (float(s[-2]) if "values" in state else 0.0 for s in (shares, before))
    why = []
    if psi > max(THRESHOLD, by_chance):
        why.append(f"PSI {psi:.2f}, above {THRESHOLD}")
    for what, now, then in (("missing", shares[-1], before[-1]), ("unknown", other, was_other)):
        if now > then + max(MISSING_RISE, 3.1 * np.sqrt(0.25 / new.sum())):
            why.append(f"{now:.0%} {what}, {then:.0%} in training")
    return {
        "psi": psi,
        "missing": float(shares[-1]),
        "other": other,
        "rows": int(new.sum()),
        "drifted": bool(why),
        "why": "; ".join(why),
    }


def _chi_squared_quantile(k: int, z: float = 3.09) -> float:
    """The 0.999 quantile of chi² with k degrees of freedom (Wilson and Hilferty, 1931)."""
    return k * (1 - 2 / (9 * k) + z * np.sqrt(2 / (9 * k))) ** 3
