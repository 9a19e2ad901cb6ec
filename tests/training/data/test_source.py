import itertools
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro

from refalign_training.bounds import InvalidOption
from refalign_training.data import source as source_module
from refalign_training.data.sample import Clip, Fault, Sample
from refalign_training.data.sample_files import write_sample
from refalign_training.data.source import Source, read_source
from tests.training.opens2v_files import write_opens2v


@pytest.fixture
def own(tmp_path):
    row = {"video": "a.mp4", "prompt": "A cat.", "references": ["a.png"]}
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row | {"id": name}) for name in ("x", "y", "x", "z", "x")))
    return file


def test_every_format_is_read(tmp_path, own):
    files = write_opens2v(tmp_path, clips=2, videos=False)
    items = list(read_source(Source("opens2v", files.annotations, files.videos, files.cross_pairs)))
    assert tuple(item.id for item in items) == files.sample_ids and items[0].references[0].cross

    found = {"dog": {"obj_from_tgt_video": [{"frame_idx": 0.5, "bbox_loc": [0, 0, 300, 300]}], "refer_result": []}}
    row = {"video_id": "a", "video_caption": "A dog.", "cross_pair": json.dumps(found)}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert [item.id for item in read_source(Source("phantom", (tmp_path / "a.parquet",), tmp_path))] == ["a"]

    samples = [item for item in read_source(Source("table", (own,))) if isinstance(item, Sample)]
    lines = tmp_path / "subset.jsonl"
    lines.write_text("\n".join(write_sample(sample, tmp_path) for sample in samples))
    assert list(read_source(Source("samples", (lines,)))) == samples

    for name in ("b.mp4", "b.ref0.png", "b.txt"):
        (tmp_path / name).write_text("B.")
    assert [item.id for item in read_source(Source("folder", videos=tmp_path)) if isinstance(item, Sample)] == ["b"]


def test_an_id_comes_once(own):
    items = list(read_source(Source("table", (own,))))
    assert [item.id for item in items if isinstance(item, Sample)] == ["x", "y", "z"]
    faults = [item for item in items if isinstance(item, Fault)]
    assert [(f.kind, f.sample_id, f.row, f.lost) for f in faults] == [
        ("duplicate id", "x", 2, "sample"),
        ("duplicate id", "x", 4, "sample"),
    ]


def test_an_id_comes_once_across_files(own):
    samples = [item for item in read_source(Source("table", (own, own))) if isinstance(item, Sample)]
    assert [sample.id for sample in samples] == ["x", "y", "z"]


def test_many_ids_are_told_apart(monkeypatch):
    clip = Clip(Path("a.mp4"))
    ids = (f"part/{i}" for i in itertools.chain(range(50_000), range(10)))
    monkeypatch.setattr(source_module, "_read", lambda _: (Sample(i, ("A.",), clip, (), "", 0) for i in ids))
    monkeypatch.setattr(source_module, "check_source", lambda _: None)
    items = list(read_source(Source("folder")))
    assert sum(isinstance(item, Sample) for item in items) == 50_000 and len(items) == 50_010


def test_reading_may_stop_early_and_change_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    files = write_opens2v(tmp_path, clips=4, videos=False)
    items = read_source(Source("opens2v", files.annotations, files.videos, files.cross_pairs))
    got = [next(items)]
    thread = threading.Thread(target=lambda: got.append(next(items)))
    thread.start()
    thread.join()
    assert [item.id for item in got] == list(files.sample_ids[:2])
    assert list((tmp_path / "temporary").iterdir())
    items.close()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "opens2v"}, "need annotation files"),
        ({"data": "opens2v", "annotations": ("own",)}, "need the folder of the videos"),
        ({"data": "phantom", "annotations": ("own",)}, "need the folder of the videos"),
        ({"data": "table"}, "need annotation files"),
        ({"data": "samples"}, "need annotation files"),
        ({"data": "folder"}, "need the folder"),
        ({"data": "folder", "annotations": ("own",), "videos": "."}, "no annotation files"),
        ({"data": "table", "annotations": ("none",)}, "does not exist"),
        ({"data": "table", "annotations": ("own",), "videos": "none"}, "There is no folder"),
        ({"data": "table", "annotations": ("own",), "cross_pairs": ("own",)}, "are OpenS2V-5M's"),
        ({"data": "opens2v", "annotations": ("own",), "videos": ".", "cross_pairs": ("none",)}, "does not exist"),
        ({"data": "zip", "annotations": ("own",)}, "data is 'zip': it must be 'opens2v'"),
    ],
)
def test_what_is_missing_is_said_at_once(own, values, message):
    paths = {"own": own, "none": own.parent / "none", ".": own.parent}
    given = {
        name: tuple(map(paths.get, value)) if isinstance(value, tuple) else paths.get(value, value)
        for name, value in values.items()
    }
    with pytest.raises((ValueError, InvalidOption), match=message):
        read_source(Source(**given))


def test_a_source_is_a_command_line():
    arguments = "--data opens2v --annotations a.json b.json --videos v --rule.max-references 2"
    parsed = tyro.cli(Source, args=arguments.split())
    assert parsed.annotations == (Path("a.json"), Path("b.json")) and parsed.rule.max_references == 2
