"""Samples of a cache, and the same ones encoded along with the training."""

import dataclasses
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from refalign_training.cache import run
from refalign_training.cache.command import CacheCommand
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Unusable
from refalign_training.data.source import Dataset
from refalign_training.method.objective import Batch
from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.batches import load_batches
from refalign_training.run.config import DataOptions, ModelOptions
from refalign_training.run.inputs import CachedSamples, Encoders, OnlineSamples, open_samples
from refalign_training.run.order import Order
from tests.training.small_cache import FRAMES, HEIGHT, WIDTH, cache_command, item_file, write_clips, write_teacher


CPU = torch.device("cpu")
RECIPE = Recipe(height=HEIGHT, width=WIDTH, num_frames=FRAMES)
ODD = 1  # a row with two references


@pytest.fixture
def clips(training_world, tmp_path) -> Path:
    """A copy of the clips, to be changed."""
    return shutil.copytree(training_world.clips, tmp_path / "clips")


@pytest.fixture
def open_online(training_world):
    """Opens the clips of a folder, by default the world's, with other options of the data or the recipe."""

    def open_online(folder: Path = training_world.clips, needs_teacher: bool = True, **changes) -> OnlineSamples:
        names = {field.name for field in dataclasses.fields(Recipe)}
        recipe = dataclasses.replace(RECIPE, **{name: changes.pop(name) for name in names & changes.keys()})
        values = {"source": Dataset(data="folder", videos=folder), "teacher": str(training_world.teacher), **changes}
        model = ModelOptions(base=str(training_world.wan), precision="float32")
        return OnlineSamples(DataOptions(recipe=recipe, **values), model, needs_teacher, CPU)

    return open_online


def load(samples, workers: int = 0, steps: int = 2) -> list[Batch]:
    order = Order(samples.buckets, np.arange(len(samples.buckets)), 4, 2, seed=0)
    return list(
        load_batches(
            samples,
            order,
            ObjectiveOptions(),
            rank=0,
            world_size=1,
            first_step=0,
            steps=steps,
            workers=workers,
            encodes=isinstance(samples, OnlineSamples),
        )
    )


def value_of(samples, row: int, epoch: int = 0) -> dict[str, torch.Tensor]:
    return samples.encode(samples.read(row, 0, epoch))


# -- Both give the same -----------------------------------------------------------------------------------------------


def test_online_gives_what_the_cache_holds(training_world, open_online):
    online, cached = open_online(augment="none"), CachedSamples(training_world.cache, needs_teacher=True)
    assert np.array_equal(online.buckets, cached.buckets)
    for row in range(len(cached.buckets)):
        ours, theirs = value_of(online, row), value_of(cached, row)
        assert online.id(row) == cached.id(row) and ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert torch.equal(online.empty_prompt_embeds(), cached.empty_prompt_embeds())


