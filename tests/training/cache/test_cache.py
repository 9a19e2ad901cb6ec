"""A cache in one process: what it holds, what makes an item stale, what becomes of what is broken."""

import dataclasses
import json
import logging
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load

from refalign_training.cache import run
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.decoding import Decoder, Task
from refalign_training.cache.encoders import VaeEncoder, vae_config
from refalign_training.cache.files import (
    FAMILIES,
    CacheFolder,
    Header,
    Item,
    Outcome,
    digest,
    write_record,
    write_text,
)
from refalign_training.cache.fill import NOT_FINITE
from refalign_training.cache.items import ShardWriter, make_item, read_item
from refalign_training.cache.reader import Cache, normalize_latents
from refalign_training.data.pixels import load_references, load_video
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import FAULTS, Unusable
from refalign_training.data.source import read_source
from tests.tiny_pipeline import tiny_wan_pipeline
from tests.training.small_cache import (
    FRAMES,
    HEIGHT,
    WIDTH,
    all_items,
    cache_command,
    change,
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
    """The command of a whole cache of five clips, in three units, run."""
    folder = tmp_path_factory.mktemp("made")
    command = cache_command(write_clips(folder / "clips", 5), folder / "cache", wan_folder, teacher, variants=2)
    assert run(command) == 0
    return command


@pytest.fixture
def command(made, tmp_path) -> CacheCommand:
    """The same on a copy of its own of clips and cache, with the files' times."""
    shutil.copytree(made.source.videos, tmp_path / "clips")
    shutil.copytree(made.output, tmp_path / "cache")
    source = dataclasses.replace(made.source, videos=tmp_path / "clips")
    command = change(made, source=source, output=tmp_path / "cache")
    assert run(command) == 0
    return command


@pytest.fixture
def stale(command, caplog):
    """Runs the command with changes; says what was called stale, and how many items were computed, by family."""

    def run_again(**changes) -> tuple[list[str], dict[str, int]]:
        caplog.clear()
        before = stamps(command.output)
        with caplog.at_level(logging.INFO, logger="refalign_training.cache"):
            assert run(change(command, **changes)) == 0
        after = stamps(command.output)
        assert {path: after[path] for path in before} == before  # nothing was made twice
        families = [path.split("/")[1] for path in after if path not in before]
        return caplog.messages, {family: families.count(family) for family in sorted(set(families))}

    return run_again


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
    assert [entry.bucket for entry in Cache(made.output).samples] == [(5, 32, 48, n) for n in (1, 2, 1, 2, 1)]


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


def test_the_shards_hold_the_same(made, tmp_path):
    sharded = change(made, output=tmp_path / "cache", shards=True)
    assert run(sharded) == 0
    assert not list((tmp_path / "cache/items").rglob("*.safetensors"))
    files, shards = Cache(made.output), Cache(tmp_path / "cache")
    assert shards.fingerprint == files.fingerprint
    for ours, theirs in zip(shards.samples, files.samples, strict=True):
        for variant in (0, 1):
            a, b = shards.read(ours, variant), files.read(theirs, variant)
            assert all(torch.equal(a[name], b[name]) for name in set(a) - {"prompt_embeds"})
            assert torch.equal(a["prompt_embeds"][0], b["prompt_embeds"][0])
    assert torch.equal(shards.empty_prompt_embeds, files.empty_prompt_embeds)


def test_the_index_finds_an_item_in_a_tar_without_unpacking(made, tmp_path):
    assert run(change(made, output=tmp_path / "cache", shards=True)) == 0
    rows = parquet.read_table(tmp_path / "cache/index/references.parquet").to_pylist()
    assert len(rows) == 10  # two variants each
    for row in rows:
        tar = tmp_path / "cache/shards/references" / row["shard"]
        data = tar.read_bytes()[row["offset"] : row["offset"] + row["size"]]
        with tarfile.open(tar) as opened:
            assert opened.extractfile(f"{row['key']}.safetensors").read() == data
        assert load(data)["latents"].shape[0] == 16


def test_a_tar_that_gets_too_large_is_split(tmp_path):
    folder = CacheFolder(tmp_path)
    writer = ShardWriter(folder, "video", "000000", shard_bytes=12_000)
    tensors = [{"latents": torch.full((1000,), float(number))} for number in range(4)]
    items = [writer.add(*make_item(t, {"number": n}, {})) for n, t in enumerate(tensors)]
    writer.close()
    assert [item.shard.rsplit("-", 1)[0] for item in items] == ["000000-0", "000000-0", "000000-1", "000000-1"]
    assert sorted(path.name for path in folder.shards("video").iterdir()) == sorted({item.shard for item in items})
    for item, tensor in zip(items, tensors, strict=True):
        assert torch.equal(read_item(folder.item("video", item), item)["latents"], tensor["latents"])


def test_workers_change_nothing(made, tmp_path):
    parallel = change(made, output=tmp_path / "cache", workers=1, families=("references",))
    assert run(parallel) == 0
    ours, expected = all_items(parallel.output), all_items(made.output)
    assert len(ours) == 10
    assert all(torch.equal(ours[path]["latents"], expected[path]["latents"]) for path in ours)


def test_no_pickle_is_written(made):
    suffixes = {path.suffix for path in made.output.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".lock", ""}


# -- What makes items stale -------------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing(stale, command):
    patterns = ("records/**/*.jsonl", "plan/0*.jsonl", "plan/summary.json", "*.json", "*.safetensors")
    before = [stamps(command.output, pattern) for pattern in patterns]
    assert all(before)
    assert stale() == ([], {})
    assert [stamps(command.output, pattern) for pattern in patterns] == before


@pytest.mark.parametrize("family", ["video", "references", "text", "teacher"])
def test_a_family_is_rebuilt_alone(stale, command, family):
    shutil.rmtree(command.output / "records" / family)
    shutil.rmtree(command.output / "items" / family)
    messages, computed = stale(families=(family,))
    assert computed == {family: {"references": 10, "teacher": 10}.get(family, 5)}
    assert messages == []


def test_another_size_makes_all_but_text_anew_and_says_why(stale):
    messages, computed = stale(height=48)
    assert computed == {"references": 10, "teacher": 10, "video": 5}
    assert "`video` is computed anew: height changed from 32 to 48" in messages
    assert "`teacher` is computed anew: height changed from 32 to 48" in messages


def test_another_number_of_frames_concerns_the_video_alone(stale):
    assert stale(num_frames=9)[1] == {"video": 5}


def test_another_dtype_makes_all_anew(stale):
    messages, computed = stale(dtype="bfloat16")
    assert computed == {"references": 10, "teacher": 10, "text": 5, "video": 5}
    assert "`text` is computed anew: dtype changed from float32 to bfloat16" in messages


def test_another_model_and_another_seed_at_once(stale, tmp_path):
    tiny_wan_pipeline(seed=1).save_pretrained(tmp_path / "wan")
    messages, computed = stale(model=str(tmp_path / "wan"), seed=1)
    assert computed == {"references": 10, "teacher": 10, "text": 5, "video": 5}
    assert "`video` is computed anew: model changed; seed changed from 0 to 1" in messages
    assert "`text` is computed anew: model changed" in messages
    assert "`teacher` is computed anew: seed changed from 0 to 1" in messages


def test_another_teacher_concerns_its_features_alone(stale, tmp_path):
    messages, computed = stale(teacher=str(write_teacher(tmp_path / "teacher", seed=1)))
    assert (messages, computed) == (["`teacher` is computed anew: model changed"], {"teacher": 10})


def test_what_was_made_before_is_found_again(stale):
    stale(height=48)
    assert stale(height=32)[1] == {}


def test_more_variants_keep_the_first_ones(stale):
    assert stale(variants=3)[1] == {"references": 5, "teacher": 5}


@pytest.mark.parametrize("shards", [False, True])
def test_a_new_sample_at_the_front_is_the_only_one_computed(command, shards):
    command = change(command, output=command.output.with_name("other"), shards=shards)
    assert run(command) == 0
    keys = all_keys(command)
    tars = stamps(command.output, "shards/**/*.tar")
    write_clip(command.source.videos, "a clip", seed=9)
    assert run(command) == 0
    entries = Cache(command.output).samples
    assert [entry.sample_id for entry in entries] == ["a clip", *(f"clip{n:02d}" for n in range(5))]
    computed = [json.loads(p.read_text("utf-8").split("\n")[0])["computed"] for p in record_files(command)]
    assert sum(computed) == 6  # video, text, two variants of references and teacher
    assert keys < all_keys(command)
    assert stamps(command.output, "shards/**/*.tar").items() >= tars.items()


def all_keys(command: CacheCommand) -> set[str]:
    cache = Cache(command.output)
    return {cache.item(entry, f, v).key for entry in cache.samples for f in cache.families for v in entry.variants}


def record_files(command: CacheCommand) -> list[Path]:
    return sorted((command.output / "records").rglob("*.jsonl"))


def test_a_removed_sample_leaves_the_cache(stale, command):
    for path in command.source.videos.glob("clip01*"):
        path.unlink()
    assert stale()[1] == {}
    assert [entry.sample_id for entry in Cache(command.output).samples] == [f"clip{n:02d}" for n in (0, 2, 3, 4)]


def test_a_changed_video_and_a_changed_caption(stale, command):
    other = (command.source.videos / "clip00.mp4").read_bytes()
    (command.source.videos / "clip02.mp4").write_bytes(other)
    (command.source.videos / "clip03.txt").write_text("another caption", "utf-8")
    messages, computed = stale()
    assert computed == {"text": 1, "video": 1}
    assert messages == [
        "1 samples of `video`: files changed",
        "1 samples of `text`: annotation changed",
    ]


def test_a_dataset_that_is_moved_keeps_its_items(stale, command, tmp_path):
    command.source.videos.rename(tmp_path / "moved")
    source = dataclasses.replace(command.source, videos=tmp_path / "moved")
    assert stale(source=source) == ([], {})


def test_families_of_different_videos_do_not_go_together(command):
    assert run(change(command, height=48, families=("video",))) == 0
    with pytest.raises(ValueError, match="`video` of height 48, but `references` of height 32"):
        Cache(command.output)
    assert len(Cache(command.output, ("references", "teacher", "text")).samples) == 5


# -- What is broken ---------------------------------------------------------------------------------------------------


def test_a_corrupt_video_goes_to_quarantine_and_the_rest_goes_on(made, tmp_path, wan_folder, capsys):
    clips = write_clips(tmp_path / "clips", 4)
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder)
    assert run(command) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "cache/quarantine.jsonl").read_text("utf-8").splitlines()]
    assert (line["family"], line["sample_id"]) == ("video", "clip01")
    assert line["kind"] in FAULTS and line["detail"]
    assert [e.sample_id for e in Cache(tmp_path / "cache").samples] == ["clip00", "clip02", "clip03"]
    assert len(Cache(tmp_path / "cache", ("references", "text")).samples) == 4
    assert run(change(command, status=True)) == 0
    assert f"1 {line['kind']}" in capsys.readouterr().out


