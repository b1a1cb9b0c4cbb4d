"""The project keeps its own rules: who imports whom, how long things are, and that the README is true."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import ROOT, command, table_for

from config import model_names
from model import MODELS

# Who may import whom: a module may import its own layer's folder and everything in the layers before it.
LAYERS = (
    {"errors", "config", "console"},
    {"scaling"},
    {"sources", "preprocessing", "task"},
    {"backbones", "model"},
    {"dataloader", "pipeline", "progress"},
    {"trainer", "evaluation", "serving"},
    {"search"},
    {"train", "predict", "serve", "compare", "export", "tune"},
)
SPINE = {"config", "dataloader", "model", "task", "trainer", "pipeline", "errors", "progress"}
MODULES = set().union(*LAYERS)
FILES = sorted([*ROOT.glob("*.py"), *(path for name in MODULES for path in (ROOT / name).glob("*.py"))])


def room(path) -> str:
    """The top-level module or folder that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_who_may_import_whom(path):
    """Imports go down the layers; in the same layer to the own folder, and from there on along the flow of the data:
    sources → preprocessing → task, dataloader and pipeline next to each other, progress below the trainer."""
    own = next(i for i, layer in enumerate(LAYERS) if room(path) in layer)
    allowed = set().union(*LAYERS[:own]) | {room(path)}
    allowed |= {
        "errors": set(),
        "config": {"errors"},
        "console": {"errors"},
        "preprocessing": {"sources"},
        "task": {"preprocessing"},
        "serving": {"evaluation"},
        "tune": {"train"},  # which trains the winner
    }.get(room(path), set())
    if room(path) == "sources":
        modules = re.findall(r"from (preprocessing[.\w]*) import", path.read_text())
        assert set(modules) <= {"preprocessing.parsing"}
        allowed |= {"preprocessing"}
    if room(path) == "model":
        allowed |= {"backbones"}
    assert imports(path) & MODULES <= allowed
    if room(path) in SPINE:
        assert not imports(path) & {"evaluation", "serving"}
    if room(path) in ("config", "errors"):
        assert imports(path) - MODULES - {"tyro"} <= set(sys.stdlib_module_names)
    if room(path) in ("predict", "serve", "serving"):
        assert not imports(path) & {"sklearn", "torchmetrics", "trainer"}


def test_the_spine_stays_short():
    """What a learner reads in one sitting: the top level."""
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    names = SPINE | {"console", "train", "predict"}
    spine = sum(count for name, count in lines.items() if name.removesuffix(".py") in names)
    assert spine <= 3000, lines


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_prediction_needs_neither_scikit_learn_nor_torchmetrics(runs):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline import Pipeline\n"
        f"import pandas as pd; out = {str(runs['binary'].out)!r}\n"
        "pipeline, rows = Pipeline.load(out + '/best.pt'), pd.read_csv(out + '/sample.csv')\n"
        "pipeline.predict(rows)\n"
        "sys.modules['torchmetrics'] = None  # not in the container: no metrics, and no traceback\n"
        "from evaluation.summary import Score; score = Score(pipeline.task)\n"
        "score.add(pipeline.predict_logits(rows)[1], rows.assign(**{pipeline.task.target: pipeline.task.classes[0]}))\n"
        "assert 'torchmetrics' in score.problem; del sys.modules['torchmetrics']\n"
        "assert not {'sklearn', 'torchmetrics', 'trainer', 'tensorboard'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_networks_are_read_without_torch():
    assert model_names() == list(MODELS)


def test_the_container_holds_all_that_serving_needs():
    """Docker copies each module that serve.py and predict.py import, and installs the pinned versions."""
    copy = (ROOT / "Dockerfile").read_text().split("WORKDIR /app")[1].split("RUN")[0]
    copied = {name.removesuffix(".py").strip("/") for name in re.findall(r"[\w/]+(?:\.py)?", copy)}
    needed, waiting = set(), ["serve", "predict"]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            files = (ROOT / name).glob("*.py") if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]
            waiting += set().union(*map(imports, files)) & MODULES
    assert needed <= copied and (ROOT / "serving" / "page.html").exists()
    context = (ROOT / ".dockerignore").read_text().splitlines()
    assert all(f"!{name}" in context for name in needed if (ROOT / name).is_dir())
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    small = [line for line in (ROOT / "requirements-serve.txt").read_text().splitlines() if "==" in line]
    assert small and set(small) <= set(pins)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="the health check reads /proc")
