"""Checkpoints: whole whatever happens while they are written, found, kept and refused."""

import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refalign_training.run import checkpoint as checkpoints
from refalign_training.run.checkpoint import (
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
from refalign_training.run.parallel import Parallel


ONE = Parallel(device="cpu")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    """A process that dies takes nothing along that it has written: only a power cut would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


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
    assert checkpoint_name(state["step"]) in checkpoint.name
    expected, actual = tensors(state["seed"]), read_tensors(checkpoint, "")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor) and actual[name].dtype == tensor.dtype, name
    return state["step"], state["seed"]


# -- Faults -----------------------------------------------------------------------------------------------------------

# What goes wrong at an operation on files. A kill before one is a kill after the one before it
KILL, CUT = "kill", "kill in the middle of a file"
FULL, CUT_FULL = "disk full", "disk full in the middle of a file"
NO_FAULT, FAILED, SURVIVED = 50, 51, 52  # exit codes


def break_operation(number: int, how: str) -> Callable[[], bool]:
    """Makes this process's so many-th operation on files go wrong, for good. Gives what says whether it has."""
    done = 0

    def operation(opens: bool) -> None:
        nonlocal done
        done += opens or how in (KILL, FULL)
        if done != number:
            return
        if how == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:  # the kernel ends the writing of the file that is opened now after 5 bytes
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if how == CUT else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5, resource.RLIM_INFINITY))

    def hook(event: str, arguments: tuple) -> None:
        opens = event == "open" and bool(arguments[2] & WRITES)
        if opens or event in CHANGES:
            operation(opens)

    os.fsync = lambda descriptor: operation(opens=False)
    sys.addaudithook(hook)
    return lambda: done >= number


def broken(action: Callable[[], None], number: int, how: str, told: Path) -> int:
    """What became of an action, in a process of its own, whose operation of that number goes wrong."""
    process = os.fork()
    if process == 0:
        try:
            has_happened = break_operation(number, how)
            action()
            os._exit(SURVIVED if has_happened() else NO_FAULT)
        except BaseException as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            told.write_text(f"{isinstance(error, (OSError, ValueError))}: {error!r}", "utf-8")
            os._exit(FAILED)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def each_fault(before: Path, action: Callable[[Path], None], how: str, scratch: Path) -> Iterator[tuple[int, Path]]:
    """Folders as `before`, in which the action went wrong at its first operation, its second and so on."""
    for number in itertools.count(1):
        folder = scratch / str(number) / "checkpoints"
        shutil.copytree(before, folder)
        outcome = broken(lambda folder=folder: action(folder), number, how, folder.with_name("told"))
        if outcome == NO_FAULT:
            break
        assert outcome in (FAILED, SURVIVED, -signal.SIGKILL, -signal.SIGXFSZ)
        yield number, folder
        shutil.rmtree(folder.parent)
    assert number > (3 if how in (CUT, CUT_FULL) else 8)  # the tensors, the state and the pointer have to be written


def first(folder: Path) -> None:
    save(folder, 5, seed=1)


def second(folder: Path) -> None:
    save(folder, 10, seed=2)


def second_instead(folder: Path) -> None:
    save(folder, 10, seed=2, keep_last=1)


def again(folder: Path) -> None:
    save(folder, 10, seed=3)


def third_after_going_back(folder: Path) -> None:
    save_checkpoint(folder, tensors(4), {"step": 7, "seed": 4}, ONE)


def second_then_first(folder: Path) -> None:
    for step, seed in ((10, 2), (5, 1)):
        save_checkpoint(folder, tensors(seed), {"step": step, "seed": seed}, ONE)


# What is there, what is saved, and what a run may go on with afterwards
CASES = {
    "first": ([], first, {None, (5, 1)}),
    "second": ([first], second, {(5, 1), (10, 2)}),
    "second, the first removed": ([first], second_instead, {(5, 1), (10, 2)}),
    "in place of one": ([first, second], again, {(5, 1), (10, 2), (10, 3)}),
    "in place of the only one": ([second], again, {(10, 2), (10, 3)}),
    "before an abandoned one": ([second_then_first], third_after_going_back, {(5, 1), (7, 4)}),
}


# What "second, the first removed" and "in place of one" do too, with more
CONTAINED = ("second", "in place of the only one")
FAULTS = [(case, how) for case in CASES for how in (KILL, CUT) if case not in CONTAINED]
FAULTS += [("in place of one", how) for how in (FULL, CUT_FULL)]
SLOW_FAULTS = [(case, how) for case in CONTAINED for how in (KILL, CUT, FULL, CUT_FULL)]
FAULTS += [pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW_FAULTS]


@dataclass
class Fault:
    number: int
    found: tuple[int, int] | str | None
    """The checkpoint that is found; None if there is none, text if it is not whole."""
    told: str | None
    """The error, if there was one."""
    then: list[str]
    """What is there after one more checkpoint, the only one to keep."""


def look(folder: Path) -> tuple[int, int] | str | None:
    try:
        return saved(folder) if has_checkpoint(folder.parent) else None
    except (AssertionError, ValueError) as error:
        return repr(error)


@pytest.fixture(scope="module", params=FAULTS, ids=", ".join)
def faults(request, tmp_path_factory) -> tuple[str, str, list[Fault]]:
    """The name of a case, how it goes wrong, and what is left after each fault."""
    (case, how), scratch = request.param, tmp_path_factory.mktemp("faults")
    earlier, action, _ = CASES[case]
    before = scratch / "before"
    before.mkdir()
    for step in earlier:
        step(before)
    found = []
    for number, folder in each_fault(before, action, how, scratch):
        told = folder.with_name("told")
        fault = Fault(number, look(folder), told.read_text("utf-8") if told.exists() else None, [])
        save(folder, 15, seed=4, keep_last=1)
        assert saved(folder) == (15, 4)
        fault.then = sorted(path.name for path in folder.iterdir())
        found.append(fault)
    return case, how, found


