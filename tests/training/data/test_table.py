import json
import os
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign_training.data.folder import read_folder
from refalign_training.data.recipe import SelectionRule
from refalign_training.data.sample import Fault, Sample
from refalign_training.data.sample_files import read_samples_file, write_sample
from refalign_training.data.table import read_table


ROW = {"video": "clips/a.mp4", "prompt": "A cat.", "references": ["refs/a.png", "refs/b.jpg"]}


def parts(items):
    items = list(items)
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Fault)]


def jsonl(folder: Path, *rows, name="data.jsonl") -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder / name


def table(folder: Path, text: str | bytes) -> Path:
    (folder / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "data.csv"


def views(sample: Sample) -> list[Path]:
    return [reference.view.path for reference in sample.references]


def test_json_lines(tmp_path):
    (sample,), faults = parts(read_table([jsonl(tmp_path, ROW | {"start": 5, "end": 50, "quality": 0.5, "by": "me"})]))
    assert not faults
    assert (sample.id, sample.prompts, sample.row) == ("clips/a", ("A cat.",), 0)
    assert (sample.clip.path, sample.clip.start, sample.clip.end) == (tmp_path / "clips/a.mp4", 5, 50)
    assert views(sample) == [tmp_path / "refs/a.png", tmp_path / "refs/b.jpg"]
    assert all(r.view.frame is None and r.view.box is None and not r.cross for r in sample.references)
    assert [reference.subject for reference in sample.references] == ["1", "2"]
    assert sample.scores == {"quality": 0.5, "references": 2}
    assert sample.clip.stride == 25 / 16  # real time


def test_the_column_may_be_called_reference(tmp_path):
    row = {"reference" if name == "references" else name: value for name, value in ROW.items()}
    expected, _ = parts(read_table([jsonl(tmp_path, ROW)]))
    assert parts(read_table([jsonl(tmp_path, row)]))[0] == expected
    written = table(tmp_path, "video,prompt,reference\nclips/a.mp4,A cat.,refs/a.png|refs/b.jpg\n")
    assert views(*parts(read_table([written]))[0]) == views(*expected)
    _, (fault,) = parts(read_table([jsonl(tmp_path, ROW | row)]))
    assert "both references and reference" in fault.detail


def test_paths_start_from_the_root(tmp_path):
    (sample,), _ = parts(read_table([jsonl(tmp_path, ROW)], root=Path("/data")))
    assert sample.clip.path == Path("/data/clips/a.mp4") and views(sample)[0] == Path("/data/refs/a.png")
    (sample,), _ = parts(read_table([jsonl(tmp_path, ROW | {"video": "/data/x.mp4"})], root=Path("/data")))
    assert sample.id == "x"


def test_ids_subjects_and_prompts(tmp_path):
    row = ROW | {"id": "mine/1", "subjects": ["cat", "hat"], "prompt": ["One.", "", "Two."]}
    (first, second), _ = parts(read_table([jsonl(tmp_path, row, ROW | {"id": 7, "references": "refs/a.png"})]))
    assert first.id == "mine/1" and first.prompts == ("One.", "Two.")
    assert [(r.subject, r.label) for r in first.references] == [("cat", "cat"), ("hat", "hat")]
    assert second.id == "7" and len(second.references) == 1


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"video": None}, "field"),
        ({"video": "../a.mp4"}, "path"),
        ({"video": "/etc/a.mp4"}, "path"),
        ({"video": "."}, "path"),
        ({"id": "a//b"}, "id"),
        ({"id": ["a"]}, "id"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": " "}, "no prompt"),
        ({"prompt": 3}, "field"),
        ({"references": []}, "no references"),
        ({"references": {"a": 1}}, "field"),
        ({"subjects": ["one"]}, "field"),
        ({"start": "5"}, "field"),
        ({"start": -1}, "field"),
        ({"start": 9, "end": 9}, "no frames"),
    ],
)
def test_a_bad_row_costs_only_itself(tmp_path, values, kind):
    file = jsonl(tmp_path, ROW | {"id": "x"}, ROW | values, ROW | {"id": "y"})
    samples, faults = parts(read_table([file]))
    assert [sample.id for sample in samples] == ["x", "y"]
    assert [(fault.kind, fault.row, fault.lost) for fault in faults] == [(kind, 1, "sample")]


