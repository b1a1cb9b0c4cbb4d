"""Hostile clients: the service over raw sockets, and bodies that no client library would send."""

import contextlib
import io
import json
import os
import re
import shutil
import socket
import sqlite3
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import uvicorn
from conftest import ROOT, assert_refused
from PIL import Image
from pyarrow import parquet
from test_serve import client_of, command, upload

from errors import UserError
from pipeline import Pipeline
from preprocessing import pixels
from preprocessing.pixels import read_pixels
from serve import read_key
from serving import guard, protocol, uploads
from serving.app import make_app
from serving.batching import Service
from serving.guard import LOOPBACK


@contextlib.contextmanager
def serving(checkpoint, log="", key="", hosts=()):
    """Serve as serve.py does, on a thread; yield (port, server)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        service = Service(str(checkpoint), str(log))
        app = make_app(service, key, hosts)
        server = protocol.Server(
            uvicorn.Config(app, http=protocol.Protocol, ws="none", log_level="warning", timeout_graceful_shutdown=8),
            service,
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1], server
        finally:
            server.should_exit = True
            thread.join(20)


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(data)
    return connection


def read(connection: socket.socket) -> bytes:
    """Read until the service closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while block := connection.recv(65_536):
            found += block
    return found


def ask(port: int, data: bytes) -> bytes:
    with connect(port, data) as connection:
        return read(connection)


def get(path: str, host: str = "localhost") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def flood(port: int, start: bytes, block: bytes, limit: int) -> tuple[int, bytes]:
    """Send a block again and again until the service closes the connection; return (bytes sent, response)."""
    with connect(port, start) as connection:
        sent, found = 0, b""
        connection.settimeout(0.001)
        deadline = time.time() + 10
        while sent < limit and time.time() < deadline:
            try:
                sent += connection.send(block)
            except TimeoutError:
                pass
            except ConnectionError:
                break
            with contextlib.suppress(TimeoutError, ConnectionError):
                found += connection.recv(4096)
        return sent, found


POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def checkpoint(runs):
    return runs["binary"].out / "best.pt"


@pytest.mark.parametrize(
    ("start", "block"),
    [
        (b"GET / HTTP/1.1\r\n", b"a:b\r\n" * 10_000),
        (b"GET / HTTP/1.1\r\na: ", b"x" * 50_000),
        (b"GET /", b"x" * 50_000),
        (CHUNKED + b"1\r\nx\r\n0\r\n", b"a:b\r\n" * 10_000),
        (CHUNKED + b"1;", b"x" * 50_000),
    ],
    ids=["headers", "value", "address", "trailers", "extension"],
)
def test_endless_headers_are_refused(checkpoint, start, block):
    with serving(checkpoint) as (port, _):
        sent, found = flood(port, start, block, 50_000_000)
        assert sent < 20_000_000 and (b" 431 " in found or not found), (sent, found[:200])
        large = POST[:-2] + b"\r\na: " + b"x" * 70_000 + b"\r\nContent-Length: 2\r\n\r\n{}"
        assert b" 431 " in ask(port, large)
        body = json.dumps({"records": ["x" * 300_000]}).encode()  # arrives together with the headers
        fine = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert b" 422 " in ask(port, fine + body)


def test_connections_without_complete_headers_are_closed(checkpoint, monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT", 1)
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 20)
    keep = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(checkpoint) as (port, server), contextlib.ExitStack() as stack:
        starts = [b"", b"GET", b"GET / HTTP/1.1\r\nHost: localhost\r\n"]
        silent = [stack.enter_context(connect(port, starts[i % 3])) for i in range(60)]
        assert b" 200 " in ask(port, get("/health"))  # the oldest one gave way
        again = stack.enter_context(connect(port, keep))
        assert b" 200 " in again.recv(9999)
        again.sendall(keep[:20])
        assert len(server.server_state.connections) <= 20
        began = time.time()
        closed = [read(connection) for connection in [*silent, again]]
        assert time.time() - began < 3
        assert not closed[-4] and all(b" 408 " in found for found in closed[-3:])


