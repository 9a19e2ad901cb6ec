"""How a run is seen: means of the losses over samples, a line of them per logged step, and a tracker that shows them.

Steps are counted from 1: what is logged at step n happened up to the n-th, and a run that goes on from step n does
step n + 1 next.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from refalign.files import new_file
from refalign_training.method.objective import Losses
from refalign_training.run.config import LogOptions


NUM_BINS = 10  # intervals of timesteps
METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"


# -- Means over samples -----------------------------------------------------------------------------------------------


class Metrics:
    """Means over the samples since the last [`collect`], each sample weighing the same whatever its micro-batch and
    process. Sums are held on the device: nothing waits for it before [`collect`].

    What [`add`] takes counts from [`commit`] on; [`discard`] forgets it, if the step turns out to be one to skip. The
    means of the alignment are named by its blocks, `layers`.
    """

    def __init__(self, layers: Sequence[int], device: torch.device | str) -> None:
        self.layers = tuple(layers)
        self.names = ["loss", "loss/diffusion", "loss/mse", "loss/alignment"]
        for low in range(0, 1000, 1000 // NUM_BINS):
            self.names.append(f"mse_by_timestep/{low:03d}-{low + 1000 // NUM_BINS:03d}")
        for name, layer in product(("cosine", "active_negatives"), self.layers):
            self.names.append(f"alignment/{name}_block_{layer}")
        # For each name the sum and the number of samples; float32, because mps has no float64
        self._sums = torch.zeros(2, len(self.names), device=device)
        self._pending = torch.zeros_like(self._sums)
        self._bins = torch.arange(NUM_BINS, device=device)

    @torch.no_grad()
    def add(self, losses: Losses, timesteps: torch.Tensor) -> None:
        """Takes the losses of a micro-batch, with or without a graph, and its timesteps `(batch,)` in [0, 1000]."""
        device = self._sums.device
        kept = losses.kept.to(device, non_blocking=True)
        has_negatives = losses.has_negatives.to(device, non_blocking=True)
        bins = (timesteps.to(device, non_blocking=True) // (1000 // NUM_BINS)).clamp(0, NUM_BINS - 1)
        blocks = torch.zeros(len(kept), len(self.layers), device=device)
        columns = [  # values and whom they count for, each of shape (batch, names)
            (torch.stack((losses.total, losses.diffusion, losses.mse), 1), torch.ones_like(kept)[:, None]),
            (losses.alignment[:, None], kept[:, None]),
            (losses.mse[:, None], bins[:, None] == self._bins),
            (blocks if losses.cosine is None else losses.cosine, kept[:, None]),
            (blocks if losses.active_negatives is None else losses.active_negatives, has_negatives[:, None]),
        ]
        pairs = [torch.broadcast_tensors(*pair) for pair in columns]
        values, masks = (torch.cat(tensors, 1) for tensors in zip(*pairs, strict=True))
        # `where`, not a product: what does not count may be anything, nan too
        self._pending[0] += torch.where(masks, values, 0).sum(0)
        self._pending[1] += masks.sum(0)

    def commit(self) -> None:
        self._sums += self._pending
        self.discard()

    def discard(self) -> None:
        self._pending.zero_()

    def collect(self, all_reduce: Callable[[torch.Tensor], Any]) -> dict[str, float]:
        """The means of what was committed since the last call. The only method that waits for the device.

        Args:
            all_reduce (`Callable`): sums a flat float32 tensor over all processes, in place.

        Returns:
            `dict`: `loss`, `loss/diffusion`, `loss/mse`; `loss/alignment`, `alignment/cosine` and
            `alignment/active_negatives`, of samples with references (and more than one subject), also for each block;
            `mse_by_timestep/300-400`, of samples at such timesteps. What no sample counts for is left out.
        """
        flat = self._sums.flatten()
        all_reduce(flat)
        sums, counts = flat.view_as(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        means = {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}
        for name in ("alignment/cosine", "alignment/active_negatives"):
            blocks = [value for key, value in means.items() if key.startswith(f"{name}_block_")]
            if blocks:
                means[name] = math.fsum(blocks) / len(blocks)
        return means


# -- The bar ----------------------------------------------------------------------------------------------------------


class Bar(tqdm):
    """Counts a run's steps, and shows the newest of a few numbers."""

    SHOWN = {"loss": "loss", "loss/alignment": "alignment", "validation/mse": "validation"}

    def __init__(self, name: str, steps: int, done: int, is_hidden: bool) -> None:
        super().__init__(desc=name, total=steps, initial=done, unit="step", smoothing=0.05, disable=is_hidden)
        self.newest: dict[str, str] = {}

    def tell(self, values: Mapping[str, float]) -> None:
        """Takes the numbers that a step or a validation has logged."""
        for name, shown in self.SHOWN.items():
            if name in values:
                self.newest[shown] = f"{values[name]:.4f}"
        self.set_postfix(self.newest, refresh=False)


