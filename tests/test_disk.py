"""Tables that are too large for memory are kept on disk, and give the same model."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_refused, command, make_table, quick_run, table_for
from hypothesis import given
from hypothesis import strategies as st

import sources.disk
from config import DataConfig, ModelConfig
from preprocessing.copies import find_copies, find_copies_in
from sources import read_table
from sources.disk import join_on_disk, memory, on_disk, take_rows, to_disk


def count_files(monkeypatch) -> list[int]:
    """Return a list that gets the size of each file that is made from now on."""
    made, make = [], sources.disk.temporary_file
    monkeypatch.setattr(sources.disk, "temporary_file", lambda size: made.append(size) or make(size))
    return made


CELLS = st.one_of(st.none(), st.text(max_size=8))


@pytest.fixture
def little_memory(monkeypatch):
    for module in ("sources.disk", "sources.tables"):
        monkeypatch.setattr(f"{module}.memory", lambda: 20_000)


@given(st.lists(CELLS, min_size=1), st.lists(st.floats(allow_nan=True), min_size=1))
def test_columns_come_back_as_they_were(cells, numbers):
    for column in (pd.Series(cells, dtype="str"), pd.Series(numbers), pd.Series(numbers) > 0):
        column.name = "a b"
        again = to_disk(column)
        pd.testing.assert_series_equal(again, column)
        assert again.iloc[:1].tolist() == column.iloc[:1].tolist() or pd.isna(column.iloc[0])


def test_chunks_become_one_table(little_memory, monkeypatch):
    made = count_files(monkeypatch)
    table = make_table(500)
    chunks = [table.iloc[i : i + 60].reset_index(drop=True) for i in range(0, 500, 60)]
    joined = join_on_disk(iter(chunks))
    pd.testing.assert_frame_equal(joined, pd.concat(chunks, ignore_index=True), check_flags=False)
    assert len(made) == 9 + len(list(table))  # a file for each part, and for each column
    rows = np.random.default_rng(0).permutation(500)[:300]
    pd.testing.assert_frame_equal(take_rows(joined.copy(deep=False), rows), table.iloc[rows])
    assert join_on_disk(iter([])) is None


@pytest.mark.parametrize("target", ["binary", "regression"])
def test_a_run_from_disk_is_the_run_in_memory(tmp_path, target, monkeypatch):
    table = table_for(target, 600)
    table.loc[::50, target] = None  # rows that are left out
    for ending in ("csv", "parquet"):
        path = tmp_path / f"data.{ending}"
        table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
        data = DataConfig(data=str(path), target=target)
        in_memory = quick_run(tmp_path / f"memory-{ending}", data=data, model=ModelConfig())
        with monkeypatch.context() as patched:
            for module in ("sources.disk", "sources.tables"):
                patched.setattr(f"{module}.memory", lambda: 20_000)
            made = count_files(patched)
            from_disk = quick_run(tmp_path / f"disk-{ending}", data=data, model=ModelConfig())
        assert len(made) > 20
        found = [json.loads((run.out / "metrics.json").read_text()) for run in (in_memory, from_disk)]
        assert found[0]["weights_sha256"] == found[1]["weights_sha256"] and found[0]["test"] == found[1]["test"]
        assert in_memory.predictions.equals(from_disk.predictions)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_does_not_grow_with_the_table(tmp_path):
    """The memory of a run that is not backed by files, beyond what a tiny run takes, in both ways."""
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.normal(size=(20_000, 60)).round(4)).add_prefix("x")
    table["y"] = table["x0"] + random.normal(size=len(table))
    table.to_csv(tmp_path / "large.csv", index=False)
    table.head(200).to_csv(tmp_path / "small.csv", index=False)
    code = (
        "import sys, threading, time, sources.disk, sources.tables\n"
        "limit, path, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
        "if limit: sources.disk.memory = sources.tables.memory = lambda: limit\n"
        "peak = [0]\n"
        "def watch():\n"
        "    while True:\n"
        "        line = next(l for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        "        peak[0] = max(peak[0], int(line.split()[1]))\n"
        "        time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "sys.argv = ['train.py', '--data', path, '--target', 'y', '--model', 'mlp', '--epochs', '1', '--no-report',"
        " '--out', out]\n"
        "import train; train.main(); print('peak', peak[0])"
    )
    peaks = []
    for limit, name in ((0, "small"), (0, "large"), (20_000_000, "large")):
        line = [
            sys.executable,
            "-c",
            code,
            str(limit),
            str(tmp_path / f"{name}.csv"),
            str(tmp_path / f"{name}-{limit}"),
        ]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    small, in_memory, from_disk = peaks
    assert from_disk - small < 0.5 * (in_memory - small), peaks


def test_encoded_columns_are_on_disk_too(little_memory, monkeypatch):
    from preprocessing import Preprocessor

    records = table_for("binary", 400).drop(columns="binary")
    preprocessor, parts = Preprocessor.fit_encode(records, DataConfig())
    made = count_files(monkeypatch)
    joined = preprocessor.join(parts)["numbers"]
    assert made == [joined.nbytes]
    with_memory = torch.cat([parts[column.name] for column in preprocessor.inputs["numbers"]], dim=1)
    assert torch.equal(joined, with_memory)


def test_a_folder_of_parts_is_one_table(tmp_path):
    table = table_for("binary")
    (tmp_path / "parts").mkdir()
    table.to_csv(tmp_path / "whole.csv", index=False)
    for i in range(3):
        table.iloc[80 * i : 80 * (i + 1)].to_csv(tmp_path / "parts" / f"part-{i}.csv", index=False)
    (tmp_path / "parts" / "_SUCCESS").touch()
    pd.testing.assert_frame_equal(read_table(tmp_path / "parts"), read_table(tmp_path / "whole.csv"))
    sha = []
    for name in ("parts", "whole.csv"):
        data = DataConfig(data=str(tmp_path / name), target="binary")
        sha.append(json.loads((quick_run(tmp_path / f"run-{name}", data=data).out / "metrics.json").read_text()))
    assert sha[0]["weights_sha256"] == sha[1]["weights_sha256"]
    line = ("predict.py", "--checkpoint", tmp_path / "run-parts" / "best.pt", "--input")
    assert command(*line, tmp_path / "parts").stdout == command(*line, tmp_path / "whole.csv").stdout
    table.rename(columns={"age": "alter"}).to_csv(tmp_path / "parts" / "part-3.csv", index=False)
    refused = command("train.py", "--data", tmp_path / "parts", "--target", "binary")
    assert_refused(refused, "part-3.csv", "'age' is missing")


def test_copies_are_found_across_tables():
    table = make_table(200).drop(columns=["customer_id", "remark"])
    both = find_copies_in([table, table.iloc[:50]], DataConfig())
    assert (both[200:] == both[:50]).all() and len(np.unique(both)) == 200
    assert (find_copies(pd.concat([table, table.iloc[:50]], ignore_index=True), DataConfig()) == both).all()


def test_the_memory_is_that_of_the_process():
    assert 0 < memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))\n"
        "from sources.disk import memory; print(memory())"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) <= 3 << 30
    assert on_disk((3, 2), np.float32).shape == (3, 2)
