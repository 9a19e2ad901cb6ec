"""Many processes for one command: the same video bit for bit, one that writes, and an end for all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import FirstBlockCacheConfig

from refalign import video
from refalign.cli import main
from refalign.pipeline_refalign_wan import processes_per_pass


SMALL = ["--height", "32", "--width", "48", "--num-frames", "5"]


class Run:
    """What processes did that torchrun would have started."""

    def __init__(self, folder: Path, count: int) -> None:
        self.codes = [int((folder / f"{rank}.code").read_text()) for rank in range(count)]
        self.frames = [sorted(folder.glob(f"{rank}-*.npy")) for rank in range(count)]
        self.out = [(folder / f"{rank}.out").read_text() for rank in range(count)]
        self.errors = [(folder / f"{rank}.err").read_text() for rank in range(count)]

    @property
    def told(self) -> list[str]:
        """The errors that all of them tell."""
        lines = [line for error in self.errors for line in error.splitlines()]
        return [line for line in lines if line.startswith("refalign: ")]


@pytest.fixture
def processes(repo_folder, tmp_path):
    """Runs `refalign generate` in so many processes. They are forks, which spares the imports."""

    def run(count: int, *words, spoil=None) -> Run:
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        folder.mkdir()
        words = ["generate", "--model", str(repo_folder), *SMALL, *map(str, words)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        forks = mp.start_processes(
            _process, (count, port, folder, words, spoil), nprocs=count, join=False, start_method="fork"
        )
        while not forks.join():
            pass
        return Run(folder, count)

    return run


def _process(rank: int, count: int, port: int, folder: Path, words: list[str], spoil) -> None:
    torch.set_num_threads(1)
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in {"RANK": rank, "WORLD_SIZE": count, **local}.items()}
    sys.stdout, sys.stderr = (folder / f"{rank}.out").open("w"), (folder / f"{rank}.err").open("w")
    write, written = video.write_video, []

    def keep(images, output, *args, **kwargs):
        """H.264's encoder does not repeat itself bit for bit."""
        images = list(images)
        np.save(folder / f"{rank}-{output.stem}.npy", np.stack(images))
        written.append(output)
        return write(images, output, *args, **kwargs)

    video.write_video = keep
    if spoil is not None:
        spoil(rank)
    try:
        code = main(words)
    except SystemExit as exit:
        code = exit.code
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / f"{rank}.code").write_text(str(code))


def job(output: Path, images: list[str], *words) -> list:
    return ["--prompt", "a cat", "--reference", *images, "--output", output, "--steps", 2, *words]


@pytest.fixture
def images(tmp_path) -> list[str]:
    from tests.drawn_references import draw_face, draw_pet

    for name, image in {"face": draw_face(0.1), "pet": draw_pet(0.4)}.items():
        image.save(tmp_path / f"{name}.png")
    return [str(tmp_path / "face.png"), str(tmp_path / "pet.png")]


@pytest.mark.parametrize("words", [(), ("--guidance-gate", 0.5, 0.5, "--cache", "first-block:10")], ids=str)
def test_passes_of_two_and_three_processes_make_the_same_video_bit_for_bit(processes, images, tmp_path, words):
    frames = []
    for count in (1, 2, 3):
        run = processes(count, *job(tmp_path / f"{count}.mp4", images, "--no-batch-passes", *words))
        assert run.codes == [0] * count
        assert [len(files) for files in run.frames] == [1, 0, 0][:count]
        assert run.out[1:] + run.errors[1:] == [""] * 2 * (count - 1)
        frames.append(np.load(run.frames[0][0]))
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[2])


def lines(tmp_path: Path, images: list[str], *changes) -> Path:
    file = tmp_path / "jobs.jsonl"
    shared = {"prompt": "a", "steps": 1, "reference": images[:1]}
    jobs = [{**shared, "output": str(tmp_path / f"{number}.mp4")} for number in range(3)]
    for number, change in changes:
        jobs[number] |= change
    file.write_text("\n".join(map(json.dumps, jobs)), "utf-8")
    return file


def test_a_batch_is_spread_over_processes_and_a_bad_job_ends_no_other(processes, images, tmp_path):
    run = processes(2, "--batch", lines(tmp_path, images, (1, {"reference": ["nowhere.png"]})))
    assert run.codes == [1, 0]
    assert [[file.stem for file in files] for files in run.frames] == [["0-0", "0-2"], []]
    assert "jobs.jsonl:2" in run.errors[1] and "1 of 3 videos failed: jobs.jsonl:2" in run.errors[0]
    assert processes(2, "--batch", lines(tmp_path, images)).frames[0][0].stem == "0-1"


def test_passes_of_a_batch_can_be_shared_and_a_bad_job_ends_no_other(processes, images, tmp_path):
    batch = lines(tmp_path, images, (0, {"reference": ["nowhere.png"]}), (2, {"reference": []}))
    run = processes(2, "--batch", batch, "--parallel", "passes")
    assert run.codes == [1, 0]
    assert [[file.stem for file in files] for files in run.frames] == [["0-1", "0-2"], []]
    assert run.errors[1] == "" and "1 of 3 videos failed: jobs.jsonl:1" in run.errors[0]


