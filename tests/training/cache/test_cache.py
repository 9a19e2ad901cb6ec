"""A cache in one process: what it holds, what is made anew, what becomes of what is broken."""

import dataclasses
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from refalign.pipeline_refalign_wan import normalize_latents
from refalign_training.cache import run
from refalign_training.cache.command import FAMILIES, CacheCommand
from refalign_training.cache.encoders import NOT_FINITE, VaeEncoder, vae_config
from refalign_training.cache.holders import READERS, hold
from refalign_training.cache.items import digest, text_key
from refalign_training.cache.reader import Cache, open_index
from refalign_training.cache.writer import write_index
from refalign_training.cli import PROGRAM
from refalign_training.data import decoding
from refalign_training.data.decoding import Task
from refalign_training.data.fields import FAULTS, Unusable
from refalign_training.data.pixels import load_references, load_video
from refalign_training.data.recipe import Recipe
from refalign_training.data.source import read_source
from tests.tiny_pipeline import tiny_wan_pipeline
from tests.training.small_cache import (
    FRAMES,
    HEIGHT,
    WIDTH,
    all_items,
    cache_command,
    change,
    failures,
    item_file,
    stamps,
    write_clip,
    write_clips,
    write_teacher,
)


RECIPE = Recipe(height=HEIGHT, width=WIDTH, num_frames=FRAMES)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def made(tmp_path_factory, wan_folder, teacher) -> CacheCommand:
    """The command of a whole cache of three clips, run."""
    folder = tmp_path_factory.mktemp("made")
    command = cache_command(write_clips(folder / "clips", 3), folder / "cache", wan_folder, teacher, variants=2)
    assert run(command) == 0
    return command


@pytest.fixture
def command(made, tmp_path) -> CacheCommand:
    """The same on a copy of its own of clips and cache, with the files' times."""
    shutil.copytree(made.source.videos, tmp_path / "clips")
    shutil.copytree(made.output, tmp_path / "cache")
    source = dataclasses.replace(made.source, videos=tmp_path / "clips")
    return change(made, source=source, output=tmp_path / "cache")


@pytest.fixture
def computed(command):
    """Runs the command with changes; says how many items were computed, by family."""

    def run_again(**changes) -> dict[str, int]:
        before = stamps(command.output)
        assert run(change(command, **changes)) == 0
        after = stamps(command.output)
        assert {path: after[path] for path in before} == before  # nothing was made twice
        families = [path.split("-")[0] for path in after if path not in before]
        return {family: families.count(family) for family in sorted(set(families))}

    return run_again


def folder_of(cache: Cache, family: str) -> Path:
    return cache.items[family].folder


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# -- What it holds ----------------------------------------------------------------------------------------------------


def test_it_holds_what_encoding_online_gives(made, wan_folder, teacher, pipeline):
    cache = Cache(made.output)
    samples = list(read_source(made.source))
    assert [entry.sample_id for entry in cache.samples] == [sample.id for sample in samples]
    config = vae_config(wan_folder)
    for sample, entry in zip(samples, cache.samples, strict=True):
        for variant in entry.variants:
            values = cache.read(entry, variant)
            frames = torch.from_numpy(load_video(sample, RECIPE)).permute(3, 0, 1, 2)[None]
            with torch.no_grad():
                video = pipeline.vae.encode(frames / 255 * 2 - 1).latent_dist.mode()
            torch.testing.assert_close(values["latents"], normalize_latents(video, config)[0], atol=1e-5, rtol=0)
            references = load_references(sample, RECIPE, variant)
            theirs = [pipeline.encode_reference(r.image, HEIGHT, WIDTH)[0] for r in references]
            assert torch.equal(values["reference_latents"], torch.cat(theirs, dim=1))
            (prompt,) = values["prompt_embeds"]
            padded, _ = pipeline.encode_prompt(sample.prompts[0], do_classifier_free_guidance=False)
            torch.testing.assert_close(prompt, padded[0, : len(prompt)], atol=1e-4, rtol=1e-4)
            assert values["teacher_features"].shape == (len(references), HEIGHT // 16, WIDTH // 16, 24)
            assert values["subjects"].tolist() == list(range(len(references)))


def test_buckets_count_frames_and_references(made):
    assert [entry.bucket for entry in Cache(made.output).samples] == [(5, 32, 48, n) for n in (1, 2, 1)]


def test_variants_are_drawn_anew(made):
    cache = Cache(made.output)
    entry = cache.samples[0]
    first, second = (cache.read(entry, variant)["reference_latents"] for variant in (0, 1))
    assert entry.variants == (0, 1)
    assert first.shape == second.shape
    with pytest.raises(ValueError, match=r"has variants \(0, 1\), not 2"):
        cache.read(entry, 2)


def test_the_empty_prompt_is_there_once(made, pipeline):
    embeds = Cache(made.output).empty_prompt_embeds
    padded, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, padded[0, : len(embeds)], atol=1e-4, rtol=1e-4)
    assert len(embeds) == 1


