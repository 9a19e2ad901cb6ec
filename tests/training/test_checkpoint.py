"""Checkpoints: whole whatever happens while they are written, found, kept and refused."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refalign_training import checkpoint as checkpoints
from refalign_training.checkpoint import (
    LATEST,
    STATE,
    checkpoint_name,
    find_checkpoint,
    has_checkpoint,
    load_tensors,
    read_projectors,
    read_state,
    read_tensors,
    read_weights,
    remove_old_checkpoints,
    save_checkpoint,
)
from refalign_training.parallel import Parallel


ONE = Parallel(device="cpu")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights.a": torch.randn(3, 40, generator=generator),
        "optimizer.step.a": torch.tensor(float(seed)),
        "optimizer.code.a": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=generator),
    }


def save(folder: Path, step: int, seed: int, keep_last: int = 100) -> None:
    save_checkpoint(folder, tensors(seed), {"step": step, "seed": seed}, ONE)
    remove_old_checkpoints(folder, keep_last, None)


def saved(folder: Path) -> tuple[int, int]:
    """Step and seed of the newest checkpoint, after a look at whether it is what was saved."""
    checkpoint = find_checkpoint(folder)
    state = read_state(checkpoint)
    assert checkpoint.name == checkpoint_name(state["step"])
    expected, actual = tensors(state["seed"]), read_tensors(checkpoint, "")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor) and actual[name].dtype == tensor.dtype, name
    return state["step"], state["seed"]


# -- Faults -----------------------------------------------------------------------------------------------------------

# How an operation on a file goes wrong. `kill` before it is `kill` after the one before it
KILL, CUT, FULL, CUT_FULL = "kill", "kill in the middle of a file", "disk full", "disk full in the middle of a file"


def break_operation(number: int, how: str) -> None:
    """Makes this process's so many-th operation on files go wrong; there is no way back."""
    done = 0

    def operation(opens: bool = False) -> None:
        nonlocal done
        done += 1
        if done != number:
            return
        if how == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif opens:  # the kernel ends the writing of the file that is opened now after 5 bytes
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if how == CUT else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5, resource.RLIM_INFINITY))
        else:
            os._exit(NOT_A_FILE)

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES:
            operation()
        elif event == "open" and arguments[2] & WRITES:
            operation(opens=True)

    def fsync(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        operation()
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


SAVED, NOT_A_FILE, FAILED = 0, 50, 51


def broken(action: Callable[[], None], number: int, how: str, error_file: Path) -> int:
    """What became of an action, in a process of its own, whose operation of that number goes wrong."""
    process = os.fork()
    if process == 0:
        try:
            break_operation(number, how)
            action()
            os._exit(SAVED)
        except BaseException as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            error_file.write_text(f"{isinstance(error, (OSError, ValueError))} {error}", "utf-8")
            os._exit(FAILED)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def each_fault(before: Path, action: Callable[[Path], None], how: str, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Folders as `before`, in which the action went wrong at its first operation, its second and so on."""
    number, outcome, faults = 0, None, 0
    while outcome != SAVED:
        number += 1
        folder = scratch / str(number)
        shutil.copytree(before, folder)
        outcome = broken(lambda folder=folder: action(folder), number, how, scratch / "error")
        assert outcome in (SAVED, NOT_A_FILE, FAILED, -signal.SIGKILL, -signal.SIGXFSZ)
        if outcome not in (SAVED, NOT_A_FILE):
            faults += 1
            yield f"{how} at operation {number}", folder
        shutil.rmtree(folder)
    assert faults >= (3 if how in (CUT, CUT_FULL) else 8)


def next_one(folder: Path) -> None:
    save(folder, 5, seed=1)


def another(folder: Path) -> None:
    save(folder, 10, seed=2)


def next_that_removes(folder: Path) -> None:
    save(folder, 10, seed=2, keep_last=1)


def again(folder: Path) -> None:
    save(folder, 10, seed=3)


# What is there, what is saved, and what a run may go on with afterwards
CASES = {
    "first": ([], next_one, {None, (5, 1)}),
    "second": ([next_one], another, {(5, 1), (10, 2)}),
    "second, the first removed": ([next_one], next_that_removes, {(5, 1), (10, 2)}),
    "in place of one": ([next_one, another], again, {(5, 1), (10, 2), (10, 3)}),
    "in place of the only one": ([another], again, {(10, 2), (10, 3)}),
}
HOWS = (KILL, CUT, FULL, CUT_FULL)


def prepared(case: str, folder: Path) -> tuple[Path, Callable[[Path], None], set]:
    earlier, action, allowed = CASES[case]
    folder.mkdir()
    for step in earlier:
        step(folder)
    return folder, action, allowed


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", CASES)
def test_a_fault_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path, case, how):
    before, action, allowed = prepared(case, tmp_path / "before")
    for moment, folder in each_fault(before, action, how, tmp_path):
        if list(folder.glob("step-*")):
            assert saved(folder) in allowed, moment
        else:
            assert None in allowed, moment


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", CASES)
def test_the_next_saving_leaves_nothing_of_a_fault(tmp_path, case, how):
    before, action, _ = prepared(case, tmp_path / "before")
    for moment, folder in each_fault(before, action, how, tmp_path):
        save(folder, 15, seed=4, keep_last=1)
        assert saved(folder) == (15, 4), moment
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000015"], moment


@pytest.mark.parametrize("how", [FULL, CUT_FULL])
def test_a_full_disk_is_an_error_that_the_command_line_tells(tmp_path, how):
    before, action, _ = prepared("second", tmp_path / "before")
    for moment, _ in each_fault(before, action, how, tmp_path):
        assert (tmp_path / "error").read_text("utf-8").startswith("True "), moment


def test_a_fault_while_leftovers_are_removed_leaves_a_whole_checkpoint(tmp_path):
    before, _, _ = prepared("second", tmp_path / "before")
    shutil.copytree(before / "step-00000005", before / ".step-00000010.partial")
    shutil.copytree(before / "step-00000005", before / ".step-00000004.removed")
    for moment, folder in each_fault(before, another, KILL, tmp_path):
        assert saved(folder) in {(5, 1), (10, 2)}, moment


def test_what_was_replaced_is_gone_when_the_new_one_is_there(tmp_path):
    another(tmp_path)
    again(tmp_path)
    assert saved(tmp_path) == (10, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]


# -- What is kept -----------------------------------------------------------------------------------------------------


def empty_checkpoint(folder: Path, step: int) -> None:
    (folder / checkpoint_name(step)).mkdir()
    (folder / checkpoint_name(step) / STATE).write_text("{}")


@given(
    steps=st.sets(st.integers(1, 10**9), min_size=1, max_size=12),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 50),
)
def test_the_last_ones_and_those_at_multiples_are_kept(tmp_path_factory, steps, keep_last, keep_every):
    folder = tmp_path_factory.mktemp("kept")
    for step in steps:
        empty_checkpoint(folder, step)
    remove_old_checkpoints(folder, keep_last, keep_every)
    expected = set(sorted(steps)[-keep_last:]) | {s for s in steps if keep_every and s % keep_every == 0}
    assert {path.name for path in folder.iterdir()} == {checkpoint_name(step) for step in expected}


def test_the_one_just_saved_is_kept_beside_later_ones_of_an_abandoned_run(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, seed=1)
    save(tmp_path, 12, seed=2, keep_last=2)  # gone on from step 10, and stopped
    assert saved(tmp_path) == (12, 2)


def test_steps_of_more_digits_come_after_those_of_fewer(tmp_path):
    for step in (99_999_999, 100_000_000):
        empty_checkpoint(tmp_path, step)
    assert find_checkpoint(tmp_path).name == "step-100000000"


# -- What is found ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run's folder with checkpoints of steps 5 and 10."""
    folder = tmp_path / "run" / "checkpoints"
    save(folder, 5, seed=1)
    save(folder, 10, seed=2)
    return folder.parent


def test_a_checkpoint_is_found_by_its_run_its_folder_and_itself(run_folder):
    newest = run_folder / "checkpoints" / "step-00000010"
    assert find_checkpoint(run_folder) == find_checkpoint(newest.parent) == find_checkpoint(newest) == newest
    assert find_checkpoint(newest.with_name("step-00000005")).name == "step-00000005"
    assert has_checkpoint(run_folder)


def test_the_pointer_counts_not_the_number(run_folder):
    save(run_folder / "checkpoints", 7, seed=3)  # by a run that went on from step 5
    assert saved(run_folder) == (7, 3)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"step-00000099\n", b"../..", b"\xff\xfe", b"\0"])