def test_batches_of_both_are_the_same(training_world, open_online):
    online = load(open_online(augment="none"), workers=1)
    cached = load(CachedSamples(training_world.cache, needs_teacher=True))
    for ours, theirs in zip(online, cached, strict=True):
        for field in dataclasses.fields(Batch):
            x, y = getattr(ours, field.name), getattr(theirs, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


def test_references_of_one_subject_have_one_number(open_online, clips):
    lines = ['{"video": "clip01.mp4", "prompt": "x", "subjects": ["a", "b", "a"], "references": [', ""]
    lines[0] += '"clip01.ref1.png", "clip01.ref2.png", "clip03.ref1.png"]}'
    (clips / "table.jsonl").write_text("\n".join(lines), "utf-8")
    online = open_online(source=Dataset(data="table", annotations=(clips / "table.jsonl",)))
    assert value_of(online, 0)["subjects"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("is_online", [True, False], ids=["online", "cached"])
def test_without_alignment_there_is_no_teacher(training_world, open_online, is_online):
    if is_online:
        samples = open_online(needs_teacher=False, teacher=None)
    else:
        samples = CachedSamples(training_world.cache, needs_teacher=False)
    assert value_of(samples, ODD).keys() == {"latents", "reference_latents", "prompt_embeds", "subjects"}
    assert load(samples, steps=1)[0].teacher_features is None


def test_a_cache_goes_before_a_dataset(training_world):
    model = ModelOptions(base=str(training_world.wan))
    cached = open_samples(DataOptions(cache=training_world.cache), model, True, CPU)
    options = DataOptions(source=Dataset(data="folder", videos=training_world.clips), recipe=RECIPE)
    assert isinstance(cached, CachedSamples)
    assert isinstance(open_samples(options, model, False, CPU), OnlineSamples)


# -- What is drawn anew -----------------------------------------------------------------------------------------------


@pytest.fixture
def with_variants(training_world, clips, tmp_path) -> CachedSamples:
    """A cache of three variants a sample, and of clips with three captions."""
    rows = [
        f'{{"video": "clip0{i}.mp4", "prompt": ["one", "two two", "three three three"], '
        f'"references": ["clip0{i}.ref1.png"]}}'
        for i in range(2)
    ]
    (clips / "table.jsonl").write_text("\n".join(rows), "utf-8")
    source = Dataset(data="table", annotations=(clips / "table.jsonl",))
    command = cache_command(clips, tmp_path / "cache", training_world.wan, source=source, variants=3, augment="all")
    assert run(command) == 0
    return CachedSamples(tmp_path / "cache", needs_teacher=False)


def test_each_epoch_draws_one_of_the_caches_variants_and_captions(with_variants):
    values = [with_variants.read(0, 0, epoch) for epoch in range(40)]
    assert len({value["reference_latents"].sum().item() for value in values}) == 3
    assert {len(value["prompt_embeds"]) for value in values} == {5, 9, 19}  # characters, and two
    assert len({value["latents"].sum().item() for value in values}) == 1


def test_what_is_drawn_of_a_cache_depends_on_seed_epoch_and_sample(with_variants):
    def drawn(row: int, seed: int) -> list[float]:
        values = [with_variants.read(row, seed, epoch) for epoch in range(12)]
        return [len(value["prompt_embeds"]) for value in values]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1) and drawn(0, 0) != drawn(1, 0)


def test_online_each_epoch_has_its_own_augmentation(open_online):
    online = open_online(augment="all")
    first, again, later = value_of(online, ODD), value_of(online, ODD), value_of(online, ODD, epoch=1)
    assert torch.equal(first["reference_latents"], again["reference_latents"])
    assert not torch.equal(first["reference_latents"], later["reference_latents"])
    assert not torch.equal(first["teacher_features"], later["teacher_features"])


def test_online_each_epoch_has_its_own_frames(open_online):
    online = open_online(stride=1.0)
    latents = {value_of(online, ODD, epoch)["latents"].sum().item() for epoch in range(6)}
    assert len(latents) > 1


def test_features_and_latents_are_of_the_same_augmented_reference(open_online):
    read = open_online(augment="all").read(ODD, 0, 3)
    assert read.keys() == {"video", "references", "text"}  # one decoding of the references serves both encoders


# -- What is broken ---------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("clip01.mp4", "video: .*clip01.mp4"),
        ("clip01.ref1.png", "no references: 1 of 2 can be read"),
        ("clip01.ref2.png", "no references: 1 of 2 can be read"),
        ("clip00.ref1.png", "no references: none of the 1"),
    ],
)
def test_a_sample_of_a_broken_file_cannot_be_used(open_online, clips, file, message):
    online = open_online(clips)
    cut(clips / file)
    with pytest.raises(Unusable, match=message):
        online.read(int(file[5]), 0, 0)


def test_online_another_sample_takes_the_place_of_a_broken_one(open_online, clips):
    online = open_online(clips)
    cut(clips / "clip03.ref2.png")
    (clips / "clip05.mp4").unlink()
    loaded = load(online, workers=1, steps=3)
    ids = [sample_id for batch in loaded for sample_id in batch.ids]
    unusable = {sample_id: reason for batch in loaded for sample_id, reason in batch.unusable}
    assert not {"clip03", "clip05"} & set(ids) and len(ids) == 12
    assert re.match("no references: 1 of 2", unusable["clip03"]) and re.match("missing file", unusable["clip05"])


