"""Errors that a user can fix: the exceptions, and a flag parser that reports in one line."""

import contextlib
import difflib
import errno
import io
import re
from collections.abc import Iterable

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what writing to a full disk raises


class UserError(ValueError):
    """Bad input. The message is one line that names the file, row, column or flag and says what to do."""


class BrokenRecords(UserError):
    """Some records cannot be read.

    messages: position of the record, counted from 0 → what is wrong with it. The first one is the error's message.
    """

    def __init__(self, messages: dict[int, str]):
        self.messages = dict(sorted(messages.items()))
        super().__init__(next(iter(self.messages.values())))


def disk_is_full(error: BaseException | None) -> str:
    """Return what the system says about the full disk that caused an error; "" if it has another cause."""
    while error and getattr(error, "errno", None) not in FULL:
        error = error.__cause__ or error.__context__
    return error.strerror if error else ""


def did_you_mean(name: str, names: Iterable[str], everything: Iterable[str] = ()) -> str:
    """Return " Did you mean 'x'?" for the closest of `names`; without a close one, list `everything` (or `names`)."""
    names = [str(n) for n in names]
    folded = {n.casefold(): n for n in names}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {folded[near[0]]!r}?"
    names = [str(n) for n in everything] or names
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f" Available: {shown or 'nothing'}."


@contextlib.contextmanager
def error_prefix(source: str):
    """Prefix the message of a UserError with the name of the file that it comes from, unless it begins with it."""

    def prefixed(message: str) -> str:
        return message if message.startswith((f"{source}:", f"{source.rstrip('/')}/")) else f"{source}: {message}"

    try:
        yield
    except BrokenRecords as error:
        raise BrokenRecords({row: prefixed(message) for row, message in error.messages.items()}) from None
    except UserError as error:
        raise UserError(prefixed(str(error))) from None


def parse_flags(config: type, *, description: str, default=None):
    """Parse the command line into a `config` dataclass with tyro. Raises UserError, in one line, for a wrong flag.

    tyro prints errors in a box of many lines; in a terminal and in a script's log one sentence is easier to read.
    """
    import tyro

    box = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, description=description, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    text = " ".join(re.sub(r"[─-╿]", " ", box.getvalue()).split())
    raise UserError(_one_sentence(text))


def _one_sentence(text: str) -> str:
    """Reduce a tyro error report to one sentence and the flags that it suggests."""
    text = re.split(r"For full helptext|Argument helptext", text)[0]
    if text.startswith("Required options"):
        return f"required: {', '.join(re.findall(r'(--[a-z-]+) [A-Z]', text))}. See --help."
    wrong, _, meant = text.partition("Perhaps you meant:")
    if meant:
        near = ", ".join(dict.fromkeys(re.findall(r"--[a-z-]+(?= [A-Z\[{]|, --no)", meant)))
        text = f"{wrong.strip()}. Did you mean {near}?" if near else wrong
    text = re.sub(r"^(Value error|Unrecognized options|Invalid choice) (?=[A-Za-z])", "", text)
    if "Could not find valid parse" in text:
        text = f"{text.strip()} (separate several values with spaces)."
    if missing := re.search(r"Missing value for argument '(--[a-z-]+)'", text):
        return f"{missing[1]} needs a value. See --help."
    text = re.sub(r"^Error parsing ((?!--)\S+: )?", "", text).strip()
    return f"{text} See --help." if text.endswith((".", "?")) else f"{text}. See --help."