def test_quarantine_waits_for_a_change_or_to_be_asked(tmp_path, wan_folder, monkeypatch):
    from refalign_training.cache import decoding

    clips = write_clips(tmp_path / "clips", 2)
    whole = (clips / "clip01.mp4").read_bytes()
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder, families=("video",), unit_size=1)
    assert run(command) == 0
    tried = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda f, s, *rest: tried.append(s.id) or decode(f, s, *rest))
    write_clip(clips, "a clip", 7)  # all move to other units
    assert run(command) == 0
    assert tried == ["a clip"]
    assert run(change(command, retry_quarantined=True)) == 0
    assert tried == ["a clip", "clip01"]
    (clips / "clip01.mp4").write_bytes(whole)
    assert run(command) == 0
    assert tried == ["a clip", "clip01", "clip01"]
    assert (tmp_path / "cache/quarantine.jsonl").read_text("utf-8") == ""
    assert len(Cache(tmp_path / "cache").samples) == 3


def test_a_removed_sample_leaves_the_quarantine(tmp_path, wan_folder):
    clips = write_clips(tmp_path / "clips", 2)
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder, families=("video",), unit_size=1)
    assert run(command) == 0
    for path in clips.glob("clip01*"):
        path.unlink()
    assert run(command) == 0
    assert (tmp_path / "cache/quarantine.jsonl").read_text("utf-8") == ""


