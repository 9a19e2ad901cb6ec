"""
What lies in a cache's folder, and how it is written and read.

    cache.json                            what each family is made with; of those of a VAE, its latents' mean and std
    plan/000012.jsonl                     the samples of a unit, with size and time of their files
    plan/summary.json                     digests of all units; written last, so that a plan without it is none
    plan/faults.jsonl                     what was wrong with the dataset's records
    records/<family>/000012.jsonl         a done unit: a header, then a line for each sample: its items, or its failure
    items/<family>/ab/<key>.safetensors   an item; or, with --shards:
    shards/<family>/000012-0-1a2b3c.tar   items of a unit, as webdataset names them
    index/<family>.parquet                where each item lies in the shards
    empty_prompt.safetensors              the embeddings of the prompt that conditioning dropout puts for a caption
    quarantine.jsonl                      all failures and lost references, collected from the records
    locks/                                empty files that processes lock (`flock`); the kernel frees them on kill -9

An item is named by its key, the sha256 of its ingredients: whatever changes what is in it changes its name. Files are
written beside their place and renamed, so none is ever half. Records are also flushed to the disk before they are
renamed; items are not: they outlive a killed process, and after a loss of power `--verify` finds what is not whole.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refalign.files import new_file


SCHEMA = 1  # of the folder; raised when an older cache can no longer be read
FAMILIES = ("video", "references", "text", "teacher")


def canonical(value: Any) -> str:
    """The value as JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """The sha256 of the value's canonical JSON, in hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


# -- What stands in the files -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """Where an item is, and what is in it."""

    key: str
    size: int
    """In bytes, of the safetensors file."""
    crc32: int
    """The checksum of its key and tensors."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What is known beside the tensors, such as the references' subjects."""
    shard: str | None = None
    """The tar that holds it; `None`: it is a file of its own."""
    offset: int = 0
    """Of its first byte in the tar."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sample has no item in a family, or an item one reference less."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a sample in a family: an item for each variant, or a failure."""

    id: str
    files: str
    """A digest of the names, sizes and times of its files."""
    annotation: str
    """A digest of what the dataset says about it."""
    items: tuple[Item, ...] = ()
    failure: Failure | None = None

    def lost(self) -> list[Failure]:
        """Views of references that could not be read, though others could."""
        return [Failure(*lost) for item in self.items for lost in item.info.get("lost", ())]


@dataclass(frozen=True)
class Header:
    """The first line of a record: all that is needed to know whether a unit is done, and how it went."""

    plan: str
    """The digest of the unit's samples. Empty: something of the record was found broken; the unit has to be redone."""
    ingredients: Mapping[str, Any]
    """What all items of the record are made with."""
    variants: int
    computed: int = 0
    """How many of the items were computed for this record; the others were there."""
    seconds: float = 0.0
    """It took."""
    written: float = 0.0
    """In seconds since 1970."""
    items: int = 0
    size: int = 0
    """In bytes, of all items."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """How many samples failed and references were lost, by kind. Counted here, as records of millions are large."""
    crc32: int = 0
    """Of all lines below."""


@dataclass(frozen=True)
class CacheFolder:
    """The paths in a cache's folder."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "cache.json"

    @property
    def summary(self) -> Path:
        return self.root / "plan/summary.json"

    @property
    def faults(self) -> Path:
        return self.root / "plan/faults.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    @property
    def empty_prompt(self) -> Path:
        return self.root / "empty_prompt.safetensors"

    def plan(self, unit: str) -> Path:
        return self.root / "plan" / f"{unit}.jsonl"

    def records(self, family: str) -> Path:
        return self.root / "records" / family

    def record(self, family: str, unit: str) -> Path:
        return self.records(family) / f"{unit}.jsonl"

    def item(self, family: str, item: Item | str) -> Path:
        """The file that holds an item, or would hold that of a key."""
        if isinstance(item, Item) and item.shard:
            return self.shards(family) / item.shard
        key = item.key if isinstance(item, Item) else item
        return self.items(family) / key[:2] / f"{key}.safetensors"

    def items(self, family: str) -> Path:
        return self.root / "items" / family

    def shards(self, family: str) -> Path:
        return self.root / "shards" / family

    def index(self, family: str) -> Path:
        return self.root / "index" / f"{family}.parquet"

    def lock(self, *names: str) -> Path:
        return self.root.joinpath("locks", *names)

    def read_settings(self) -> dict[str, Any]:
        """The content of cache.json. ValueError if there is none, or of another schema."""
        settings = _read_json(self.settings, f"{self.root} is no cache: it has no {self.settings.name}")
        if settings.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.root} is a cache of schema {settings.get('schema')}; this version reads schema {SCHEMA}. "
                "Name another folder."
            )
        return settings

    def read_summary(self) -> dict[str, Any]:
        """The content of plan/summary.json. ValueError if there is none."""
        return _read_json(self.summary, f"The plan of {self.root} is not complete. Run `refalign-train cache` again")

    def units(self) -> dict[str, str]:
        """The names of the plan's units, each with the digest of what its samples are."""
        return {f"{number:06d}": plan for number, plan in enumerate(self.read_summary()["units"])}