def test_a_fault_at_any_moment_of_saving_leaves_a_whole_checkpoint(faults):
    case, _, found = faults
    assert [fault for fault in found if fault.found not in CASES[case][2]] == []


def test_the_next_saving_leaves_nothing_of_a_fault(faults):
    _, _, found = faults
    assert [fault for fault in found if fault.then != ["latest", "step-00000015"]] == []


def test_a_full_disk_is_an_error_that_the_command_line_tells(faults):
    _, how, found = faults
    assert any(fault.told for fault in found) == (how in (FULL, CUT_FULL))
    assert [fault for fault in found if fault.told and not fault.told.startswith("True")] == []


def test_a_kill_while_leftovers_are_removed_leaves_a_whole_checkpoint(tmp_path):
    first(tmp_path / "before")
    for name in (".step-00000010.partial", ".step-00000004.removed"):
        shutil.copytree(tmp_path / "before" / "step-00000005", tmp_path / "before" / name)
    for number, folder in each_fault(tmp_path / "before", second, KILL, tmp_path):
        assert saved(folder) in {(5, 1), (10, 2)}, number


def test_what_was_replaced_is_gone_when_the_new_one_is_there(tmp_path):
    second(tmp_path)
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


def damage(file: Path, share: float) -> None:
    """Changes one bit of a file."""
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_a_changed_bit_names_the_file_and_the_older_one_to_resume_from(one, share):
    file = next(one.glob("*.safetensors"))
    damage(file, share)
    target = tensors(7)
    older = one.with_name("step-00000005")
    told = rf"{re.escape(str(file))} is damaged.* whole: go on from it with --resume {re.escape(str(older))}$"
    with pytest.raises(ValueError, match=told):
        load_tensors(one, target)
    assert all(torch.equal(target[name], tensor) for name, tensor in tensors(7).items())
    assert read_tensors(older, "")["weights.a"].equal(tensors(1)["weights.a"])


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_changed_bit_of_the_state_is_told(one, share):
    damage(one / STATE, share)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(one))}.* --resume .*step-00000005$"):
        read_state(one)


def test_a_step_that_was_changed_is_told(one):
    file = one / STATE
    file.write_text(file.read_text("utf-8").replace('"step": 10', '"step": 11'), "utf-8")
    with pytest.raises(ValueError, match=f"{STATE} is damaged: it does not hold what the run wrote"):
        read_state(one)


def test_an_older_one_that_is_damaged_too_is_not_advised(run_folder, one):
    save(run_folder / "checkpoints", 15, seed=3)
    newest = find_checkpoint(run_folder)
    for checkpoint in (one, newest):
        damage(next(checkpoint.glob("*.safetensors")), 0.9)
    with pytest.raises(ValueError, match=r"--resume .*step-00000005$"):
        read_tensors(newest, "")


def test_without_an_older_one_another_way_is_told(one):
    shutil.rmtree(one.with_name("step-00000005"))
    damage(next(one.glob("*.safetensors")), 0.9)
    with pytest.raises(ValueError, match=r"is damaged.* Copy the checkpoint again, or go on from another\.$"):
        read_tensors(one, "")


def test_a_file_of_tensors_that_the_run_did_not_write_is_refused(one):
    shutil.copy(next(one.glob("*.safetensors")), one / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds other\.safetensors, which is not the run's"):
        read_tensors(one, "")


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(one):
    state = json.loads((one / STATE).read_text("utf-8"))
    del state["sha256"]
    (one / STATE).write_text(json.dumps(state), "utf-8")
    assert read_tensors(one, "")["weights.a"].equal(tensors(2)["weights.a"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"files": {"../../secret": 1}}, r"names a file outside of its folder: '\.\./\.\./secret'"),
        ({"files": ["a"]}, r"files is \['a'\]"),
        ({"step": "ten"}, "step is 'ten'"),
        ({"options": None}, "options is None"),
        ({"sha256": 3}, "sha256 is 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_that_no_run_writes_is_refused(one, changes, told):
    state = json.loads((one / STATE).read_text("utf-8"))
    (one / STATE).write_text(json.dumps({**state, **changes}), "utf-8")
    with pytest.raises(ValueError, match=told):
        read_state(one)


def test_a_pointer_to_another_place_is_not_followed(run_folder, tmp_path):
    save(tmp_path / "elsewhere", 20, seed=3)
    (run_folder / "checkpoints" / LATEST).write_text("../../elsewhere/step-00000020\n")
    assert saved(run_folder) == (10, 2)


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


def test_a_part_of_a_tensor_is_saved_alone(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    save_checkpoint(tmp_path, {"part": whole[1:3]}, {"step": 1}, ONE)
    assert torch.equal(read_tensors(find_checkpoint(tmp_path), "")["part"], whole[1:3])


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


def test_large_states_go_into_several_files(tmp_path, monkeypatch):
    """Each is made in memory before it is written."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 100)
    tensors = {f"weights.{number}": torch.randn(20) for number in range(3)}
    written = save_checkpoint(tmp_path, tensors, {"step": 1}, Parallel(device="cpu"))
    assert len(list(written.glob("*.safetensors"))) == 3
    read = read_tensors(written, "")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