def test_latents_that_are_not_finite_go_to_quarantine(tmp_path, wan_folder, monkeypatch):
    encode = VaeEncoder._encode
    monkeypatch.setattr(VaeEncoder, "_encode", lambda self, pixels: encode(self, pixels) * float("nan"))
    command = cache_command(write_clips(tmp_path / "clips", 1), tmp_path / "cache", wan_folder, families=("video",))
    assert run(command) == 1
    assert json.loads((tmp_path / "cache/quarantine.jsonl").read_text("utf-8"))["kind"] == "video"
    assert set(NOT_FINITE.values()) <= set(FAULTS)


def test_faults_of_the_dataset_are_listed(tmp_path, wan_folder, made):
    lines = ["{", json.dumps({"video": "clip00.mp4", "prompt": "a", "references": ["clip00.ref1.png"]})]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(lines), "utf-8")
    source = dataclasses.replace(made.source, data="table", annotations=(table,), videos=made.source.videos)
    assert run(change(made, source=source, output=tmp_path / "cache", families=("text",))) == 0
    assert json.loads((tmp_path / "cache/plan/faults.jsonl").read_text("utf-8"))["kind"] == "not readable"
    summary = json.loads((tmp_path / "cache/plan/summary.json").read_text("utf-8"))
    assert (summary["samples"], summary["faults"]) == (1, {"sample: not readable": 1})


