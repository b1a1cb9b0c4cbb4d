"""Join the processes that torchrun starts, and end them together: one message, whatever went wrong.

Standard library only: without torchrun, a command does not import torch for it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta

from errors import UserError

# A process that ends is noticed at once, by the others and by torchrun. This limit is only for one that hangs: reading
# and preparing the data may take the first process much longer than the others.
TIMEOUT = timedelta(hours=24)
LAST_WORDS = timedelta(minutes=10)  # in which the first process reports that it has saved


def is_launched() -> bool:
    """Return whether torchrun has started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def refuse_if_launched(flag: str) -> None:
    """Raise UserError if `flag` is given under torchrun, which it does not support."""
    if is_launched():
        raise UserError(f"{flag}: not under torchrun: run it in one process.")


def restarted_from(out: str) -> str:
    """Return the last.pt in `out` if torchrun has restarted this run after a failure (--max-restarts), else ""."""
    if not out or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    from scaling.processes import from_main

    last = os.path.join(out, "last.pt")
    return last if from_main(os.path.exists, last) else ""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect this process with the others of the run; without torchrun do nothing.

    Only the first process prints. If several processes fail, as they do for the same bad data, one of them raises its
    UserError and the others exit quietly, with the same code.
    """
    if not is_launched():
        yield
        return
    import torch.distributed as dist

    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        # After a restart torchrun keeps the store, with the addresses and the last words of the processes before.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # By default torch takes gloo for tensors on the CPU, and nccl for those on a GPU.
        dist.init_process_group(store=dist.PrefixStore("run", store), rank=rank, world_size=count, timeout=TIMEOUT)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"torchrun: the processes cannot reach each other ({reason}).") from None
    try:
        with _quiet() if rank else contextlib.nullcontext():
            yield
    except UserError:
        if not _is_first_to_stop(store):
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        if not _has_last_words(store, rank):
            sys.exit(130)
        raise


def _is_first_to_stop(store) -> bool:
    """Return whether no other process has stopped before. From here on torchrun, which stops all processes as soon as
    one has ended, cannot stop the one that reports."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return store.add("stopped", 1) == 1
    except RuntimeError:  # the first process has kept the store, and has ended
        return True


def _has_last_words(store, rank: int) -> bool:
    """Return whether this process reports an interruption: the first one, which has saved the run. The others wait
    until torchrun cannot stop it any more."""
    if rank:
        with contextlib.suppress(RuntimeError):
            store.wait(["interrupted"], LAST_WORDS)
        return False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as above
    store.set("interrupted", "")
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Print nothing. What the interpreter reports after the block, such as a traceback, is printed."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