def test_a_bad_reference_costs_only_itself(tmp_path):
    row = ROW | {"references": ["../x.png", "a.png", 3, "b.png", "c.png", "d.png"]}
    (sample,), faults = parts(read_table([jsonl(tmp_path, row)]))
    assert [path.name for path in views(sample)] == ["a.png", "b.png", "c.png"]  # three at most, the first ones
    assert [fault.kind for fault in faults] == ["path", "field", "field"]
    assert {fault.lost for fault in faults} == {"reference"}
    (sample,), _ = parts(read_table([jsonl(tmp_path, ROW)], rule=SelectionRule(max_references=1)))
    assert len(sample.references) == 1


def test_lines_that_are_broken_cost_only_themselves(tmp_path):
    good = json.dumps(ROW | {"prompt": "Café 公园"}, ensure_ascii=False).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b"caf\xe9",
        b"{",
        b"[]",
        b'"text"',
        b"\0",
        b"[" * 99999,
        b" ",
        good,
        b"1e999",
    ]
    samples, faults = parts(read_table([jsonl(tmp_path, *lines)]))
    assert [(sample.row, sample.prompts) for sample in samples] == [(0, ("Café 公园",)), (9, ("Café 公园",))]
    assert [fault.row for fault in faults] == [2, 3, 4, 5, 6, 7, 10]


def test_scores_that_are_no_numbers(tmp_path):
    line = json.dumps(ROW | {"good": True, "quality": 1, "clip": 2}).replace("2}", "NaN}").encode()
    (sample,), faults = parts(read_table([jsonl(tmp_path, line)]))
    assert sample.scores == {"quality": 1, "references": 2}
    assert [(fault.kind, fault.lost) for fault in faults] == [("score", "nothing")]


def test_csv(tmp_path):
    text = (
        "\ufeffvideo,prompt,references,start,end,quality,note\r\n"
        'a.mp4,"A cat, a hat.\nTwo lines.",x.png|y.png,0,10,0.5,\r\n'
        "\r\n"
        'b.mp4,[A cat],"[""p|q.png"", ""r.png""]",,,,n\r\n'
    )
    (first, second), faults = parts(read_table([table(tmp_path, text)]))
    assert not faults and (first.row, second.row) == (0, 1)
    assert first.prompts == ("A cat, a hat.\nTwo lines.",) and (first.clip.start, first.clip.end) == (0, 10)
    assert [path.name for path in views(first)] == ["x.png", "y.png"] and first.scores["quality"] == 0.5
    assert second.prompts == ("[A cat]",) and [path.name for path in views(second)] == ["p|q.png", "r.png"]
    assert second.clip.end is None and second.scores == {"references": 2}


HEADER = "video,prompt,references"
ROW_OF_CSV = "clips/a.mp4,A cat.,x.png"
TABLES = {
    "semicolons": "video;prompt;references;quality\nclips/a.mp4;A cat.;x.png;0,5\n",
    "tabs": f"{HEADER}\n{ROW_OF_CSV}\n".replace(",", "\t"),
    "bars": f"{HEADER}\n{ROW_OF_CSV}\n".replace(",", "|"),
    "excel's first line": f"sep=,\r\n{HEADER}\r\n{ROW_OF_CSV}\r\n",
    "capitals and blanks": f"Video, Prompt, REFERENCES\n{ROW_OF_CSV}\n",
    "blank columns and rows": f"{HEADER},,\r\n{ROW_OF_CSV},,\r\n,,,,\r\n",
    "short rows": f"{HEADER},quality\n{ROW_OF_CSV}\n",
    "backslashes": f"{HEADER}\nclips\\a.mp4,A cat.,.\\x.png\n",
    "utf-16": f"{HEADER}\r\n{ROW_OF_CSV}\r\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", TABLES)
