"""Several processes of torchrun train the model of one process, share its checkpoints, and end together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT, table_for

from sources.checkpoint import read_checkpoint

FLAGS = ("--target", "binary", "--no-report", "--threads", "1", "--columns", "city=drop", "member=drop")  # no draws
MLP = ("--model", "mlp", "--dropout", "0", "--accumulate", "2", "--clip-norm", "0.5", "--batch-size", "25")


def start(*flags, processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
    ]
    line = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "train.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def run(*flags, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    process = start(*flags, processes=processes, restarts=restarts)
    output, errors = process.communicate(timeout=150)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def weights(out) -> dict:
    return read_checkpoint(str(out / "best.pt"))["state_dict"]


def metrics(out) -> dict:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "data.csv"
    table_for("binary").to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def both(data):
    """The same run in one process and in two."""
    for processes in (1, 2):
        flags = ("--data", data, *FLAGS, *MLP, "--epochs", 4, "--out", data.parent / f"{processes}")
        result = run(*flags, processes=processes)
        assert result.returncode == 0, result.stderr
    return data.parent / "1", data.parent / "2"


def test_two_processes_train_the_model_of_one(both):
    one, two = map(weights, both)
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)
    assert not any(name.startswith("module.") for name in two)
    history = [pd.read_csv(out / "history.csv") for out in both]
    for name in ("train/loss", "val/loss", "val/accuracy", "lr"):
        assert history[0][name].tolist() == pytest.approx(history[1][name].tolist(), abs=1e-6)
    found = [metrics(out) for out in both]
    assert found[0]["test"] == pytest.approx(found[1]["test"], abs=1e-6)
    assert found[1]["processes"] == 2 and found[0]["best_epoch"] == found[1]["best_epoch"]


@pytest.fixture
def two_hosts():
    """The names of two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2: it needs root."""
    hosts = [f"host{i}-{os.getpid()}" for i in (1, 2)]
    cable = f"link add {hosts[0][-12:]}a type veth peer name {hosts[0][-12:]}b"
    lines = [f"netns add {host}" for host in hosts] + [cable]
    for i, (host, end) in enumerate(zip(hosts, "ab", strict=True), start=1):
        lines.append(f"link set {hosts[0][-12:]}{end} netns {host} name eth0")
        lines += [
            f"-n {host} {line}" for line in (f"addr add 10.77.0.{i}/24 dev eth0", "link set eth0 up", "link set lo up")
        ]
    try:
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)
        yield hosts
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not allowed here")
    finally:
        for host in hosts:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def test_two_hosts_train_the_model_of_one(both, two_hosts, data, tmp_path):
    processes = []
    for i, host in enumerate(two_hosts, start=1):
        meeting = f"--rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400 --rdzv-conf is_host={i == 1}"
        launch = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --local-addr 10.77.0.{i} {meeting}"
        flags = ("--data", data, *FLAGS, *MLP, "--epochs", 4, "--out", tmp_path / "run")
        line = ["ip", "netns", "exec", host, sys.executable, *launch.split(), str(ROOT / "train.py"), *map(str, flags)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        processes.append(subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    one, two = weights(both[0]), weights(tmp_path / "run")
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)


def test_checkpoints_are_interchangeable(both, data):
    """A run of two processes continues in one, as the run of one does."""
    sha = []
    for out in both:
        last = out / "last.pt"
        assert run("--resume", last, "--epochs", 6, processes=1).returncode == 0
        sha.append(weights(out))
    assert all(torch.allclose(sha[0][name], sha[1][name], rtol=0, atol=2e-6) for name in sha[0])


def test_images_and_batch_norm_too(tmp_path):
    for processes in (1, 2):
        flags = (
            "--data",
            "digits",
            "--augment",
            "none",
            "--dropout",
            0,
            "--epochs",
            1,
            "--hidden",
            8,
            8,
            "--no-report",
        )
        result = run(*flags, "--lr", 0.001, "--out", tmp_path / f"{processes}", processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.allclose(one[n].double(), two[n].double(), rtol=0, atol=1e-4) for n in one)
    assert metrics(tmp_path / "1")["test"]["loss"] == pytest.approx(metrics(tmp_path / "2")["test"]["loss"], abs=1e-4)


def children(process) -> list[int]:
    """The processes that torchrun has started, in the order of their ranks."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return sorted(map(int, listed.stdout.split()))


def wait_for(path, process) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


LONG = ("--model", "mlp", "--hidden", "64", "--batch-size", "16", "--epochs", "40", "--patience", "0")


def test_a_run_whose_process_was_killed_restarts_and_is_the_same(data, tmp_path):
    flags = ("--data", data, *FLAGS, *LONG)
    whole = run(*flags, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = start(*flags, "--out", tmp_path / "killed", restarts=1)
    wait_for(tmp_path / "killed" / "last.pt", process)
    os.kill(children(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert metrics(tmp_path / "killed")["weights_sha256"] == metrics(tmp_path / "whole")["weights_sha256"]


def test_a_signal_to_one_process_saves_the_run(data, tmp_path):
    process = start("--data", data, *FLAGS, *LONG, "--epochs", 3000, "--out", tmp_path / "run")
    wait_for(tmp_path / "run" / "last.pt", process)
    os.kill(children(process)[1], signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and "a signal to another process: saved in epoch" in errors
    assert not (tmp_path / "run" / "metrics.json").exists()
    again = run("--resume", tmp_path / "run" / "last.pt", "--epochs", 60, "--patience", 1, processes=1)
    assert again.returncode == 0, again.stderr


def test_bad_data_are_reported_once(data):
    result = run("--data", data, "--target", "nothing")
    assert result.returncode != 0
    assert result.stderr.count("error: --target nothing: no such column") == 1
