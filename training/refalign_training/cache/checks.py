"""How far a cache is, whether it is whole, and what of it can go: `--status`, `--verify`, `--prune`."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from refalign.files import read_json
from refalign_training.cache.command import FAMILIES
from refalign_training.cache.reader import INDEX, PLAN, check_format, item_path, open_index, read_item, text_key
from refalign_training.cache.writer import NOT_COMPUTED, Store, read_failures, write_index


def status(root: Path) -> int:
    """Prints how far the last command has come, and returns the exit code."""
    plan = _read_plan(root)
    print(f"{root}: {plan['samples']} samples.")
    failed = [folder for folder, _ in read_failures(root)]
    for family, made in plan["families"].items():
        sizes = [path.stat().st_size for path in (root / made["folder"]).glob("*/[!.]*.safetensors")]
        wanted = plan["samples"] * made["variants"] + (family == "text")  # with the empty prompt
        failures = failed.count(made["folder"])
        print(f"{family:<10}  {len(sizes)} of {wanted} items, {failures} failed, {sum(sizes) / 1e6:,.1f} MB")
    end = "has come to its end" if _is_finished(root, plan) else "runs, or was killed: the same command goes on"
    print(f"The last `cache` command {end}.")
    return 0


def verify(root: Path) -> int:
    """
    Reads every item of the last finished command, and returns 1 if any is broken. Those are named and removed: the
    next run computes them.
    """
    header, table = open_index(root)
    stores = {family: Store(root / made["folder"]) for family, made in header["families"].items()}
    broken: list[str] = []
    if "text" in stores and _is_broken(stores["text"], text_key([""]), "the empty prompt"):
        broken.append("the empty prompt")
    rows = tqdm(_rows(table), desc="verify", total=table.metadata.num_rows, unit="sample")
    write_index(root, header, _without_broken(rows, stores, broken))
    print(f"{root}: {len(broken)} broken items. " + ("The next run makes them anew." if broken else "All is whole."))
    return 1 if broken else 0


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.iter_batches():
        yield from batch.to_pylist()


def _without_broken(
    rows: Iterator[dict[str, Any]], stores: Mapping[str, Store], broken: list[str]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        for family, store in stores.items():
            for variant, key in enumerate(row[family]):
                if key is not None and _is_broken(store, key.hex(), f"{family} {row['id']!r}"):
                    broken.append(row["id"])
                    row[family][variant], row[f"{family}_missing"] = None, NOT_COMPUTED
        yield row


def _is_broken(store: Store, key: str, name: str) -> bool:
    """Whether an item is missing, cut off, another one, not finite, or nothing but zeros, as after a loss of power."""
    path = item_path(store.folder, key)
    try:
        tensors = read_item(path)
        if store.find(key) is not None and all(t.isfinite().all() and t.any() for t in tensors.values()):
            return False
        reason = f"{path} is not what was written"
    except ValueError as error:
        reason = str(error)
    print(f"{name}: {reason}")
    path.unlink(missing_ok=True)
    return True


def prune(root: Path) -> int:
    """
    Removes what the last command does not need, and returns the exit code: folders of other recipes, items of samples
    that have left the dataset, and what killed processes were writing.

    Raises:
        ValueError: if the last command has not come to its end, whose items would be lost.
    """
    header, table = open_index(root)
    if not _is_finished(root, _read_plan(root)):
        raise ValueError(f"The last command on {root} has not come to its end. Run it to its end first.")
    folders = {made["folder"] for made in header["families"].values()}
    removed = []
    for path in [path for path in root.iterdir() if path.name != ".lock"]:
        is_family = path.is_dir() and path.name.split("-")[0] in FAMILIES
        if path.name.startswith(".") or (is_family and path.name not in folders):
            removed.append(_remove(path))
    for family, made in header["families"].items():
        keys = {text_key([""])} if family == "text" else set()
        for row in _rows(table):
            keys.update(key.hex() for key in row[family] if key is not None)
        for path in [*(root / made["folder"]).glob("*/*"), *(root / made["folder"]).glob(".*")]:
            if path.stem not in keys:
                removed.append(_remove(path))
    print(f"{root}: removed {len(removed)} files and folders, {sum(removed) / 1e6:,.1f} MB.")
    return 0


def _read_plan(root: Path) -> dict[str, Any]:
    check_format(root)
    if not (root / PLAN).is_file():
        raise ValueError(f"{root} is not a cache: it has no {PLAN}.")
    return read_json(root / PLAN)


def _is_finished(root: Path, plan: Mapping[str, Any]) -> bool:
    return (root / INDEX).exists() and open_index(root)[0] == plan


def _remove(path: Path) -> int:
    """Removes a file or folder and returns its size in bytes."""
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path)
    else:
        size = path.stat().st_size
        path.unlink()
    return size
