"""Files: where records come from (tables, folders, a log, standard input, examples) and go to; reading checkpoints."""

from sources.bundled import load_bundled
from sources.encodings import is_gzip, open_unpacked
from sources.folders import read_folder, split_folders
from sources.layout import AS_WRITTEN, FILE, FORMATS, IMAGE_ENDINGS, LABEL, TEXT_ENDINGS, Layout, file_format
from sources.request_log import log_kinds, read_log
from sources.tables import read_chunks, read_records, read_table, resolve_paths, separator_of, standard_input
from sources.writer import Writer, whole_again

__all__ = [
    "AS_WRITTEN", "FILE", "FORMATS", "IMAGE_ENDINGS", "LABEL", "TEXT_ENDINGS", "Layout", "Writer", "file_format",
    "is_gzip", "load_bundled", "log_kinds", "open_unpacked", "read_chunks", "read_folder", "read_log",
    "read_records", "read_table", "resolve_paths", "separator_of", "split_folders", "standard_input", "whole_again",
]  # fmt: skip
