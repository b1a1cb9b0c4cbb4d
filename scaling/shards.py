"""Parts of a file that is predicted by several processes or machines."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from errors import UserError
from scaling.launch import is_launched


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the records, `number` counted from 1. A part holds whole chunks of the file, as they are
    read: within a chunk, the batches and with them the last digits of a prediction could differ."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "2/8"; "" is everything. Raises UserError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text or "1/1")
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--shard takes NUMBER/COUNT, from 1/8 to 8/8, not {text!r}.")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def of_process(cls, text: str, source: str, output: str) -> "Shard":
        """Return the shard of this process under torchrun, and otherwise the one that --shard names.

        Raises UserError for files that cannot be read or written in parts.
        """
        shard = cls.parse(text)
        if is_launched():
            if text:
                raise UserError("--shard: under torchrun each process has its own part: leave out --shard.")
            if "-" in (source, output):
                raise UserError("under torchrun, --input and --output must be files.")
            shard = cls(int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"]))
        if shard.count > 1 and output.endswith(".parquet"):
            raise UserError(f"--output {output}: parts are written as csv, tsv or jsonl, which can be joined.")
        return shard

    def take(self, read: Callable[[], Iterator]) -> Iterator:
        """Return the chunks of this part. `read` starts reading; it is called twice, to count the chunks first."""
        if self.count == 1:
            return read()
        chunks = sum(1 for _ in read())
        start, end = (-(-chunks * number // self.count) for number in (self.number - 1, self.number))
        return islice(read(), start, end)  # rounded up, so that the first part, which has the header, is never empty


def part_of(output: str, number: int) -> str:
    """Return the file in which process `number`, counted from 1, writes its part: predictions.part-2.csv."""
    path = Path(output)
    return str(path.with_name(f"{path.stem}.part-{number}{path.suffix}"))


def join_parts(output: str, count: int, file) -> None:
    """Copy the parts into an open file, in order, and remove them."""
    parts = [Path(part_of(output, number)) for number in range(1, count + 1)]
    for path in parts:
        with open(path, "rb") as each:
            shutil.copyfileobj(each, file)
    for path in parts:
        path.unlink()