def test_captions_can_be_read_one_by_one(wan_folder, tmp_path, made):
    lines = [json.dumps({"video": "clip00.mp4", "prompt": ["a", "another one"], "references": ["clip00.ref1.png"]})]
    (made.source.videos / "table.jsonl").write_text("\n".join(lines), "utf-8")
    source = dataclasses.replace(
        made.source, data="table", annotations=(made.source.videos / "table.jsonl",), videos=None
    )
    assert run(change(made, source=source, output=tmp_path / "cache", families=("text",))) == 0
    (made.source.videos / "table.jsonl").unlink()
    cache = Cache(tmp_path / "cache")
    embeds = cache.read(cache.samples[0])["prompt_embeds"]
    assert len(embeds) == 2
    assert torch.equal(cache.read(cache.samples[0], prompt=1)["prompt_embeds"], embeds[1])


def test_the_cache_can_be_read_for_some_families_only(made):
    cache = Cache(made.output, ("text",))
    assert set(cache.read(cache.samples[0])) == {"prompt_embeds"}
    assert cache.fingerprint != Cache(made.output).fingerprint
    assert Cache(made.output).fingerprint == Cache(made.output).fingerprint


def test_workers_change_nothing(made, tmp_path):
    parallel = change(made, output=tmp_path / "cache", workers=1, families=("references",))
    assert run(parallel) == 0
    ours, expected = all_items(parallel.output), all_items(made.output)
    assert len(ours) == 6
    assert all(torch.equal(ours[path]["latents"], expected[path]["latents"]) for path in ours)


def test_no_pickle_is_written(made):
    suffixes = {path.suffix for path in made.output.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".parquet", ".safetensors", ""}  # the last is the lock's


# -- What is made anew ------------------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing(computed, command):
    before = Cache(command.output).fingerprint
    assert computed() == {}
    assert Cache(command.output).fingerprint == before


@pytest.mark.parametrize("family", ["video", "references", "text", "teacher"])
def test_a_family_is_rebuilt_alone(computed, command, family):
    shutil.rmtree(Cache(command.output).items[family].folder)
    assert computed(families=(family,), allow_changes=False) == {
        family: {"references": 6, "teacher": 6, "text": 4}.get(family, 3)
    }
    assert len(Cache(command.output).samples) == 3


def test_another_size_makes_all_but_text_anew_beside_the_first(computed, command):
    first = Cache(command.output)
    assert computed(height=48) == {"references": 6, "teacher": 6, "video": 3}
    second = Cache(command.output)
    assert second.samples[0].bucket == (5, 48, 48, 1)
    assert folder_of(second, "video") != folder_of(first, "video") and folder_of(second, "text") == folder_of(
        first, "text"
    )
    assert first.read(first.samples[0])["latents"].shape == (16, 2, 4, 6)
    assert computed(height=32) == {}  # what was made before is found again
    assert Cache(command.output).fingerprint == first.fingerprint