def truncate(path: Path, item: Item) -> None:
    corrupt(path)


def flip(path: Path, item: Item) -> None:
    """Another value in the middle of the tensors' bytes: not finite."""
    content = bytearray(path.read_bytes())
    content[item.offset + item.size - 4 : item.offset + item.size] = np.float32("nan").tobytes()
    path.write_bytes(content)


def zero(path: Path, item: Item) -> None:
    """As after a loss of power: the tensors' pages were never written."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)


def remove(path: Path, item: Item) -> None:
    path.unlink()


def item_of(command: CacheCommand, sample: int, family: str, variant: int = 0) -> Item:
    cache = Cache(command.output)
    return cache.item(cache.samples[sample], family, variant)


@pytest.mark.parametrize("damage", [truncate, flip, zero, remove])
def test_verify_finds_a_broken_item_and_the_next_run_mends_it(command, damage, capsys):
    before, expected = stamps(command.output), all_items(command.output)
    item = item_of(command, 1, "references", 1)
    path = CacheFolder(command.output).item("references", item)
    damage(path, item)
    verify = change(command, verify=True)
    capsys.readouterr()
    assert run(verify) == 1
    assert "references 'clip01'" in capsys.readouterr().out
    assert len(Cache(command.output).samples) == 3  # those of its unit wait for the next run
    assert run(command) == 0
    after = stamps(command.output)
    assert [p for p in after if after[p] != before[p]] == [str(path.relative_to(command.output))]
    assert all(torch.equal(expected[p][n], t) for p, ts in all_items(command.output).items() for n, t in ts.items())
    assert run(verify) == 0


def test_verify_and_mend_in_shards(made, tmp_path):
    command = change(made, output=tmp_path / "cache", shards=True, families=("references",))
    assert run(command) == 0
    item = item_of(command, 1, "references", 1)
    flip(command.output / "shards/references" / item.shard, item)
    assert run(change(command, verify=True)) == 1
    assert run(command) == 0
    headers = [json.loads(path.read_text("utf-8").split("\n")[0]) for path in record_files(command)]
    assert [header["computed"] for header in headers] == [1, 4, 2]
    assert run(change(command, verify=True)) == 0
    assert run(change(command, prune=True)) == 0
    assert run(change(command, verify=True)) == 0


def test_verify_notices_an_item_under_another_ones_name(command, capsys):
    first, second = (item_of(command, sample, "video").key for sample in (0, 1))
    folder = CacheFolder(command.output)
    shutil.copy(folder.item("video", first), folder.item("video", second))
    assert run(change(command, verify=True)) == 1
    assert f"item {second} is not what was written" in capsys.readouterr().out


# -- Families that do not fit together --------------------------------------------------------------------------------


@pytest.fixture
def unreadable(monkeypatch):
    """Makes one reference unreadable for as long as a family is computed."""
    from refalign_training.data import pixels

    read = pixels._read_image

    def fail(name: str) -> None:
        def read_others(path: Path):
            if path.name == name:
                raise Unusable("image", "not now")
            return read(path)

        monkeypatch.setattr(pixels, "_read_image", read_others)

    return fail


def test_references_and_teacher_that_saw_other_references_are_left_out(made, tmp_path, unreadable, caplog):
    command = change(made, output=tmp_path / "cache", variants=1)
    assert run(change(command, families=("references",))) == 0
    unreadable("clip01.ref1.png")
    assert run(change(command, families=("teacher",))) == 0
    unreadable("")
    (line,) = [json.loads(line) for line in (command.output / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert (line["family"], line["sample_id"], line["lost"], line["kind"]) == (
        "teacher", "clip01", "reference", "image",
    )  # fmt: skip
    cache = Cache(command.output)
    assert [entry.sample_id for entry in cache.samples] == ["clip00", "clip02", "clip03", "clip04"]
    assert "4 samples; left out: 1 references and teacher disagree" in caplog.text
    before = cache.fingerprint
    assert run(change(command, families=("references", "teacher"))) == 0
    assert Cache(command.output).fingerprint == before  # it waits to be asked
    assert run(change(command, families=("references", "teacher"), retry_quarantined=True)) == 0
    assert len(Cache(command.output).samples) == 5
    assert (command.output / "quarantine.jsonl").read_text("utf-8") == ""


def test_a_reference_that_both_lost_changes_the_bucket(made, tmp_path, unreadable):
    command = change(made, output=tmp_path / "cache", families=("references", "teacher"), shards=True)
    unreadable("clip01.ref2.png")
    assert run(command) == 0
    lost = Cache(command.output)
    assert [entry.bucket[3] for entry in lost.samples] == [1, 1, 1, 2, 1]
    unreadable("")
    assert run(change(command, retry_quarantined=True)) == 0
    mended = Cache(command.output)
    assert [entry.bucket[3] for entry in mended.samples] == [1, 2, 1, 2, 1]
    assert mended.read(mended.samples[1], 1)["subjects"].tolist() == [0, 1]
    assert mended.fingerprint != lost.fingerprint
    assert run(change(command, verify=True)) == 0


def test_the_variants_are_those_that_both_families_have(made, tmp_path):
    command = change(made, output=tmp_path / "cache", variants=3)
    assert run(change(command, families=("references",))) == 0
    assert run(change(command, families=("teacher",), variants=2)) == 0
    cache = Cache(command.output)
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
    vae = cache.settings["families"]["references"]["vae"]
    assert vae["latents_std"] == [2.0] * 16
    item = cache.item(cache.samples[0], "references")
    stored = read_item(CacheFolder(command.output).item("references", item), item)["latents"]
    assert torch.equal(cache.read(cache.samples[0])["reference_latents"], normalize_latents(stored, vae))
    assert Cache(command.output, ("video",)).settings["families"]["video"]["vae"] != vae


# -- What goes wrong on the way ---------------------------------------------------------------------------------------


def test_another_dtype_tries_again_what_was_not_finite(tmp_path, wan_folder, monkeypatch):
    encode = VaeEncoder._encode

    def overflow(self, pixels):
        return encode(self, pixels) * (float("nan") if self.dtype == torch.float16 else 1)

    monkeypatch.setattr(VaeEncoder, "_encode", overflow)
    command = cache_command(write_clips(tmp_path / "clips", 2), tmp_path / "cache", wan_folder, families=("video",))
    assert run(change(command, dtype="float16")) == 1
    with pytest.raises(ValueError, match=r"has no sample .*: 2 failed in `video`. .*--retry-quarantined"):
        Cache(command.output)
    assert run(command) == 0
    assert len(Cache(command.output).samples) == 2


def test_an_unexpected_exception_costs_one_sample(tmp_path, wan_folder, monkeypatch, caplog):
    from refalign_training.cache import decoding

    load = decoding.load_video

    def fail(sample, *rest):
        if sample.id == "clip00":
            raise KeyError("nobody has foreseen it")
        return load(sample, *rest)

    monkeypatch.setattr(decoding, "load_video", fail)
    command = cache_command(write_clips(tmp_path / "clips", 2), tmp_path / "cache", wan_folder, families=("video",))
    with caplog.at_level(logging.DEBUG, logger="refalign_training.cache.decoding"):
        assert run(command) == 0
    assert "Traceback" in caplog.text
    (line,) = [json.loads(line) for line in (command.output / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert (line["sample_id"], line["kind"]) == ("clip00", "not readable")
    assert line["detail"] == "KeyError: 'nobody has foreseen it'"
    assert len(Cache(command.output).samples) == 1


def test_a_dead_decoder_is_told_with_its_samples(made, monkeypatch):
    from refalign_training.cache import decoding

    def die(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")  # as torch tells of it

    monkeypatch.setattr(decoding._Decoding, "__getitem__", die)
    sample = next(iter(read_source(made.source)))
    with pytest.raises(ValueError, match=r"has died .*these samples: clip00\. Run again.*--workers 0"):
        with Decoder("video", RECIPE, iter([Task("000000", 0, 0, sample)]), workers=0) as results:
            list(results)


@pytest.mark.parametrize(
    "cut", [lambda text: "", lambda text: text[:40], lambda text: text[:-30]], ids=["empty", "header", "last line"]
)
def test_a_damaged_record_is_like_none(command, cut, capsys, caplog):
    record = command.output / "records/video/000000.jsonl"
    whole = record.read_text("utf-8")
    record.write_text(cut(whole), "utf-8")
    assert len(Cache(command.output).samples) == 3
    assert "left out: 2 not computed yet in `video`" in caplog.text
    for action in ("status", "prune"):
        assert run(change(command, **{action: True})) == 0
    assert run(change(command, verify=True)) == (0 if not record.is_file() else 1)
    assert not record.is_file()
    before = stamps(command.output)
    assert run(command) == 0
    assert stamps(command.output) == before
    assert len(Cache(command.output).samples) == 5


def test_quarantine_follows_the_records_whatever_their_times(tmp_path, wan_folder):
    clips = write_clips(tmp_path / "clips", 2)
    corrupt(clips / "clip01.mp4")
    command = cache_command(clips, tmp_path / "cache", wan_folder, families=("video",))
    assert run(command) == 0
    listed = (command.output / "quarantine.jsonl").read_text("utf-8")
    (command.output / "quarantine.jsonl").write_text("", "utf-8")  # newer than all records, as in a race
    assert run(command) == 0
    assert (command.output / "quarantine.jsonl").read_text("utf-8") == listed != ""


def test_the_empty_prompt_without_text(made, tmp_path, command):
    assert run(change(made, output=tmp_path / "video", families=("video",))) == 0
    with pytest.raises(ValueError, match=r"no embeddings of the empty prompt. .*--families text"):
        _ = Cache(tmp_path / "video").empty_prompt_embeds
    item = command.output / "empty_prompt.safetensors"
    item.write_bytes(item.read_bytes()[:-4] + b"\0\0\0\1")
    assert run(change(command, verify=True)) == 1
    assert run(command) == 0
    assert torch.equal(Cache(command.output).empty_prompt_embeds, Cache(made.output).empty_prompt_embeds)


def test_a_cache_of_many_samples_is_small_in_memory(tmp_path):
    count, unit_size, made = 20_000, 256, {"ingredients": {}, "variants": 1}
    folder = CacheFolder(tmp_path)
    info = {"frames": 81, "size": [480, 832], "subjects": ["a", "b", "c"], "origins": ["regular"] * 3}
    units = [range(start, min(start + unit_size, count)) for start in range(0, count, unit_size)]
    write_text(folder.settings, json.dumps({"schema": 1, "families": dict.fromkeys(FAMILIES, made)}))
    write_text(folder.summary, json.dumps({"units": ["plan"] * len(units), "samples": count, "faults": {}}))
    for family in FAMILIES:
        for number, unit in enumerate(units):
            items = ((s, Item(digest([family, s]), 10**6, 0, info, f"{number:06d}-0.tar", 512 * s)) for s in unit)
            outcomes = [Outcome(f"total_part1/abcdefghij{s:08d}", "", "", (item,)) for s, item in items]
            write_record(folder.record(family, f"{number:06d}"), Header("plan", {}, 1), outcomes)
    cache = Cache(tmp_path)
    assert len(cache.samples) == count
    assert cache.samples[-1].bucket == (81, 480, 832, 3)
    assert cache.item(cache.samples[300], "text") == Item(digest(["text", 300]), 10**6, 0, {}, "000001-0.tar", 153_600)
    assert len(pickle.dumps(cache)) < 300 * count


# -- Prune ------------------------------------------------------------------------------------------------------------


def test_prune_removes_what_nothing_needs(command, capsys):
    prune = change(command, prune=True)
    before = stamps(command.output)
    assert run(prune) == 0
    assert stamps(command.output) == before
    assert run(change(command, height=48)) == 0
    (command.output / "items/video/.left").mkdir()
    (command.output / "items/video/.left/half").write_bytes(b"half")
    (command.output / "shards/video").mkdir(parents=True)
    (command.output / "shards/video/.000000-0.tar.17").write_bytes(b"half")
    capsys.readouterr()
    assert run(prune) == 0
    assert "removed 27 files and folders" in capsys.readouterr().out  # 5 + 10 + 10, and what was left
    assert len(stamps(command.output)) == len(before)
    assert not list(command.output.rglob(".*"))
    assert run(change(command, verify=True)) == 0
    assert len(Cache(command.output).samples) == 5


def test_prune_keeps_what_an_unfinished_cache_will_find(command, tmp_path):
    write_clip(command.source.videos, "a clip", seed=9)
    before = stamps(command.output)
    assert run(change(command, families=("text",))) == 0  # the plan has moved; text alone has followed
    assert run(change(command, prune=True)) == 0
    assert stamps(command.output).items() >= before.items()


def test_prune_keeps_the_finished_items_of_a_unit_that_was_killed(command):
    (command.output / "records/video/000001.jsonl").unlink()  # as if it had been killed before the record
    before = stamps(command.output)
    assert run(change(command, prune=True)) == 0
    assert stamps(command.output) == before


# -- What is asked ----------------------------------------------------------------------------------------------------


def test_status_tells_how_far_it_is(command, capsys):
    (command.output / "records/video/000001.jsonl").unlink()
    capsys.readouterr()
    assert run(CacheCommand(output=command.output, status=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("5 samples in 3 units.")
    assert lines[2].split()[:4] == ["video", "2/3", "3+2", "0"]
    assert lines[4].split()[:4] == ["text", "3/3", "5", "0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "Pass --model"),
        ({"teacher": None}, "Pass --teacher"),
        ({"height": 40}, "multiples of 16"),
        ({"num_frames": 6}, r"4k \+ 1"),
        ({"families": ()}, "--families"),
        ({"families": ("text", "text")}, "each once"),
        ({"variants": 0}, "--variants is 0"),
        ({"unit_size": 0}, "--unit-size is 0"),
        ({"status": True, "verify": True}, "at a time"),
    ],
)
def test_a_command_that_does_not_fit_together(made, changes, message):
    with pytest.raises(ValueError, match=message):
        run(change(made, **changes))


def test_a_dataset_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match="Pass the dataset"):
        run(CacheCommand(output=tmp_path))
    with pytest.raises(ValueError, match="is no cache"):
        run(CacheCommand(output=tmp_path, verify=True))


def test_a_cache_of_another_schema_is_refused(command):
    settings = json.loads((command.output / "cache.json").read_text("utf-8"))
    (command.output / "cache.json").write_text(json.dumps(settings | {"schema": 99}), "utf-8")
    with pytest.raises(ValueError, match="schema 99; this version reads schema 1"):
        Cache(command.output)


def test_a_family_that_was_not_computed(made, tmp_path):
    assert run(change(made, output=tmp_path / "cache", families=("text",))) == 0
    with pytest.raises(ValueError, match="has no video"):
        Cache(tmp_path / "cache", ("video", "text"))


def test_limit_takes_the_first_samples(made, tmp_path):
    assert run(change(made, output=tmp_path / "cache", families=("text",), limit=3)) == 0
    assert [e.sample_id for e in Cache(tmp_path / "cache").samples] == ["clip00", "clip01", "clip02"]


def test_keys_do_not_depend_on_the_order_of_ingredients():
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
