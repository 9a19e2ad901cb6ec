"""Bernini-R models are trained with references of their own sizes, and without tokens of those that are dropped."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image
from safetensors.torch import load_file

from refalign import RefAlignWanPipeline
from refalign.families import BERNINI_PREFIX
from refalign.hub import LORA_WEIGHTS
from refalign_training.cache import run as run_cache
from refalign_training.cache.reader import Cache
from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Dataset
from refalign_training.method.losses import add_noise, flow_matching_loss
from refalign_training.method.objective import Batch, Objective
from refalign_training.method.options import ObjectiveOptions
from refalign_training.publish import export
from refalign_training.run.batches import load_batches
from refalign_training.run.checkpoint import find_checkpoint, read_state, read_tensors
from refalign_training.run.config import DataOptions, ModelOptions, PromptOptions, RunCommand
from refalign_training.run.inputs import CachedSamples, OnlineSamples
from refalign_training.run.networks import load_transformer, make_alignment, of_its_family
from refalign_training.run.order import Order, draw_dropout
from refalign_training.run.resume import find_start
from refalign_training.run.trainer import Trainer
from tests.tiny_models import FIXTURES
from tests.training.small_cache import FRAMES, HEIGHT, WIDTH, cache_command
from tests.training.small_run import assert_equal_runs, changed, run_command, train


PREFIX = BERNINI_PREFIX.format("subject-to-video")
NO_DROPOUT = ObjectiveOptions(no_text=0, no_references=0, neither=0, max_sequence_length=64)


@pytest.fixture(scope="module")
def pipeline(bernini_world) -> RefAlignWanPipeline:
    return RefAlignWanPipeline.from_pretrained(bernini_world.wan)


@pytest.fixture(scope="module")
def samples(bernini_world) -> CachedSamples:
    return CachedSamples(bernini_world.cache, needs_teacher=True)


@pytest.fixture
def command(bernini_world, tmp_path):
    """The command of a run, with other options."""

    def command(**changes) -> RunCommand:
        return run_command(tmp_path / "run", bernini_world.wan, bernini_world.cache, **changes)

    return command


# -- What is cached ---------------------------------------------------------------------------------------------------


def test_references_are_what_the_pipeline_encodes(bernini_world, samples, pipeline):
    sizes = set()
    for row in range(2):
        for number, latents in enumerate(samples.read(row, 0, 0)["reference_latents"], 1):
            image = Image.open(bernini_world.clips / f"clip{row:02d}.ref{number}.png")
            expected = pipeline.encode_reference(image, HEIGHT, WIDTH, 848)[0]
            torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
            sizes.add(tuple(latents.shape))
    assert sizes == {(16, 1, 2, 4), (16, 1, 8, 4)}


def test_prompts_are_encoded_with_what_the_pipeline_puts_before_them(bernini_world, samples, pipeline):
    caption = (bernini_world.clips / "clip01.txt").read_text("utf-8")
    for text, ours in ((caption, samples.read(1, 0, 0)["prompt_embeds"]), ("", samples.empty_prompt_embeds())):
        theirs, _ = pipeline.encode_prompt(PREFIX + prompt_clean(text), do_classifier_free_guidance=False)
        assert not theirs[0, len(ours) :].any()
        torch.testing.assert_close(ours, theirs[0, : len(ours)], atol=1e-4, rtol=1e-4)


def test_features_have_the_tokens_of_each_reference(samples):
    value = samples.read(1, 0, 0)
    grids = [tuple(features.shape[:2]) for features in value["teacher_features"]]
    assert grids == [(latents.shape[2] // 2, latents.shape[3] // 2) for latents in value["reference_latents"]]
    assert grids == [(4, 2), (1, 2)]


def test_online_samples_are_the_caches(bernini_world, samples):
    recipe = Recipe(height=HEIGHT, width=WIDTH, num_frames=FRAMES, augment="none")
    source = Dataset(data="folder", videos=bernini_world.clips)
    options = DataOptions(source=source, recipe=recipe, teacher=str(bernini_world.teacher))
    model = ModelOptions(base=str(bernini_world.wan), precision="float32")
    online = OnlineSamples(options, model, True, torch.device("cpu"))
    ours, theirs = online.encode(online.read(1, 0, 0)), samples.read(1, 0, 0)
    for name in ("reference_latents", "teacher_features"):
        for one, other in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(one, other)
    assert torch.equal(ours["prompt_embeds"], theirs["prompt_embeds"])


def test_another_longer_side_is_another_folder(bernini_world, tmp_path):
    for long_edge in (None, 32):
        command = cache_command(bernini_world.clips, tmp_path, bernini_world.wan, long_edge=long_edge)
        assert run_cache(dataclasses.replace(command, families=("video", "references", "text"), limit=2)) == 0
    assert len(list(tmp_path.glob("references-*"))) == 2 and len(list(tmp_path.glob("video-*"))) == 1
    entry = Cache(tmp_path).samples[1]
    assert [max(latents.shape[2:]) for latents in Cache(tmp_path).read(entry)["reference_latents"]] == [4, 4]


def test_a_longer_side_is_refused_for_a_model_of_letterboxed_references(bernini_world, training_world, tmp_path):
    command = cache_command(bernini_world.clips, tmp_path / "cache", training_world.wan, long_edge=848)
    with pytest.raises(ValueError, match="reads references in the video's size"):
        run_cache(command)


# -- Batches ----------------------------------------------------------------------------------------------------------


def test_samples_of_one_batch_have_references_of_equal_sizes(samples):
    order = Order(samples.buckets, np.arange(12), 4, 2, seed=0)
    for number in range(order.epoch_length):
        rows = order(0, number).rows
        sizes = {str([latents.shape for latents in samples.read(row, 0, 0)["reference_latents"]]) for row in rows}
        assert len(sizes) == 1
    assert order.epoch_length == 6 and len(np.unique(samples.buckets, axis=0)) == 4


def test_text_and_references_are_dropped_independently():
    options = dataclasses.replace(ObjectiveOptions(), family="bernini").filled()
    counts = Counter(draw_dropout(0, step, 0, "a", options) for step in range(20_000))
    shares = {kept: count / 20_000 for kept, count in counts.items()}
    expected = {(True, True): 0.81, (False, True): 0.09, (True, False): 0.09, (False, False): 0.01}
    assert shares == pytest.approx(expected, abs=0.006)


# -- The objective ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objective(bernini_world) -> Objective:
    """That of a run, whose adapters do something already."""
    command = run_command(Path("unused"), bernini_world.wan, bernini_world.cache)
    start = find_start(command)
    transformer = load_transformer(command, start)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    alignment = make_alignment(command.alignment, transformer.config, 24, start, command.seed)
    return Objective(transformer, alignment, command.alignment, torch.float32)


@pytest.fixture(scope="module")
def batch(samples) -> Batch:
    """Five samples of two references, of which three have other sizes; those of two are dropped."""
    order = Order(samples.buckets[:, :4], np.array([1, 3, 5, 7, 9]), 5, 5, seed=0)
    sizes = {"rank": 0, "world_size": 1, "first_step": 0, "steps": 1, "workers": 0, "encodes": False}
    (batch,) = load_batches(samples, order, NO_DROPOUT, **sizes)
    batch.keeps_references[1] = batch.keeps_references[4] = False
    return batch


def pick(batch: Batch, place: int) -> Batch:
    """One sample of a batch, as a batch."""
    values = {}
    for name, value in vars(batch).items():
        if name not in ("seed", "unusable"):
            values[name] = value[place : place + 1]
    return dataclasses.replace(batch, **values)


def gradients_after(objective: Objective, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    gradients = {}
    for module in (objective.transformer, objective.alignment):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradients[name], parameter.grad = parameter.grad, None
    return gradients


def test_a_batch_of_other_sizes_and_dropouts_equals_its_samples(objective, batch):
    assert sorted(map(str, (places for places, _ in batch.groups()))) != ["[0, 1, 2, 3, 4]"]
    together = objective(batch, 0)
    alone = [objective(pick(batch, place), 0) for place in range(5)]
    for name in ("total", "diffusion", "alignment", "cosine", "kept", "has_negatives"):
        expected = torch.cat([getattr(losses, name) for losses in alone])
        torch.testing.assert_close(getattr(together, name), expected, atol=1e-5, rtol=1e-5)
    gradients = gradients_after(objective, together.total.sum())
    expected = gradients_after(objective, sum(losses.total.sum() for losses in alone))
    assert gradients.keys() == expected.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_dropped_references_are_no_tokens(objective, batch):
    losses = objective(pick(batch, 1), 0)
    one = pick(batch, 1)
    with torch.no_grad():
        noisy = add_noise(one.latents, one.noise, one.timesteps)
        velocity = objective.transformer(noisy, one.timesteps, one.prompt_embeds).sample
    expected = flow_matching_loss(velocity, one.noise, one.latents) * one.weights
    torch.testing.assert_close(losses.total, expected, atol=1e-6, rtol=1e-6)
    assert losses.alignment.item() == 0 and not losses.kept.item()


def test_the_alignment_is_that_of_all_tokens(objective, batch):
    """The loss of a reference of eight tokens and one of two, by its formula."""
    one = pick(batch, int(batch.ids.index("clip01")))
    layers = objective.options.layers
    with torch.no_grad():
        output = objective.transformer(
            add_noise(one.latents, one.noise, one.timesteps),
            one.timesteps,
            one.prompt_embeds,
            reference_hidden_states=[latents[None] for latents in one.reference_latents[0]],
            output_reference_layers=layers,
        )
        teacher = torch.cat([features.flatten(0, 1) for features in one.teacher_features[0]])
        subject = torch.tensor([0] * 8 + [1] * 2)
        expected = []
        for layer, tokens in zip(layers, output.reference_hidden_states, strict=True):
            projector = objective.alignment.projectors[str(layer)]
            student = projector(torch.cat(tokens, dim=1)[0], (0, 0))
            cosines = torch.cosine_similarity(student[:, None], teacher[None], dim=-1)
            others = subject[:, None] != subject[None]
            expected.append((1 - cosines.diagonal()).mean() + cosines[others].relu().mean())
        losses = objective(dataclasses.replace(one, keeps_references=torch.tensor([True])), 0)
    torch.testing.assert_close(losses.alignment[0], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


# -- Runs -------------------------------------------------------------------------------------------------------------


RUN = {"steps": 4, "checkpoints.every": 2, "batch.size": 4, "objective.no_references": 0.4, "lora.dropout": 0.2}
# Of two samples at once, often one is dropped
ONE_STEP = {"steps": 1, "batch.size": 8, "optimizer.max_grad_norm": 0.0, "objective.no_references": 0.4}


@pytest.fixture(scope="module")
def undisturbed(bernini_world, tmp_path_factory) -> RunCommand:
    """The command of a run that has come to its end."""
    folder = tmp_path_factory.mktemp("bernini") / "run"
    command = run_command(folder, bernini_world.wan, bernini_world.cache, **RUN)
    train(command)
    return command


def gradients(output: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_checkpoint(output), "optimizer.exp_avg.")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and any(tensor.any() for tensor in one.values())
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-7, rtol=1e-4)


def test_a_resumed_run_comes_to_the_same_tensors(undisturbed, tmp_path):
    begun = changed(undisturbed, output=tmp_path / "run", steps=2)
    train(begun)
    train(changed(begun, steps=4, resume="latest"))
    assert_equal_runs(begun.output, undisturbed.output)


def test_a_run_holds_what_its_family_decided(undisturbed):
    options = read_state(find_checkpoint(undisturbed.output))["options"]
    names = ("family", "timesteps", "no_text", "no_references", "neither")
    assert [options[f"objective.{name}"] for name in names] == ["bernini", "bernini", 0.09, 0.4, 0.01]


@pytest.mark.parametrize(("mode", "micro"), [("ddp", 2), ("fsdp2", 1)])
def test_two_processes_have_the_gradients_of_one(command, tmp_path, mode, micro):
    alone = command(**ONE_STEP, **{"batch.micro": micro, "output": tmp_path / "alone"})
    together = changed(alone, output=tmp_path / "together", parallel=mode)
    train(alone)
    train(together, processes=2)
    assert_close(gradients(together.output), gradients(alone.output))


def test_videos_and_gains_of_held_out_samples(command, bernini_world):
    options = {"validation.every": 1, "validation.samples": 1, "validation.videos": 1, "steps": 1}
    prompt = PromptOptions("x", references=(str(bernini_world.clips / "clip01.ref1.png"),))
    asked = command(**options, **{"validation.prompts": (prompt,)})
    begun = Trainer(asked)
    assert begun.train() == 0
    names = {path.name for path in (asked.output / "samples/step-00000001").glob("*.mp4")}
    assert "prompt_1.mp4" in names and len(names) == 2
    text = (asked.output / "metrics.jsonl").read_text("utf-8")
    assert "validation/mse" in text


@pytest.fixture(scope="module")
def exported(undisturbed, bernini_world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "lora"
    assert export.run(export.ExportCommand(undisturbed.output, output, base=str(bernini_world.wan))) == 0
    return output


def test_comfyui_knows_every_key_of_an_exported_lora(exported):
    shapes = json.loads((FIXTURES / "native_checkpoint_shapes.json").read_text("utf-8"))
    known = {f"diffusion_model.{key.removesuffix('.weight')}" for key in next(iter(shapes.values()))}
    modules = {key.partition(".lora_")[0] for key in load_file(exported / LORA_WEIGHTS)}
    assert modules and modules <= known


def test_an_exported_lora_loads_into_the_pipeline(undisturbed, bernini_world, exported):
    pipeline = RefAlignWanPipeline.from_pretrained(bernini_world.wan)
    trained = Trainer(changed(undisturbed, resume="latest", steps=4)).transformer.eval()
    pipeline.load_lora_weights(exported)
    torch.manual_seed(0)
    arguments = (torch.randn(1, 16, 2, 4, 6), torch.tensor([500]), torch.randn(1, 7, 32))
    references = [torch.randn(1, 16, 1, 4, 2), torch.randn(1, 16, 1, 2, 6)]
    with torch.no_grad():
        ours = pipeline.transformer(*arguments, reference_hidden_states=references).sample
        theirs = trained(*arguments, reference_hidden_states=references).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# -- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.family": "refalign"}, "objective.family is refalign, but .* is of the family bernini"),
        ({"objective.kind": "distil"}, "does not teach the projected guidance"),
        ({"batch.micro": 2, "parallel": "fsdp2"}, "batch.micro is 2, but with fsdp2"),
    ],
)
def test_what_cannot_be_trained_is_told_in_one_line(command, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        of_its_family(command(**changes))
    assert "\n" not in str(error.value)


def test_another_family_is_not_made_of_a_base(training_world, tmp_path):
    command = run_command(tmp_path, training_world.wan, training_world.cache, **{"objective.family": "bernini"})
    with pytest.raises(ValueError, match=r"is of the family refalign\. Leave it out, or make a base"):
        of_its_family(command)


def test_a_cache_of_another_family_is_refused(bernini_world, training_world, tmp_path):
    for base, cache in ((bernini_world.wan, training_world.cache), (training_world.wan, bernini_world.cache)):
        with pytest.raises(ValueError, match=f"in another way than {re.escape(str(base))}"):
            Trainer(run_command(tmp_path / "run", base, cache))
