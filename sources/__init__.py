"""Where records come from: tables, folders, a service's log, standard input and bundled examples."""

from sources.bundled import load_bundled
from sources.encodings import is_gzip, open_unpacked
from sources.folders import read_folder, split_folders
from sources.layout import FILE, FORMATS, IMAGE_ENDINGS, LABEL, TEXT_ENDINGS, Layout, file_format
from sources.request_log import log_kinds, read_log
from sources.tables import read_chunks, read_records, read_table, resolve_paths, standard_input

__all__ = [
    "FILE", "FORMATS", "IMAGE_ENDINGS", "LABEL", "TEXT_ENDINGS", "Layout", "file_format", "is_gzip", "load_bundled",
    "log_kinds", "open_unpacked", "read_chunks", "read_folder", "read_log", "read_records", "read_table",
    "resolve_paths", "split_folders", "standard_input",
]  # fmt: skip