@pytest.mark.parametrize("flag", [[], ["--port"], ["--port="]])
def test_the_health_check_follows_the_port(runs, flag):
    """Dockerfile's entry point and health check, with this process's number instead of 1."""
    lines = dict(re.findall(r"^(?:    )?(ENTRYPOINT|CMD) (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    check = json.loads(re.findall(r"^    CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    given = [flag[0] + port] if flag == ["--port="] else [*flag, *([port] if flag else [])]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PORT": "1" if flag else port}
    start = [*json.loads(lines["ENTRYPOINT"]), "--checkpoint", str(runs["binary"].out / "best.pt"), *given]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    service = subprocess.Popen(start, cwd=ROOT, env=env, **pipes)
    try:
        assert f"at http://0.0.0.0:{port}" in service.stdout.readline()
        check[-1] = check[-1].replace("/proc/1/", f"/proc/{service.pid}/")
        healthy = subprocess.run(check, env=env, capture_output=True, text=True, check=False)
        assert healthy.returncode == 0, healthy.stderr
    finally:
        service.kill()
        warning = service.communicate()[1]
    assert warning.count("\n") == 1 and "--host 0.0.0.0 without an API key" in warning


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_every_command_in_the_readme_runs(tmp_path):
    """Every block, line by line, in a copy of the project with a table.csv of a user's.

    The first command and those with pipes run in a shell, as they are; others are forks (see forks.py).
    """
    for path in [*FILES, *ROOT.glob("*.txt"), *ROOT.glob("*/*.html")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    table_for("regression", 150).rename(columns={"regression": "price"}).to_csv(tmp_path / "table.csv", index=False)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = {"cwd": tmp_path, "text": True, "env": os.environ | {"PATH": path}}
    ports = {}
    for port in ("8000", "8001", "8002"):  # they may be taken on this machine
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports[port] = str(free.getsockname()[1])
    ran, served, last_id = [], [], ""
    try:
        for block in readme_blocks("bash"):
            block = re.sub(r"\b800[0-2]\b", lambda port: ports[port[0]], block.replace("\\\n", " "))
            for line in block.splitlines():
                line = line.removeprefix("pip install -r requirements.txt && ")
                if line.startswith("python serve.py"):
                    served.append(forks.Popen(line.split()[1:], stdout=subprocess.PIPE, **options))
                    assert f"at http://127.0.0.1:{line.split('--port ')[1].split()[0]}" in served[-1].stdout.readline()
                elif re.search(r"(^|\| )python (train|tune|predict|compare|export)\.py|^(curl|cp) ", line):
                    if line.startswith("curl") and not shutil.which("curl"):
                        continue
                    line = line.replace("curl -s", "curl -sf")  # what is no answer is an error
                    line = line.replace("THE_ID", last_id).replace("--trials 30", "--trials 2 --epochs 2")
                    if ran and re.fullmatch(r"python [\w./ =-]+", line):
                        _, script, *flags = line.split()
                        done = command(tmp_path / script, *flags, cwd=tmp_path)
                    else:
                        done = subprocess.run(["bash", "-c", line], capture_output=True, **options)
                    assert done.returncode == 0, f"{line}\n{done.stderr}"
                    ran.append(line)
                    if "/predict -" in line:
                        answer = json.loads(done.stdout)
                        assert answer["predictions"], line
                        last_id = answer["id"]
                    if "/feedback" in line:
                        assert json.loads(done.stdout) == {"kept": 1}
    finally:
        for process in served:
            process.kill()
            process.communicate()
    assert len(ran) >= 5 and len(served) == 3
    for block in readme_blocks("python"):
        done = command("-c", block, cwd=tmp_path)
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
