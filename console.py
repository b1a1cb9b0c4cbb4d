"""How a command runs: its exit code, errors in one line, and standard streams that never stop it."""

import errno
import os
import sys
from collections.abc import Callable

from errors import FULL, UserError

FAULTS = FULL | {errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}


class Output:
    """A standard stream that never stops a command: what cannot be printed is dropped.

    `buffer` raises as usual: `predict.py --output -` stops when its reader does.
    """

    def __init__(self, stream):
        self.stream, self.is_closed = stream or open(os.devnull, "w"), stream is None
        self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text) or 0

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, method: Callable, *args):
        try:
            return method(*args)
        except OSError:  # the reader of a pipe has gone, or the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run(command: Callable[[], None]) -> None:
    """Run a command and exit: 0 done, 2 bad input (one line on standard error), 130 interrupted.

    Anything else is a bug and keeps its traceback.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # closed ones: no other file may take their place
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        command()
    except UserError as error:
        _stop("error: " + " ".join(str(error).split()), 2)
    except KeyboardInterrupt as stop:
        _stop(stop.args[0] if stop.args else "interrupted", 130)
    except BrokenPipeError:  # `predict.py --output - | head`: the reader closed the pipe
        pass
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        _stop(f"error: {error.filename or 'a file or standard output'}: {error.strerror}.", 2)
    finally:
        sys.stdout.flush()


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
