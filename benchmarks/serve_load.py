"""Requests per second of serve.py, one record each, against a FastAPI app that calls Pipeline.predict per request.

  python benchmarks/serve_load.py [--requests 100000]

The load comes from this process, on the same machine: 32 connections, each of which sends a request, waits for the
response and sends the next.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import uvloop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONNECTIONS = 32
NAIVE = """
import sys
sys.path.insert(0, sys.argv[1])
import uvicorn
from fastapi import FastAPI
from pipeline import Pipeline

pipeline, app = Pipeline.load(sys.argv[2]), FastAPI()


@app.post("/predict")
def predict(body: dict):
    return {"predictions": pipeline.predict(body["records"]).to_dict("records")}


@app.get("/health")
async def health():
    return {}


uvicorn.run(app, port=int(sys.argv[3]), log_level="error")
"""


def make_run(folder: Path) -> Path:
    """Train on a table of numbers, categories, a boolean and a date."""
    from config import DataConfig, RunConfig, TrainConfig
    from train import train

    random, rows = np.random.default_rng(0), 5_000
    table = pd.DataFrame({f"number {i}": random.normal(size=rows) for i in range(6)})
    table["city"] = random.choice(["Seoul", "Busan", "Paris"], rows)
    table["plan"] = random.choice(list("abcdefgh"), rows)
    table["member"] = random.choice(["yes", "no"], rows)
    table["since"] = pd.date_range("2020-01-01", periods=rows, freq="h").strftime("%Y-%m-%d")
    table["y"] = np.where(table["number 0"] + (table["city"] == "Seoul") > 0.5, "yes", "no")
    run = RunConfig(out=str(folder / "run"))
    train(DataConfig(target="y"), training=TrainConfig(epochs=2), run=run, table=table)
    return folder / "run" / "best.pt"


class Client(asyncio.Protocol):
    """Send a request over one connection again and again, and record the duration of each."""

    def __init__(self, message: bytes, count: int, seconds: list[float], done: asyncio.Future):
        self.message, self.count, self.seconds, self.done, self.buffer = message, count, seconds, done, b""

    def connection_made(self, transport):
        self.transport = transport
        self.send()

    def send(self):
        self.began = time.perf_counter()
        self.transport.write(self.message)

    def data_received(self, data):
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(self.buffer.decode()))
            return
        self.buffer = b""
        self.seconds.append(time.perf_counter() - self.began)
        self.count -= 1
        if self.count:
            self.send()
        else:
            self.transport.close()
            if not self.done.done():  # cancelled, if the load ended while this watched /health
                self.done.set_result(None)


def http(method: str, path: str, body: bytes = b"") -> bytes:
    headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{method} {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body


async def load(port: int, message: bytes, requests: int) -> tuple[float, list[float], list[float]]:
    """Return (seconds in total, seconds of each request, seconds of requests to /health meanwhile)."""
    loop, seconds, health = asyncio.get_running_loop(), [], []

    async def send(message: bytes, count: int, seconds: list[float]) -> None:
        done = loop.create_future()
        await loop.create_connection(lambda: Client(message, count, seconds, done), "127.0.0.1", port)
        await done

    async def watch() -> None:
        while True:
            await send(http("GET", "/health"), 1, health)
            await asyncio.sleep(0.05)

    watcher, began = asyncio.create_task(watch()), time.perf_counter()
    await asyncio.gather(*(send(message, requests // CONNECTIONS, seconds) for _ in range(CONNECTIONS)))
    took = time.perf_counter() - began
    watcher.cancel()
    return took, seconds, health


def memory(process: subprocess.Popen) -> float:
    """Return the resident memory of a process in megabytes (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            (await asyncio.open_connection("127.0.0.1", port))[1].close()
            return
        except OSError:
            await asyncio.sleep(0.1)
    raise RuntimeError("the server did not start")


async def measure(name: str, command: list[str], port: int, message: bytes, requests: int) -> float:
    """Start a server, put it under load, print the results; return requests per second."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        await wait_for(port)
        await load(port, message, 2_000)  # warm up
        before = memory(process)
        took, seconds, health = await load(port, message, requests)
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
        print(
            f"{name:<12}{len(seconds) / took:8,.0f} requests/s   p50 {p50:5.1f} ms   p99 {p99:5.1f} ms   "
            f"/health p50 {np.median(health) * 1000:4.1f}, p99 {np.quantile(health, 0.99) * 1000:4.1f} ms   "
            f"memory {before:.0f} → {memory(process):.0f} MB",
            flush=True,
        )
        return len(seconds) / took
    finally:
        process.terminate()
        process.wait()


async def main(requests: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(make_run(Path(folder)))
        from pipeline import Pipeline

        record = Pipeline.load(checkpoint).examples[0]
        message = http("POST", "/predict", json.dumps({"records": [record]}).encode())
        print(f"\n{CONNECTIONS} connections, {requests:,} requests of one record with {len(record)} columns")
        serve = [sys.executable, str(ROOT / "serve.py"), "--checkpoint", checkpoint, "--port", "8911"]
        ours = await measure("serve.py", serve, 8911, message, requests)
        naive = [sys.executable, "-c", NAIVE, str(ROOT), checkpoint, "8912"]
        theirs = await measure("naive app", naive, 8912, message, min(requests, 5_000))
        print(f"serve.py / naive app {ours / theirs:.1f}   (at least 3)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    uvloop.run(main(parser.parse_args().requests))
