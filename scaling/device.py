"""Where and how tensors are computed: the device, mixed precision, determinism, records on the device."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from errors import UserError
from scaling import processes

SUM_DTYPES = {"mps": torch.float32}  # dtype of loss sums on devices without float64
DEVICE_SHARE = 0.4  # of the free memory of a GPU that encoded records may take; the network needs the rest


def choose_device(name: str) -> torch.device:
    """Return the torch device called `name`; auto is cuda, mps or cpu. Each process of a machine has its own GPU.

    Raises UserError for a device that is not there, or that several processes cannot share.
    """
    several = processes.count() > 1
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if several and name not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: several processes need --device cuda, one GPU for each, or --device cpu.")
    if several and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available on this machine or in this build of torch.") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def mixed_precision(device: torch.device, amp: bool) -> tuple[AbstractContextManager, torch.amp.GradScaler]:
    """Return the autocast context and the gradient scaler of a training; without `amp` both do nothing.

    bfloat16 where the device computes in it, else float16, whose small gradients become zero without the scaler.
    """
    if not amp:
        return nullcontext(), torch.amp.GradScaler(device.type, enabled=False)
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        print("--amp: this CPU does not compute in bfloat16 (AMX), so it is many times slower", flush=True)
    needs_scaler = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float16 if needs_scaler else torch.bfloat16
    return torch.autocast(device.type, dtype), torch.amp.GradScaler(device.type, enabled=needs_scaler)


def be_deterministic() -> None:
    """Let torch use only operations that give the same bits each time; those that cannot raise an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_process() -> int:
    """Return the threads that a large network uses: torch's default, or this process's share of the cores.

    torchrun sets OMP_NUM_THREADS=1, so torch's default says nothing there.
    """
    if processes.count() == 1:
        return torch.get_num_threads()
    return max(1, count_cores() // int(os.environ["LOCAL_WORLD_SIZE"]))


# ---------------------------------------------------------------- encoded records


def keep_on_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of encoded records that stay on a GPU: all, if they fit in DEVICE_SHARE of its free memory.

    Token ids of texts, which are padded batch by batch on the CPU, stay there.
    """
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    if device.type != "cuda" or size > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return {}
    return {name: x.to(device) for name, x in tensors.items()}


def move(x: Tensor, device: torch.device) -> Tensor:
    """Return a batch on the device. A GPU copies it from pinned memory, while the CPU goes on."""
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)
