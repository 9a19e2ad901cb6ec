"""Which device to compute on."""

import torch


def find_device(name: str = "auto") -> torch.device:
    """
    The device that `--device` names; `auto` is this machine's accelerator, or its CPU if it has none.

    Raises:
        ValueError: if it is not a device, or this machine does not have it.
    """
    count, accelerator = 0, None
    if torch.accelerator.is_available():
        count, accelerator = torch.accelerator.device_count(), torch.accelerator.current_accelerator()
    here = accelerator or torch.device("cpu")
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
