"""Which device to compute on, and which share of the work is this process's."""

import os

import torch


def rank_and_processes() -> tuple[int, int]:
    """Which process this is, from 0, and of how many, as torchrun and accelerate say it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def find_device(name: str = "auto") -> torch.device:
    """
    The device that `--device` names; `auto` is this machine's accelerator, or its CPU if it has none. Processes that
    torchrun or accelerate started take one each.

    Raises:
        ValueError: if it is not a device, or this machine does not have it.
    """
    count, accelerator = 0, None
    if torch.accelerator.is_available():
        count, accelerator = torch.accelerator.device_count(), torch.accelerator.current_accelerator()
    here = accelerator or torch.device("cpu")
    own = os.environ.get("LOCAL_RANK")
    if own is not None and count and name in ("auto", here.type):
        name = f"{here.type}:{own}"
    if name == "auto":
        return here
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} cannot be used here: it is not a device. {error}") from None
    if device.type == "cpu":
        return device
    if device.type != here.type or (device.index or 0) >= count:
        has = f"{count} of type {here.type}" if count else "a CPU alone"
        raise ValueError(f"--device {name} cannot be used here: this machine has {has}.")
    return device
