"""Choose the winner of a search, and compare it with the default flags."""

from dataclasses import replace

import numpy as np

from evaluation.comparison import compare_means, compare_models, verdict
from search.space import describe, with_params
from search.trial import Data, run_trial


def choose_winner(data: Data, ranked: list[tuple], default: dict, count: int) -> tuple[dict, list[list], str]:
    """Train the best settings and the default again with another seed; return (the winner, a row [setting, value, value
    with the other seed] of each, a sentence about the winner and the default).

    ranked: (setting, value) of the trials, the best first. The best of many noisy numbers is too good; the other seed
    tells luck with the initial weights from a better setting: with it, too, the winner is better than the default.
    """
    print(f"\nthe best of {len(ranked)} settings are trained again, with another seed", flush=True)
    values = [value for params, value in ranked if params == default]  # none if its trial was lost
    value = values[0] if values else run_trial(data, with_params(data, default))[0]
    contenders = [(default, value), *(each for each in ranked if each[0] != default)][:count]
    losses, rows = [], []
    for params, value in contenders:
        config = with_params(data, params)
        config = replace(config, training=replace(config.training, seed=config.training.seed + 1))
        again, of_records = run_trial(data, config)
        losses.append(of_records)
        rows.append([describe(data, params), value, again])
    best = int(np.argmin([row[1] + row[2] if row[2] < rows[0][2] else np.inf for row in rows]))
    if best == 0:
        return default, rows, "No setting is better than the default flags on the validation split."
    both = np.stack([losses[best], losses[0]], axis=1)
    paired = compare_means(both)
    low, _ = paired.interval(1, 0)
    sure = "beyond the noise" if low > 0 else "but not beyond the noise"
    what = "root mean squared error" if data.pipeline.task.kind == "regression" else "log-loss"
    what = what if data.config.training.monitor == "loss" else data.config.training.monitor
    means = [abs(row[1] + row[2]) / 2 for row in (rows[best], rows[0])]
    sentence = (
        f"The best setting is better than the default flags on the validation split, {sure} of its {len(both)} "
        f"records: {what} {means[0]:.4g} against {means[1]:.4g}, as means of two seeds."
    )
    return contenders[best][0], rows, sentence


def compare_tests(result, other) -> list[str]:
    """Return sentences that compare the test predictions of two runs, of the winner and of the default flags."""
    if result is other:
        return []
    task, names = result.pipeline.task, ["the winner", "the default flags"]
    targets = task.decode(task.encode(result.predictions["target"])).numpy()
    runs = (result, other)
    values = [run.pipeline.task.from_columns(run.predictions) for run in runs]
    groups = result.predictions["group"].to_numpy() if "group" in result.predictions else None
    found = compare_models([run.pipeline.task for run in runs], values, targets, groups)
    decides, paired = next(iter(found.items()))
    low, high = paired.interval(0, 1)
    said = verdict(decides, paired, 0, 1)
    said = said if said in ("better", "worse") else "the same as far as these rows can tell"
    return [
        f"On the test split, {names[0]} is {said}: {decides} {paired.values[0]:.4g} against {paired.values[1]:.4g} of "
        f"{names[1]} (difference {low:.2g} to {high:.2g}, {len(targets)} rows)."
    ]
