"""Random numbers of a run: what each stream follows from, and the state of the generators."""

import numpy as np
import torch
from torch import Tensor

from scaling import processes


def seed_weights(seed: int) -> None:
    """Seed torch for the initial weights, with a random stream that no epoch uses."""
    seed_all(seed, epoch=-1)


def seed_all(seed: int, epoch: int, *more: int) -> None:
    """Seed torch for an epoch, counted from 0: order, dropout and augmentation follow from (seed, epoch).

    more: what else a stream follows from, counted from 1, because zeros at the end do not change it.
    """
    # torch's CPU generator takes 32 bits only, so all numbers are mixed into them
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch + 1, *more]).generate_state(1)[0]))


def seed_batch(seed: int, epoch: int, batch: int) -> None:
    """With several processes, give each its own dropout and augmentation. They follow from (seed, epoch, batch, rank),
    so that a resumed run needs no generator state, and any number of processes can continue it."""
    if processes.count() > 1:
        seed_all(seed, epoch, batch + 1, processes.rank() + 1)


def generator_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state(device)
    return states


def set_generator_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[device.type], device)