def test_csv_as_programs_write_it(tmp_path, name):
    (sample,), faults = parts(read_table([table(tmp_path, TABLES[name])]))
    assert not faults and (sample.id, sample.prompts) == ("clips/a", ("A cat.",))
    assert views(sample) == [tmp_path / "x.png"]
    assert sample.scores.get("quality") == (0.5 if name == "semicolons" else None)


def test_a_json_list_is_a_table(tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps([ROW | {"id": "x"}, ROW], indent=1))
        samples, faults = parts(read_table([tmp_path / name]))
        assert not faults and [sample.id for sample in samples] == ["x", "clips/a"]


def test_what_pandas_and_windows_write(tmp_path):
    nothing = json.dumps(ROW | {"id": None, "start": None}).replace("null", "NaN").encode()
    drive = ROW | {"video": "C:\\clips\\a.mp4"}
    (sample,), faults = parts(read_table([jsonl(tmp_path, nothing, drive, ROW | {"start": 0.5})]))
    assert sample.id == "clips/a" and sample.clip.start == 0
    assert [fault.kind for fault in faults] == ["path", "field"]
    assert "a path of Windows' own" in faults[0].detail and "a frame and not a second" in faults[1].detail


def test_csv_lines_that_are_broken_are_reported(tmp_path):
    lines = [
        b"video,prompt,references",
        b"a.mp4,one,x.png",
        b"b.mp4,caf\xe9,x.png",
        b"c.mp4,one",
        b"d.mp4,one,x.png,more",
        b"e.mp4,\0,x.png",
        b'f.mp4,"an open quote,x.png',
        b'g.mp4,"lost with it",x.png',
        b"h.mp4,one,[oops",
        b"i.mp4," + b"x" * 200_000 + b",x.png",
        b"j.mp4,one,x.png",
        b'k.mp4,"to the end,x.png',
        b"l.mp4,one,x.png",
    ]
    samples, faults = parts(read_table([table(tmp_path, b"\n".join(lines))]))
    assert [sample.id for sample in samples if sample.id != "e"] == ["a", "j"]
    assert {fault.lost for fault in faults} == {"sample"}
    assert any("lines 7 to 8" in fault.detail for fault in faults)
    assert any("lines 12 to 13" in fault.detail for fault in faults)


def test_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [ROW | {"id": str(i), "quality": float(i), "prompt": None if i == 1 else "A cat."} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    samples, faults = parts(read_table([path]))
    assert [(sample.id, sample.scores["quality"]) for sample in samples] == [("0", 0), ("2", 2)]
    assert [(fault.kind, fault.sample_id, fault.row) for fault in faults] == [("no prompt", "1", 1)]
    path.write_bytes(path.read_bytes()[:-20])
    assert [fault.kind for fault in read_table([path])] == ["not readable"]


def test_wrong_tables_say_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_table([tmp_path / "none.csv"])
    with pytest.raises(ValueError, match=r"\.jsonl"):
        read_table([jsonl(tmp_path, ROW, name="data.json")])
    for text in ("path,prompt,references\n", "", "video;prompt;images\n", "video,prompt\n".encode("utf-16")):
        with pytest.raises(ValueError, match="must have video, prompt, references"):
            read_table([table(tmp_path, text)])
    pq.write_table(pa.table({"video": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must have"):
        read_table([tmp_path / "a.parquet"])


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*ROW, "id", "subjects", "start", "end", "quality"])


@settings(max_examples=100, deadline=None)
@given(junk | st.dictionaries(NAMES, junk).map(lambda values: ROW | values), st.binary(max_size=20))
def test_whatever_a_line_holds_its_neighbours_are_read(tmp_path_factory, value, data):
    file = jsonl(tmp_path_factory.mktemp("any"), ROW, value, data.replace(b"\n", b""), ROW)
    samples, faults = parts(read_table([file]))
    assert {0, 3} <= {sample.row for sample in samples} and {fault.row for fault in faults} <= {1, 2}


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from('a,"\n\r|[]\0é ')))
def test_whatever_a_csv_holds_it_is_read_to_the_end(tmp_path_factory, text):
    for item in read_table([table(tmp_path_factory.mktemp("any"), f"video,prompt,references\n{text}")]):
        assert isinstance(item, (Sample, Fault))


