"""Example data that is on every machine: scikit-learn's tables and digits, and the docstrings of Python's library."""

import ast
import contextlib
import os
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from errors import UserError
from sources.folders import read_folder
from sources.layout import LABEL

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")


def load_bundled(name: str, notes: list[str]) -> tuple[pd.DataFrame, str, dict[str, str]]:
    """Return the records of an example, the name of its target, and the kinds of the columns that need one."""
    if name == "digits":
        records, kinds = read_folder(_digits_folder(), notes)
        return records, LABEL, kinds
    if name == "docstrings":
        return _load_docstrings(), "package", {"docstring": "text"}
    return _load_table(name), "target", {}


def _load_table(name: str) -> pd.DataFrame:
    from sklearn import datasets

    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(as_frame=True, **options)
    table = bunch.frame
    if name != "diabetes":
        table["target"] = [str(bunch.target_names[i]) for i in table["target"]]
    table.index = pd.RangeIndex(1, len(table) + 1, name="row")
    return table


def _digits_folder() -> Path:
    """Write scikit-learn's 1,797 digits as png files by class, once, to the temporary folder; return where."""
    folder = Path(tempfile.gettempdir()) / "digits-as-png-1797"
    if not folder.exists():
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
                path = Path(temporary) / "digits" / str(label) / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)
            with contextlib.suppress(OSError):  # another run was faster
                os.replace(Path(temporary) / "digits", folder)
    return folder


def _load_docstrings() -> pd.DataFrame:
    """Return the docstrings in the source files beside the interpreter, and the package of each; nothing is imported.

    Raises UserError if the source files are missing.
    """
    library, rows = Path(sysconfig.get_paths()["stdlib"]), {}
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text and len(text.split()) >= 4:
                    rows.setdefault(text, package)
    if len(set(rows.values())) < len(PACKAGES):
        raise UserError(f"--data docstrings: the source files of Python's library are missing in {library}.")
    index = pd.RangeIndex(1, len(rows) + 1, name="row")
    return pd.DataFrame({"docstring": list(rows), "package": list(rows.values())}, index=index)
