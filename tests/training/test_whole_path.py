"""From a dataset to a video by the command line alone; and tiny models that learn four clips by heart."""

import contextlib
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from refalign.video import read_video, write_video
from refalign_training.cache import run as run_cache
from refalign_training.cli import main
from refalign_training.method.losses import add_noise, sample_timesteps
from refalign_training.method.objective import Batch
from refalign_training.run.batches import pad_prompt_embeds
from refalign_training.run.config import RunCommand
from refalign_training.run.trainer import Trainer
from tests import programs
from tests.drawn_references import draw_pet, draw_place
from tests.tiny_pipeline import tiny_transformer, tiny_wan_pipeline
from tests.training.opens2v_files import write_opens2v
from tests.training.small_cache import FRAMES, HEIGHT, WIDTH, cache_command, write_teacher
from tests.training.small_run import assert_equal_runs, run_command


# -- The whole path ---------------------------------------------------------------------------------------------------


SIZE = ["--height", HEIGHT, "--width", WIDTH, "--num-frames", FRAMES]
RECIPE = """
steps: 60
model: {base: wan, precision: float32}
data: {cache: cache, workers: 2}
batch: {size: 4, micro: 2}
optimizer: {lr: 3e-3, ema_decay: 0.9}
alignment: {layers: [0, 1]}
lora: {rank: 4, alpha: 8, dropout: 0.1}
checkpoints: {every: 5}
log: {every: 1, gradients_every: 20}
validation: {every: 0}
"""


