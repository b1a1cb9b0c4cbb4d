"""Ctrl-C and SIGTERM: noted for the training loop, which saves before it stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from scaling.processes import count, total


class Interruption:
    """The signal that this process got, if any. A second signal acts at once.

    With several processes, a signal to one of them stops all after the same step: it is summed up with the losses.
    """

    def __init__(self, device: torch.device):
        self.signal = ""  # the name of the signal
        self.signals = torch.zeros((), device=device)  # of all processes
        self.is_known = False  # by all processes

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note signals for as long as the block runs, instead of what they usually do."""
        handlers = {}

        def note(number, frame):
            self.signal = signal.Signals(number).name
            if count() == 1:  # torchrun passes on what the terminal has sent to all processes already
                signal.signal(number, handlers[number])

        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.signal = ""  # a signal that was not handled came too late: the run is complete

    def total(self, loss_sum: Tensor) -> Tensor:
        """Return the sum over all processes, and count the processes that got a signal."""
        if count() == 1:
            return loss_sum
        loss_sum, signals = total(torch.stack([loss_sum, torch.full_like(loss_sum, bool(self.signal))]))
        self.signals += signals
        return loss_sum

    def look(self) -> None:
        """Learn whether any process got a signal. All processes must look at the same step; a GPU waits for it."""
        self.is_known = count() > 1 and self.signals.item() > 0

    def take(self) -> str:
        """Return what to stop for, once; "" to go on."""
        if not (self.signal if count() == 1 else self.is_known):
            return ""
        name, self.signal = self.signal or "a signal to another process", ""
        return name
