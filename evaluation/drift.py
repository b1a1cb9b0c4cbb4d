"""Detect drift: the distribution of each column in the training data, and how far newer data is from it."""

from dataclasses import dataclass

import numpy as np

THRESHOLD = 0.2  # PSI above this is usually called drift (Siddiqi, "Credit Risk Scorecards", 2006)
MISSING_RISE = 0.1  # rise in the share of missing or unknown cells that counts as drift
MIN_RECORDS = 30  # newer records from which on they are compared
BINS = 10  # per number
MAX_CATEGORIES, MIN_ROWS = 30, 5  # categories in a profile, and training rows that each of them needs
PROFILE_ROWS = 2_000  # training rows, evenly spaced, from which a profile is made


@dataclass(frozen=True)
class Profile:
    """The distribution of each column of the training data, in plain values for a checkpoint.

    columns: name → {"edges"} of a number or {"values"} of a category, and {"counts"} of the training rows: one per bin
    or value, then other values (categories only), then missing cells. Numbers also have "low" and "high".
    """

    columns: dict[str, dict]

    @classmethod
    def fit(cls, data: dict[str, np.ndarray]) -> "Profile":
        """Fit on the `profile_values` of training records: floats with NaN, or words with "" for missing cells."""
        columns = {}
        for name, values in data.items():
            if values.dtype == object:
                words, counts = np.unique(values[values != ""].astype(str), return_counts=True)
                if len(words) > MAX_CATEGORIES or counts.min(initial=MIN_ROWS) < MIN_ROWS:
                    # Choose the frequent words in one half of the rows and count them in the other: counted in the
                    # same half, the chosen words would seem more frequent than they are
                    values = np.random.default_rng(0).permutation(values)
                    half, values = values[::2], values[1::2]
                    words, counts = np.unique(half[half != ""].astype(str), return_counts=True)
                    most = np.argsort(-counts, kind="stable")[:MAX_CATEGORIES]
                    words = words[most[counts[most] >= MIN_ROWS]]
                state = {"values": words.tolist()}
            else:
                known = values[~np.isnan(values)]
                if not len(known):
                    continue
                edges, times = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1]), return_counts=True)
                # A value that fills a decile or more gets its own bin, which starts just below it
                edges = np.union1d(edges, np.nextafter(edges[times > 1], -np.inf))
                state = {"edges": edges.tolist(), "low": float(known.min()), "high": float(known.max())}
            columns[name] = state | {"counts": _count(values, state).tolist()}
        return cls(columns)

    def count(self, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Count newer records in the bins of the training data. A `collections.Counter` can sum such counts."""
        return {name: _count(values, self.columns[name]) for name, values in data.items() if name in self.columns}

    def compare(self, counts: dict[str, np.ndarray]) -> dict[str, dict]:
        """Return {"psi", "missing", "other", "rows", "enough", "drifted", "why"} for each column of counted records.

        psi: population stability index, the sum of (p - q) · ln(p / q) over the bins. For n rows without drift it is
        distributed as chi²(bins - 1) · (1/n + 1/N) (Yurdakul, "Statistical Properties of PSI", 2018). An index below
        the 0.999 quantile of that distribution is not reported, so that a few rows raise no alarm.
        enough: whether the records suffice to tell drift from chance; below MIN_RECORDS nothing is called drift.
        missing, other: shares of the records; `other` are categories that are not in the profile.
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
    # Half a row is added to each bin: an empty bin would make the index infinite
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
    few = new.sum() < MIN_RECORDS
    return {
        "psi": psi,
        "missing": float(shares[-1]),
        "other": other,
        "rows": int(new.sum()),
        "enough": bool(by_chance <= THRESHOLD) and not few,
        "drifted": bool(why) and not few,
        "why": "" if few else "; ".join(why),
    }


def _chi_squared_quantile(k: int, z: float = 3.09) -> float:
    """Return the 0.999 quantile of chi² with k degrees of freedom (Wilson and Hilferty, 1931)."""
    return k * (1 - 2 / (9 * k) + z * np.sqrt(2 / (9 * k))) ** 3
