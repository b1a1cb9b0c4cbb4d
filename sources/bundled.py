"""Example data that is on every machine: scikit-learn's tables and digits, and the docstrings of Python's library."""

import ast
import io
import sysconfig
from pathlib import Path

import numpy as np
import pandas as pd

from errors import UserError
from sources.layout import FILE, LABEL

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")


def load_bundled(name: str) -> tuple[pd.DataFrame, str, dict[str, str]]:
    """Return the records of an example, the name of its target, and the kinds of the columns that need one."""
    if name == "digits":
        return _load_digits(), LABEL, {FILE: "image"}
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


def _load_digits() -> pd.DataFrame:
    """Return scikit-learn's 1,797 digits, by class, as the bytes of png files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, files = load_digits(), []
    order = np.argsort(digits.target, kind="stable")
    for pixels in (digits.images[order] * 255 / 16).round().astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    index = pd.RangeIndex(1, len(files) + 1, name="row")
    return pd.DataFrame({FILE: files, LABEL: digits.target[order].astype(str)}, index=index)


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
