"""What a network relies on: the importance of columns, and the words of texts and the places of images that decided."""

import time
from collections import defaultdict

import numpy as np
import pandas as pd
import torch

from evaluation import html
from preprocessing.column import evenly_spaced
from preprocessing.preprocessor import take

ROWS, DRAWS = 500, 5  # test records whose cells are permuted, and how often
SHOWN, COUNTED = 6, 60  # test records that are shown, and records whose words are counted
SECONDS = 4.0  # for the words: large networks count fewer records
MAX_COLUMNS, MAX_WORDS = 30, 15


def importance(pipeline, test: pd.DataFrame) -> str:
    """Return how much the loss rises if the cells of a column are permuted among test records (Breiman, 2001)."""
    task, names = pipeline.task, pipeline.preprocessor.names
    test = evenly_spaced(test, ROWS)
    if len(names) < 2 or len(test) < 10:
        return ""
    targets, records = task.encode(test[task.target]), test.drop(columns=task.target)
    parts, logits = pipeline.predict_logits(records)
    sources = {features.name: features.source for features in pipeline.preprocessor.derived}
    base, random, rows = float(task.loss(logits, targets)), np.random.default_rng(0), []
    for name in names:
        rises = []
        for _ in range(DRAWS):
            order = torch.from_numpy(random.permutation(len(test)))
            moved = {key: take(x, order) if sources.get(key, key) == name else x for key, x in parts.items()}
            rises.append(float(task.loss(pipeline.logits(pipeline.preprocessor.join(moved)), targets)) - base)
        rows.append([name, float(np.mean(rises)), f"± {2 * np.std(rises, ddof=1) / DRAWS**0.5:.2g}"])
    rows.sort(key=lambda row: -row[1])
    caption = f"Rise of the loss ({base:.4g}) when the cells of a column are exchanged between records"
    return html.table(rows[:MAX_COLUMNS], ["column", "rise of the loss", "95 % interval"], caption)


def deciding_parts(pipeline, test: pd.DataFrame) -> str:
    """Return some test records with their words or places shaded by how far the prediction falls without them (Zeiler
    and Fergus, "Visualizing and Understanding Convolutional Networks", 2014), and the words that decide most."""
    shown = [_draw_records(pipeline, column, test) for column in pipeline.preprocessor.columns]
    return "".join(shown)


def _draw_records(pipeline, column, test: pd.DataFrame) -> str:
    records, drawn = evenly_spaced(test.drop(columns=pipeline.task.target), COUNTED), []
    effects, started = defaultdict(list), time.monotonic()
    for i in np.random.default_rng(0).permutation(len(records)):
        record = records.iloc[[i]]
        if not (parts := column.occlusions(record[column.name].iloc[0])):
            continue
        prediction, falls = _falls(pipeline, column.name, record, [without for _, without in parts])
        names = [part for part, _ in parts]
        if len(drawn) < SHOWN:
            drawn.append(_draw(column, record, names, prediction, falls))
        if not isinstance(names[0], str) and len(drawn) == SHOWN:
            break
        for name, fall in zip(names, falls, strict=True):
            if isinstance(name, str):
                effects[name, prediction].append(fall)
        if time.monotonic() - started > SECONDS and len(drawn) == SHOWN:
            break
    return "".join(drawn) and _legend(column.name, pipeline.task) + "".join(drawn) + _table(effects, pipeline.task)


def _falls(pipeline, name: str, record: pd.DataFrame, cells: list) -> tuple[str, np.ndarray]:
    """Return the prediction for a record, and how far its probability, or its value, falls with each of other cells."""
    task, rows = pipeline.task, pd.concat([record] * (len(cells) + 1), ignore_index=True)
    rows[name] = pd.Series([record[name].iloc[0], *cells], dtype=object)
    values = task.activate(pipeline.predict_logits(rows)[1])
    if task.kind == "regression":
        return "", (values[0] - values[1:])[:, 0].numpy() / task.std
    predicted = int(task.decide(values[:1]))
    return str(task.classes[predicted]), (values[0, predicted] - values[1:, predicted]).numpy()


def _draw(column, record: pd.DataFrame, parts: list, prediction: str, falls: np.ndarray) -> str:
    largest = max(abs(falls).max(), 0.02)  # smaller falls are no reasons
    shades = [html.shade(fall / largest) for fall in falls]
    label = html.text(f"row {record.index[0]}" + (f": {prediction}" if prediction else ""))
    if isinstance(parts[0], str):
        words = " ".join(
            f'<span style="background: {shade}">{html.text(part)}</span>'
            for part, shade in zip(parts, shades, strict=True)
        )
        return f'<p class="words"><b>{label}</b> {words}</p>'
    places = "".join(
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{shade}"/>'
        for (x, y, size), shade in zip(parts, shades, strict=True)
    )
    picture = f'<image href="{html.text(column.examples(record[column.name])[0])}" width="1" height="1"/>'
    pair = f'<svg viewBox="0 0 2.1 1">{picture}<g transform="translate(1.1)">{picture}{places}</g></svg>'
    return f'<figure class="map">{pair}<figcaption>{label}</figcaption></figure>'


def _legend(name: str, task) -> str:
    what = f"the predicted {task.target}" if task.kind == "regression" else "the probability of the predicted class"
    return (
        f"<p>{html.text(name)}: without the parts in orange {html.text(what)} falls, without those in blue it rises. "
        "Some test records, at random.</p>"
    )


def _table(effects: dict, task) -> str:
    """effects: (word, prediction) → how far the prediction fell without the word, in each text."""
    rows = [[word, label, len(falls), float(np.mean(falls))] for (word, label), falls in effects.items()]
    rows = sorted((row for row in rows if row[2] > 1), key=lambda row: -abs(row[3]))[:MAX_WORDS]
    if task.kind == "regression":
        rows = [[word, count, fall * task.std] for word, _, count, fall in rows]
        return html.table(rows, ["word", "texts", "it adds"], "Words that decide most") if rows else ""
    header = ["word", "prediction", "texts", "fall of the probability without it"]
    return html.table(rows, header, "Words that decide most") if rows else ""
