"""Everything about x: raw cells → tensors, one file per kind of column, fitted on the training split alone."""

from preprocessing.column import Column
from preprocessing.infer import KINDS, infer_kind
from preprocessing.preprocessor import Preprocessor, as_frame, gather

__all__ = ["KINDS", "Column", "Preprocessor", "as_frame", "gather", "infer_kind"]