def test_what_is_refused_is_not_read_on(checkpoint, monkeypatch):
    monkeypatch.setattr(guard, "LINGER", 0.3)
    monkeypatch.setattr(guard, "BODY_TIMEOUT", 0.3)
    monkeypatch.setattr(guard, "MAX_BODY", 1_000_000)
    long = b"Content-Length: 99999999999\r\n\r\n"
    block = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    with serving(checkpoint, key="k") as (port, _):
        authorized = POST + b"Authorization: Bearer k\r\n"
        for start, piece, status in (
            (POST + long, block, b" 401 "),
            (CHUNKED, block, b" 401 "),
            (authorized + long, block, b" 413 "),
            (authorized + b"Transfer-Encoding: chunked\r\n\r\n", block, b" 413 "),
            (authorized.replace(b"/predict", b"/nowhere") + long, block, b" 404 "),
            (authorized + b"Origin: http://evil\r\n" + long, block, b" 403 "),
        ):
            sent, found = flood(port, start, piece, 500_000_000)
            assert status in found and b"connection: close" in found.lower(), (start, found)
            assert sent < 20_000_000
        late = ask(port, authorized + b"Content-Length: 99\r\n\r\n{")
        assert b" 408 " in late and b"connection: close" in late.lower()
        # A client that sends all of a body before it reads gets the response, not a reset
        assert b" 413 " in ask(port, authorized + b"Content-Length: 1900000\r\n\r\n" + b"x" * 1_900_000)


def test_without_a_key_only_this_machine_is_served(checkpoint):
    """A foreign name that resolves to 127.0.0.1 would let any web page read responses (DNS rebinding)."""
    with serving(checkpoint, hosts=LOOPBACK) as (port, _):
        for host in ("localhost", "127.0.0.1", "[::1]", f"LOCALHOST:{port}", "[::1]:1"):
            assert b" 200 " in ask(port, get("/schema", host)), host
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil", "127.0.0.1.evil", "::1", "", "0.0.0.0"):
            assert b" 403 " in ask(port, get("/schema", host)), host
    done = command("serve.py", "--checkpoint", checkpoint, env={"API_KEY": "\n"})
    assert_refused(done, "API_KEY")


def test_the_command_names_its_hosts(checkpoint):
    from test_serve import running

    with running(checkpoint) as (_, address):
        port = int(address.rsplit(":", 1)[1])
        assert b" 403 " in ask(port, get("/schema", "evil.example")) and b" 200 " in ask(port, get("/schema"))


def test_a_key_is_read_without_its_newline():
    assert read_key("k ü\r\n") == "k ü" and read_key("") == ""
    for key in (" ", "a\nb", "a\0"):
        with pytest.raises(UserError, match="API_KEY"):
            read_key(key)


