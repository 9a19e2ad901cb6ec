"""A tiny untrained pipeline that refines, drawn clips with masks for it, and the command of a run on them."""

from pathlib import Path
from typing import Any, NamedTuple

from refalign_training.data.source import Dataset
from refalign_training.run.config import RunCommand
from tests.tiny_refine import tiny_refine_pipeline
from tests.training.opens2v_files import OpenS2VFiles, write_opens2v
from tests.training.small_run import changed, run_command


class RefineWorld(NamedTuple):
    """What is trained, and on what."""

    base: Path
    files: OpenS2VFiles

    @property
    def source(self) -> Dataset:
        files = self.files
        return Dataset(
            data="opens2v", annotations=files.annotations, videos=files.videos, cross_pairs=files.cross_pairs
        )


def refine_world(folder: Path) -> RefineWorld:
    tiny_refine_pipeline().save_pretrained(folder / "base")
    return RefineWorld(folder / "base", write_opens2v(folder / "data", clips=4))


def refine_command(folder: Path, world: RefineWorld, **changes: Any) -> RunCommand:
    """Four steps of four samples on the CPU, two at once, without a cache."""
    command = changed(
        run_command(folder, world.base, folder),
        training="full",
        steps=4,
        **{
            "objective.kind": "refine",
            "objective.no_references": 0.15,
            "alignment.weight": 0.0,
            "data.cache": None,
            "data.source": world.source,
            "checkpoints.every": 2,
            "optimizer.ema_decay": 0.9,
        },
    )
    return changed(command, **changes)