@pytest.mark.slow
@pytest.mark.parametrize("training", ["lora", "full"])
def test_from_opens2v_to_a_video_with_a_kill_on_the_way(training, wan_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wan").symlink_to(wan_folder)
    write_teacher(Path("teacher"))
    write_opens2v(tmp_path, clips=4)
    draw_pet(0.3).save("pet.png")
    Path("recipe.yaml").write_text(f"training: {training}\n{RECIPE}", "utf-8")
    annotations = ["--data", "opens2v", "--annotations", "Jsons/mask_and_bbox/total_part1.json"]
    subset = ["--data", "samples", "--annotations", "subset.jsonl", "--videos", "Videos", *SIZE]

    train("check", *annotations, "--select", "references>=2", "--write", "subset.jsonl")
    assert "usable samples: 4" in train("check", *subset, "--preview", "preview")
    train("cache", *subset, "--output", "cache", "--model", "wan", "--teacher", "teacher")
    assert "time " in train("run", "--config", "recipe.yaml", "--output", "killed", "--dry-run")
    kill_after_a_checkpoint("run", "--config", "recipe.yaml", "--output", "killed")
    assert "goes on from" in train("run", "--config", "recipe.yaml", "--output", "killed", "--resume", "latest")
    train("run", "--config", "recipe.yaml", "--output", "undisturbed")
    train("export", "killed", "--output", "exported")
    by_training = {"lora": ["--model", "wan", "--lora", "exported"], "full": ["--model", "exported"]}

    assert_equal_runs(Path("killed"), Path("undisturbed"))
    lines = Path("killed/metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 61))
    video = generate("trained.mp4", *by_training[training])
    assert video.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert (video != generate("untrained.mp4", "--model", "wan")).any()


def train(*words: object) -> str:
    return call("refalign_training.cli", *words)


def generate(output: str, *words: object) -> np.ndarray:
    prompt = ["--prompt", "A ball and a brick.", "--reference", "pet.png", "--steps", 2, *SIZE]
    call("refalign.cli", "generate", *prompt, "--output", output, *words)
    return read_video(output)


def call(module: str, *words: object) -> str:
    """What a command says, in a process of its own."""
    program = importlib.import_module(module)
    done = programs.call(lambda: program.main(list(map(str, words))))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def command_line(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, words)]


def kill_after_a_checkpoint(*words: object) -> None:
    """Ends a run by SIGKILL once it has taken a step more than it has saved."""
    output = Path(words[words.index("--output") + 1])
    with Path("killed.log").open("w") as log:
        process = subprocess.Popen(command_line("refalign_training.cli", *words), stdout=log, stderr=log)
    while process.poll() is None and not is_ahead_of_its_checkpoint(output):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, Path("killed.log").read_text()


def is_ahead_of_its_checkpoint(output: Path) -> bool:
    latest, metrics = output / "checkpoints" / "latest", output / "metrics.jsonl"
    if not latest.exists() or not metrics.exists():
        return False
    return metrics.read_text("utf-8").count("\n") > int(latest.read_text("utf-8").partition("-")[2])


# -- Four clips by heart ----------------------------------------------------------------------------------------------


# As wide as a patch has values, or it could not say which noise it sees
WIDE = {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 128}
LEARNING = {"batch.micro": 4, "optimizer.lr": 3e-3, "checkpoints.every": 1000, "log.every": 50}


@dataclass(frozen=True)
class Learned:
    """A run, what of its four clips it knew before and afterwards, and what its model says to given inputs."""

    command: RunCommand
    before: dict[str, float]
    after: dict[str, float]
    inputs: dict[str, torch.Tensor]
    velocity: torch.Tensor


@pytest.fixture(scope="module")
def learned_in_full(tmp_path_factory) -> Learned:
    folder = tmp_path_factory.mktemp("full")
    cache = cache_drawn_clips(folder, write_wan(folder / "wan"), hue=0.0)
    logged = {"log.gradients_every": 50, "validation.every": 50, "validation.cache": cache}
    command = run_command(folder / "run", folder / "wan", cache, steps=50, training="full", **LEARNING, **logged)
    return learn(command)


@pytest.fixture(scope="module")
def model_folder(learned_in_full, tmp_path_factory) -> Path:
    return export(learned_in_full.command.output, tmp_path_factory.mktemp("exported") / "model", "--dtype", "float32")


@pytest.fixture(scope="module")
def learned_as_lora(model_folder, tmp_path_factory) -> Learned:
    """Adapters of the model that was trained in full, on other clips: a head of random weights cannot follow them."""
    folder = tmp_path_factory.mktemp("lora")
    cache = cache_drawn_clips(folder, model_folder, hue=0.5)
    changes = {**LEARNING, "optimizer.lr": 1e-2, "lora.rank": 32, "lora.alpha": 64.0, "optimizer.schedule": "cosine"}
    return learn(run_command(folder / "run", model_folder, cache, steps=300, **changes))


@pytest.fixture(scope="module")
def lora_folder(learned_as_lora, tmp_path_factory) -> Path:
    return export(learned_as_lora.command.output, tmp_path_factory.mktemp("exported") / "lora")


def write_wan(folder: Path) -> Path:
    """A pipeline whose latents tell one clip from another: a VAE of random weights sees little but its own biases."""
    pipeline = tiny_wan_pipeline()
    pipeline.register_modules(transformer=tiny_transformer(**WIDE))
    vae = pipeline.vae
    clips = torch.stack([torch.stack([*map(to_tensor, draw_clip(number / 5))], 1) for number in range(5)])
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        latents = vae.encode(clips).latent_dist.mean.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
    pipeline.save_pretrained(folder)
    return folder


def to_tensor(frame: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1) / 127.5 - 1


def cache_drawn_clips(folder: Path, model: Path, hue: float) -> Path:
    (folder / "clips").mkdir()
    for number in range(4):
        write_drawn_clip(folder / "clips", f"clip{number}", hue + number / 10)
    command = cache_command(folder / "clips", folder / "cache", model, write_teacher(folder / "teacher"))
    assert run_cache(command) == 0
    return folder / "cache"


def write_drawn_clip(folder: Path, name: str, hue: float) -> None:
    write_video(draw_clip(hue), folder / f"{name}.mp4", fps=25)
    (folder / f"{name}.txt").write_text(f"A pet of hue {hue:.1f} crosses a field.", "utf-8")
    draw_pet(hue + 0.3).save(folder / f"{name}.ref0.png")
    draw_place(hue).save(folder / f"{name}.ref1.png")


def draw_clip(hue: float) -> list[Image.Image]:
    """An animal that crosses a place: 13 frames, of which each third is taken."""
    frames = []
    for number in range(13):
        frame, pet = draw_place(hue), draw_pet(hue + 0.3)
        frame.paste(pet, (20 * number, 40), pet)
        frames.append(frame.resize((WIDTH, HEIGHT)))
    return frames


def learn(command: RunCommand) -> Learned:
    trainer = Trainer(command)
    batch = fixed_batch(trainer)
    before = measure(trainer, batch)
    assert trainer.train() == 0
    inputs = {
        "hidden_states": add_noise(batch.latents, batch.noise, batch.timesteps),
        "timestep": batch.timesteps,
        "encoder_hidden_states": batch.prompt_embeds,
        "reference_hidden_states": batch.reference_latents,
    }
    with torch.no_grad():
        velocity = trainer.transformer.eval()(**inputs).sample
    return Learned(command, before, measure(trainer, batch), inputs, velocity)


def fixed_batch(trainer: Trainer) -> Batch:
    """The four clips, each at a timestep and with noise that training does not draw."""
    samples = trainer.samples
    values = [samples.encode(samples.read(row, seed=0, epoch=0)) for row in range(4)]
    latents, references, features, subjects = (
        torch.stack([value[name] for value in values])
        for name in ("latents", "reference_latents", "teacher_features", "subjects")
    )
    timesteps, weights = sample_timesteps("refalign", torch.tensor([0.2, 0.4, 0.6, 0.8]))
    return Batch(
        ids=[samples.id(row) for row in range(4)],
        seed=0,
        latents=latents,
        noise=torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)),
        reference_latents=references,
        prompt_embeds=pad_prompt_embeds([value["prompt_embeds"] for value in values], 512),
        timesteps=timesteps,
        weights=weights,
        keeps_references=torch.ones(4, dtype=torch.bool),
        subjects=subjects,
        teacher_features=features,
    )