def test_without_a_good_pointer_the_newest_is_found(run_folder, content):
    pointer = run_folder / "checkpoints" / LATEST
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert saved(run_folder) == (10, 2)


def test_a_folder_that_was_moved_away_is_not_missed(run_folder, tmp_path):
    shutil.move(run_folder / "checkpoints" / "step-00000010", tmp_path / "kept")
    assert saved(run_folder) == (5, 1)
    assert read_state(find_checkpoint(tmp_path / "kept"))["step"] == 10


@pytest.mark.parametrize("name", ["step-00000010.bak", "step-00000012-good", "step-1 (copy)", "step-9x"])
def test_a_renamed_copy_is_no_checkpoint_of_the_run(run_folder, name):
    folder = run_folder / "checkpoints"
    shutil.copytree(folder / "step-00000010", folder / name)
    (folder / LATEST).unlink()
    assert saved(run_folder) == (10, 2)
    remove_old_checkpoints(folder, 1, None)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["step-00000010", name])


def test_stray_files_are_left_alone(run_folder):
    folder = run_folder / "checkpoints"
    for name in ("step-00000020", "notes.txt"):
        (folder / name).write_text("of a person")
    (folder / "step-00000030").mkdir()
    (folder / LATEST).unlink()
    assert saved(run_folder) == (10, 2)
    remove_old_checkpoints(folder, 1, None)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("notes.txt", "step-00000010", "step-00000020", "step-00000030")
    ]


