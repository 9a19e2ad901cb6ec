"""A dataset as a run's configuration names it, and all its samples in order. Imports nothing heavy at the top."""

import hashlib
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from refalign_training.bounds import Many, Options
from refalign_training.data.fields import Unusable
from refalign_training.data.recipe import SelectionRule
from refalign_training.data.sample import Fault, Place, Sample


Format = Literal["opens2v", "phantom", "table", "folder", "samples"]
Paths = Annotated[tuple[Path, ...], Many]


@dataclass(frozen=True)
class Source(Options):
    """A dataset: what format it has, and where it is."""

    data: Format
    """The format of the dataset: OpenS2V-5M, Phantom-Data, a table or a folder of your own, or samples that
    `refalign-train check --write` wrote."""
    annotations: Paths = ()
    """The annotation files. For opens2v they are Jsons/mask_and_bbox/total_part*.json, full or high quality; for
    phantom .parquet files; for table .jsonl, .json, .csv, .tsv or .parquet files with the columns video, prompt and
    references; for samples JSONL files. A folder has none."""
    videos: Path | None = None
    """The folder that all paths of the annotations start from. For opens2v it holds total_part1, total_part2, ...;
    for phantom the mp4 files of Koala-36M; for folder it is the dataset itself. For table and samples it is each
    annotation file's own folder by default."""
    cross_pairs: Paths = ()
    """Lists of pairs (Jsons/cross_video_pairs) for references from other clips of a subject. Only for opens2v."""
    rule: SelectionRule = field(default_factory=SelectionRule)
    """The rule that selects which subjects become references."""


@dataclass(frozen=True)
class Dataset(Source):
    """The dataset, which not every command needs."""

    data: Format | None = None


def read_source(source: Source) -> Iterator[Sample | Fault]:
    """
    The samples of a dataset, in its order and with ids that come once, and what is wrong in it. Memory does not grow
    with the dataset.

    Raises:
        ValueError: at once, if something that the format needs is missing, or something it has no use for is given.
    """
    check_source(source)
    return _drop_duplicates(_read(source))


def check_source(source: Source) -> None:
    """Raises ValueError if something that the format needs is missing, or something it has no use for is given."""
    needs_annotations, needs_videos = source.data != "folder", source.data in ("opens2v", "phantom", "folder")
    if needs_annotations and not source.annotations:
        raise ValueError(f"Data of the format {source.data!r} need annotation files; pass --annotations.")
    if source.annotations and not needs_annotations:
        raise ValueError(f"A folder has no annotation files, but --annotations are given: {source.annotations[0]}.")
    if needs_videos and source.videos is None:
        raise ValueError(f"Data of the format {source.data!r} need the folder of the videos; pass --videos.")
    if source.cross_pairs and source.data != "opens2v":
        raise ValueError(f"--cross-pairs are OpenS2V-5M's; data of the format {source.data!r} have none of their own.")
    if source.videos is not None and not source.videos.is_dir():
        raise ValueError(f"There is no folder {source.videos}; check --videos.")


def _read(source: Source) -> Iterator[Sample | Fault]:
    from refalign_training.data.folder import read_folder
    from refalign_training.data.opens2v import read_opens2v
    from refalign_training.data.phantom import read_phantom
    from refalign_training.data.sample_files import read_samples_file
    from refalign_training.data.table import read_table

    match source.data, source.videos:
        case "opens2v", Path() as videos:
            return read_opens2v(source.annotations, videos, source.cross_pairs, source.rule)
        case "phantom", Path() as videos:
            return read_phantom(source.annotations, videos, source.rule)
        case "folder", Path() as videos:
            return read_folder(videos, source.rule)
        case "table", videos:
            return read_table(source.annotations, videos, source.rule)
        case "samples", videos:
            return read_samples_file(source.annotations, videos)
    raise ValueError(f"--data is {source.data!r}; it must be opens2v, phantom, table, folder or samples.")


def _drop_duplicates(items: Iterator[Sample | Fault]) -> Iterator[Sample | Fault]:
    # 8 bytes per id on disk: a set of five million takes 0.4 GB of memory. Two of them collide once in a million runs
    with (
        tempfile.TemporaryDirectory(prefix="refalign-ids-") as folder,
        closing(sqlite3.connect(Path(folder) / "ids", check_same_thread=False)) as database,
    ):
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -32000;")
        database.execute("CREATE TABLE seen (digest INTEGER PRIMARY KEY)")
        for item in items:
            if isinstance(item, Sample):
                digest = hashlib.blake2b(item.id.encode(), digest_size=8).digest()
                values = (int.from_bytes(digest, "big", signed=True),)
                if not database.execute("INSERT OR IGNORE INTO seen VALUES (?)", values).rowcount:
                    error = Unusable("duplicate id", f"{item.id} came before")
                    item = Place(item.source, item.row, item.id).fault(error)
            yield item
