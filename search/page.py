"""Write tune.html: the trials of a search, which flags mattered, and the winner."""

from pathlib import Path

import numpy as np
import optuna

from evaluation import html
from pipeline import atomic_write

BEST = 10  # settings that are listed


def write_page(path: Path, study: optuna.Study, space: dict, finalists: list[list], sentences: list[str], line: str):
    """Write the page.

    space: name → distribution.  finalists: [setting, value, value with another seed].  sentences: the conclusion.
    line: the train.py command of the winner.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    done = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    counts = {state: sum(trial.state.name == state for trial in trials) for state in ("COMPLETE", "PRUNED", "FAIL")}
    best = sorted(done, key=lambda trial: trial.value)[:BEST]
    rows = [[trial.number, float(trial.value), *(_show(trial.params.get(name)) for name in space)] for trial in best]
    again = html.table(finalists, ["setting", "validation loss", "with another seed"])
    sections = [
        ("Result", html.bullets(sentences) + f"<p><code>{html.text(line)}</code></p>"),
        ("The finalists, the default flags first", again),
        ("History", html.plots([("Validation loss of each trial, and the lowest so far", _history(done))])),
        ("Which flags mattered", _importance(study, done)),
        ("Settings", html.plots([("A line for each trial; the best are orange", _parallel(done, space))])),
        (f"The best {len(rows)} trials", html.table(rows, ["trial", "validation loss", *space])),
        ("Report", html.table([[html.Link("the winner, on the test split", "report.html")]], [""])),
    ]
    introduction = (
        f"{counts['COMPLETE']} trials were trained to the end, {counts['PRUNED']} were stopped early as hopeless, and "
        f"{counts['FAIL']} failed or were interrupted. The validation split decided; the test split was used once, at "
        "the end."
    )
    with atomic_write(path) as file:
        file.write(html.page(f"Search: {path.parent.name}", introduction, sections))


def _show(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _history(done: list) -> str:
    def plot(axes):
        values = np.array([trial.value for trial in done])
        axes.plot([trial.number for trial in done], values, "o", color=html.BLUE, alpha=0.6)
        axes.plot([trial.number for trial in done], np.minimum.accumulate(values), color=html.ORANGE)
        low, high = values.min(), np.quantile(values, 0.9)
        axes.set_ylim(low - 0.1 * (high - low) - 1e-9, high + 0.3 * (high - low) + 1e-9)

    return html.draw(plot, "trial", "validation loss")


def _importance(study: optuna.Study, done: list) -> str:
    """Return the share of each flag in the spread of the good trials (PED-ANOVA: Watanabe et al., 2023)."""
    if len(done) < 8:
        return ""
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return html.table([[name, float(share)] for name, share in found.items()], ["flag", "importance"])


def _parallel(done: list, space: dict) -> str:
    """Draw a line for each trial through its place in the range of each flag."""

    def plot(axes):
        order = sorted(done, key=lambda trial: -trial.value)
        for rank, trial in enumerate(order):
            is_good = rank >= 0.9 * len(order)
            places = [_place(distribution, trial.params[name]) for name, distribution in space.items()]
            color, alpha = (html.ORANGE, 0.9) if is_good else (html.BLUE, 0.25)
            axes.plot(range(len(space)), places, "-", color=color, alpha=alpha, linewidth=1.5)
        axes.set_xticks(range(len(space)), list(space), rotation=30)
        axes.set_yticks([0, 1], ["low", "high"])

    return html.draw(plot, "", "")


def _place(distribution, value) -> float:
    """Return where a value is between the lowest, 0, and the highest, 1."""
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return distribution.choices.index(value) / max(1, len(distribution.choices) - 1)
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        low, high, value = np.log(low), np.log(high), np.log(value)
    return float((value - low) / max(high - low, 1e-12))
