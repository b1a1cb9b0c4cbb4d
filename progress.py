"""Progress of a run: a bar or plain lines, history.csv, TensorBoard."""

import csv
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from errors import UserError

SHOW_SECONDS = 0.5  # between two updates of the bar: reading the loss waits for the device


class Progress:
    """Show and record the epochs of a run.

    out: the run folder, for history.csv and TensorBoard events; None records nothing.
    records: number of records per epoch.  history: rows of epochs that are already done; they are written again.
    """

    def __init__(self, out: Path | None, *, epochs: int, records: int, monitor: str, history: list[dict]):
        self.out, self.epochs, self.records, self.monitor = out, epochs, records, monitor
        self.shown_at, self.latest = 0.0, ""
        if out:
            self._open_files(out, history)
        self.bar = tqdm(
            total=records * epochs, initial=records * len(history), unit=" samples", unit_scale=True,
            dynamic_ncols=True, disable=None,
        )  # fmt: skip

    def _open_files(self, out: Path, history: list[dict]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            out.mkdir(parents=True, exist_ok=True)
            self.csv = open(out / "history.csv", "w", encoding="utf-8", newline="")
        except OSError as error:
            raise UserError(f"--out {out}: cannot create the folder or write to it ({error.strerror}).") from None
        self.board = SummaryWriter(str(out), purge_step=len(history) + 1)
        for row in history:
            self._write(row)

    def is_due(self, now: float) -> bool:
        """Return whether there is a bar and its next update is due."""
        return not self.bar.disable and now - self.shown_at >= SHOW_SECONDS

    def show(self, now: float, epoch: int, samples: int, loss: float) -> None:
        """Update the bar within an epoch, after `samples` records with mean `loss`."""
        self.shown_at = now
        self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {loss:.4f}{self.latest}", refresh=False)
        self.bar.update(epoch * self.records + samples - self.bar.n)

    def end_epoch(self, row: dict) -> None:
        """Record a row of the history. Without a bar, print about ten of the rows."""
        if self.out:
            self._write(row)
        self.latest = f", val {self.monitor} {row[f'val/{self.monitor}']:.4f}"
        if self.bar.disable and (row["epoch"] == 1 or row["epoch"] % max(1, self.epochs // 10) == 0):
            numbers = "  ".join(f"{name} {row[name]:.5g}" for name in row if "/" in name)
            print(f"epoch {row['epoch']:>4}  {numbers}  {row['samples_per_second']:,.0f} samples/s", flush=True)

    def _write(self, row: dict) -> None:
        writer = csv.DictWriter(self.csv, row.keys())
        try:
            if self.csv.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            self.csv.flush()
            for name, value in row.items():
                if name != "epoch":
                    self.board.add_scalar(name, value, row["epoch"])
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written to ({error.strerror}).") from None

    def close(self) -> None:
        self.bar.close()
        if self.out:
            with suppress(OSError):  # a full disk, which `_write` has reported
                self.csv.close()
            with suppress(OSError):
                self.board.close()
