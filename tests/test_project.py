"""The project keeps its own rules: who imports whom, how long things are, and that the README is true."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from config import model_names
from model import MODELS

ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "cells": {"errors"},
    "preprocessing": {"cells", "errors"},
    "task": {"cells", "errors"},
    "model": {"errors", "huggingface"},
    "reader": {"cells", "errors"},
    "images": {"errors", "preprocessing"},
    "huggingface": {"errors"},
    "text": {"errors", "huggingface", "preprocessing"},
    "augmentation": set(),
    "dataloader": {"augmentation", "cells", "config", "errors", "images", "preprocessing", "reader", "task", "text"},
    "pipeline": {"errors", "images", "preprocessing", "reader", "model", "task", "text"},
    "journal": {"errors"},
    "trainer": {"config", "errors", "journal"},
    "train": {
        "augmentation",
        "config",
        "dataloader",
        "drift",
        "errors",
        "huggingface",
        "images",
        "model",
        "pipeline",
        "preprocessing",
        "task",
        "text",
        "trainer",
    },
    "drift": set(),
    "runtime": {"errors", "pipeline", "preprocessing", "task"},
    "export": {"errors", "model", "pipeline", "preprocessing", "runtime"},
    "predict": {"cells", "drift", "errors", "images", "pipeline", "reader", "runtime", "text"},
    "service": {"cells", "drift", "errors", "images", "pipeline", "preprocessing", "runtime"},
    "serve": {"errors", "images", "pipeline", "predict", "preprocessing", "reader", "service"},
}
FILES = sorted(ROOT.glob("*.py"))


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_who_may_import_whom(path):
    assert imports(path) & set(ALLOWED) <= ALLOWED[path.stem]
    if path.stem in ("config", "errors"):
        assert imports(path) - set(ALLOWED) - {"tyro"} <= set(sys.stdlib_module_names)
    if path.stem == "predict":
        assert not imports(path) & {"sklearn", "torchmetrics"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_asking_a_model_needs_neither_scikit_learn_nor_torchmetrics(runs):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline import Pipeline\n"
        f"import pandas as pd; out = {str(runs['binary'].out)!r}\n"
        "pipeline, rows = Pipeline.load(out + '/best.pt'), pd.read_csv(out + '/sample.csv')\n"
        "pipeline.predict(rows)\n"
        "sys.modules['torchmetrics'] = None  # it is not in the image: no metrics, and no traceback\n"
        "from predict import Score; score = Score(pipeline.task)\n"
        "score.add(pipeline.ask(rows)[1], rows.assign(**{pipeline.task.target: pipeline.task.classes[0]}))\n"
        "assert 'torchmetrics' in score.trouble; del sys.modules['torchmetrics']\n"
        "assert not {'sklearn', 'torchmetrics', 'trainer', 'tensorboard'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_networks_are_read_without_torch():
    assert model_names() == list(MODELS)


def test_the_image_holds_all_that_serving_needs():
    """Docker copies each module that serve.py and predict.py import, and installs the pinned versions."""
    copied = set(
        re.findall(r"(\w+)\.py", (ROOT / "Dockerfile").read_text().split("\nCOPY errors.py")[1] + " errors.py")
    )
    needed, waiting = set(), ["serve", "predict"]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += imports(ROOT / f"{name}.py") & set(ALLOWED)
    assert needed <= copied and (ROOT / "page.html").exists()
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    small = [line for line in (ROOT / "requirements-serve.txt").read_text().splitlines() if "==" in line]
    assert small and set(small) <= set(pins)


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_every_command_in_the_readme_runs(tmp_path):
    """Every block, line by line, in a copy of the project with a table.csv of a user's."""
    from conftest import table_for

    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.html")]:
        (tmp_path / path.name).write_text(path.read_text())
    table_for("regression", 150).rename(columns={"regression": "price"}).to_csv(tmp_path / "table.csv", index=False)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])  # 8000 may be taken on this machine
    ran, served = 0, None
    try:
        for block in readme_blocks("bash"):
            for line in block.replace("\\\n", " ").replace("8000", port).splitlines():
                options = {"cwd": tmp_path, "text": True, "env": os.environ | {"PATH": path}}
                if line.startswith("python serve.py"):
                    served = subprocess.Popen(["bash", "-c", f"exec {line}"], stdout=subprocess.PIPE, **options)
                    assert f"answers at http://127.0.0.1:{port}" in served.stdout.readline()
                elif re.search(r"(^|\| )python (train|predict|export)\.py|^curl", line):
                    if line.startswith("curl"):
                        line = line.replace("curl -s", "curl -sf")  # what is no answer is an error
                        if not shutil.which("curl"):
                            continue
                    done = subprocess.run(["bash", "-c", line], capture_output=True, **options)
                    assert done.returncode == 0, f"{line}\n{done.stderr}"
                    ran += 1
    finally:
        if served:
            served.kill()
            served.communicate()
    assert ran >= 5 and served
    for block in readme_blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_both_readmes_say_the_same():
    """The same blocks and headings in the same order, as many table rows, and the same things named in code."""

    def skeleton(name: str) -> list:
        text = (ROOT / name).read_text()
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        headings = re.findall(r"^#+ ", prose, flags=re.MULTILINE)
        rows = re.findall(r"^\| ", prose, flags=re.MULTILINE)
        named = set(re.findall(r"`[^`]+`", " ".join(prose.split())))
        return [re.findall(r"```.*?```", text, flags=re.DOTALL), headings, len(rows), named]

    assert skeleton("README.md") == skeleton("README.ko.md")