def test_stopping_waits_for_no_half_sent_body_and_leaves_one_file(checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(protocol, "STOP_TIMEOUT", 0.5)
    example = Pipeline.load(checkpoint).examples[0]
    body = json.dumps({"records": [example] * 7}).encode()
    whole = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    log = tmp_path / "new" / "requests.db"
    with serving(checkpoint, log=log) as (port, _), contextlib.ExitStack() as stack:
        assert b" 200 " in connect(port, whole).recv(9999)
        assert [stat.S_IMODE(os.stat(path).st_mode) for path in (log.parent, log)] == [0o700, 0o600]
        assert {stat.S_IMODE(path.stat().st_mode) for path in log.parent.iterdir()} == {0o600}
        for cut in (10, len(whole) - 5, len(POST) + 30):
            for _ in range(5):
                stack.enter_context(connect(port, whole[:cut]))
        time.sleep(0.2)
        began = time.time()
    assert time.time() - began < 4 and "Traceback" not in capfd.readouterr().err
    assert [path.name for path in log.parent.iterdir()] == ["requests.db"]
    assert sqlite3.connect(log).execute("SELECT COUNT(*) FROM requests").fetchone() == (7,)


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced"])
def test_a_log_that_is_gone_is_noticed(checkpoint, tmp_path, how):
    log, record = tmp_path / "requests.db", Pipeline.load(checkpoint).examples[0]
    with client_of(checkpoint, log) as client:
        sent = client.post("/predict", json={"records": [record]}).json()
        shutil.move(log, tmp_path / "other.db")
        if how == "deleted":
            (tmp_path / "other.db").unlink()
        if how == "replaced":
            log.write_bytes(b"")
        for path, body in (("/predict", {"records": [record]}), ("/feedback", {"id": sent["id"], "targets": ["low"]})):
            refused = client.post(path, json=body)
            assert refused.status_code == 503 and "was deleted or renamed" in refused.text


def test_health_needs_no_database(checkpoint, tmp_path):
    """Its score is a running total, which replaced feedback and a restart do not change."""
    record = Pipeline.load(checkpoint).examples[0]
    log = tmp_path / "requests.db"
    service = Service(str(checkpoint), str(log))
    from fastapi.testclient import TestClient

    with TestClient(make_app(service)) as client:
        ids = [client.post("/predict", json={"records": [record] * 2}).json()["id"] for _ in range(5)]
        for sent in [*ids, *ids[:2]]:
            for targets in (["low", "high"], ["low", "low"]):
                assert client.post("/feedback", json={"id": sent, "targets": targets}).status_code == 200
        with service.log.lock:
            live = client.get("/health").json()["live"]
    count, error = sqlite3.connect(log).execute("SELECT COUNT(error), AVG(error) FROM requests").fetchone()
    assert live["targets"] == count == 10 and live["accuracy"] == 1 - error
    with client_of(checkpoint, log) as client:
        assert client.get("/health").json()["live"] == live


def test_a_log_of_another_shape_is_refused(checkpoint, tmp_path):
    for name, sql in {
        "a": "CREATE TABLE requests (id TEXT, row INTEGER, model TEXT, prediction TEXT, error REAL)",
        "b": "CREATE TABLE models (name TEXT)",
        "c": "CREATE VIEW requests AS SELECT 1 AS id",
    }.items():
        with sqlite3.connect(tmp_path / name) as database:
            database.execute(sql)
        with pytest.raises(UserError, match="cannot be used as a request log"):
            Service(str(checkpoint), str(tmp_path / name))
    with client_of(checkpoint, tmp_path / "d") as client:
        with sqlite3.connect(tmp_path / "d") as database:
            odd = ("{", "[]", "7", "{}", None, '{"probabilities": 1}')
            rows = [(str(i), 1, prediction) for i, prediction in enumerate(odd)]
            database.executemany("INSERT INTO requests (id, row, prediction) VALUES (?, ?, ?)", rows)
        for request, *_ in rows:
            refused = client.post("/feedback", json={"id": request, "targets": ["low"]})
            assert refused.status_code in (422, 503), refused.text


def test_a_damaged_checkpoint_is_not_loaded(checkpoint, tmp_path, monkeypatch):
    shutil.copy(checkpoint, tmp_path / "best.pt")
    with client_of(tmp_path / "best.pt") as client:
        monkeypatch.setattr(Pipeline, "load", lambda *_: {}["missing"])
        refused = client.post("/reload")
        assert refused.status_code == 409 and "the old model is kept" in refused.text


def test_the_lock_file_holds_what_is_pinned():
    """All packages of the container but torch, which comes from its own index, by hash."""
    lock = (ROOT / "requirements-serve.lock").read_text()
    locked = re.findall(r"^([\w-]+==\S+) \\\n    --hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
    pins = re.findall(r"^[\w-]+==[^;\s]+", (ROOT / "requirements-serve.txt").read_text(), re.MULTILINE)
    assert {pin for pin in pins if not pin.startswith("torch==")} <= set(locked)
    assert "://" not in lock and len(locked) == len(re.findall("==", lock))


HALF = {"raw": b"\xed\xa0\xbd", "escaped": b"\\ud83d", "invalid": b"\xff"}


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "utf-32"])
def test_no_half_of_a_surrogate_pair_breaks_anything(checkpoint, tmp_path, half, encoding):
    """As cells, as keys, in feedback and in files."""
    example = Pipeline.load(checkpoint).examples[0]

    def encoded(body) -> bytes:
        text = json.dumps(body)
        if encoding == "utf-8":
            return text.encode().replace(b"HALF", HALF[half])
        return text.replace("HALF", "\\ud83d" if half == "escaped" else "\ud83d").encode(encoding, "surrogatepass")

    with client_of(checkpoint, tmp_path / "requests.db") as client:
        sent = client.post("/predict", json={"records": [example]}).json()["id"]
        table = {"a.jsonl": encoded(example | {"city": "HALF"}), "HALF.jsonl": b"{}", "HALF": b""}
        found = [
            client.post(path, content=encoded(body))
            for path, body in (
                ("/predict", {"records": [example | {"city": "HALF"}]}),
                ("/predict", {"records": [example | {"HALF": "HALF"}]}),
                ("/predict", {"records": [{"HALF": 1}]}),
                ("/predict", {"HALF": 1}),
                ("/feedback", {"id": "HALF", "targets": ["HALF"]}),
                ("/feedback", {"id": sent, "targets": ["HALF"]}),
                ("/feedback", {"HALF": "HALF"}),
            )
        ] + [client.post("/predict?keep=1", files={"file": (n.encode().decode(), data)}) for n, data in table.items()]
    assert all(response.status_code < 500 for response in found), [response.status_code for response in found]
    assert found[0].status_code == (200 if half == "escaped" else 422)


@pytest.mark.parametrize("charset", ["undefined", "utf-16", "idna", "rot13", "hex", "utf-7", "none"])
def test_forms_in_any_charset(checkpoint, charset):
    names = b'name="a\xff\xed\xa0\x80"; filename="\xed\xa0\x80.csv"'
    part = b"--x\r\nContent-Disposition: form-data; " + names + b"\r\n\r\na\r\n--x--\r\n"
    kind = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    with client_of(checkpoint) as client:
        assert client.post("/predict", content=part, headers=kind).status_code == 422