def test_another_sample_takes_the_place_of_one_that_the_cache_lost(training_world, tmp_path):
    shutil.copytree(training_world.cache, tmp_path / "cache")
    samples = CachedSamples(tmp_path / "cache", needs_teacher=True)
    cut(item_file(tmp_path / "cache", "clip02", "references"))
    loaded = load(samples, steps=4)
    unusable = [pair for batch in loaded for pair in batch.unusable]
    assert {sample_id for sample_id, _ in unusable} == {"clip02"}
    assert all("refalign-train cache --verify" in reason for _, reason in unusable)
    assert "clip02" not in {sample_id for batch in loaded for sample_id in batch.ids}


# -- The encoders -----------------------------------------------------------------------------------------------------


def test_encoders_are_made_once_and_the_vae_is_shared(open_online, monkeypatch):
    loaded = []
    theirs = AutoencoderKLWan.from_pretrained
    monkeypatch.setattr(
        AutoencoderKLWan, "from_pretrained", lambda *args, **kwargs: loaded.append(args) or theirs(*args, **kwargs)
    )
    online = open_online()
    assert not online.encoders._made and not loaded  # not before they are needed
    value_of(online, 0)
    encoders = dict(online.encoders._made)
    assert encoders["video"].vae is encoders["references"].vae and len(loaded) == 1
    value_of(online, 1)
    online.empty_prompt_embeds()
    assert {name: online.encoders._made[name] for name in encoders} == encoders and len(loaded) == 1


def test_encoders_compute_in_the_models_precision_but_the_vae(training_world, open_online):
    options = DataOptions(
        source=Dataset(data="folder", videos=training_world.clips), recipe=RECIPE, teacher=str(training_world.teacher)
    )
    online = OnlineSamples(options, ModelOptions(base=str(training_world.wan), precision="bfloat16"), True, CPU)
    value, in_float32 = value_of(online, ODD), value_of(open_online(), ODD)
    assert value["prompt_embeds"].dtype == value["teacher_features"].dtype == torch.bfloat16
    assert online.encoders._made["video"].vae.dtype == torch.float32
    assert all(torch.equal(value[name], in_float32[name]) for name in ("latents", "reference_latents"))


def test_workers_are_sent_no_encoders(open_online):
    online = open_online()
    before = len(pickle.dumps(online))
    value = value_of(online, ODD)
    online.empty_prompt_embeds()
    sent = pickle.dumps(online)
    assert len(sent) == before
    theirs = pickle.loads(sent)
    assert not theirs.encoders._made and online.encoders._made
    assert torch.equal(theirs.read(ODD, 0, 0)["video"].pixels, online.read(ODD, 0, 0)["video"].pixels)
    assert torch.equal(value_of(theirs, ODD)["latents"], value["latents"])


def test_workers_encode_nothing(open_online, monkeypatch):
    expected, made = load(open_online()), Encoders.__call__

    def make(self, family):
        assert torch.utils.data.get_worker_info() is None, family
        return made(self, family)

    monkeypatch.setattr(Encoders, "__call__", make)
    for ours, theirs in zip(load(open_online(), workers=2), expected, strict=True):
        assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.prompt_embeds, theirs.prompt_embeds)


@pytest.fixture
def spawning():
    """Processes are spawned, as on macOS, and not forked."""
    method = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    yield
    torch.multiprocessing.set_start_method(method, force=True)


@pytest.mark.slow
@pytest.mark.parametrize("is_online", [True, False], ids=["online", "cached"])
def test_spawned_workers_read_the_same(training_world, open_online, is_online, spawning):
    samples = open_online() if is_online else CachedSamples(training_world.cache, needs_teacher=True)
    expected = load(samples)
    for ours, theirs in zip(load(samples, workers=2), expected, strict=True):
        assert ours.ids == theirs.ids and torch.equal(ours.latents, theirs.latents)