def _read_json(path: Path, absent: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{absent}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and run `refalign-train cache` again.") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole, on the disk before it takes its name."""
    with new_file(path, overwrite=True) as file, file.open("w", encoding="utf-8", errors="surrogatepass") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


# -- Locks ------------------------------------------------------------------------------------------------------------


class Lock:
    """An open file whose lock this process holds until [`release`], or until it ends in whatever way."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, path: Path, shared: bool = False, wait: bool = False) -> "Lock | None":
        """The lock of that file; `None` if another holds it and `wait` is false."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


# -- Records ----------------------------------------------------------------------------------------------------------


def write_record(path: Path, header: Header, outcomes: Iterable[Outcome]) -> None:
    """Writes the record of a unit; the header's counts are made from the outcomes."""
    outcomes = list(outcomes)
    items = [item for outcome in outcomes for item in outcome.items]
    failures = Counter(outcome.failure.kind for outcome in outcomes if outcome.failure)
    failures.update(f"reference: {lost.kind}" for outcome in outcomes for lost in outcome.lost())
    body = "".join(f"{canonical(dataclasses.asdict(outcome))}\n" for outcome in outcomes)
    header = dataclasses.replace(
        header,
        items=len(items),
        size=sum(item.size for item in items),
        failures=dict(sorted(failures.items())),
        crc32=zlib.crc32(body.encode("utf-8", "surrogatepass")),
    )
    write_text(path, f"{canonical(dataclasses.asdict(header))}\n{body}")


def read_header(path: Path) -> Header | None:
    """The header of a record; `None` if there is no record, or a damaged one."""
    record = _read_record(path)
    return record and record[0]


def read_outcomes(path: Path) -> Iterator[Outcome]:
    """What became of the samples of a record; nothing if there is none, or a damaged one."""
    _, body = _read_record(path) or (None, b"")
    for line in body.decode("utf-8", "surrogatepass").split("\n")[:-1]:  # splitlines takes U+2028 for an end, too
        record = json.loads(line)
        failure = record["failure"] and Failure(**record["failure"])
        yield Outcome(**record | {"items": tuple(Item(**i) for i in record["items"]), "failure": failure})


def _read_record(path: Path) -> tuple[Header, bytes] | None:
    try:
        first, _, body = path.read_bytes().partition(b"\n")
        header = Header(**json.loads(first))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return (header, body) if zlib.crc32(body) == header.crc32 else None


def done(
    folder: CacheFolder, family: str, unit: str, plan: str, made: Mapping[str, Any], since: float | None = None
) -> Header | None:
    """The header of a unit's record, if it is up to date; with `since`, if nothing failed or it is not older."""
    header = read_header(folder.record(family, unit))
    wanted = (plan, made["ingredients"], made["variants"])
    if header is None or (header.plan, header.ingredients, header.variants) != wanted:
        return None
    return None if since and header.failures and header.written < since else header
