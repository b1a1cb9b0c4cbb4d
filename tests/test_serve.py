"""The service predicts as predict.py does, also under load; it refuses bad requests and keeps feedback."""

import asyncio
import base64
import concurrent.futures
import gzip
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TARGETS, assert_refused, close, command, make_table, quick_run
from fastapi.testclient import TestClient
from forks import Popen
from PIL import Image
from test_image_column import make_folder
from test_text import reviews, text_run
from workbooks import xlsx

from config import DataConfig
from errors import UserError
from pipeline import Pipeline
from preprocessing.number import NumberColumn
from serving import batching, guard, uploads
from serving.app import make_app
from serving.batching import Service
from serving.schema import RecordSchema
from sources.request_log import read_log


@contextmanager
def client_of(checkpoint, log="", key="", **headers):
    with TestClient(make_app(Service(str(checkpoint), str(log)), key), raise_server_exceptions=False) as client:
        client.headers.update(headers)
        yield client


KINDS = ("tabular", "text", "image", "mixed")


def expected_of(pipeline, records) -> list[dict]:
    return pipeline.task.to_json(pipeline.predict_logits(records)[1])


def column_of(pipeline, kind: str) -> str:
    """The name of the first column of a kind."""
    return next(name for name, of in pipeline.preprocessor.kinds.items() if of == kind)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_rest_predicts_as_the_pipeline_does(everything, kind, target):
    pipeline = Pipeline.load(everything[kind, target])
    expected = expected_of(pipeline, pipeline.examples)
    table = pipeline.predict(pipeline.examples)["prediction"].tolist()
    assert [e["prediction"] for e in expected] == (pytest.approx(table) if target == "regression" else table)
    with client_of(everything[kind, target]) as client:
        together = client.post("/predict", json={"records": pipeline.examples}).json()["predictions"]
        alone = [client.post("/predict", json={"records": [r]}).json()["predictions"][0] for r in pipeline.examples]
        schema = client.get("/schema").json()
        assert list(schema["example"]) == pipeline.preprocessor.names and schema["task"] == target
        assert all(map(close, together, expected)) and all(map(close, alone, expected))
        assert schema["lone"] == (None if kind in ("tabular", "mixed") else column_of(pipeline, kind))
        if schema["lone"]:
            bare = [record[schema["lone"]] for record in pipeline.examples]
            assert client.post("/predict", json={"records": bare}).json()["predictions"] == together
        if kind == "image":
            files = [base64.b64decode(cell.partition(",")[2]) for cell in bare]
            sent = client.post("/predict", files=[("files", (f"{i}.png", f)) for i, f in enumerate(files)])
            assert all(map(close, sent.json()["predictions"], expected))


def test_a_missing_column_of_a_mixed_record_is_named(everything):
    pipeline = Pipeline.load(everything["mixed", "binary"])
    with client_of(everything["mixed", "binary"]) as client:
        for name in pipeline.preprocessor.names:
            record = {k: v for k, v in pipeline.examples[0].items() if k != name} | {f"{name}s": 1}
            refused = client.post("/predict", json={"records": [pipeline.examples[0], record]})
            message = f"row 2, column {name!r} is missing. Did you mean {f'{name}s'!r}?"
            assert refused.status_code == 422 and refused.json()["detail"] == message
        refused = client.post("/predict", json={"records": [pipeline.examples[0][column_of(pipeline, "text")]]})
        assert refused.status_code == 422 and "row 1: a record must be an object" in refused.json()["detail"]


