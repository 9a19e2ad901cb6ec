"""Outputs: whole or not at all, one owner at a time, and nothing left of owners that were killed."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from refalign import cli
from refalign.files import new_file, new_folder
from refalign.owner import owned, remove_dead_lock


@contextmanager
def another_process(make: Callable, output: Path) -> Iterator[int]:
    """A process that is making an output, and is killed at the end."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        with make(output) as path:
            if make is new_folder:
                (path / "half").write_text("half")
            elif path is not None:
                path.write_text("half")
            os.write(writing, b"ready")
            signal.pause()
    os.read(reading, 5)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.fixture(params=[new_folder, new_file], ids=["folder", "file"])
def make(request) -> Callable:
    return request.param


def fill(make: Callable, output: Path) -> None:
    with make(output) as path:
        (path / "whole" if make is new_folder else path).write_text("whole")


def test_the_second_is_told_who_makes_the_output(make, tmp_path):
    output = tmp_path / "out"
    with another_process(make, output) as process, pytest.raises(ValueError) as told:
        fill(make, output)
    assert re.match(rf"{re.escape(str(output))} is in use by process {process} on .* since", str(told.value))
    assert not output.exists()


def test_the_next_one_removes_what_a_killed_process_has_left(make, tmp_path):
    with another_process(make, tmp_path / "out"):
        pass
    assert len(list(tmp_path.iterdir())) == 2  # half of it, and the lock
    fill(make, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_belongs_to_other_outputs_or_to_nobody_stays(make, tmp_path):
    for name in (".out.mp4.abcdefgh.partial", ".out.settings", ".out.abcdefgh.partial.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcdefgh.partial").write_text("a file of a person")
    before = set(tmp_path.iterdir())
    fill(make, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}


def test_outputs_beside_each_other_do_not_wait(make, tmp_path):
    long = "a" * 60
    with another_process(make, tmp_path / f"{long}1"):
        fill(make, tmp_path / f"{long}2")
    assert (tmp_path / f"{long}2").exists()


def test_an_owner_may_make_what_it_owns(make, tmp_path):
    with owned(tmp_path / "out"):
        fill(make, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_video_that_another_process_makes_is_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("refalign.generate.load_for", None)
    with another_process(owned, output := tmp_path / "out.mp4"):
        assert cli.main(["generate", "--prompt", "a", "--output", str(output), "--overwrite"]) == 1
    assert f"{output} is in use by process " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mask", "name"),
    [("mask.png", "out.mp4"), ("mask.png", "map.png"), ("auto", "out.mask.mp4"), ("auto", "out.mask.png")],
)
def test_whatever_refine_would_write_is_told_before_anything_is_read(tmp_path, capsys, mask, name):
    words = ["refine", "--video", "missing.mp4", "--reference", "missing.png", "--mask", mask, "--overwrite"]
    words += ["--output", str(tmp_path / "out.mp4"), "--map", str(tmp_path / "map.png")]
    with another_process(owned, tmp_path / name):
        assert cli.main(words) == 1
    assert f"{tmp_path / name} is in use by process " in capsys.readouterr().err


def test_an_output_in_a_file_is_told(make, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file, so nothing can be written in it"):
        fill(make, tmp_path / "file/some/out")


def test_folders_that_were_made_for_nothing_are_gone(make, tmp_path):
    with pytest.raises(ValueError, match="wrong"), make(tmp_path / "some" / "where" / "out"):
        raise ValueError("wrong")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "nothing"])
def test_a_link_is_refused_before_the_work(make, tmp_path, kind):
    if kind == "folder":
        (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    named = f"link is a symbolic link.*name {re.escape(str(tmp_path / 'disk'))} instead|exists already"
    with pytest.raises(ValueError, match=named), make(tmp_path / "link"):
        pytest.fail("this is the work")


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(ValueError, match="out is a mount point"), new_folder(tmp_path / "out"):
        pytest.fail("this is the work")


def test_the_folder_one_is_in_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the folder you are in: name a new folder"), new_folder("."):
        pytest.fail("this is the work")


FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device", "/tmp/hidden/part"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: type(error).__name__)
def test_a_full_disk_names_the_output(make, tmp_path, error):
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'out'}'"), make(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_modules_are_imported_shows_no_traceback():
    code = "import refalign.cli, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert ended.stderr == "interrupted; nothing was done.\n"


def test_the_lock_of_an_owner_that_was_killed_at_its_end_goes(tmp_path):
    lock = tmp_path / ".a.mp4.lock"
    lock.touch()
    remove_dead_lock(tmp_path / "a.mp4")
    assert not lock.exists()


def test_a_lock_that_is_held_stays(tmp_path):
    with owned(tmp_path / "a.mp4"):
        thread = threading.Thread(target=remove_dead_lock, args=(tmp_path / "a.mp4",))
        thread.start()
        thread.join()
        assert (tmp_path / ".a.mp4.lock").exists()
