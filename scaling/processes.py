"""Compute as one of several processes: parts of records, sums and values of all processes, and batch normalisation.

In a single process each function returns what it is given, and costs nothing.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError


def count() -> int:
    """Return the number of processes that train together now."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the process that writes and prints."""
    return rank() == 0


def leave() -> None:
    """End the group: the first process goes on alone, all others exit with 0."""
    if count() > 1:
        is_done = not is_main()
        with _report_lost():
            dist.barrier()
        dist.destroy_process_group()
        if is_done:
            sys.exit()


@contextmanager
def _report_lost() -> Iterator[None]:
    """Turn what torch raises if another process has ended into one line."""
    try:
        yield
    except RuntimeError as error:
        reason = re.split(r"\. |\n", str(error).split("] ", 1)[-1])[0]
        raise UserError(
            f"another process of this run has ended, so this one stops ({reason}). To continue from the last save, use "
            "torchrun --max-restarts, or train.py --resume."
        ) from None


# ---------------------------------------------------------------- parts, sums and values


def part(x: Tensor) -> Tensor:
    """Return the rows of a batch (N, …) that this process computes: a contiguous part, of about N / count rows."""
    return x.tensor_split(count())[rank()] if count() > 1 else x


def gather(x: Tensor, rows: int) -> Tensor:
    """Undo `part`: return the rows (N, …) of all processes, in order.

    x: the rows of this process.  rows: N. The parts of a short batch differ in length, and may be empty.
    """
    if count() == 1:
        return x
    sizes = [len(each) for each in torch.empty(rows, 0).tensor_split(count())]
    padded = x.new_zeros(sizes[0], *x.shape[1:])  # the first part is never shorter than another
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    with _report_lost():
        dist.all_gather(parts, padded)
    return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])


def total(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, the same bits in each."""
    if count() == 1:
        return x
    x = x.clone()
    with _report_lost():
        dist.all_reduce(x)
    return x


def total_in_place(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over all processes, in one exchange."""
    if count() > 1:
        flat = total(torch.cat([x.flatten() for x in tensors]))
        sums = flat.split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [s.view_as(x) for s, x in zip(sums, tensors, strict=True)])


def total_of(number: int) -> int:
    """Return the sum of a whole number over all processes."""
    return int(total(torch.tensor(number)))


def from_main(function: Callable, *args):
    """Return function(*args), computed by the first process alone. A UserError is raised in all of them."""
    if count() == 1:
        return function(*args)
    found = [None, None]
    if is_main():
        try:
            found[0] = function(*args)
        except UserError as error:
            found[1] = str(error)
    with _report_lost():
        dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def gather_values(value) -> list:
    """Return a value, which must be picklable, of each process."""
    values = [value] * count()
    if count() > 1:
        with _report_lost():
            dist.all_gather_object(values, value)
    return values


def check_same(facts: Callable[[], dict]) -> None:
    """Raise UserError, in all processes, unless all have the same facts, such as hashes of their data and weights.

    facts: computes them, by name; a single process need not.
    """
    if count() == 1:
        return
    for name, values in ((name, gather_values(value)) for name, value in facts().items()):
        if any(value != values[0] for value in values):
            raise UserError(
                f"the processes do not have the same {name}: give all of them the same files, flags and versions."
            )


# ---------------------------------------------------------------- work that the processes of one machine share

_shared = False


@contextmanager
def shared_work() -> Iterator[None]:
    """In this block, all processes make the same calls, so that they can share the work by `host_part`."""
    global _shared
    _shared = count() > 1
    try:
        yield
    finally:
        _shared = False


def is_shared() -> bool:
    return _shared


def host_part(rows: int) -> range:
    """Return the rows that this process computes for all processes of its machine."""
    local, on_host = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return range(rows * local // on_host, rows * (local + 1) // on_host)


def host_file(create: Callable[[], str]) -> str:
    """Return the file that one process of this machine has created for all of them."""
    created = create() if os.environ["LOCAL_RANK"] == "0" else ""
    node = os.environ.get("GROUP_RANK", "0")
    return next(path for of, path in gather_values((node, created)) if of == node and path)


# ---------------------------------------------------------------- batch normalisation


class _Total(torch.autograd.Function):
    """The sum over all processes. Each of them depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return total(gradient.contiguous())


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of the whole batch, of which each process has a part.

    As torch.nn.SyncBatchNorm, but on CPUs as well, and for parts without rows.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:  # (N, C, …)
        if not self.training or count() == 1:
            return super().forward(x)
        dims, size = [0, *range(2, x.dim())], x.shape[1]
        rows = x.new_full((1,), x.numel() / size)
        sums = _Total.apply(torch.cat([x.float().sum(dims), x.float().square().sum(dims), rows]).to(_sum_dtype(x)))
        mean, square, n = sums[:size] / sums[-1], sums[size:-1] / sums[-1], sums[-1].detach()
        var = square - mean**2
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * n / (n - 1).clamp(min=1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        zeros = torch.zeros_like(self.running_mean)  # so that one kernel multiplies and adds
        return F.batch_norm(x, zeros, zeros + 1, scale.to(x.dtype), shift.to(x.dtype), eps=0.0)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def sync_batch_norm(model: nn.Module) -> None:
    """Let the batch normalisation of a network use the whole batch. Parameters and their names stay."""
    for module in model.modules() if count() > 1 else ():
        usual = getattr(module, "affine", False) and module.track_running_stats and module.momentum is not None
        if usual and isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            module.__class__ = SyncBatchNorm