@pytest.mark.parametrize(
    ("count", "words", "message"),
    [
        (2, ("--guidance-scale", "1", "--image-guidance-scale", "1"), "On a CPU, processes cannot share the tokens"),
        (3, ("--guidance-scale", "5"), "3 processes do not divide into the 2 passes of a step. Start 2 processes"),
        (2, ("--parallel", "jobs"), "--parallel jobs goes with --batch"),
        (2, ("--steps", "0"), "num_inference_steps"),
        (1, ("--parallel", "passes"), "goes with many processes"),
    ],
)
def test_a_mistake_is_told_once(processes, images, tmp_path, count, words, message):
    run = processes(count, *job(tmp_path / "out.mp4", images, *words))
    assert run.codes == [1] * count
    (line,) = run.told
    assert message in line
    assert not (tmp_path / "out.mp4").exists()


def fail_in_a_step(rank: int) -> None:
    """In one process alone, as if its memory were full."""
    from refalign import RefAlignWanTransformer3DModel

    def forward(*args, **kwargs):
        raise MemoryError("out of memory")

    if rank == 1:
        RefAlignWanTransformer3DModel.forward = forward


def be_killed_in_a_step(rank: int) -> None:
    from refalign import RefAlignWanTransformer3DModel

    folder = Path(sys.stderr.name).parent

    def forward(*args, **kwargs):
        (folder / f"{rank}.code").write_text("-9")
        os._exit(0)  # as a killed process: nothing is cleaned up or told

    if rank == 1:
        RefAlignWanTransformer3DModel.forward = forward


KILLED = "Another process of this command was killed"


# Each end and each form of the command once; the slow ones are the other pairs
@pytest.mark.parametrize(
    ("spoil", "message", "is_batch"),
    [
        (fail_in_a_step, "out of memory", True),
        (be_killed_in_a_step, KILLED, False),
        pytest.param(fail_in_a_step, "out of memory", False, marks=pytest.mark.slow),
        pytest.param(be_killed_in_a_step, KILLED, True, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_ends_all_in_one_line(processes, images, tmp_path, spoil, message, is_batch):
    words = job(tmp_path / "out.mp4", images)
    if is_batch:
        words = ["--batch", lines(tmp_path, images), "--parallel", "passes"]
    run = processes(3, *words, spoil=spoil)
    assert 0 not in run.codes
    (line,) = run.told
    assert message in line
    assert list(tmp_path.glob("*.mp4")) == list(tmp_path.glob(".*.partial")) == list(tmp_path.glob(".*.lock")) == []


@pytest.mark.parametrize(("count", "passes", "degree"), [(1, 3, 1), (2, 3, 1), (3, 3, 1), (6, 3, 2), (4, 1, 4)])
def test_processes_beyond_the_passes_share_a_pass(count, passes, degree):
    assert processes_per_pass(count, passes) == degree


def _share_tokens(rank: int, pipeline, call: dict, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 4  # diffusers divides by it, and it is 0 without accelerators
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    pipeline.enable_guidance_parallel(passes=2)
    latents = pipeline(**call, generator=torch.Generator().manual_seed(0)).frames
    with pytest.raises(ValueError, match="pass a `generator`"):
        pipeline(**call)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="A cache cannot be used"):
        pipeline(**call, generator=torch.Generator())
    np.save(folder / f"{rank}.npy", latents.numpy())
    dist.destroy_process_group()


def test_four_processes_share_the_tokens_of_two_passes(pipeline, images, tmp_path):
    scales = {"guidance_scale": 5.0, "image_guidance_scale": 5.0}
    size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    call = {"prompt": "a cat", "reference_images": images, "output_type": "latent", **scales, **size}
    mp.start_processes(_share_tokens, (pipeline, call, tmp_path), nprocs=4, start_method="fork")
    expected = pipeline(**call, generator=torch.Generator().manual_seed(0)).frames.numpy()
    for rank in range(4):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("signal_of_end", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_ended_without_half_files(repo_folder, images, tmp_path, signal_of_end):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "refalign.cli"]
    words = ["generate", "--model", str(repo_folder), *SMALL, *map(str, job(tmp_path / "out.mp4", images))]
    words[words.index("--steps") + 1] = "100000"
    started = subprocess.Popen([*torchrun, *words], stdout=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / ".out.mp4.lock").exists():
        time.sleep(0.1)
    time.sleep(5)
    os.killpg(started.pid, signal_of_end)
    assert started.wait(60) != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["face.png", "pet.png"]


@pytest.mark.slow
def test_torchrun_makes_a_video(repo_folder, images, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "-m", "refalign.cli"]
    words = ["generate", "--model", str(repo_folder), *SMALL, *map(str, job(tmp_path / "out.mp4", images))]
    subprocess.run([*torchrun, *words], check=True)
    assert (tmp_path / "out.mp4").is_file()
