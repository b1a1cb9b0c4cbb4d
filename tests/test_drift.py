"""Drift is detected where the data has moved, and chance alone raises no alarm."""

import numpy as np
import pandas as pd
import pytest
from conftest import command

from evaluation.drift import Profile
from pipeline import Pipeline


def test_psi_follows_the_textbook():
    old = np.repeat([0.0, 1.0], [5000, 5000])
    profile = Profile.fit({"x": old})
    counts = profile.count({"x": np.repeat([0.0, 1.0], [8000, 2000])})
    expected = (0.8 - 0.5) * np.log(0.8 / 0.5) + (0.2 - 0.5) * np.log(0.2 / 0.5)
    assert profile.compare(counts)["x"]["psi"] == pytest.approx(expected, rel=0.01)


DRAWS = {
    "normal": lambda random, n: random.normal(size=n),
    "nearly always 1": lambda random, n: (random.random(n) < 0.95).astype(float),
    "five words": lambda random, n: random.choice(list("abcde"), n).astype(object),
    "two words by turns": lambda random, n: np.resize(np.array(["left", "right"] * 99 + ["both"], dtype=object), n),
    "a hundred words": lambda random, n: random.integers(0, 100, n).astype(str).astype(object),
}


@pytest.mark.parametrize("rows", [300, 2000])
@pytest.mark.parametrize("name", DRAWS)
def test_no_alarm_by_chance_and_one_for_drifted_data(name, rows):
    random = np.random.default_rng(0)

    def drifted(new) -> bool:
        profile = Profile.fit({"x": DRAWS[name](random, rows)})
        return profile.compare(profile.count({"x": new}))["x"]["drifted"]

    alarms = [drifted(DRAWS[name](random, n)) for n in (1, 5, 30, 100, 300, 1000) for _ in range(50)]
    assert np.mean(alarms) <= 0.01
    if name != "a hundred words" or rows > 300:  # 300 rows have too few of each word
        assert drifted(np.repeat(["zebra"], 300).astype(object) if "words" in name else np.full(300, -5.0))
    if name == "nearly always 1":
        assert drifted(np.zeros(300))


def test_predict_warns_of_drift(runs, tmp_path):
    checkpoint, path = runs["binary"].out / "best.pt", runs["binary"].out.parent / "binary.csv"
    table = pd.read_csv(path)
    table.assign(age=table["age"] + 200).to_csv(tmp_path / "moved.csv", index=False)
    for name, warned in ((path, False), (tmp_path / "moved.csv", True)):
        done = command("predict.py", "--checkpoint", checkpoint, "--input", name, "--output", tmp_path / "a.csv")
        assert done.returncode == 0 and (b"drift in 'age': PSI" in done.stderr) is warned, done.stderr
        assert b"drift in 'city'" not in done.stderr
    assert Pipeline.load(checkpoint).profile["age"]["high"] < 100