@pytest.mark.parametrize("make", [False, True])
def test_where_there_is_none_that_is_said(tmp_path, make):
    folder = tmp_path / "run"
    if make:
        (folder / "checkpoints").mkdir(parents=True)
    assert not has_checkpoint(folder)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))} is neither a checkpoint nor a run's folder"):
        find_checkpoint(folder)


# -- What is read -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one(run_folder) -> Path:
    return find_checkpoint(run_folder)


def test_a_newer_schema_is_refused(one):
    (one / STATE).write_text(json.dumps({"schema": checkpoints.SCHEMA + 1, "step": 10}))
    with pytest.raises(ValueError, match=rf"{one.name} is a checkpoint of schema {checkpoints.SCHEMA + 1}; .* reads"):
        read_state(one)


@pytest.mark.parametrize("content", ["", '{"schema": 1, "st', "[1, 2]", "null"])
def test_a_damaged_state_is_named(one, content):
    (one / STATE).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(one / STATE))):
        read_state(one)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_of_tensors_is_named(one, share):
    file = next(one.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_tensors(one, "")


def test_a_missing_file_of_tensors_is_missed(one):
    next(one.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=re.escape(str(one))):
        load_tensors(one, tensors(0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights.b": torch.zeros(2)}, r"missing \(1\): weights.b"),
        ({"weights.a": torch.zeros(3, 41)}, r"of another shape \(1\): weights.a"),
    ],
    ids=["missing", "shape"],
)
def test_what_does_not_fit_is_told(one, change, told):
    target = tensors(7) | change
    before = {name: tensor.clone() for name, tensor in target.items()}
    with pytest.raises(ValueError, match=f"{one.name} does not fit this run: {told}"):
        load_tensors(one, target)
    assert all(torch.equal(target[name], before[name]) for name in target)


def test_only_what_is_asked_for_is_filled(one):
    target = {"weights.a": torch.zeros(3, 40)}
    load_tensors(one, target)
    assert torch.equal(target["weights.a"], tensors(2)["weights.a"])


def test_views_and_transposed_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    save_checkpoint(tmp_path, {"part": base[1:3], "turned": base.T}, {"step": 1}, ONE)
    actual = read_tensors(find_checkpoint(tmp_path), "")
    assert torch.equal(actual["part"], base[1:3]) and torch.equal(actual["turned"], base.T)


def test_weights_and_projectors_have_their_own_names(tmp_path):
    names = {
        "weights.transformer.blocks.0.attn1.to_q.lora_A.default.weight": torch.ones(2),
        "average.transformer.blocks.0.attn1.to_q.lora_A.default.weight": torch.zeros(2),
        "weights.alignment.projectors.3.weight": torch.full((2,), 3.0),
    }
    checkpoint = save_checkpoint(tmp_path, names, {"step": 1}, ONE)
    key = "blocks.0.attn1.to_q.lora_A.weight"
    assert read_weights(checkpoint, average=False)[key].tolist() == [1, 1]
    assert read_weights(checkpoint, average=True)[key].tolist() == [0, 0]
    assert {name: value.tolist() for name, value in read_projectors(checkpoint).items()} == {
        "blocks.3.input_mlp.weight": [3, 3]
    }


def test_a_run_without_an_average_has_none_to_read(one):
    with pytest.raises(ValueError, match=r"holds no average: its run had no optimizer.ema_decay"):
        read_weights(one, average=True)