def measure(trainer: Trainer, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        losses = trainer.objective(batch, step=0)
    return {name: getattr(losses, name).mean().item() for name in ("mse", "alignment", "cosine")}


def export(run_folder: Path, output: Path, *words: str) -> Path:
    assert main(["export", str(run_folder), "--output", str(output), *words]) == 0
    return output


def test_a_model_learns_four_clips_by_heart(learned_in_full):
    before, after = learned_in_full.before, learned_in_full.after
    assert after["mse"] < 0.6 * before["mse"]
    assert after["alignment"] < 0.6 * before["alignment"]
    assert after["cosine"] > before["cosine"] + 0.4


def test_the_documentation_explains_every_number_of_the_log(learned_in_full):
    lines = (learned_in_full.command.output / "metrics.jsonl").read_text("utf-8").splitlines()
    logged = {re.sub(r"\d[\d.-]*", "N", name) for line in lines for name in json.loads(line)} - {"step"}
    document = (Path(__file__).parents[2] / "docs/training.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([a-z_/N]+)` \|", document, flags=re.MULTILINE)) == logged


@pytest.mark.slow
def test_a_lora_learns_four_clips_by_heart(learned_as_lora):
    before, after = learned_as_lora.before, learned_as_lora.after
    assert after["mse"] < 0.75 * before["mse"]
    assert after["alignment"] < 0.6 * before["alignment"]
    assert after["cosine"] > before["cosine"] + 0.4


# -- Exports in a process of their own --------------------------------------------------------------------------------


ANOTHER_PROCESS = """
import torch
from safetensors.torch import load_file, save_file
from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel

{load}
with torch.no_grad():
    velocity = transformer.eval()(**load_file("inputs.safetensors")).sample
save_file({{"velocity": velocity}}, "velocity.safetensors")
"""
PIPELINE = "transformer = RefAlignWanPipeline.from_pretrained('model').transformer"
NATIVE_FILE = """
transformer = RefAlignWanTransformer3DModel.from_single_file(
    "model/refalign-native.safetensors", config="model", subfolder="transformer"
)
"""
LORA = """
pipeline = RefAlignWanPipeline.from_pretrained("model")
pipeline.load_lora_weights("lora")
transformer = pipeline.transformer
"""


@pytest.mark.parametrize(
    "load",
    [pytest.param(PIPELINE, id="pipeline"), pytest.param(NATIVE_FILE, id="native file", marks=pytest.mark.slow)],
)
def test_exported_weights_say_what_the_trained_model_said(load, learned_in_full, model_folder, tmp_path):
    (tmp_path / "model").symlink_to(model_folder)
    said = velocity_in_another_process(load, learned_in_full.inputs, tmp_path)
    torch.testing.assert_close(said, learned_in_full.velocity, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_exported_lora_says_what_the_trained_model_said(learned_as_lora, model_folder, lora_folder, tmp_path):
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "lora").symlink_to(lora_folder)
    said = velocity_in_another_process(LORA, learned_as_lora.inputs, tmp_path)
    torch.testing.assert_close(said, learned_as_lora.velocity, rtol=0, atol=1e-4)


def velocity_in_another_process(load: str, inputs: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    save_file(inputs, folder / "inputs.safetensors")
    with contextlib.chdir(folder):
        done = programs.call_script(ANOTHER_PROCESS.format(load=load))
    assert done.returncode == 0, done.stderr
    return load_file(folder / "velocity.safetensors")["velocity"]
