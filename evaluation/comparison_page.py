"""Write compare.html: which model is better, by how much, and on which records they differ most."""

import numpy as np

from evaluation import html
from evaluation.comparison import best_model, record_losses, verdict
from evaluation.intervals import with_interval
from pipeline import atomic_write

RECORDS = 20  # records that are shown
WIDTH, HEIGHT = 240, 24  # of the drawing of an interval, in pixels


def write_page(path: str, models: list, found: dict, sentences: list[str], flags: list[str]) -> None:
    """Write the page.

    models: compare.Scored of each.  found: what `compare_models` returns.  sentences: the conclusion.  flags: those in
    which the models differ.
    """
    task, names = models[0].task, [model.name for model in models]
    decides, paired = next(iter(found.items()))
    best = best_model(decides, paired)
    rows = [
        [name, *(float(each.values[i]) for each in found.values()), f"{models[i].size / 1000:,.0f} kB", flags[i]]
        for i, name in enumerate(names)
    ]
    sections = [
        ("Result", html.bullets(sentences)),
        ("Metrics", html.table(rows, ["model", *found, "weights and preprocessor", "flags that differ"])),
        (f"Differences to {names[best]}", "".join(_intervals(name, each, best, names) for name, each in found.items())),
        ("How to read this", html.bullets(_notes(decides, models, found))),
        ("Records on which the models differ most", _records(models)),
    ]
    introduction = f"{task.kind} of {task.target}: {len(names)} models on the same {len(models[0].targets)} records."
    with atomic_write(path) as file:
        file.write(html.page(f"Comparison: {' · '.join(names)}", introduction, sections))


def _notes(decides: str, models: list, found: dict) -> list[str]:
    drawn = "groups of records" if "group" in models[0].records else "records"
    notes = [
        f"A difference is the model minus the best one by {decides}, on the same records. Its 95 % interval comes from "
        f"a bootstrap over {drawn}; the line marks no difference.",
        "“Cannot tell” does not mean equal: the records are too few to exclude chance.",
    ]
    if "accuracy" in found and drawn == "records":
        notes.append("Whether accuracies differ is decided by McNemar's exact test.")
    if len(models) > 2:
        notes.append("The verdicts are corrected for the number of pairs (Holm); the intervals are not.")
    return notes


def _intervals(name: str, paired, best: int, names: list[str]) -> str:
    """Return a table with the differences of a metric to the best model, drawn on the same scale."""
    others = [i for i in range(len(names)) if i != best]
    intervals = [paired.interval(i, best) for i in others]
    reach = max(np.nanmax(np.abs(intervals)), 1e-12) if np.isfinite(intervals).any() else 1.0
    rows = ""
    for i, interval in zip(others, intervals, strict=True):
        said = with_interval(paired.difference[i, best], interval)
        cells = [html.text(names[i]), _drawing(paired.difference[i, best], interval, reach), html.text(said)]
        cells += [verdict(name, paired, i, best), f"{paired.p[i, best]:.2g}"]
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = f"<th>{html.text(name)}</th><th></th><th>difference (95 % interval)</th><th>verdict</th><th>p</th>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _drawing(value: float, interval: list[float], reach: float) -> str:
    """Return an interval as SVG: a bar with a point, and a line at 0 in the middle of −reach … reach."""
    if not np.isfinite([value, *interval]).all():
        return ""
    low, middle, high = (WIDTH / 2 * (1 + 0.95 * x / reach) for x in (interval[0], value, interval[1]))
    y = HEIGHT / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width: {WIDTH}px" role="img" aria-label="95 % interval">'
        f'<line x1="{WIDTH / 2}" y1="0" x2="{WIDTH / 2}" y2="{HEIGHT}" stroke="{html.GREY}" stroke-dasharray="3"/>'
        f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}" stroke="{html.BLUE}" stroke-width="3"/>'
        f'<circle cx="{middle:.1f}" cy="{y}" r="5" fill="{html.ORANGE}"/></svg>'
    )


def _records(models: list) -> str:
    """Return the records whose losses differ most between two models, and what each model predicts for them."""
    task, records = models[0].task, models[0].records
    losses = np.array([record_losses(model.task, model.values, model.targets) for model in models])
    spread = np.ptp(losses, axis=0)
    worst = [at for at in np.argsort(-spread, kind="stable")[:RECORDS] if spread[at] > 0]
    shown = [name for name in ("target", "file") if name in records]
    rows = []
    for at in worst:
        cells = [str(records.index[at]), *(str(records[name].iloc[at]) for name in shown)]
        rows.append([*cells, *(_predicted(model, at) for model in models)])
    if task.kind == "regression":
        return html.table(rows, ["row", *shown, *(model.name for model in models)])
    caption = "The prediction of each model, and the probability that it gave the target"
    return html.table(rows, ["row", *shown, *(model.name for model in models)], caption)


def _predicted(model, at: int) -> str:
    import torch

    values = model.values[at]
    if model.task.kind == "regression":
        return f"{values[0]:.5g}"
    label = model.task.classes[int(model.task.decide(torch.from_numpy(values[None]))[0])]
    return f"{label} ({values[model.targets[at]]:.2g})"
