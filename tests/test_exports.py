"""Files as other programs and people write them train, predict and serve without a flag."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import quick_run
from starlette.testclient import TestClient

from config import DataConfig
from pipeline import Pipeline
from serving.app import make_app
from serving.batching import Service
from sources import read_table

ROWS = 120
DRAW = np.random.default_rng(0)
SIZE, COUNT = DRAW.uniform(30, 2000, ROWS).round(1), DRAW.integers(1, 7, ROWS)
PRICE = (SIZE * 15.5 + COUNT * 120).round(2)
DAYS = pd.Series(pd.Timestamp("2023-01-02") + pd.to_timedelta(DRAW.integers(0, 60 * 24 * 90, ROWS), unit="min"))


def german(number: float) -> str:
    return f"{number:,.2f}".replace(",", "T").replace(".", ",").replace("T", ".")


def lines(header: str, rows: list[str]) -> str:
    return "\n".join([header, *rows]) + "\n"


def european() -> tuple:
    rows = [f"{d:%d.%m.%Y};{german(s)};{german(round(p))[:-3]}" for d, s, p in zip(DAYS, SIZE, PRICE, strict=True)]
    text = lines("Umsätze – Quartal 1;;\n;;\nDatum;Fläche;Preis", rows)
    return "umsatz.csv", text.encode("cp1252"), "Preis", {"Fläche": SIZE}, PRICE.round()


def dollars() -> tuple:
    rows = [f'"${price:,.2f}",{size:.1f} m²,{day:%m/%d/%Y}' for price, size, day in zip(PRICE, SIZE, DAYS, strict=True)]
    return "usd.csv", lines("price,size,sold", rows).encode("utf-8-sig"), "price", {"size": SIZE}, PRICE


def won() -> tuple:
    records = [
        {"가격": f"{int(p):,}원", "면적": f"{s}㎡", "방": int(c)} for p, s, c in zip(PRICE, SIZE, COUNT, strict=True)
    ]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return "won.jsonl", text.encode(), "가격", {"면적": SIZE, "방": COUNT}, PRICE.astype(int)


def clock() -> tuple:
    rows = [f"{day:%m/%d/%Y %I:%M %p},{size}" for day, size in zip(DAYS, SIZE, strict=True)]
    days = (DAYS - pd.Timestamp(0)) / pd.Timedelta(days=1)
    return "clock.csv", lines("when,kwh", rows).encode(), "kwh", {"when": days.to_numpy()}, SIZE


def percent() -> tuple:
    rows = [f"{size / 100:.1f}%,{'yes' if size > 900 else 'no'}" for size in SIZE]
    return (
        "rate.csv",
        lines("rate,late", rows).encode(),
        "late",
        {"rate": [float(f"{size / 100:.1f}") for size in SIZE]},
        None,
    )


def codes() -> tuple:
    rows = [
        f"{['01001', '04109', '20095', '80331'][count % 4]},{size},{count % 2}"
        for count, size in zip(COUNT, SIZE, strict=True)
    ]
    return "zip.csv", lines("plz,size,big", rows).encode(), "big", {"size": SIZE}, None


@pytest.mark.parametrize("export", [european, dollars, won, clock, percent, codes], ids=lambda export: export.__name__)
def test_six_usual_exports(tmp_path, export):
    name, content, target, numbers, targets = export()
    (tmp_path / name).write_bytes(content)
    run = quick_run(tmp_path / "run", data=DataConfig(data=str(tmp_path / name), target=target), epochs=1)
    table = read_table(tmp_path / name)
    columns = {column.name: column for column in run.pipeline.preprocessor.columns}
    for column, expected in numbers.items():
        np.testing.assert_allclose(columns[column].parse(table[column]), expected, rtol=1e-12)
    if targets is not None:
        decoded = run.pipeline.task.decode(run.pipeline.task.encode(table[target]))
        np.testing.assert_allclose(decoded, targets, rtol=1e-5)
    else:
        assert run.pipeline.task.kind == "binary"
    assert "plz" not in table or columns["plz"].values == ["1001", "20095", "4109", "80331"]

    saved = Pipeline.load(tmp_path / "run" / "best.pt")
    expected = saved.task.to_json(saved.predict_logits(table)[1])
    with TestClient(make_app(Service(str(tmp_path / "run" / "best.pt"), ""), "")) as client:
        records = {"records": table.drop(columns=target).head(9).to_dict("records")}
        answer = client.post("/predict", json=records).json()
        uploaded = client.post("/predict", files={"file": (name, content)}).json()
    for found, known in ((answer, expected[:9]), (uploaded, expected)):
        assert all(saved.task.same_prediction(a, b) for a, b in zip(found["predictions"], known, strict=True))
