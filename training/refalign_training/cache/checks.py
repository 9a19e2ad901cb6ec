"""How far a cache is, whether it is whole, and what of it can go: `--status`, `--verify`, `--prune`."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from refalign.files import read_json
from refalign_training.cache.command import FAMILIES
from refalign_training.cache.holders import READERS, WRITERS, find_holders, root_lock, writing
from refalign_training.cache.items import Items, Place, text_key
from refalign_training.cache.reader import INDEX, PLAN, check_format, open_families, open_index
from refalign_training.cache.writer import write_index


def status(root: Path) -> int:
    """Prints how far the last command has come, and returns the exit code."""
    plan = _read_plan(root)
    print(f"{root}: {plan['samples']} samples.")
    for family, items in open_families(root, plan["families"]).items():
        sizes = items.sizes()
        variants = plan["families"][family]["variants"]
        wanted = plan["samples"] * variants + (family == "text")  # with the empty prompt
        failed = len(items.failures())
        print(f"{family:<10}  {len(sizes)} of {wanted} items, {failed} failed, {sum(sizes) / 1e6:,.1f} MB")
    end = "has come to its end" if _is_finished(root, plan) else "runs, or was killed: the same command goes on"
    print(f"The last `cache` command {end}.")
    return 0


def verify(root: Path) -> int:
    """
    Reads every item of the last finished command, and returns 1 if any is broken. Those are named and removed: the
    next run computes them.
    """
    header, table = open_index(root)
    families = open_families(root, header["families"])
    broken: list[str] = []
    text = families.get("text")
    if text and _is_broken(text, text.place(text_key([""])), "the empty prompt"):
        broken.append("the empty prompt")
    rows = tqdm(_rows(table), desc="verify", total=table.metadata.num_rows, unit="sample")
    with writing(root):
        write_index(root, header, _without_broken(rows, families, broken))
    print(f"{root}: {len(broken)} broken items. " + ("The next run makes them anew." if broken else "All is whole."))
    return 1 if broken else 0


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.iter_batches():
        yield from batch.to_pylist()


def _without_broken(
    rows: Iterable[dict[str, Any]], families: dict[str, Items], broken: list[str]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        for family, items in families.items():
            for place in filter(None, row[family] or ()):
                if _is_broken(items, place, f"{family} {row['id']!r}"):
                    broken.append(row["id"])
                    row[family] = None
        yield row


def _is_broken(items: Items, place: Place, name: str) -> bool:
    """Whether an item is missing, cut off, another one, not finite, or nothing but zeros, as after a loss of power."""
    reason = f"{items.path(place)} is not what was written"
    try:
        tensors = items.read(place).values()
        found = items.find(place[:16].hex())
        is_whole = all(tensor.isfinite().all() and tensor.any() for tensor in tensors)
        if is_whole and found and found[0] == place:
            return False
    except ValueError as error:
        reason = str(error)
    print(f"{name}: {reason}")
    items.remove(place)
    return True


def prune(root: Path) -> int:
    """
    Removes what the last command does not need, and returns the exit code: folders of other recipes, items of samples
    that have left the dataset, and what killed processes were writing.

    Raises:
        ValueError: if the last command has not come to its end, whose items would be lost, or another process reads or
            writes the cache.
    """
    header, table = open_index(root)
    families = open_families(root, header["families"])
    if not _is_finished(root, _read_plan(root)):
        raise ValueError(f"The last command on {root} has not come to its end. Run it to its end first.")
    with root_lock(root):
        for role, what in ((READERS, "read"), (WRITERS, "written")):
            if alive := find_holders(root, role)[0]:
                raise ValueError(f"{root} is {what} by {', '.join(alive)}. Prune it when that has ended.")
        sizes = list(map(_remove, _find_unneeded(root, families, table)))
    print(f"{root}: removed {len(sizes)} files and folders, {sum(sizes) / 1e6:,.1f} MB.")
    return 0


def _find_unneeded(root: Path, families: dict[str, Items], table: Any) -> set[Path]:
    unneeded = set(root.glob(".*")) - {root / ".lock"}
    for family in FAMILIES:
        unneeded.update(root.glob(f"{family}-*"))
    for family, items in families.items():
        keys = {text_key([""])}
        for row in _rows(table):
            for place in filter(None, row[family] or ()):
                keys.add(place[:16].hex())
        unneeded.discard(items.folder)
        unneeded.update(items.without(keys))
    return unneeded


def _read_plan(root: Path) -> dict[str, Any]:
    check_format(root)
    if not (root / PLAN).is_file():
        raise ValueError(f"{root} is not a cache: it has no {PLAN}.")
    return read_json(root / PLAN)


def _is_finished(root: Path, plan: dict[str, Any]) -> bool:
    return (root / INDEX).exists() and open_index(root)[0] == plan


def _remove(path: Path) -> int:
    """Removes a file or folder and returns its size in bytes."""
    if not path.is_dir():
        size = path.stat().st_size
        path.unlink()
        return size
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path)
    return size