def test_a_recipe_says_what_its_folder_was_made_with(made):
    recipe = json.loads((folder_of(Cache(made.output), "video") / "recipe.json").read_text("utf-8"))
    assert recipe["model"].startswith("sha256:")
    assert (recipe["family"], recipe["height"], recipe["num_frames"], recipe["dtype"]) == ("video", 32, 5, "float32")


def test_another_number_of_frames_concerns_the_video_alone(computed):
    assert computed(num_frames=9) == {"video": 3}


def test_another_dtype_makes_all_anew(computed):
    assert computed(dtype="bfloat16") == {"references": 6, "teacher": 6, "text": 4, "video": 3}


def test_another_model_makes_all_but_the_teachers_features_anew(computed, tmp_path):
    tiny_wan_pipeline(seed=1).save_pretrained(tmp_path / "wan")
    assert computed(model=str(tmp_path / "wan")) == {"references": 6, "text": 4, "video": 3}


def test_another_teacher_concerns_its_features_alone(computed, tmp_path):
    assert computed(teacher=str(write_teacher(tmp_path / "teacher", seed=1))) == {"teacher": 6}


def test_more_variants_keep_the_first_ones(computed):
    assert computed(variants=3) == {"references": 3, "teacher": 3}


def test_a_new_sample_at_the_front_is_the_only_one_computed(computed, command):
    write_clip(command.source.videos, "a clip", seed=9)
    assert computed() == {"references": 2, "teacher": 2, "text": 1, "video": 1}
    entries = Cache(command.output).samples
    assert [entry.sample_id for entry in entries] == ["a clip", "clip00", "clip01", "clip02"]


def test_a_removed_sample_leaves_the_cache(computed, command):
    for path in command.source.videos.glob("clip01*"):
        path.unlink()
    assert computed() == {}
    assert [entry.sample_id for entry in Cache(command.output).samples] == ["clip00", "clip02"]


def test_a_changed_video_and_a_changed_caption(computed, command):
    other = (command.source.videos / "clip00.mp4").read_bytes()
    (command.source.videos / "clip01.mp4").write_bytes(other)
    (command.source.videos / "clip02.txt").write_text("another caption", "utf-8")
    assert computed() == {"text": 1, "video": 1}


def test_a_dataset_that_is_moved_keeps_its_items(computed, command, tmp_path):
    command.source.videos.rename(tmp_path / "moved")
    source = dataclasses.replace(command.source, videos=tmp_path / "moved")
    assert computed(source=source) == {}


def test_other_options_than_the_folders_must_be_meant(command, tmp_path):
    before = stamps(command.output)
    tiny_wan_pipeline(seed=1).save_pretrained(tmp_path / "wan")
    changed = change(
        command, allow_changes=False, height=48, num_frames=9, dtype="float16", model=str(tmp_path / "wan")
    )
    message = (
        r"was made with other options: dtype \(there float32, now float16\), height \(there 32, now 48\), "
        r"model \(there sha256:\w+, now sha256:\w+\), num_frames \(there 5, now 9\)\. .*--allow-changes"
    )
    with pytest.raises(ValueError, match=message):
        run(changed)
    assert stamps(command.output) == before
    assert run(change(command, allow_changes=False, variants=3)) == 0


def test_what_a_command_leaves_out_is_the_folders(command, made):
    words = ["cache", "--output", str(command.output), "--variants", "3"]
    _, read = PROGRAM.parse(words)
    of_the_call = {"device": "auto", "workers": 2, "allow_changes": False}
    assert read == change(command, source=read.source, variants=3, **of_the_call)
    assert read.source == made.source
    (command.output / "options.json").write_text('{"dtype": "float23"}', "utf-8")
    with pytest.raises(ValueError, match=r"options\.json holds no options of a cache"):
        PROGRAM.parse(words)


def test_families_of_different_videos_do_not_go_together(command):
    assert run(change(command, height=48, families=("video",))) == 0
    with pytest.raises(ValueError, match="`video` of height 48, but `references` of height 32"):
        Cache(command.output)
    assert len(Cache(command.output, ("references", "teacher", "text")).samples) == 3