# -- A run's log ------------------------------------------------------------------------------------------------------


class RunLog:
    """Where the main process writes the run's numbers: `metrics.jsonl` in the run's folder, and a tracker, which shows
    all options by their dotted names. `step` is the last one that is done: what lies beyond is removed.

    Raises:
        ValueError: if the tracker is not installed, or a file in the folder is damaged.
    """

    def __init__(self, folder: Path, options: LogOptions, run_options: Mapping[str, Any], step: int) -> None:
        check_tracker(options.tracker)
        self.folder = folder
        for name in (METRICS_FILE, SKIPPED_FILE):
            _drop_beyond(self.folder / name, step)
        self._tracker = _start_tracker(self.folder, options, run_options, step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes the numbers of a step. Those that are not finite are null in the file, so that it stays JSON."""
        line: dict[str, float | None] = {"step": step}
        for name, value in values.items():
            line[name] = float(value) if math.isfinite(value) else None
        _append(self.folder / METRICS_FILE, line)
        if self._tracker is not None:
            self._tracker.log(dict(values), step=step)

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Shows images by their names, if the tracker can: tensorboard and wandb."""
        if hasattr(self._tracker, "log_images"):
            shape = {"dataformats": "NHWC"} if self._tracker.name == "tensorboard" else {}
            for name, image in images.items():
                pixels = np.asarray(image.convert("RGB"))[None]
                self._tracker.log_images({name: pixels}, step=step, **shape)

    def finish(self) -> None:
        """Closes the tracker."""
        if self._tracker is not None:
            self._tracker.finish()


def check_tracker(name: str) -> None:
    """Raises ValueError if a tracker's package is not installed."""
    # Without an origin it is only a folder of that name, such as wandb leaves where it ran
    if name != "none" and getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise ValueError(f"log.tracker is {name}, which is not installed. `pip install {name}`, or choose another.")


def append_skipped(folder: Path, step: int, ids: Iterable[str], reason: str) -> None:
    """Writes the samples that a step left out, or all of a step that was skipped, into `skipped.jsonl`."""
    _append(folder / SKIPPED_FILE, {"step": step, "ids": list(ids), "reason": reason})


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last one that a killed process left half. Raises ValueError if the
    file cannot be read, or another line is damaged."""
    try:
        lines = Path(file).read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is damaged ({error}). Remove the line.") from None
    return read


def _drop_beyond(file: Path, step: int) -> None:
    if file.exists():
        lines = [line for line in read_metrics(file) if line["step"] <= step]
        with new_file(file, overwrite=True) as partial:
            _append(partial, *lines)


def _append(file: Path, *lines: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        for line in lines:
            opened.write(json.dumps(line, allow_nan=False) + "\n")


def _start_tracker(folder: Path, options: LogOptions, run_options: Mapping[str, Any], step: int) -> Any:
    """accelerate's tracker, started, or None. It shows the options and nothing of an earlier run beyond the step."""
    if options.tracker == "none":
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_class = LOGGER_TYPE_TO_CLASS[options.tracker]
    if options.tracker == "tensorboard":
        tracker = tracker_class("logs", folder, purge_step=step + 1)
    else:
        # A run of its own each time, beside the earlier ones: wandb takes no step twice
        name = folder.resolve().name
        place = {"dir": str(folder)} if options.tracker == "wandb" else {}
        tracker = tracker_class(options.project, name=f"{name}-from-{step}" if step else name, group=name, **place)
    tracker.start()
    if options.tracker == "tensorboard":
        # As text, indented so that it stays verbatim: `store_init_configuration` makes a folder named by the time
        text = "\n".join(f"    {name}: {value}" for name, value in run_options.items())
        tracker.log({"options": text}, step=step)
    else:
        tracker.store_init_configuration(dict(run_options))
    return tracker