def odd_tables() -> dict[str, pa.Table]:
    def described(metadata: dict) -> pa.Table:
        return pa.table({"age": [1, 2]}).replace_schema_metadata({b"pandas": json.dumps(metadata).encode()})

    index = {"kind": "range", "name": None, "start": 0, "stop": 2, "step": 0}
    about = {"columns": [], "column_indexes": [], "pandas_version": "3.0.0"}
    return {
        "date": pa.table({"age": pa.array([2**30], pa.int32()).cast(pa.date32())}),
        "timestamp": pa.table({"age": pa.array([2**58]).cast(pa.timestamp("ms"))}),
        "duration": pa.table({"age": pa.array([2**62]).cast(pa.duration("us"))}),
        "step": described(about | {"index_columns": [index]}),
        "index": described(about | {"index_columns": ["\ud800", 7, None]}),
        "keys": described({"columns": 7}),
        "list": described([]),
        "surrogates": pa.table({"a\x00\u202e": ["x"]}),
        "map": pa.table({"age": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))}),
    }


@pytest.mark.parametrize("name", odd_tables())
def test_odd_parquet_files_are_refused_or_predicted(checkpoint, tmp_path, name):
    example, table = Pipeline.load(checkpoint).examples[0], odd_tables()[name]
    for column, cell in example.items():
        if column not in table.column_names:
            table = table.append_column(column, pa.array([cell] * len(table)))
    parquet.write_table(table, tmp_path / "t.parquet")
    with client_of(checkpoint, tmp_path / "requests.db") as client:
        for keep in ("", "?keep=1"):
            sent = client.post(f"/predict{keep}", files={"file": ("t.parquet", (tmp_path / "t.parquet").read_bytes())})
            assert sent.status_code in (200, 422), sent.text


@pytest.mark.parametrize("kind", ["texts", "columns", "lists"])
def test_parquet_that_is_huge_when_decoded_is_refused_unread(checkpoint, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UNPACKED", 4_000_000)
    monkeypatch.setattr(uploads, "read_records", lambda *_: 1 / 0)
    cell = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 90_000]))
    example = Pipeline.load(checkpoint).examples[0]
    table = {name: pa.array([value] * 2000) for name, value in example.items()}
    if kind == "texts":
        table["city"] = cell
    elif kind == "columns":
        short = pa.array(["x" * 200]).take(pa.array([0] * 2000)).dictionary_encode()
        table |= {f"c{i}": short for i in range(20)}
    else:
        table["age"] = pa.array([[0] * 1000] * 2000)
    parquet.write_table(pa.table(table), tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 200_000
    with client_of(checkpoint, tmp_path / "requests.db") as client:
        refused = upload(client, tmp_path / "t.parquet")
    assert refused.status_code == 422 and "more than 4,000,000 bytes when unpacked" in refused.text


def progressive(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * scans + data[-2:]


def test_a_jpeg_of_many_scans_is_refused(tmp_path):
    assert read_pixels(progressive(20), 8, 3).shape == (3, 8, 8)
    (tmp_path / "a.jpg").write_bytes(progressive(200))
    for cell in (progressive(200), str(tmp_path / "a.jpg")):
        with pytest.raises(UserError, match="more than 50 scans"):
            read_pixels(cell, 8, 3)


def test_a_slow_image_holds_up_nobody(everything, monkeypatch):
    slow, free, read = progressive(2), threading.Event(), pixels.read_pixels
    monkeypatch.setattr(pixels, "read_pixels", lambda cell, *size: (cell != slow or free.wait(9)) and read(cell, *size))
    with client_of(everything["image", "binary"]) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/predict", files={"a": ("a.jpg", slow)})
        time.sleep(0.2)
        assert client.post("/predict", files={"a": ("b.jpg", progressive(1))}).status_code == 200
        assert not waiting.done()
        free.set()
        assert waiting.result().status_code == 200


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_harms_no_pixels():
    """Each byte of the tags replaced by numbers of types: the pixels come back, or the image is refused."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "words", 1.5
    exif[0x8769], exif[0x8825] = {0x9286: b"c", 0x829A: 0.5}, {1: "N", 2: (1.0, 2.0, 3.0)}
    Image.new("L", (8, 8), 200).save(file, "JPEG", exif=exif)
    data, start = file.getvalue(), file.getvalue().index(b"Exif")
    for at in range(start, start + len(exif.tobytes())):
        for byte in (0, 2, 5, 7, 12, 255):
            with contextlib.suppress(UserError):
                assert read_pixels(data[:at] + bytes([byte]) + data[at + 1 :], 8, 1).mean() > 190
