"""What a user can mend: one exception, its one-line report, and the flag parser that speaks the same way."""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names the file, row, column or flag and says what to do."""


def did_you_mean(name: str, names: Iterable[str], everything: Iterable[str] = ()) -> str:
    """Return " Did you mean 'x'?" for the nearest of `names`, or else the list of `everything` (or of `names`)."""
    names = [str(n) for n in names]
    folded = {n.casefold(): n for n in names}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {folded[near[0]]!r}?"
    names = [str(n) for n in everything] or names
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f" There is: {shown or 'nothing'}."


@contextlib.contextmanager
def naming(source: str):
    """Put the file's name before the message of a UserError that comes from its rows."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def parse_flags(config: type, *, description: str, default=None):
    """Turn the command line into a `config` dataclass with tyro; raise UserError in one line where it is wrong.

    tyro reports in a box over many lines; a user's terminal and a script's log both want the sentence alone.
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
    """Keep of a tyro report what is wrong and the flags that it names."""
    text = re.split(r"For full helptext|Argument helptext", text)[0]
    if text.startswith("Required options"):
        return f"needed: {', '.join(re.findall(r'(--[a-z-]+) [A-Z]', text))}. See --help."
    wrong, _, meant = text.partition("Perhaps you meant:")
    if meant:
        near = ", ".join(dict.fromkeys(re.findall(r"--[a-z-]+(?= [A-Z\[{]|, --no)", meant)))
        text = f"{wrong.strip()}. Did you mean {near}?" if near else wrong
    text = re.sub(r"^(Value error|Unrecognized options|Invalid choice) (?=[A-Za-z])", "", text)
    if "Could not find valid parse" in text:
        text = f"{text.strip()} (several values are parted by spaces)."
    text = re.sub(r"^Error parsing ((?!--)\S+: )?", "", text).strip()
    return f"{text} See --help." if text.endswith((".", "?")) else f"{text}. See --help."


def run(command: Callable[[], None]) -> None:
    """Run a command and exit: 0 done, 2 bad input (one line on standard error), 130 interrupted.

    Anything else is a bug and keeps its traceback.
    """
    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(stop.args[0] if stop.args else "interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `predict.py --output - | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