@pytest.mark.parametrize("kind", KINDS)
def test_openapi_shows_each_column_with_its_type(everything, kind):
    pipeline = Pipeline.load(everything[kind, "binary"])
    with client_of(everything[kind, "binary"]) as client:
        paths = client.get("/openapi.json").json()["paths"]
        operation, schema = paths["/predict"]["post"], client.get("/schema").json()["record"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        assert client.post("/predict", json=example).status_code == 200
    content = operation["requestBody"]["content"]
    items = content["application/json"]["schema"]["properties"]["records"]["items"]
    record = items["anyOf"][1] if pipeline.preprocessor.lone else items
    assert record == schema and record["required"] == list(record["properties"]) == pipeline.preprocessor.names
    assert list(content["application/json"]["example"]["records"][0]) == pipeline.preprocessor.names
    types = {"number": "number", "boolean": "boolean", "category": "string", "date": "string", "text": "string"}
    for name, column in pipeline.preprocessor.kinds.items():
        shown = record["properties"][name]
        assert shown["x-kind"] == column and types.get(column, "string") in shown["type"]
        assert shown.get("pattern") == ("^data:image/" if column == "image" else None)
    assert {"200", "401", "403", "408", "413", "422", "503"} == set(operation["responses"])
    for path, model in (("/predict", "Predictions"), ("/feedback", "Kept"), ("/reload", "Reloaded")):
        assert model in str(paths[path]["post"]["responses"]["200"])


@pytest.mark.parametrize("kind", [*KINDS, "awkward"])
def test_no_training_record_is_published(everything, awkward, kind):
    """The schemas show made-up cells, which can be predicted; a checkpoint keeps real ones for its self-check."""
    checkpoint = awkward if kind == "awkward" else everything[kind, "binary"]
    pipeline = Pipeline.load(checkpoint)
    with client_of(checkpoint) as client:
        schema, openapi, page = (client.get(path) for path in ("/schema", "/openapi.json", "/"))
        example = schema.json()["example"]
        predicted = client.post("/predict", json={"records": [example]})
        assert predicted.status_code == 200, predicted.text
        assert not [w for w in predicted.json().get("warnings", []) if "known words" not in w]
        assert (
            example
            in openapi.json()["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["example"][
                "records"
            ]
        )
        published = schema.text + openapi.text + page.text
    assert example not in pipeline.examples
    for name, of in pipeline.preprocessor.kinds.items():
        cells = {record[name] for record in pipeline.examples} - {None, ""}
        if of in ("text", "image"):
            assert not [cell for cell in cells if str(cell) in published], name
        if of == "number":
            low, high = pipeline.profile[name]["low"], pipeline.profile[name]["high"]
            assert low <= example[name] <= high and len(str(example[name])) < 8


def test_made_up_numbers_are_within_the_range_of_training():
    column = NumberColumn("n", fill=0.5, flag=False)
    for low, high in ((18, 90), (0, 1), (1.5, 1.6), (-1e-9, 2e-9), (3, 3), (-1e308, 1e308), (1e15, 1e16), (0, 5e-324)):
        assert low <= column.made_up({"low": low, "high": high}) <= high
    assert column.made_up({"low": 18.0, "high": 90.0}) == 54 and column.made_up({}) == 0.5


WARNINGS = {"city": "'Atlantis' was not seen in training", "remark": "the text is empty"}


def test_unknown_values_are_predicted_with_a_warning(everything, monkeypatch):
    """Each request gets its own, also out of a batch that is shared; a missing cell that training had is none."""
    monkeypatch.setattr(batching, "BATCH_WINDOW", 0.05)
    pipeline = Pipeline.load(everything["tabular", "binary"])
    assert "" in next(c for c in pipeline.preprocessor.columns if c.name == "city").values
    fine = [
        record | {"city": city, "income": None}
        for record, city in zip(pipeline.examples[:3], ["", "Seoul", None], strict=True)
    ]
    odd = [fine[0], fine[1] | {"city": "Atlantis"}, fine[2] | {"remark": "", "city": "x" * 80}]
    zzz = [fine[0] | {"remark": "\u4e00\u4e01"}]
    with client_of(everything["tabular", "binary"]) as client:
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            sent = list(pool.map(lambda r: client.post("/predict", json={"records": r}).json(), [fine, odd, zzz] * 3))
        assert [list(answer) for answer in sent[0::3]] == [["id", "predictions"]] * 3  # no key
        for answer in sent[1::3]:
            assert [w.split(" (")[0] for w in answer["warnings"]] == [
                f"row 2, column 'city': {WARNINGS['city']}",
                f"row 3, column 'city': '{'x' * 60}…' was not seen in training",
                "row 3, column 'remark': the text is empty",
            ]
        for answer in sent[2::3]:
            assert answer["warnings"] == ["row 1, column 'remark': '\u4e00\u4e01' has no known words"]
        many = client.post("/predict", json={"records": [odd[1]] * 150}).json()["warnings"]
        assert len(many) == 101 and many[0].startswith("row 1, ") and many[-1] == "and 50 more"
        table = pd.DataFrame([fine[0]] * 700 + [odd[1]] * 600)
        found = client.post("/predict", files={"file": ("t.csv", table.to_csv(index=False))}).json()["warnings"]
        assert found[0].startswith("row 701, column 'city': 'Atlantis'") and found[100:] == ["and 500 more"]
        described = client.get("/openapi.json").json()["components"]["schemas"]["Predictions"]["properties"]
        assert "left out if there are none" in described["warnings"]["description"]


def test_concurrent_requests_share_a_pass_and_each_is_predicted_as_if_alone(everything, monkeypatch):
    """Valid and invalid requests at once: each gets the response that it would get alone."""
    monkeypatch.setattr(batching, "BATCH_WINDOW", 0.05)
    pipeline = Pipeline.load(everything["tabular", "binary"])
    good = [{**r, "city": c} for r in pipeline.examples[:8] for c in ("Seoul", "Nowhere", None, 7)]
    bad = [{**good[0], "age": "old"}, {**good[0], "since": "soon"}]
    service = Service(str(everything["tabular", "binary"]))

    async def crowd(requests):
        worker = asyncio.create_task(service.run())
        await asyncio.sleep(0)
        found = await asyncio.gather(*(service.predict([r]) for r in requests), return_exceptions=True)
        worker.cancel()
        return found

    together = asyncio.run(crowd([*good, *bad]))
    passes = service.metrics.registry.get_sample_value("batch_records_count")
    alone = [asyncio.run(crowd([r]))[0] for r in good]
    assert passes == 1
    assert all(close(a[1][0], b[1][0]) for a, b in zip(together[: len(good)], alone, strict=True))
    assert "row 1, column 'age': 'old'" in str(together[-2]) and "column 'since'" in str(together[-1])
    assert service.metrics.registry.get_sample_value("unknown_values_total", {"column": "city"}) >= 16


def test_a_bug_in_one_request_does_not_affect_others(everything, monkeypatch):
    monkeypatch.setattr(batching, "BATCH_WINDOW", 0.05)
    service, predict = Service(str(everything["text", "binary"])), Service._predict

    def stumble(self, records, *rest):
        return 1 / 0 if {"review": "stumble"} in records else predict(self, records, *rest)

    monkeypatch.setattr(Service, "_predict", stumble)

    async def crowd():
        worker = asyncio.create_task(service.run())
        await asyncio.sleep(0)
        sent = [service.predict([{"review": text}]) for text in ("great", "stumble", "awful")]
        found = await asyncio.gather(*sent, return_exceptions=True)
        worker.cancel()
        return found

    good, bad, other = asyncio.run(crowd())
    assert len(good[1]) == len(other[1]) == 1 and isinstance(bad, ZeroDivisionError)


def test_true_and_1_stay_apart_in_one_batch(tmp_path):
    table = pd.DataFrame({"code": [1, 2, 3, 17] * 30, "n": np.arange(120) % 7, "y": ["a", "b", "a", "a"] * 30})
    run = quick_run(tmp_path / "run", table, data=DataConfig(target="y", columns=("code=category",)))
    records = [{"code": True, "n": 1}, {"code": 1, "n": 1}, {"code": None, "n": 1}, {"code": "2", "n": 1}]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        together = run.pipeline.predict([records[i] for i in order])["probability_a"].to_numpy()
        alone = [run.pipeline.predict([records[i]])["probability_a"].iloc[0] for i in order]
        assert np.allclose(together, alone, atol=1e-6)


def test_unknown_columns_are_dropped_and_large_integers_kept(everything):
    pipeline = Pipeline.load(everything["tabular", "binary"])
    example, schema = pipeline.examples[0], RecordSchema(pipeline)
    extra = {f"extra {i} {j}": 1 for i in range(3) for j in range(3)}
    assert schema.read_body({"records": [extra | example] * 3}) == [example] * 3
    # Beside an empty cell, pandas would make a float of it
    assert schema.read_body({"records": [example | {"city": 2**53 + 1}]})[0]["city"] == str(2**53 + 1)
    with pytest.raises(UserError, match="row 8, column 'age'"):
        schema.validate([example, example | {"age": []}], first=7)


def test_pages_of_other_sites_are_refused(everything):
    with client_of(everything["text", "binary"]) as client:
        for origin, status in (("http://evil", 403), ("null", 403), ("http://testserver", 200)):
            response = client.post("/predict", json={"records": ["great"]}, headers={"Origin": origin})
            assert response.status_code == status
        # Behind a proxy that does not forward the host, the browser's own header counts
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            headers = {"Origin": "https://model.example", "Sec-Fetch-Site": site}
            assert client.post("/predict", json={"records": ["great"]}, headers=headers).status_code == status
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert client.get("/", headers=link).status_code == 200  # a link to the page is harmless


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """Another model of the same target as everything["text", "binary"]."""
    folder = tmp_path_factory.mktemp("other")
    text_run(folder / "run", epochs=1, seed=5)
    return folder / "run" / "best.pt"


REFUSED = {
    "no json": (b"{", "not valid JSON"),
    "a list": (b"[]", '{"records": [...]}'),
    "no records": ({"records": []}, "records: between 1 and 1000 per request, got 0."),
    "too many": ({"records": [{}] * 1001}, "got 1001"),
    "no object": ({"records": ["x"]}, "row 1: a record must be an object"),
    "a list in a cell": ({"age": [1]}, "row 1, column 'age': a cell must be"),
    "a word": ({"age": "old"}, "row 1, column 'age': 'old' is not a number"),
    "no date": ({"since": "soon"}, "column 'since'"),
    "too large": ({"age": 10**30}, "row 1, column 'age': the number is too large"),
    "infinite": (b'{"records": [{"age": Infinity}]}', "Infinity is not a JSON number"),
    "not a number": (b'{"records": [{"age": NaN}]}', "NaN is not a JSON number"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "endless": (b'{"records": [' + b"[]," * 1_000_001, "more than 1,000,000 values"),
    "long": ({"city": "x" * 100_001}, "row 1, column 'city': 100,001 characters; at most 100,000"),
    "missing": ({"age": None, "agee": 3}, "row 1, column 'age' is missing. Did you mean 'agee'?"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_by_row_and_column(everything, name):
    body, message = REFUSED[name]
    with client_of(everything["tabular", "binary"]) as client:
        if isinstance(body, bytes):
            response = client.post("/predict", content=body)
        else:
            if "records" not in body:
                record = Pipeline.load(everything["tabular", "binary"]).examples[0] | body
                body = {"records": [{k: v for k, v in record.items() if name != "missing" or k != "age"}]}
            response = client.post("/predict", json=body)
        assert response.status_code == 422 and message in response.json()["detail"], response.text


def test_images_come_from_the_client_alone(everything, tmp_path):
    """A path in a record would let clients read the server's files."""
    column = column_of(Pipeline.load(everything["image", "binary"]), "image")
    path = next(make_folder(tmp_path).rglob("*.*"))
    with client_of(everything["image", "binary"]) as client:
        for record in ({column: str(path)}, str(path), {column: "data:image/png;base64,AAAA"}):
            refused = client.post("/predict", json={"records": [record]})
            assert refused.status_code == 422 and f"row 1, column '{column}': " in refused.json()["detail"]
        broken = client.post("/predict", files={"a": ("a.png", b"no image")})
        assert broken.status_code == 422 and f"a.png: row 1, column '{column}': not a readable image" in broken.text
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "DDS")  # a format that is not accepted
        assert client.post("/predict", files={"a": buffer.getvalue()}).status_code == 422
        assert client.post("/predict", files={}, data={"a": "b"}).status_code == 422


def test_a_broken_image_costs_its_row_alone(everything, tmp_path):
    """Files and data URLs: it is named, keeps its place, and neither feedback nor training counts it."""
    paths = sorted(make_folder(tmp_path / "photos").rglob("*.png"))[:3]
    good = [path.read_bytes() for path in paths]
    bad, heic = good[0][: len(good[0]) // 2], b"\0\0\0\x18ftypmif1\0\0\0\0heicmif1 and more"
    with client_of(everything["image", "multiclass"], tmp_path / "requests.db") as client:
        pipeline = Pipeline.load(everything["image", "multiclass"])
        column, expected = column_of(pipeline, "image"), expected_of(pipeline, list(map(str, paths)))
        files = [good[0], bad, good[1], heic, good[2]]
        sent = client.post("/predict", files=[("f", (f"{i}.png", file)) for i, file in enumerate(files)]).json()
        urls = ["data:image/png;base64," + base64.b64encode(file).decode() for file in files]
        as_json = client.post("/predict", json={"records": urls}).json()
        for answer, prefix in ((sent, "{}.png: "), (as_json, "")):
            found = answer["predictions"]
            assert all(map(close, (found[i] for i in (0, 2, 4)), expected))
            for i, why in ((1, "the image is broken"), (3, "this is a HEIC image: convert it to JPEG or PNG.")):
                assert found[i]["prediction"] is None and set(found[i]) == {"prediction", "error"}
                assert found[i]["error"].startswith(f"{prefix.format(i)}row {i + 1}, column '{column}': {why}")
        labels = [str(name) for name in pipeline.task.classes]
        targets = [labels[0], labels[1], None, labels[0], labels[1]]
        assert client.post("/feedback", json={"id": sent["id"], "targets": targets}).status_code == 200
        assert client.get("/health").json()["live"]["targets"] == 2
        none = client.post("/predict", files=[("f", ("x.png", bad)), ("f", ("y.png", heic))])
        message = f"x.png: row 1, column '{column}': the image is broken"
        assert none.status_code == 422 and none.json()["detail"].startswith(message)
    logged = pd.concat(read_log(tmp_path / "requests.db", 10, []))
    assert len(logged) == 2


@pytest.mark.parametrize("kind", ["image", "mixed"])
def test_an_uploaded_table_holds_images_but_no_paths(everything, kind, tmp_path):
    """Bytes in parquet and data URLs in jsonl are read; a path would let clients read the server's files."""
    pipeline = Pipeline.load(everything[kind, "binary"])
    column, expected = column_of(pipeline, "image"), expected_of(pipeline, pipeline.examples)
    table, path = pd.DataFrame(pipeline.examples), next(make_folder(tmp_path / "photos").rglob("*.*"))
    table.to_json(tmp_path / "urls.jsonl", orient="records", lines=True)
    as_bytes = [base64.b64decode(cell.partition(",")[2]) for cell in table[column]]
    table.assign(**{column: as_bytes}).to_parquet(tmp_path / "bytes.parquet")
    with client_of(everything[kind, "binary"], tmp_path / "requests.db") as client:
        for name in ("urls.jsonl", "bytes.parquet"):
            sent = upload(client, tmp_path / name)
            assert sent.status_code == 200 and all(map(close, sent.json()["predictions"], expected)), sent.text
        for cell in (str(path), f"../photos/{path.name}"):
            table.assign(**{column: [*table[column][:-1], cell]}).to_csv(tmp_path / "paths.csv", index=False)
            refused = upload(client, tmp_path / "paths.csv")
            message = f"row {len(table)}, column '{column}': "
            assert refused.status_code == 422 and message in refused.json()["detail"], refused.text


@pytest.mark.parametrize("kind", ["image", "mixed"])
def test_images_that_are_huge_when_decoded_are_refused(everything, kind, monkeypatch):
    pipeline = Pipeline.load(everything[kind, "binary"])
    column, buffer = column_of(pipeline, "image"), io.BytesIO()
    Image.new("L", (1000, 1000)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    monkeypatch.setattr(batching, "MAX_PIXELS", 2_500_000)
    with client_of(everything[kind, "binary"]) as client:
        for count, status in ((2, 200), (3, 422)):
            sent = client.post("/predict", json={"records": [pipeline.examples[0] | {column: url}] * count})
            assert sent.status_code == status, sent.text
    assert "3,000,000 pixels" in sent.json()["detail"]


def test_the_key_guards_everything_but_health(everything):
    with client_of(everything["tabular", "binary"], key="s3cret ü") as client:
        assert client.get("/health").json()["status"] == "ready"
        paths = ("/", "/schema", "/drift", "/metrics", "/docs", "/openapi.json", "/nowhere")
        assert [client.get(path).status_code for path in paths] == [401] * len(paths)
        assert client.post("/predict", json={}).status_code == 401
        key = "s3cret ü".encode()
        basic = base64.b64encode(b"anyone:" + key)
        for value, status in ((b"Bearer " + key, 200), (b"Basic " + basic, 200), (b"Bearer x", 401), (b"Basic x", 401)):
            assert client.get("/schema", headers={"Authorization": value}).status_code == status


def test_more_than_the_limits_is_refused(everything, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODY", 1000)
    with client_of(everything["text", "binary"]) as client:
        assert client.post("/predict", json={"records": ["x" * 2000]}).status_code == 413

        def pieces():
            yield from [b"x" * 400] * 4

        assert client.post("/predict", content=pieces()).status_code == 413
        monkeypatch.setattr(batching, "MAX_QUEUE", 2)
        monkeypatch.setattr(batching, "BATCH_WINDOW", 0.3)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: client.post("/predict", json={"records": ["fine"]}), range(8)))
        refused = [r for r in found if r.status_code == 503]
        assert refused and all(r.headers["retry-after"] == "1" for r in refused)
        assert any(r.status_code == 200 for r in found)


def test_a_body_that_does_not_arrive_times_out(everything, monkeypatch):
    monkeypatch.setattr(guard, "BODY_TIMEOUT", 0.2)
    sent = []

    async def never():
        await asyncio.sleep(5)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
    asyncio.run(make_app(Service(str(everything["text", "binary"])))(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_locked_log_is_reported(everything, tmp_path):
    with client_of(everything["text", "binary"], tmp_path / "requests.db") as client:
        with sqlite3.connect(tmp_path / "requests.db") as other:
            other.execute("BEGIN EXCLUSIVE")
            refused = client.post("/predict", json={"records": ["fine"]})
            assert refused.status_code == 503 and "the log cannot be written" in refused.json()["detail"]
            other.rollback()
        assert client.post("/predict", json={"records": ["fine"]}).status_code == 200


def test_a_bug_reveals_nothing_to_clients(everything, monkeypatch):
    with client_of(everything["text", "binary"]) as client:
        monkeypatch.setattr(Service, "_predict", lambda *_: 1 / 0)
        failed = client.post("/predict", json={"records": ["fine"]})
        assert failed.status_code == 500 and "ZeroDivision" not in failed.text and "Traceback" not in failed.text
        monkeypatch.undo()
        assert client.post("/predict", json={"records": ["fine"]}).status_code == 200


def test_drift_is_detected_and_the_same_data_raises_no_alarm(runs):
    pipeline = Pipeline.load(runs["binary"].out / "best.pt")
    table = pd.read_csv(runs["binary"].out.parent / "binary.csv")[pipeline.preprocessor.names]
    records = json.loads(table.to_json(orient="records"))
    with client_of(runs["binary"].out / "best.pt") as client:
        assert client.get("/drift").json() == {"rows": 0, "window": batching.DRIFT_WINDOW, "columns": {}}
        client.post("/predict", json={"records": records})
        same = client.get("/drift").json()
        assert same["rows"] == len(records) and not any(c["drifted"] for c in same["columns"].values()), same
    with client_of(runs["binary"].out / "best.pt") as client:
        moved = [{**r, "age": 30 + i % 3, "city": "Oslo", "income": None} for i, r in enumerate(records)]
        client.post("/predict", json={"records": moved})
        columns = client.get("/drift").json()["columns"]
        assert {name for name, c in columns.items() if c["drifted"]} == {"age", "city", "income"}
        assert "PSI" in columns["age"]["why"] and "unknown" in columns["city"]["why"]
        assert "missing" in columns["income"]["why"]
        assert re.search(r'drift_psi\{column="age"\} [1-9]', client.get("/metrics").text)


@pytest.mark.parametrize("target", TARGETS)
def test_feedback_is_stored_scored_and_used_for_training(everything, target, tmp_path):
    log = tmp_path / "requests.db"
    pipeline = Pipeline.load(everything["text", target])
    rows = reviews(60, seed=9)
    with client_of(everything["text", target], log) as client:
        for text, truth in zip(rows["review"], rows[target].tolist(), strict=True):
            sent = client.post("/predict", json={"records": [text]}).json()
            assert client.post("/feedback", json={"id": sent["id"], "targets": [truth]}).status_code == 200
        client.post("/predict", json={"records": ["without feedback"]})
        for body, status in (
            ({"id": "nobody", "targets": [truth]}, 404),
            ({"id": sent["id"], "targets": []}, 422),
            ({"id": sent["id"], "targets": [{}]}, 422),
            ({"id": sent["id"], "targets": [1e160]}, 422),
            ({"id": sent["id"], "targets": [None]}, 422),
            ({"id": sent["id"], "targets": ["neither"]}, 422),
            ({"id": 1, "targets": [truth]}, 422),
            ([], 422),
        ):
            assert client.post("/feedback", json=body).status_code == status
        live = client.get("/health").json()["live"]
    predicted = pipeline.predict(rows["review"].tolist())["prediction"].to_numpy()
    assert live["targets"] == 60 and live["interval"][0] < live["interval"][1]
    if target == "regression":
        assert live["mae"] == pytest.approx(np.abs(predicted - rows[target].to_numpy()).mean(), rel=1e-5)
    else:
        assert live["accuracy"] == pytest.approx((predicted == rows[target].to_numpy()).mean())
    with client_of(everything["text", target], log) as client:  # it is still there, summed in another order
        again = client.get("/health").json()["live"]
    assert again == live | {key: pytest.approx(live[key]) for key in live}
    kinds = sqlite3.connect(log).execute("SELECT kinds FROM models").fetchall()
    assert [json.loads(found) for (found,) in kinds] == [pipeline.preprocessor.kinds]
    done = command("train.py", "--data", log, "--epochs", 1, "--out", tmp_path / "run", "--text", "review")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"] == {"train": 42, "val": 9, "test": 9}


def test_a_log_of_images_is_training_data(everything, tmp_path):
    pipeline = Pipeline.load(everything["image", "binary"])
    with client_of(everything["image", "binary"], tmp_path / "requests.db") as client:
        for i, record in enumerate(pipeline.examples * 3):
            file = base64.b64decode(record[column_of(pipeline, "image")].partition(",")[2])
            sent = client.post("/predict", files={"file": ("a.png", file)}).json()
            client.post("/feedback", json={"id": sent["id"], "targets": [pipeline.task.classes[i % 2]]})
    done = command(
        *("train.py", "--data", tmp_path / "requests.db", "--image", "path", "--epochs", 1, "--out", tmp_path / "run")
    )
    assert done.returncode == 0, done.stderr


def test_without_a_log_feedback_is_refused(everything):
    with client_of(everything["text", "binary"]) as client:
        assert client.post("/feedback", json={"id": "x", "targets": []}).status_code == 409


def test_reload_swaps_the_model_or_keeps_the_old_one(everything, other_model, tmp_path):
    checkpoint, log = tmp_path / "best.pt", tmp_path / "requests.db"
    shutil.copy(everything["text", "binary"], checkpoint)
    with client_of(checkpoint, log) as client:

        def predict():
            return client.post("/predict", json={"records": ["great"]}).json()

        before, old = client.get("/health").json()["model"], predict()
        shutil.copy(other_model, checkpoint)
        assert client.post("/reload").status_code == 200
        now = predict()["predictions"]
        assert client.get("/health").json()["model"] != before and now != old["predictions"]
        assert client.post("/feedback", json={"id": old["id"], "targets": ["pos"]}).status_code == 200
        assert client.get("/health").json()["live"] == {"targets": 0}  # the old model made that prediction
        for write in (
            lambda: checkpoint.write_bytes(b"broken"),
            lambda: shutil.copy(everything["text", "regression"], checkpoint),  # of another kind
        ):
            write()
            refused = client.post("/reload")
            assert refused.status_code == 409 and "the old model is kept" in refused.json()["detail"]
            assert predict()["predictions"] == now


def test_requests_sent_before_a_reload_are_predicted_by_the_old_model(tmp_path):
    """Columns and classes may change with a reload: neither requests nor feedback on them are lost."""
    random, checkpoint = np.random.default_rng(0), tmp_path / "best.pt"
    table = pd.DataFrame({name: random.normal(size=120) for name in "abc"}).assign(y=list("uvw") * 40)
    others = table[["a", "c", "y"]].assign(y=list("vwx") * 40)
    quick_run(tmp_path / "old", table[["a", "b", "y"]], data=DataConfig(target="y"), epochs=1)
    quick_run(tmp_path / "new", others, data=DataConfig(target="y"), epochs=1)
    shutil.copy(tmp_path / "old" / "best.pt", checkpoint)
    service = Service(str(checkpoint), str(tmp_path / "requests.db"))
    old = service.model
    shutil.copy(tmp_path / "new" / "best.pt", checkpoint)

    async def crowd():
        worker = asyncio.create_task(service.run())
        await asyncio.sleep(0)
        before = [asyncio.create_task(service.predict([{"a": 1.0, "b": 2.0}], old)) for _ in range(3)]
        await service.reload()
        after = [service.predict([{"a": 1.0, "c": 2.0}]) for _ in range(3)]
        late = [service.predict([{"a": 1.0, "b": 2.0}], old)]
        found = await asyncio.gather(*before, *after, *late)
        worker.cancel()
        return found

    found = asyncio.run(crowd())
    classes = ["".join(predictions[0]["probabilities"]) for _, predictions, _ in found]
    assert classes == ["uvw"] * 3 + ["vwx"] * 3 + ["uvw"]
    assert service.drift()["rows"] == 3 and set(service.drift()["columns"]) == {"a", "c"}
    with client_of(checkpoint, tmp_path / "requests.db") as client:
        for i, target, status in ((0, "u", 200), (1, "x", 422), (3, "u", 422), (4, "x", 200), (6, "u", 200)):
            kept = client.post("/feedback", json={"id": found[i][0], "targets": [target]})
            assert kept.status_code == status, kept.text


def test_lone_surrogates_break_nothing(everything, tmp_path):
    """JSON can hold it, and neither UTF-8 nor a database can."""
    for kind in ("tabular", "text"):
        example = Pipeline.load(everything[kind, "binary"]).examples[0]
        column = "city" if kind == "tabular" else "review"
        with client_of(everything[kind, "binary"], tmp_path / f"{kind}.db") as client:

            def send(path, body, client=client):
                return client.post(path, content=json.dumps(body)).status_code

            half = "x \ud83d"
            assert send("/predict", {"records": [example | {column: half}]}) == 200
            assert send("/predict", {"records": [example | {half: half}]}) == 200
            assert send("/predict", {"records": [{half: half}]}) == 422
            assert send("/feedback", {"id": half, "targets": [half]}) == 404


def test_metrics_count_what_happened(everything):
    with client_of(everything["text", "binary"]) as client:
        client.post("/predict", json={"records": ["great", "awful"]})
        client.post("/predict", json={})
        client.get("/nowhere")
        text = client.get("/metrics").text
    assert 'http_requests_total{path="/predict",status="200"} 1.0' in text
    assert 'http_requests_total{path="/predict",status="422"} 1.0' in text
    assert 'http_requests_total{path="other",status="404"} 1.0' in text
    assert sum(float(n) for n in re.findall(r"^predictions_total\{.*\} (.*)$", text, flags=re.MULTILINE)) == 2
    assert "http_request_seconds_bucket" in text


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_the_schema_allows_or_forbids_breaks_it(everything, kind, tmp_path):
    """Fuzzed from its own OpenAPI schema: no 5xx, and responses match the schema."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    app = make_app(Service(str(everything[kind, "multiclass"]), str(tmp_path / "requests.db")))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    sent = []
    for operation in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:

            @given(case=operation.ok().as_strategy(generation_mode=mode))
            @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            def send(case):
                response = case.call()
                sent.append((case.path, response.status_code))
                assert response.status_code < 500
                case.operation.validate_response(response)

            with suppress(Unsatisfiable):  # a request without parameters cannot be invalid
                send()
    assert {path for path, _ in sent} >= {"/predict", "/feedback", "/reload", "/health"}
    # A valid image together with all other columns is drawn too rarely
    assert ("/predict", 422) in sent and (kind == "mixed" or ("/predict", 200) in sent)


# ---------------------------------------------------------------- the command itself


@contextmanager
def running(checkpoint, *flags, env=None):
    """Start serve.py as a user does; yield (process, address)."""
    process = Popen(
        [ROOT / "serve.py", "--checkpoint", checkpoint, "--port", 0, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    )
    try:
        yield process, re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.kill()
        process.communicate()


def post(address, path, body):
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=30))


def test_kill_9_under_load_loses_no_acknowledged_feedback(everything, tmp_path):
    log, acknowledged = tmp_path / "requests.db", []
    with running(everything["text", "binary"], "--log", log) as (process, address):

        def talk(_):
            while True:
                try:
                    sent = post(address, "/predict", {"records": ["great film"]})
                    post(address, "/feedback", {"id": sent["id"], "targets": ["pos"]})
                except (OSError, ValueError):
                    return
                acknowledged.append(sent["id"])

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            talking = [pool.submit(talk, i) for i in range(8)]
            time.sleep(3)
            process.kill()
            concurrent.futures.wait(talking, timeout=60)
    kept = {row[0] for row in sqlite3.connect(log).execute("SELECT id FROM requests WHERE target IS NOT NULL")}
    assert len(acknowledged) > 5 and set(acknowledged) <= kept


def test_stopping_finishes_accepted_requests_and_hangup_reloads(everything, other_model, tmp_path):
    checkpoint = tmp_path / "best.pt"
    shutil.copy(everything["text", "binary"], checkpoint)
    with running(checkpoint) as (process, address):
        before = json.load(urllib.request.urlopen(address + "/health"))["model"]
        shutil.copy(other_model, checkpoint)
        process.send_signal(signal.SIGHUP)
        deadline = time.time() + 30
        while json.load(urllib.request.urlopen(address + "/health"))["model"] == before:
            assert time.time() < deadline
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            sent = [pool.submit(post, address, "/predict", {"records": ["great film " * 200] * 1000}) for _ in range(4)]
            while (waiting := json.load(urllib.request.urlopen(address + "/health"))["waiting"]) < 1000:
                assert time.time() < deadline
            process.send_signal(signal.SIGTERM)
            # A request that it had not begun to read may be refused or cut off
            done = [s.result() for s in sent if not isinstance(s.exception(), OSError)]
        assert len(done) >= waiting / 1000 and all(len(d["predictions"]) == 1000 for d in done)
        process.wait(30)
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(address + "/health")


def test_the_command_refuses_what_it_cannot_serve(everything, tmp_path):
    (tmp_path / "bad.db").write_text("this is no database" * 100)
    checkpoint = everything["text", "binary"]
    assert_refused(command("serve.py", "--checkpoint", tmp_path / "none.pt"), "no such checkpoint")
    assert_refused(command("serve.py", "--checkpoint", tmp_path / "x.onnx"), "ONNX", "give the run's best.pt")
    assert_refused(command("serve.py", "--checkpoint", checkpoint, "--port", 99999), "--port")
    assert_refused(command("serve.py", "--checkpoint", checkpoint, "--host", "256.1.1.1"), "--host 256.1.1.1")
    assert_refused(command("serve.py", "--checkpoint", checkpoint, "--log", tmp_path / "bad.db"), "--log")
    with running(checkpoint, env={"API_KEY": "k"}) as (_, address):
        assert address.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address + "/schema")


# ---------------------------------------------------------------- the page, and the files that it sends


def upload(client, path, data=None, sheet=""):
    data = path.read_bytes() if data is None else data
    return client.post(f"/predict?sheet={sheet}", files={"file": (path.name, data)})


def predict_command(checkpoint, path, folder, *flags):
    out = folder / "predictions.csv"
    done = command("predict.py", "--checkpoint", checkpoint, "--input", path, "--output", out, *flags)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(out)


def as_sheet(table, last="") -> bytes:
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    return xlsx({"Notes": [["nothing"]], "Orders": [["Report 2023"], [], list(table), *rows]}, last)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "parquet", "xlsx"])
def test_a_file_is_predicted_as_predict_does(everything, ending, tmp_path):
    """Rows beyond a request's limit, under one id; words in cp949, decimal commas, and dates of a parquet file."""
    path, checkpoint = tmp_path / f"my.table.{ending}", everything["tabular", "multiclass"]
    table = make_table(2500, seed=3).assign(city=lambda t: t["city"].str.replace("Paris", "서울"))
    if ending == "csv":
        path.write_bytes(table.to_csv(index=False, sep=";", decimal=",").replace("Köln", "쾰른").encode("cp949"))
    elif ending == "csv.gz":
        table.to_csv(path, index=False)
    elif ending == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif ending == "xlsx":
        path.write_bytes(as_sheet(table.assign(since=pd.to_datetime(table["since"]))))
    else:
        table.assign(since=pd.to_datetime(table["since"])).to_parquet(path)
    expected = predict_command(checkpoint, path, tmp_path, *(["--sheet", "Orders"] if ending == "xlsx" else []))
    with client_of(checkpoint, tmp_path / "requests.db") as client:
        sent = upload(client, path, sheet="Orders").json()
        found = pd.json_normalize(sent["predictions"], sep="_").rename(columns=lambda c: c.replace("ies_", "y_"))
        assert found["prediction"].tolist() == expected["prediction"].tolist()
        assert np.allclose(found[expected.columns[1:]], expected.iloc[:, 1:], atol=1e-5)
        kept = client.post("/feedback", json={"id": sent["id"], "targets": table["multiclass"].tolist()})
        assert kept.json() == {"kept": 2500}, kept.text


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_the_cells_of_a_file_come_back_on_request(everything, ending, tmp_path):
    path, table = tmp_path / f"t.{ending}", make_table(1200, seed=3)
    added = {"order": ["007", " x ", "", None] * 300, "n": [7, None] * 600, "far": [np.inf, 0.5] * 600}
    table = table.assign(**added)
    if ending == "csv":
        table.to_csv(path, index=False)
    elif ending == "jsonl":  # with half of a surrogate pair, which UTF-8 cannot hold
        added["order"] = ["007", "\ud800", "", None] * 300
        records = json.loads(table.to_json(orient="records"))
        lines = [record | {name: cells[i] for name, cells in added.items()} for i, record in enumerate(records)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        table.to_parquet(path)
    with client_of(everything["tabular", "binary"]) as client:
        asked = client.post("/predict?keep=true", files={"file": (path.name, path.read_bytes())})
        assert asked.status_code == 200, asked.text
        found, plain = asked.json()["predictions"], upload(client, path).json()["predictions"]
    cells = [prediction.pop("record") for prediction in found]
    assert found == plain and [list(c) for c in cells] == [list(table)] * 1200
    assert [c["order"] for c in cells[:3]][::2] == ["007", ""] and cells[0]["far"] == "inf"
    assert [c["n"] for c in cells[:2]] == (["7.0", ""] if ending == "csv" else [7, None])
    assert not isinstance(cells[0]["n"], float)


@pytest.mark.parametrize("name", ["texts.csv", "texts.txt"])
def test_a_file_of_texts_keeps_its_empty_ones(everything, name, tmp_path):
    texts, path = ["great film", "", "NA", "정말 지루해요"], tmp_path / name
    lines = [*texts] if name.endswith(".txt") else ["review", *(f'"{text}"' for text in texts)]
    path.write_text("\n".join(lines) + "\n", encoding="cp949")
    with client_of(everything["text", "binary"]) as client:
        found, sent = upload(client, path).json(), client.post("/predict", json={"records": texts}).json()
    assert len(found["predictions"]) == 4 and all(map(close, found["predictions"], sent["predictions"]))
    assert [p["prediction"] for p in found["predictions"]] == predict_command(
        everything["text", "binary"], path, tmp_path
    )["prediction"].tolist()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", lambda t: t.assign(age=t["age"].astype(str).where(t.index != 2099, "old")), "row 2100, column 'age'"),
        ("t.csv", lambda t: t.assign(city=t["city"].where(t.index != 2099, "x" * 100_001)), "row 2100, column 'city'"),
        ("t.csv", lambda t: t.rename(columns={"age": "agee"}), "column 'age' is missing. Did you mean 'agee'?"),
        ("t.csv", lambda t: t[:0], "t.csv: there are no rows"),
        ("t.csv", lambda t: t[:9].to_csv(index=False).replace("Seoul", "Seoul,"), "t.csv: row "),
        ("t.csv", lambda t: pd.concat([t] * 3), "t.csv: more than 5,000 rows"),
        ("t.csv.gz", lambda t: gzip.compress(b"a")[:-4], "t.csv.gz: cannot be read (Compressed file ended"),
        ("t.csv.gz", lambda t: gzip.compress(bytes(5_000_000)), "t.csv.gz: more than 4,000,000 bytes"),
        ("t.csv.gz", lambda t: gzip.compress(gzip.compress(b"a,b\n")), "t.csv.gz: compressed twice"),
        ("t.parquet", lambda t: t[:2000].assign(city="x" * 4000).to_parquet(), "t.parquet: more than 4,000,000 bytes"),
        ("t.parquet", lambda t: b"PAR1", "t.parquet: cannot be read as parquet"),
        ("t.csv", lambda t: b'age,city\n"' + b"x\n" * 600_000, "t.csv: row 1 has 1 fields"),
        (
            "t.csv",
            lambda t: ",".join(map(str, range(9_000))) + "\n" + "," * 8_999,
            "column 'age' is missing. Available",
        ),
        ("t.csv", lambda t: b"a" * 1_100_000 + b"\n1\n", "t.csv: no line ends within the first 1,048,576 bytes"),
        (
            "t.csv",
            lambda t: t[:9].to_csv(index=False).encode()[:-1] + b"\xec\x84",
            "t.csv: row 9 contains bytes that are not valid UTF-8",
        ),
        ("t.csv", lambda t: b"\xff\xfea\0\n\0\0\xd8\n\0", "t.csv: cannot be read"),
        ("t.jsonl", lambda t: b"[" * 100_000, "t.jsonl: line 1 is not valid JSON"),
        ("t.db", lambda t: b"", "t.db: a file of records must be csv"),
        ("t.xlsx", lambda t: b"", "t.xlsx: this is not a spreadsheet"),
        ("t.xlsx", lambda t: as_sheet(t, "XFD1048576"), "t.xlsx: the spreadsheet is damaged, or its cells take"),
        ("t.xlsx", lambda t: as_sheet(pd.concat([t] * 9)), "t.xlsx: more than 4,000,000 bytes when unpacked"),
        ("/etc/.csv/", lambda t: b"", "the name must end in"),
    ],
)
def test_an_invalid_file_is_refused_by_its_row(everything, name, data, message, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_ROWS", 5000)
    monkeypatch.setattr(uploads, "MAX_UNPACKED", 4_000_000)
    data = data(make_table(2500))
    data = data.to_csv(index=False) if isinstance(data, pd.DataFrame) else data
    with client_of(everything["tabular", "binary"]) as client:
        refused = client.post("/predict", files={"file": (name, data)})
        assert refused.status_code == 422 and message in refused.json()["detail"], refused.text
        assert tempfile.gettempdir() not in refused.text
        assert client.post("/predict", files=[("file", ("a.csv", b"")), ("file", ("b.csv", b""))]).status_code == 422


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service as Driver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-component-update")
    driver = webdriver.Chrome(options=options, service=Driver(shutil.which("chromedriver")))
    driver.implicitly_wait(10)
    yield driver
    driver.quit()


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_predicts(browser, everything, kind, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    checkpoint = everything[kind, "binary"]
    pipeline = Pipeline.load(checkpoint)
    expected = expected_of(pipeline, [RecordSchema(pipeline).example])[0]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pipeline.examples))
    with running(checkpoint, "--log", tmp_path / "requests.db") as (_, address):
        browser.get(address)
        WebDriverWait(browser, 20).until(lambda b: b.title == f"Predict {pipeline.task.target}")
        assert len(browser.find_elements(By.CSS_SELECTOR, "#fields > div")) == len(pipeline.preprocessor.names)
        browser.find_element(By.CSS_SELECTOR, "#example" if kind == "image" else "#form button").click()
        assert browser.find_element(By.CLASS_NAME, "prediction").text.endswith(str(expected["prediction"]))
        shown = browser.find_element(By.CLASS_NAME, "bars").text
        assert all(f"{100 * p:.1f} %" in shown for p in expected["probabilities"].values())
        chosen = browser.find_element(By.CSS_SELECTOR, ".feedback select option:checked")
        assert chosen.text == str(expected["prediction"])
        browser.find_element(By.CSS_SELECTOR, ".feedback button").click()
        WebDriverWait(browser, 20).until(lambda b: "Saved" in b.find_element(By.CSS_SELECTOR, ".feedback span").text)
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "records.jsonl"))
        link = browser.find_element(By.CSS_SELECTOR, "#predictions .button")
        assert f"Save {len(pipeline.examples)} predictions" in link.text
        browser.find_element(By.ID, "check").click()
        assert "too few records" in browser.find_element(By.CSS_SELECTOR, "#drift table").text
        assert "PSI 2" not in browser.find_element(By.ID, "drift").text
        primary = "s => s.querySelectorAll(':is(button, .button):not(.quiet)').length"
        counts = browser.execute_script(f"return [...document.querySelectorAll('section')].map({primary})")
        assert counts == [1, 1, 1]
        unlabelled = browser.execute_script(
            "return [...document.querySelectorAll('input,select,textarea')].filter(e => !e.labels.length).length"
        )
        assert unlabelled == 0
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


SAVED = "return fetch(document.querySelector(arguments[0]).href).then(response => response.text())"


def test_the_page_takes_many_images(browser, everything, tmp_path):
    """A card for each chosen file, with its name and its own feedback; each is a request, so no limit is exceeded and a
    broken one costs no other. An example clears the picker."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    paths = sorted(str(p) for p in make_folder(tmp_path / "photos").rglob("*.*"))[:5]
    Image.open(paths[0]).resize((300, 200)).save(tmp_path / "large, too.png")
    (tmp_path / "broken.png").write_text("no image")
    chosen = [*paths, str(tmp_path / "large, too.png"), str(tmp_path / "broken.png")]
    pipeline = Pipeline.load(everything["image", "binary"])
    expected = expected_of(pipeline, chosen[:-1])
    with running(everything["image", "binary"], "--log", tmp_path / "requests.db") as (_, address):
        browser.get(address)
        WebDriverWait(browser, 20).until(lambda b: b.title == f"Predict {pipeline.task.target}")
        picker = browser.find_element(By.CSS_SELECTOR, "#fields input[type=file]")
        picker.send_keys("\n".join(chosen))
        link = browser.find_element(By.CSS_SELECTOR, "#prediction .button")
        cards = browser.find_elements(By.CSS_SELECTOR, "#prediction .card")
        assert [card.find_element(By.CLASS_NAME, "name").text for card in cards] == [
            os.path.basename(p) for p in chosen
        ]
        for card, prediction in zip(cards, expected, strict=False):
            shown = card.find_element(By.CLASS_NAME, "bars").text
            assert all(f"{100 * p:.1f} %" in shown for p in prediction["probabilities"].values())
        assert cards[-1].find_element(By.CLASS_NAME, "wrong").text.startswith("not a readable image")
        tiny = [card.find_element(By.TAG_NAME, "img").get_attribute("class") for card in cards[:6]]
        assert tiny == ["tiny"] * 5 + [""]  # a photo is not drawn as squares
        cards[1].find_element(By.CSS_SELECTOR, ".feedback button").click()
        cards[4].find_element(By.CSS_SELECTOR, ".feedback button").click()
        WebDriverWait(browser, 20).until(lambda _: all("Saved" in cards[i].text for i in (1, 4)))
        saved = pd.read_csv(io.StringIO(browser.execute_script(SAVED, "#prediction .button").removeprefix("\ufeff")))
        assert link.text == "Save 6 predictions" and saved["file"].tolist() == [
            os.path.basename(p) for p in chosen[:-1]
        ]
        assert saved["prediction"].tolist() == [e["prediction"] for e in expected]
        browser.find_element(By.ID, "example").click()
        WebDriverWait(browser, 20).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#prediction .card")) == 1)
        assert picker.get_attribute("value") == ""
    kept = sqlite3.connect(tmp_path / "requests.db").execute("SELECT COUNT(*) FROM requests WHERE target IS NOT NULL")
    assert kept.fetchone() == (2,)


def test_the_page_shows_the_image_of_a_mixed_record(browser, everything, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    path = str(next(make_folder(tmp_path).rglob("*.*")))
    pipeline = Pipeline.load(everything["mixed", "binary"])
    column, example = column_of(pipeline, "image"), RecordSchema(pipeline).example
    with running(everything["mixed", "binary"]) as (_, address):
        browser.get(address)
        WebDriverWait(browser, 20).until(lambda b: b.title == f"Predict {pipeline.task.target}")
        for image in (path, example[column]):
            if image == path:
                browser.find_element(By.CSS_SELECTOR, "#fields input[type=file]").send_keys(path)
            else:
                browser.find_element(By.ID, "example").click()
                assert browser.find_element(By.CSS_SELECTOR, "#fields input[type=file]").get_attribute("value") == ""
            assert len(browser.find_elements(By.CSS_SELECTOR, "#fields img")) == 1
            browser.find_element(By.CSS_SELECTOR, "#form button").click()
            (expected,) = expected_of(pipeline, [example | {column: image}])
            shown = "return (document.querySelector('#prediction .bars')?.innerText || '').replaceAll('\\u00a0', ' ')"
            wanted = [f"{100 * p:.1f} %" for p in expected["probabilities"].values()]
            WebDriverWait(browser, 20).until(
                lambda b, shown=shown, wanted=wanted: all(p in b.execute_script(shown) for p in wanted)
            )


def test_the_page_shows_warnings_and_fits_a_telephone(browser, everything, tmp_path):
    """The table that is saved has the columns of the file, whatever its format, then the predictions."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    pipeline = Pipeline.load(everything["tabular", "binary"])
    table = make_table(60, seed=4).assign(city="Atlantis", prediction="mine", order=ODD_TEXTS * 12)
    table.to_parquet(tmp_path / "t.parquet")
    browser.set_window_size(390, 900)
    try:
        with running(everything["tabular", "binary"]) as (_, address):
            browser.get(address)
            WebDriverWait(browser, 20).until(lambda b: b.title == "Predict binary")
            city = browser.find_elements(By.CSS_SELECTOR, "#fields input")[2]
            city.clear()
            city.send_keys("Atlantis")
            browser.find_element(By.CSS_SELECTOR, "#form button").click()
            note = browser.find_element(By.CSS_SELECTOR, "#prediction .notes").text
            assert note.startswith("column 'city': 'Atlantis' was not seen in training")
            numbers = browser.find_elements(By.CSS_SELECTOR, "#prediction .bars .number")
            assert all(number.size["height"] < 30 for number in numbers)  # one line
            tracks = browser.find_elements(By.CSS_SELECTOR, "#prediction .track")
            assert all(track.size["width"] > 150 for track in tracks)
            browser.find_element(By.ID, "file").send_keys(str(tmp_path / "t.parquet"))
            assert "row 1, column 'city'" in browser.find_element(By.CSS_SELECTOR, "#predictions .notes").get_attribute(
                "textContent"
            )
            text = browser.execute_script(SAVED, "#predictions .button").removeprefix("\ufeff")
            saved = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
            browser.find_element(By.ID, "check").click()
            verdict = browser.find_element(By.CSS_SELECTOR, "#drift td.wrong")
            assert "100% unknown" in verdict.text
            widths = "const { scrollWidth, clientWidth } = document.documentElement; return [scrollWidth, clientWidth]"
            assert len(set(browser.execute_script(widths))) == 1
            right = "return arguments[0].getBoundingClientRect().right"
            scroll = browser.find_element(By.CSS_SELECTOR, "#drift .scroll")
            assert browser.execute_script(right, verdict) <= browser.execute_script(right, scroll)
    finally:
        browser.set_window_size(1280, 900)
    mine = ["prediction (input)" if name == "prediction" else name for name in table]
    assert list(saved) == [*mine, "prediction", "probability", "probability_high", "probability_low"]
    assert saved["order"].tolist() == ODD_TEXTS * 12
    assert saved["prediction"].tolist() == pipeline.predict(table)["prediction"].tolist()


ODD_TEXTS = ["007", 'say "hi"', "a,b", "two\nlines", ""]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """A model of columns with similar names, dates and words."""
    rows, random = 120, np.random.default_rng(0)
    days = pd.date_range("2020-01-01", periods=rows)
    table = pd.DataFrame(
        {
            "city": random.choice(["Seoul", "Paris"], rows),
            "city-list": random.choice(["Oslo", "Rome"], rows),
            "clock": (days + pd.to_timedelta(random.integers(1, 86_000, rows), unit="s")).astype(str),
            "midnight": days,
            "day": days.strftime("%Y-%m-%d"),
            "german": days.strftime("%d.%m.%Y"),
            "member": random.choice(["Y", "N"], rows),
        }
    )
    table["target"] = np.where((table["city"] == "Seoul") ^ (table["member"] == "Y"), "high", "low")
    folder = tmp_path_factory.mktemp("awkward")
    return quick_run(folder / "run", table, data=DataConfig(target="target")).out / "best.pt"


def test_the_schema_allows_what_the_service_accepts(awkward):
    with client_of(awkward) as client:
        schema = client.get("/schema").json()
        columns, example = schema["record"]["properties"], schema["example"]
        assert [name for name, what in columns.items() if what.get("format") == "date"] == ["midnight", "day"]
        assert columns["clock"]["examples"] == [example["clock"]] and "%d.%m.%Y" in columns["german"]["description"]
        assert columns["member"]["type"] == ["boolean", "string", "number", "null"] and "enum" not in columns["member"]
        for word in (example["member"], "y", "OFF", "t", 1, 0, True, None):
            assert client.post("/predict", json={"records": [example | {"member": word}]}).status_code == 200
        assert {"file"} == set(
            client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"][
                "multipart/form-data"
            ]["schema"]["properties"]
        )


def test_the_page_sends_what_its_fields_show(browser, awkward, tmp_path):
    """The service requires a key, which the address contains; feedback belongs to the prediction that is shown."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    pipeline = Pipeline.load(awkward)
    example = RecordSchema(pipeline).example
    expected = pipeline.predict([example])["probability"].iloc[0]
    with running(awkward, "--log", tmp_path / "requests.db", env={"API_KEY": "k"}) as (_, address):
        browser.get(address.replace("//", "//user:k@"))
        WebDriverWait(browser, 20).until(lambda b: b.title == "Predict target")
        fields = browser.find_elements(By.CSS_SELECTOR, "#fields input, #fields select")
        assert [f.get_attribute("value") for f in fields[:-1]] == [v for name, v in example.items() if name != "member"]
        predict = browser.find_element(By.CSS_SELECTOR, "#form button")
        predict.click()
        assert f"{100 * expected:.1f} %" in browser.find_element(By.CLASS_NAME, "bars").text
        assert browser.find_element(By.CLASS_NAME, "feedback").is_displayed()
        assert browser.switch_to.active_element == predict
        fields[2].clear()
        fields[2].send_keys("soon")
        predict.click()
        assert "column 'clock': 'soon'" in browser.find_element(By.CSS_SELECTOR, "#prediction .wrong").text
        assert not browser.execute_script("return document.querySelector('.feedback')")
        (tmp_path / "bad.csv").write_text("citi\nSeoul\n")
        browser.find_element(By.ID, "file").send_keys(str(tmp_path / "bad.csv"))
        assert "Did you mean 'citi'?" in browser.find_element(By.CSS_SELECTOR, "#predictions .wrong").text