def test_a_command_that_fails_leaves_the_cache_as_it_was(command, monkeypatch):
    def fail(self, pixels):
        raise RuntimeError("out of memory")

    before = Cache(command.output).fingerprint
    monkeypatch.setattr(VaeEncoder, "_encode", fail)
    with pytest.raises(RuntimeError):
        run(change(command, height=48))
    assert Cache(command.output).fingerprint == before


# -- What is broken ---------------------------------------------------------------------------------------------------


def test_a_corrupt_video_is_listed_and_the_rest_goes_on(made, tmp_path, wan_folder, capsys):
    clips = write_clips(tmp_path / "clips", 4)
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder)
    assert run(command) == 0
    (line,) = failures(tmp_path / "cache")
    assert line["folder"].startswith("video-") and line["sample_id"] == "clip01"
    assert line["kind"] in FAULTS and line["detail"]
    assert "1 failures, faults of the dataset and lost references" in capsys.readouterr().out
    assert [e.sample_id for e in Cache(tmp_path / "cache").samples] == ["clip00", "clip02", "clip03"]
    assert len(Cache(tmp_path / "cache", ("references", "text")).samples) == 4
    assert run(change(command, status=True)) == 0
    assert "3 of 4 items, 1 failed" in capsys.readouterr().out


def test_what_failed_waits_for_a_change_or_to_be_asked(tmp_path, wan_folder, monkeypatch):
    clips = write_clips(tmp_path / "clips", 2)
    whole = (clips / "clip01.mp4").read_bytes()
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder, families=("video",))
    assert run(command) == 0
    tried = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda f, s, *rest: tried.append(s.id) or decode(f, s, *rest))
    write_clip(clips, "a clip", 7)
    assert run(command) == 0
    assert tried == ["a clip"]
    assert run(change(command, retry_failed=True)) == 0
    assert tried == ["a clip", "clip01"]
    assert len(failures(command.output)) == 1
    (clips / "clip01.mp4").write_bytes(whole)
    assert run(command) == 0
    assert tried == ["a clip", "clip01", "clip01"]
    assert failures(command.output) == []
    assert len(Cache(tmp_path / "cache").samples) == 3


def test_a_failure_goes_with_its_sample(tmp_path, wan_folder, capsys):
    clips = write_clips(tmp_path / "clips", 2)
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder, families=("video",))
    assert run(command) == 0
    for path in clips.glob("clip01*"):
        path.unlink()
    assert run(command) == 0
    capsys.readouterr()
    assert run(change(command, status=True)) == 0
    assert "1 of 1 items, 0 failed" in capsys.readouterr().out


def test_a_failure_that_a_kill_has_cut_off_is_found_again(tmp_path, wan_folder):
    clips = write_clips(tmp_path / "clips", 3)
    for name in ("clip00", "clip01"):
        corrupt(clips / f"{name}.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder, families=("video",))
    assert run(command) == 0
    listed = failures(command.output)
    file = command.output / "failed.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    assert run(command) == 0
    assert failures(command.output) == listed and len(listed) == 2


def test_what_is_listed_has_failed_with_this_recipe_and_this_dataset(tmp_path, wan_folder):
    clips = write_clips(tmp_path / "clips", 2)
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder, families=("video",))
    for frames in (5, 1):
        assert run(change(command, num_frames=frames)) == 0
        (line,) = failures(command.output)
        assert line["folder"] == folder_of(Cache(command.output), "video").name
    for path in clips.glob("clip01*"):
        path.unlink()
    assert run(change(command, num_frames=1)) == 0
    assert failures(command.output) == []


def test_latents_that_are_not_finite_are_listed_and_another_dtype_tries_again(tmp_path, wan_folder, monkeypatch):
    encode = VaeEncoder._encode

    def overflow(self, pixels):
        return encode(self, pixels) * (float("nan") if self.dtype == torch.float16 else 1)

    monkeypatch.setattr(VaeEncoder, "_encode", overflow)
    command = cache_command(write_clips(tmp_path / "clips", 2), tmp_path / "cache", wan_folder, families=("video",))
    assert run(change(command, dtype="float16")) == 1
    assert [line["kind"] for line in failures(command.output)] == ["video", "video"]
    assert set(NOT_FINITE.values()) <= set(FAULTS)
    with pytest.raises(ValueError, match=r"has no sample .*: 2 without `video`. .*--retry-failed"):
        Cache(command.output)
    assert run(command) == 0
    assert len(Cache(command.output).samples) == 2


