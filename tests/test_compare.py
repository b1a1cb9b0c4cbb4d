"""compare.py tells better, worse and cannot tell apart, and refuses runs that were tested on other records."""

import numpy as np
import pytest
from conftest import assert_refused, command, quick_run, table_for
from scipy import stats

from config import DataConfig, ModelConfig
from evaluation.comparison import compare_means, holm, mcnemar, more_rows, simpler


def test_equal_models_are_seldom_told_apart_and_different_ones_are():
    random, alarms, found = np.random.default_rng(0), 0, 0
    for _ in range(200):
        hard = random.exponential(size=120)
        a, b = (hard * random.lognormal(0, 0.4, 120) for _ in range(2))
        alarms += compare_means(np.stack([a, b], axis=1)).p[0, 1] < 0.05
        found += compare_means(np.stack([a, b + 0.5], axis=1)).p[0, 1] < 0.05
    assert alarms <= 14 and found >= 180


def test_the_interval_of_a_mean_difference_is_that_of_the_paired_t_test():
    random = np.random.default_rng(1)
    a, b = random.normal(0.1, 1, 300), random.normal(0, 1, 300)
    paired, expected = compare_means(np.stack([a, b], axis=1)), stats.ttest_rel(a, b)
    low, high = expected.confidence_interval()
    np.testing.assert_allclose(paired.interval(0, 1), [low, high], atol=0.02)
    assert paired.p[0, 1] == pytest.approx(expected.pvalue, abs=0.05)


def test_accuracies_are_compared_by_the_records_on_which_one_is_right_alone():
    right, other = np.array([1] * 50 + [1] * 12 + [0] * 3), np.array([1] * 50 + [0] * 12 + [1] * 3)
    assert mcnemar(right == 1, other == 1) == pytest.approx(stats.binomtest(12, 15).pvalue)
    assert mcnemar(right == 1, right == 1) == 1


def test_p_values_of_several_pairs_are_corrected():
    p = np.array([[1, 0.01, 0.03], [0.01, 1, 0.02], [0.03, 0.02, 1]])
    corrected = holm(p)
    assert corrected[0, 1] == pytest.approx(0.03) and corrected[1, 2] == corrected[0, 2] == pytest.approx(0.04)
    assert (corrected == corrected.T).all()


def test_with_the_rows_that_it_asks_for_a_difference_is_found():
    random = np.random.default_rng(2)
    difference = random.normal(0.05, 1, 400)
    difference += 0.05 - difference.mean()
    paired = compare_means(np.stack([difference, np.zeros(400)], axis=1))
    rows = 400 + round(more_rows(paired, 0, 1, 400))
    found = [abs(stats.ttest_1samp(random.normal(0.05, 1, rows), 0).statistic) > 1.96 for _ in range(200)]
    assert 0.7 < np.mean(found) < 0.9


def test_of_equal_models_the_simpler_is_preferred():
    assert simpler([1], 0, [1000, 500], [9.0, 9.0])[0] == 1
    assert simpler([1], 0, [500, 1000], [9.0, 9.0])[0] == 0
    assert simpler([1], 0, [500, 500], [9.0, 3.0])[0] == 1


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A model that has learned, and one that has not, on the same splits."""
    folder, table = tmp_path_factory.mktemp("compare"), table_for("binary", 600).drop(columns="remark")
    table.to_csv(folder / "table.csv", index=False)
    data = DataConfig(data=str(folder / "table.csv"), target="binary")
    quick_run(folder / "good", data=data, epochs=20)
    quick_run(folder / "bad", data=data, model=ModelConfig(hidden=(4,)), epochs=1, lr=1e-6)
    quick_run(folder / "other", data=data, epochs=1, seed=1)
    return folder


def test_a_better_run_is_found_and_the_page_makes_no_request(two_runs):
    page = two_runs / "compare.html"
    result = command("compare.py", two_runs / "bad", two_runs / "good", "--output", page)
    shown = result.stdout.decode()
    assert result.returncode == 0, result.stderr
    assert f"{two_runs / 'bad'} against {two_runs / 'good'}: worse" in shown
    assert f"Choose {two_runs / 'good'}: it is better" in shown
    html = page.read_text()
    assert "log_loss" in html and "src=" not in html.replace('src="data:', "") and "<link" not in html


def test_checkpoints_are_compared_on_new_records(two_runs):
    table_for("binary", 400, seed=5).to_csv(two_runs / "new.csv", index=False)
    checkpoints = [two_runs / name / "best.pt" for name in ("bad", "good")]
    result = command("compare.py", "--checkpoint", *checkpoints, "--data", two_runs / "new.csv")
    assert result.returncode == 0, result.stderr
    assert "400 test rows" in result.stdout.decode() and f"Choose {checkpoints[1]}" in result.stdout.decode()


def test_runs_with_other_test_records_are_refused(two_runs, tmp_path):
    assert_refused(command("compare.py", two_runs / "good", two_runs / "other"), "different test records", "--seed")
    assert_refused(command("compare.py", two_runs / "good", tmp_path), str(tmp_path), "missing")
    assert_refused(command("compare.py", two_runs / "good"), "two or more runs")
    quick_run(tmp_path / "wine", data=DataConfig(data="wine"), epochs=1)
    assert_refused(command("compare.py", two_runs / "good", tmp_path / "wine"), "same task")