# ---- folders


def write_folder(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"About {Path(name).stem}.\n" if name.lower().endswith(".txt") else "")
    return folder


def test_a_folder(tmp_path):
    write_folder(
        tmp_path, "b.mp4", "b.txt", "b.ref10.png", "b.ref2.JPG", "a/c.v2.MOV", "a/c.v2.txt", "a/c.v2.ref0.webp"
    )
    write_folder(tmp_path, ".hidden.mp4", "README.md", "README.txt", "other.png", "Thumbs.db")
    (second, first), faults = parts(read_folder(tmp_path))
    assert not faults
    assert (first.id, first.prompts, first.clip.path) == ("b", ("About b.",), tmp_path / "b.mp4")
    assert views(first) == [tmp_path / "b.ref2.JPG", tmp_path / "b.ref10.png"]
    assert second.id == "a/c.v2" and views(second) == [tmp_path / "a/c.v2.ref0.webp"]


def test_what_a_folder_lacks_is_a_fault(tmp_path):
    write_folder(tmp_path, "a.mp4", "a.ref0.png", "b.mp4", "b.txt", "c.ref0.png", "d.mp4", "d.txt", "d.ref0.png")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    samples, faults = parts(read_folder(tmp_path))
    assert not samples
    assert [(fault.kind, fault.sample_id) for fault in faults] == [
        ("no prompt", "a"),
        ("no references", "b"),
        ("not readable", "d"),
        ("missing file", ""),
    ]


@pytest.mark.parametrize("video", ["MP4", "MTS", "ts", "mpg", "3GP", "wmv", "flv", "gif", "vob", "m2ts", "ogv"])
def test_suffixes_of_all_that_is_read_in_any_case(tmp_path, video):
    write_folder(tmp_path, f"A.{video}", "A.TXT", "A.REF0.JPG", "A.ref1.avif", "A.ref2.tiff", "a.Ref3.gif")
    (sample,), faults = parts(read_folder(tmp_path, SelectionRule(max_references=4)))
    assert not faults and sample.clip.path.name == f"A.{video}" and sample.prompts == ("About A.",)
    assert [path.name for path in views(sample)] == ["A.REF0.JPG", "A.ref1.avif", "A.ref2.tiff", "a.Ref3.gif"]


def test_names_that_differ_by_more_than_case_stay_apart(tmp_path):
    """As macOS and Linux spell an accent; two videos that only case tells apart have their own files."""
    composed, taken_apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_folder(tmp_path, f"{taken_apart}.mp4", f"{composed}.txt", f"{composed}.ref0.png")
    for name in ("a", "A"):
        write_folder(tmp_path, f"{name}.mp4", f"{name}.txt", f"{name}.ref0.png")
    samples, faults = parts(read_folder(tmp_path))
    assert not faults and len(samples) == 3
    assert {(sample.prompts, views(sample)[0].name) for sample in samples[:2]} == {
        (("About A.",), "A.ref0.png"),
        (("About a.",), "a.ref0.png"),
    }