# -- What is missing --------------------------------------------------------------------------------------------------


def test_a_cache_without_a_family_is_named(training_world, clips, tmp_path):
    assert run(cache_command(clips, tmp_path / "cache", training_world.wan)) == 0
    CachedSamples(tmp_path / "cache", needs_teacher=False)
    with pytest.raises(ValueError, match=r"cache has no teacher. Compute it: refalign-train cache"):
        CachedSamples(tmp_path / "cache", needs_teacher=True)


def test_a_folder_that_is_no_cache_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none"))):
        CachedSamples(tmp_path / "none", needs_teacher=False)


def test_a_dataset_without_samples_is_named(open_online, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no usable sample\. Look at: refalign-train check"):
        open_online(tmp_path / "empty")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "/nowhere/teacher"}, "/nowhere/teacher is neither a file or folder here nor a Hub id"),
        ({"teacher": "no-one/teacher"}, "no-one/teacher is not a file or folder here, and the Hub does not give it"),
    ],
)
def test_what_cannot_be_had_is_told_at_once(open_online, changes, message):
    with pytest.raises(ValueError, match=message):
        open_online(**changes)


def test_a_base_without_encoders_is_told_at_once(open_online, training_world, tmp_path):
    options = DataOptions(source=Dataset(data="folder", videos=training_world.clips), recipe=RECIPE)
    with pytest.raises(ValueError, match="is not a pipeline in diffusers"):
        OnlineSamples(options, ModelOptions(base=str(tmp_path)), False, CPU)


# -- The fingerprint --------------------------------------------------------------------------------------------------


def test_the_same_dataset_has_the_same_fingerprint(training_world, open_online):
    assert open_online().fingerprint == open_online().fingerprint
    ours, theirs = (CachedSamples(training_world.cache, needs_teacher=True).fingerprint for _ in range(2))
    assert ours == theirs


@pytest.mark.parametrize("change", ["caption", "clip", "reference", "recipe"])
def test_another_dataset_has_another_fingerprint(open_online, clips, change):
    before = open_online(clips).fingerprint
    if change == "caption":
        (clips / "clip01.txt").write_text("another", "utf-8")
    elif change == "clip":
        (clips / "clip01.mp4").unlink()
    elif change == "reference":
        (clips / "clip01.ref2.png").unlink()
    assert open_online(clips, stride=2.0 if change == "recipe" else RECIPE.stride).fingerprint != before


@pytest.mark.parametrize("change", ["caption", "clip", "teacher"])
def test_another_cache_has_another_fingerprint(training_world, clips, tmp_path, change):
    before = CachedSamples(training_world.cache, needs_teacher=True).fingerprint
    if change == "caption":
        (clips / "clip01.txt").write_text("another", "utf-8")
    elif change == "clip":
        write_clips(clips, 9)
    teacher = write_teacher(tmp_path / "teacher", seed=int(change == "teacher"))
    assert run(cache_command(clips, tmp_path / "cache", training_world.wan, teacher)) == 0
    assert CachedSamples(tmp_path / "cache", needs_teacher=True).fingerprint != before


def test_a_cache_that_is_made_again_has_the_same_fingerprint(training_world, tmp_path):
    command = cache_command(training_world.clips, tmp_path / "cache", training_world.wan, training_world.teacher)
    assert run(command) == 0
    ours, theirs = (CachedSamples(folder, True).fingerprint for folder in (tmp_path / "cache", training_world.cache))
    assert ours == theirs


def test_a_cache_that_is_read_cannot_be_pruned(with_variants):
    samples = pickle.loads(pickle.dumps(with_variants))  # as workers get them: they hold nothing
    with pytest.raises(ValueError, match="is read by process"):
        run(CacheCommand(output=with_variants.cache.root, prune=True))
    assert samples.cache.fingerprint == with_variants.fingerprint