def test_faults_of_the_dataset_are_listed(tmp_path, wan_folder, made):
    lines = ["{", json.dumps({"video": "clip00.mp4", "prompt": "a", "references": ["clip00.ref1.png"]})]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(lines), "utf-8")
    source = dataclasses.replace(made.source, data="table", annotations=(table,), videos=made.source.videos)
    assert run(change(made, source=source, output=tmp_path / "cache", families=("text",))) == 0
    (line,) = failures(tmp_path / "cache")
    assert (line["kind"], line["row"], line["lost"]) == ("not readable", 0, "sample")
    assert len(Cache(tmp_path / "cache").samples) == 1


def truncate(path: Path) -> None:
    corrupt(path)


def flip(path: Path) -> None:
    """Another value at the end of the tensors' bytes: not finite."""
    path.write_bytes(path.read_bytes()[:-4] + np.float32("nan").tobytes())


def zero(path: Path) -> None:
    """As after a loss of power: the tensors' pages were never written."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, zero, remove])
def test_verify_finds_a_broken_item_and_the_next_run_mends_it(command, damage, capsys):
    before, expected = stamps(command.output), all_items(command.output)
    path = item_file(command.output, "clip01", "references", 1)
    damage(path)
    verify = change(command, verify=True)
    capsys.readouterr()
    assert run(verify) == 1
    assert "references 'clip01'" in capsys.readouterr().out
    assert [entry.sample_id for entry in Cache(command.output).samples] == ["clip00", "clip02"]
    assert run(command) == 0
    after = stamps(command.output)
    assert [p for p in after if after[p] != before[p]] == [str(path.relative_to(command.output))]
    assert all(torch.equal(expected[p][n], t) for p, ts in all_items(command.output).items() for n, t in ts.items())
    assert run(verify) == 0


def test_verify_notices_an_item_under_another_ones_name(command, capsys):
    second = item_file(command.output, "clip01", "video")
    shutil.copy(item_file(command.output, "clip00", "video"), second)
    assert run(change(command, verify=True)) == 1
    assert f"{second} is not what was written" in capsys.readouterr().out


def test_an_item_that_is_cut_off_is_made_anew_without_being_asked(command):
    expected = all_items(command.output)
    corrupt(item_file(command.output, "clip01", "video"))
    assert run(command) == 0
    assert all(torch.equal(expected[p][n], t) for p, ts in all_items(command.output).items() for n, t in ts.items())


# -- Families that do not fit together --------------------------------------------------------------------------------


@pytest.fixture
def unreadable(monkeypatch):
    """Makes one reference unreadable for as long as a family is computed."""
    from refalign_training.data import pixels

    read = pixels.read_image

    def fail(name: str) -> None:
        def read_others(path: Path):
            if path.name == name:
                raise Unusable("image", "not now")
            return read(path)

        monkeypatch.setattr(pixels, "read_image", read_others)

    return fail


def test_references_and_teacher_that_saw_other_references_are_left_out(command, unreadable, caplog):
    command = change(command, output=command.output.with_name("other"), variants=1)
    assert run(change(command, families=("references",))) == 0
    unreadable("clip01.ref1.png")
    assert run(change(command, families=("teacher",))) == 0
    unreadable("")
    (line,) = failures(command.output)
    assert line["folder"].startswith("teacher-")
    assert (line["sample_id"], line["lost"], line["kind"]) == ("clip01", "reference", "image")
    cache = Cache(command.output)
    assert [entry.sample_id for entry in cache.samples] == ["clip00", "clip02"]
    assert "2 samples; left out: 1 references and teacher disagree" in caplog.text
    before = cache.fingerprint
    assert run(change(command, families=("references", "teacher"))) == 0
    assert Cache(command.output).fingerprint == before  # it waits to be asked
    assert run(change(command, families=("references", "teacher"), retry_failed=True)) == 0
    assert len(Cache(command.output).samples) == 3
    assert failures(command.output) == []


def test_a_reference_that_both_lost_changes_the_bucket(command, unreadable):
    command = change(command, output=command.output.with_name("other"), families=("references", "teacher"))
    unreadable("clip01.ref2.png")
    assert run(command) == 0
    lost = Cache(command.output)
    assert [entry.bucket[3] for entry in lost.samples] == [1, 1, 1]
    unreadable("")
    assert run(change(command, retry_failed=True)) == 0
    mended = Cache(command.output)
    assert [entry.bucket[3] for entry in mended.samples] == [1, 2, 1]
    assert mended.read(mended.samples[1], 1)["subjects"].tolist() == [0, 1]
    assert mended.fingerprint != lost.fingerprint
    assert run(change(command, verify=True)) == 0


def test_a_variant_that_failed_leaves_the_others(command, monkeypatch):
    decode = decoding.decode

    def fail(family, sample, recipe, variant):
        if sample.id == "clip00" and variant == 0:
            raise Unusable("image", "not this one")
        return decode(family, sample, recipe, variant)

    monkeypatch.setattr(decoding, "decode", fail)
    assert run(change(command, output=command.output.with_name("other"), families=("references",))) == 0
    cache = Cache(command.output.with_name("other"))
    assert [entry.variants for entry in cache.samples] == [(1,), (0, 1), (0, 1)]
    assert run(change(command, output=cache.root, verify=True)) == 0


def test_the_variants_are_those_that_both_families_have(command):
    assert run(change(command, families=("references",), variants=3)) == 0
    cache = Cache(command.output, ("references", "teacher"))
    assert cache.samples[0].variants == (0, 1)
    assert set(cache.read(cache.samples[0], 1)) == {"reference_latents", "teacher_features", "subjects"}


def test_video_and_references_of_different_vaes_are_refused(command, tmp_path):
    other = tiny_wan_pipeline(seed=1)
    other.vae.register_to_config(latents_std=[2.0] * 16)
    other.save_pretrained(tmp_path / "wan")
    assert run(change(command, model=str(tmp_path / "wan"), families=("references",))) == 0
    with pytest.raises(ValueError, match=r"`video` of model sha256:.* but `references` of model"):
        Cache(command.output)
    cache = Cache(command.output, ("references",))
    vae = cache.recipes["references"]["vae"]
    assert vae["latents_std"] == [2.0] * 16
    stored = cache.items["references"].read(cache.place(cache.samples[0], "references"))["latents"]
    assert torch.equal(cache.read(cache.samples[0])["reference_latents"], normalize_latents(stored, vae))
    assert Cache(command.output, ("video",)).recipes["video"]["vae"] != vae


# -- What goes wrong on the way ---------------------------------------------------------------------------------------


def test_an_unexpected_exception_costs_one_sample(tmp_path, wan_folder, monkeypatch, caplog):
    load = decoding.load_video

    def fail(sample, *rest):
        if sample.id == "clip00":
            raise KeyError("nobody has foreseen it")
        return load(sample, *rest)

    monkeypatch.setattr(decoding, "load_video", fail)
    command = cache_command(write_clips(tmp_path / "clips", 2), tmp_path / "cache", wan_folder, families=("video",))
    with caplog.at_level(logging.DEBUG, logger="refalign_training.data.decoding"):
        assert run(command) == 0
    assert "Traceback" in caplog.text
    (line,) = failures(command.output)
    assert (line["sample_id"], line["kind"]) == ("clip00", "not readable")
    assert line["detail"] == "KeyError: 'nobody has foreseen it'"
    assert len(Cache(command.output).samples) == 1


def test_a_dead_decoder_is_told_with_its_samples(made, monkeypatch):
    def die(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")  # as torch tells of it

    monkeypatch.setattr(decoding._Tasks, "__getitem__", die)
    sample = next(iter(read_source(made.source)))
    died = pytest.raises(ValueError, match=r"has died .*these samples: clip00\. Run the command again.*--workers 0")
    with died, decoding.decoding("video", RECIPE, [Task("key", 0, sample)], workers=0) as results:
        list(results)


@pytest.mark.parametrize("changes", [{}, {"verify": True}, {"prune": True}])
def test_an_index_that_names_a_folder_outside_is_refused(command, tmp_path, changes):
    header, table = open_index(command.output)
    (command.output / header["families"]["video"]["folder"]).rename(tmp_path / "video-0")
    header["families"]["video"]["folder"] = "../video-0"
    write_index(command.output, header, table.read().to_pylist())
    before = stamps(tmp_path, "video-0/*/*")
    with pytest.raises(ValueError, match=r"names '\.\./video-0' as a folder of its own"):
        run(change(command, **changes)) if changes else Cache(command.output)
    assert stamps(tmp_path, "video-0/*/*") == before


def test_an_index_that_is_damaged_is_named(command):
    index = command.output / "samples.parquet"
    index.write_bytes(index.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"samples\.parquet is damaged .*Remove it and run `refalign-train cache`"):
        Cache(command.output)


def test_the_empty_prompt_without_text(made, tmp_path, command):
    assert run(change(made, output=tmp_path / "video", families=("video",))) == 0
    with pytest.raises(ValueError, match=r"no embeddings of the empty prompt. .*--families text"):
        _ = Cache(tmp_path / "video").empty_prompt_embeds
    flip(Cache(command.output).items["text"].path(bytes.fromhex(text_key([""]))))
    assert run(change(command, verify=True)) == 1
    assert run(command) == 0
    assert torch.equal(Cache(command.output).empty_prompt_embeds, Cache(made.output).empty_prompt_embeds)


def test_a_cache_of_many_samples_is_small_in_memory(made, tmp_path):
    count = 20_000
    families = {name: {"folder": i.folder.name, "variants": 1} for name, i in Cache(made.output).items.items()}
    shutil.copytree(made.output, tmp_path / "cache", ignore=shutil.ignore_patterns("*.safetensors"))
    bucket = {"frames": 81, "height": 480, "width": 832, "num_references": 3, "subjects": [[0, 1, 2]]}
    rows = []
    for number in range(count):
        row = {"id": f"total_part1/abcdefghij{number:08d}", "prompts": 1, **bucket}
        rows.append(row | {family: [number.to_bytes(16)] for family in FAMILIES})
    write_index(tmp_path / "cache", {"families": families}, rows)
    cache = Cache(tmp_path / "cache")
    assert len(cache.samples) == count
    assert cache.samples[-1].bucket == (81, 480, 832, 3)
    assert cache.place(cache.samples[300], "text") == (300).to_bytes(16)
    assert len(pickle.dumps(cache)) < 300 * count


# -- Prune ------------------------------------------------------------------------------------------------------------


def test_prune_removes_what_nothing_needs(command, capsys):
    prune = change(command, prune=True)
    before = stamps(command.output)
    assert run(prune) == 0
    assert stamps(command.output) == before
    write_clip(command.source.videos, "a clip", seed=9)
    assert run(change(command, families=("text",))) == 0
    for path in command.source.videos.glob("a clip*"):
        path.unlink()
    assert run(change(command, height=48, families=("video",))) == 0
    assert run(command) == 0
    half = folder_of(Cache(command.output), "video") / "ab/.abc.safetensors.17"
    half.mkdir(parents=True)
    (half / "abc.safetensors").write_bytes(b"half")
    (command.output / ".plan.json.17").mkdir()
    capsys.readouterr()
    assert run(prune) == 0
    assert "removed 4 files and folders" in capsys.readouterr().out  # a caption, a recipe's folder, and what was left
    assert stamps(command.output) == before
    assert [path.name for path in command.output.rglob(".*")] == [".lock"]
    assert run(change(command, verify=True)) == 0
    assert len(Cache(command.output).samples) == 3


def test_prune_waits_for_a_command_that_has_not_come_to_its_end(command, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    write_clip(command.source.videos, "a clip", seed=9)
    with monkeypatch.context() as patches:
        patches.setattr(VaeEncoder, "_encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(command)
    with pytest.raises(ValueError, match="has not come to its end"):
        run(change(command, prune=True))
    assert run(command) == 0
    assert run(change(command, prune=True)) == 0


def test_prune_waits_for_a_run_that_reads(command):
    run_ = hold(command.output, READERS)
    with pytest.raises(ValueError, match=rf"is read by process {os.getpid()} on .*Prune it when that has ended"):
        run(change(command, prune=True))
    run_.release()
    assert run(change(command, prune=True)) == 0
    assert not list(command.output.rglob(".readers/*"))


# -- What is asked ----------------------------------------------------------------------------------------------------


def test_status_tells_how_far_it_is(command, capsys):
    item_file(command.output, "clip01", "video").unlink()
    write_clip(command.source.videos, "a clip", seed=9)
    assert run(change(command, families=("text",))) == 0
    capsys.readouterr()
    assert run(CacheCommand(output=command.output, status=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("4 samples.")
    assert lines[1].split()[:6] == ["video", "2", "of", "4", "items,", "0"]
    assert lines[3].split()[:6] == ["text", "5", "of", "5", "items,", "0"]
    assert lines[-1] == "The last `cache` command has come to its end."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "Pass --model"),
        ({"teacher": None}, "Pass --teacher"),
        ({"families": ()}, "--families"),
        ({"families": ("text", "text")}, "each once"),
        ({"variants": 0}, "--variants is 0"),
        ({"workers": -1}, "--workers is -1"),
        ({"status": True, "verify": True}, "--status, --verify do not go together"),
    ],
)
def test_a_command_that_does_not_fit_together(made, changes, message):
    with pytest.raises(ValueError, match=message):
        run(change(made, **changes))


def test_a_dataset_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match="Pass the dataset"):
        run(CacheCommand(output=tmp_path))
    with pytest.raises(ValueError, match="is not a cache"):
        run(CacheCommand(output=tmp_path, verify=True))


@pytest.mark.parametrize("changes", [{}, {"status": True}, {"verify": True}, {"prune": True}])
def test_a_cache_of_an_earlier_version_is_refused(made, tmp_path, changes):
    (tmp_path / "cache.json").write_text('{"schema": 1}', "utf-8")
    (tmp_path / "plan").mkdir()
    with pytest.raises(ValueError, match="earlier version, which this one cannot read"):
        run(change(made, output=tmp_path, **changes))
    with pytest.raises(ValueError, match="earlier version"):
        Cache(tmp_path)


def test_a_family_that_was_not_computed(made, tmp_path):
    assert run(change(made, output=tmp_path / "cache", families=("text",))) == 0
    with pytest.raises(ValueError, match="has no video"):
        Cache(tmp_path / "cache", ("video", "text"))


def test_limit_takes_the_first_samples(made, tmp_path, capsys):
    assert run(change(made, output=tmp_path / "cache", families=("text",), limit=2)) == 0
    assert [e.sample_id for e in Cache(tmp_path / "cache").samples] == ["clip00", "clip01"]
    assert "the dataset's first ones, as --limit says" in capsys.readouterr().out


def test_digests_do_not_depend_on_the_order_of_names():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.0})


def test_a_folder_of_other_things_is_no_place_for_a_cache(made, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="holds other things than a cache"):
        run(change(made, output=tmp_path))


def test_a_cache_without_a_complete_sample_is_an_error(made, tmp_path, capsys):
    clips = write_clips(tmp_path / "clips", 2)
    for video in clips.glob("*.mp4"):
        video.write_bytes(b"")
    source = dataclasses.replace(made.source, videos=clips)
    assert run(change(made, source=source, output=tmp_path / "cache", families=("video",))) == 1
    assert "0 of 2 samples are complete" in capsys.readouterr().out