@pytest.mark.parametrize(
    ("name", "says", "lost"),
    [
        ("a.ref.png", "a reference is called a.ref1.png", "reference"),
        ("a_ref1.png", "a reference is called a.ref1.png", "reference"),
        ("a.ref1 (1).png", "a reference is called a.ref1.png", "reference"),
        ("a.ref1.HEIC", "a reference is called a.ref1.png, in a format that is read", "reference"),
        ("a.png", "a reference is called a.ref1.png", "nothing"),
        ("a.ref0.jpg", "reference 0 is a.ref0.jpg; name it, say, a.ref1.png", "reference"),
        ("a.mp4.txt", "the caption is called a.txt", "nothing"),
        ("a.TXT", "a.mp4 has the caption a.TXT", "nothing"),
        ("b.txt", "there is no video b, whose caption it would be", "nothing"),
        ("b.m2v", "a video is called, say, clip.mp4", "sample"),
        ("b.mp4.part", "a video is called, say, clip.mp4", "sample"),
    ],
)
def test_a_file_that_is_nearly_named_right_is_told(tmp_path, name, says, lost):
    write_folder(tmp_path, "a.mp4", "a.txt", "a.ref0.png", name)
    (sample,), (fault,) = parts(read_folder(tmp_path))
    assert sample.prompts == ("About a.",) and len(views(sample)) == 1
    assert fault.kind == "name" and says in fault.detail and fault.lost == lost


def test_a_file_of_two_videos_of_one_name_is_told_once(tmp_path):
    write_folder(tmp_path, "a.mov", "a.mp4", "a.txt", "a.TXT", "a.ref0.jpg", "a.ref0.png")
    _, faults = parts(read_folder(tmp_path))
    told = [fault.detail for fault in faults if fault.kind == "name"]
    assert len(told) == len(set(told)) == 2


def test_a_caption_of_another_suffix_is_told_where_there_is_none(tmp_path):
    write_folder(tmp_path, "a.mp4", "a.caption", "a.ref0.png", "b.mp4", "b.txt", "b.json", "b.ref0.png")
    (sample,), (lost, near) = parts(read_folder(tmp_path))
    assert sample.id == "b" and (lost.kind, lost.sample_id) == ("no prompt", "a")
    assert near.detail == "'a.caption' is not taken: the caption is called a.txt"


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    write_folder(tmp_path, "a.mp4", "a.ref0.png", "b.txt", "b.ref0.png")
    os.mkfifo(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.mp4")
    os.mkfifo(tmp_path / "t.csv")
    samples, faults = parts(read_folder(tmp_path))
    assert not samples
    assert [fault.kind for fault in faults] == ["missing file", "missing file"]
    assert all("is not a file but a named pipe" in fault.detail for fault in faults)
    with pytest.raises(ValueError, match=r"The table .*t\.csv is not a file but a named pipe\."):
        read_table([tmp_path / "t.csv"])


def test_captions_of_notepad(tmp_path):
    write_folder(tmp_path, "a.mp4", "a.ref0.png")
    (tmp_path / "a.txt").write_bytes("Un café.\r\n".encode("utf-16"))
    (sample,), _ = parts(read_folder(tmp_path))
    assert sample.prompts == ("Un café.",)


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path, "disk/a.mp4", "disk/a.txt", "disk/a.ref0.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "data")
    samples, _ = parts(read_folder(tmp_path / "data"))
    assert [sample.id for sample in samples] == ["linked/a"]


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_not_utf8_is_a_fault(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"")
    samples, faults = parts(read_folder(write_folder(tmp_path, "a.mp4", "a.txt", "a.ref0.png")))
    assert len(samples) == 1 and len(faults) == 1


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        read_folder(tmp_path / "none")


# ---- samples


def test_samples_that_were_written_come_back(tmp_path):
    samples, _ = parts(read_table([jsonl(tmp_path, ROW, ROW | {"id": "é", "prompt": ["One.", "Zwei."]})]))
    lines = [write_sample(sample, tmp_path).encode() for sample in samples]
    file = tmp_path / "subset.jsonl"
    file.write_bytes(b"\n".join([lines[0], b"\xff", b"{}", b"", b"[1]", lines[1]]))
    read, faults = parts(read_samples_file([file]))
    assert read == samples
    assert [(fault.row, fault.source) for fault in faults] == [(1, str(file)), (2, str(file)), (4, str(file))]
    with pytest.raises(ValueError, match="does not exist"):
        read_samples_file([tmp_path / "none"])
