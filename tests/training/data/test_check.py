import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from refalign.video import read_video, write_video
from refalign_training.cli import main
from refalign_training.data.check import is_selected, parse_selection
from refalign_training.data.sample import Clip, Sample
from tests.training.opens2v_files import Drawn, opens2v_record, rectangle, write_annotations, write_opens2v


SMALL = ["--height", "48", "--width", "64", "--num-frames", "5"]


@pytest.fixture
def opens2v(tmp_path):
    return write_opens2v(tmp_path / "opens2v", clips=4, parts=2)


def check(*arguments) -> int:
    return main(["check", *map(str, arguments)])


def check_opens2v(files, *arguments) -> int:
    return check(
        "--data", "opens2v", "--annotations", *files.annotations, "--videos", files.videos, *SMALL, *arguments
    )


# -- What is told -----------------------------------------------------------------------------------------------------


def test_a_whole_dataset_is_usable(opens2v, capsys):
    assert check_opens2v(opens2v, "--cross-pairs", *opens2v.cross_pairs) == 0
    told = capsys.readouterr().out
    assert "usable samples: 4\n  number of references 2: 4\n" in told
    assert "with a subject that another clip shows too: 4" in told
    assert "lost" not in told and "remarks" not in told


def test_a_bad_video_is_told_with_id_and_row_and_the_rest_goes_on(opens2v, capsys):
    broken = next((opens2v.videos / "total_part2").iterdir())
    broken.write_bytes(broken.read_bytes()[:500])
    gone = next((opens2v.videos / "total_part1").iterdir())
    gone.unlink()
    assert check_opens2v(opens2v) == 0
    told = capsys.readouterr().out
    assert "usable samples: 2" in told
    assert "lost samples, missing file: 1 (" in told and "lost samples, video: 1 (" in told
    assert re.search(r"total_part2/gm\d\S* \(\S*total_part2.json, row \d\): ", told)
    assert str(broken) in told and str(gone) in told


def test_nothing_usable_is_an_error(opens2v, capsys):
    for video in opens2v.videos.rglob("*.mp4"):
        video.write_bytes(b"")
    assert check_opens2v(opens2v) == 1
    assert "usable samples: 0" in capsys.readouterr().out


def test_clips_that_are_too_short_are_told(opens2v, tmp_path, capsys):
    assert check_opens2v(opens2v, "--stride", 12, "--preview", tmp_path / "preview") == 0
    assert (
        "played more slowly, as they are shorter than the 1.9 s of 5 frames: 4 (slowest: " in capsys.readouterr().out
    )
    samples = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "preview").rglob("sample.json")]
    assert all(sample["slowdown"] > 1 for sample in samples)
    assert "as it is too short" in (tmp_path / "preview/index.html").read_text("utf-8")
    assert check_opens2v(opens2v, "--stride", 1) == 0
    assert "shorter" not in capsys.readouterr().out


@pytest.fixture
def own_clip(tmp_path):
    """A folder with a clip of 3 s in 96x48, filmed with 25 frames a second."""
    write_video([np.full((48, 96, 3), 3 * n, np.uint8) for n in range(75)], tmp_path / "clips/a.mp4", fps=25)
    (tmp_path / "clips/a.txt").write_text("a prompt", "utf-8")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "clips/a.ref0.png")
    return tmp_path / "clips"


def test_how_clips_are_played_is_told_in_plain_words(own_clip, tmp_path, capsys):
    size = ["--height", "96", "--width", "128", "--num-frames", "33"]
    (own_clip / "b.mp4").write_bytes(b"no video")
    preview = ["--preview", tmp_path / "preview"]
    assert check("--data", "folder", "--videos", own_clip, *size, *preview) == 0
    told = capsys.readouterr().out
    assert (
        "33 frames of 128x96, which last 2.1 s at the model's 16 frames a second:\n  played in real time: 1\n" in told
    )
    assert "cropped to the size: 1 (most: 33% of the picture, a)\n  enlarged to the size: 1 (most: 2 times, a)" in told
    page = (tmp_path / "preview/index.html").read_text("utf-8")
    assert "a.mp4: 96x48, 25 frames a second, 3.0 s. Played in real time; 33% of the picture is cut off" in page
    assert "<h2>Lost clips</h2>" in page and "<li>b (no prompt, row 1): there is none</li>" in page


def test_the_papers_stride_is_fast(own_clip, capsys):
    assert check("--data", "folder", "--videos", own_clip, *SMALL, "--stride", "3") == 0
    assert "played 1.9 times as fast as it was filmed: 1\n" in capsys.readouterr().out


def test_all_faults_go_to_a_file(tmp_path, capsys):
    for number in range(25):
        (tmp_path / f"{number:02d}.mp4").write_bytes(b"")
    assert check("--data", "folder", "--videos", tmp_path, "--faults", tmp_path / "faults.jsonl") == 1
    told = capsys.readouterr().out
    assert "and 5 more: --faults FILE lists all" in told
    faults = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text("utf-8").splitlines()]
    assert [fault["sample_id"] for fault in faults] == [f"{number:02d}" for number in range(25)]


def test_names_that_are_not_utf8_are_told(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    (tmp_path / os.fsdecode(b"clips/\xff.mp4")).write_bytes(b"")
    (tmp_path / os.fsdecode(b"clips/\xfe.ref0.png")).write_bytes(b"")
    assert check("--data", "folder", "--videos", tmp_path / "clips", "--faults", tmp_path / "faults.jsonl") == 1
    assert capsys.readouterr().out.encode("utf-8").count(b"udc") >= 2
    assert len((tmp_path / "faults.jsonl").read_text("utf-8").splitlines()) == 2


def test_the_limit_counts_samples(opens2v, capsys):
    assert check_opens2v(opens2v, "--limit", 3) == 0
    assert "usable samples: 3" in capsys.readouterr().out


def test_a_folder_of_ones_own(tmp_path, capsys):
    write_video([np.full((48, 64, 3), 9 * n, np.uint8) for n in range(9)], tmp_path / "clips/a.mp4")
    (tmp_path / "clips/a.txt").write_text("a prompt", "utf-8")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "clips/a.ref0.png")
    assert check("--data", "folder", "--videos", tmp_path / "clips", *SMALL) == 0
    assert "usable samples: 1\n  number of references 1: 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "opens2v"], "annotation"),
        (["--data", "folder"], "videos"),
        (["--data", "folder", "--videos", "{}", "--limit", "0"], "--limit is 0"),
        (["--data", "folder", "--videos", "{}", "--height", "50"], "height is 50: it must be a multiple of 16"),
        (["--data", "folder", "--videos", "{}", "--select", "aesthetic"], "'aesthetic' is not like"),
        (["--data", "folder", "--videos", "{}", "--write", "{}/full"], "exists already"),
        (["--data", "folder", "--videos", "{}", "--preview", "{}"], "exists already"),
    ],
)
def test_wrong_options_are_told_in_a_line(tmp_path, capsys, arguments, message):
    (tmp_path / "full").write_text("kept")
    assert check(*(argument.format(tmp_path) for argument in arguments)) == 1
    told = capsys.readouterr().err
    assert told.startswith("refalign-train: ") and message in told and told.count("\n") == 1
    assert (tmp_path / "full").read_text() == "kept"


# -- Preview ----------------------------------------------------------------------------------------------------------


def test_the_preview_shows_what_the_model_will_see(opens2v, tmp_path):
    preview = tmp_path / "preview"
    assert check_opens2v(opens2v, "--preview", preview, "--limit", 3) == 0
    folders = sorted(path.parent for path in preview.rglob("sample.json"))
    assert [folder.relative_to(preview).as_posix() for folder in folders] == sorted(opens2v.sample_ids[:3])
    for folder in folders:
        assert read_video(folder / "video.mp4").shape == (5, 48, 64, 3)
        sample = json.loads((folder / "sample.json").read_text("utf-8"))
        assert sample["id"] == folder.relative_to(preview).as_posix()
        assert sample["recipe"]["height"] == 48
        assert len(sample["references"]) == 2
        for number in (1, 2):
            assert Image.open(folder / f"reference_{number}.png").size == (64, 48)


def test_the_page_leads_to_all_files(opens2v, tmp_path):
    assert check_opens2v(opens2v, "--preview", tmp_path / "preview") == 0
    links = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: links.extend(v for n, v in attributes if n == "src")
    parser.feed((tmp_path / "preview/index.html").read_text("utf-8"))
    assert len(links) == 4 * 3
    assert all((tmp_path / "preview" / link.split("#")[0]).is_file() for link in links)


def test_captions_cannot_write_the_page(tmp_path):
    write_video([np.zeros((48, 64, 3), np.uint8)] * 5, tmp_path / "clips/a.mp4")
    (tmp_path / "clips/a.txt").write_text("<script>alert(1)</script>", "utf-8")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "clips/a.ref0.png")
    preview = tmp_path / "preview"
    assert check("--data", "folder", "--videos", tmp_path / "clips", "--preview", preview, *SMALL) == 0
    page = (preview / "index.html").read_text("utf-8")
    assert "&lt;script&gt;" in page and "<script" not in page


@pytest.mark.parametrize("name", ["index.html", "a/video.mp4"])
def test_an_id_cannot_take_a_previews_place(tmp_path, capsys, name):
    write_video([np.zeros((48, 64, 3), np.uint8)] * 5, tmp_path / "a.mp4")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    rows = [{"id": id, "video": "a.mp4", "prompt": "p", "references": ["a.png"]} for id in (name, "a")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    preview = tmp_path / "preview"
    assert check("--data", "table", "--annotations", tmp_path / "t.jsonl", "--preview", preview, *SMALL) == 0
    assert "lost samples, id: 1" in capsys.readouterr().out
    assert (preview / "index.html").is_file() and (preview / "a/video.mp4").is_file()


# -- Subset -----------------------------------------------------------------------------------------------------------


def scored(**scores) -> Sample:
    return Sample("a", ("p",), Clip("a.mp4"), (), "file", 0, scores)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", True),
        ("aesthetic>5.5,references>=2", True),
        ("aesthetic > 5.5 , references >= 3", False),
        ("references=2", True),
        ("references==2", True),
        ("references!=2", False),
        ("aesthetic<=6", True),
        ("aesthetic<6", False),
        ("motion>0", False),
    ],
)
def test_a_selection_holds_all_its_terms(text, passes):
    assert is_selected(scored(aesthetic=6.0, references=2.0), parse_selection(text)) is passes


@pytest.mark.parametrize("text", ["aesthetic", "aesthetic>", ">5", "aesthetic>high", "a>1 b>2", "a=>1", "a>1;b>2"])
def test_a_term_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="is not like"):
        parse_selection(text)


def test_a_subset_needs_no_videos_and_says_which_parts_it_does(tmp_path, capsys):
    """Nobody has to download 11 TB to try."""
    subject = Drawn("brick", rectangle(48, 64, (8, 8, 48, 40)))
    files = []
    for part, aesthetics in (("total_part2", (5.0, 6.0)), ("total_part12", (6.5, 4.0))):
        records = {}
        for number, aesthetic in enumerate(aesthetics):
            record = opens2v_record([subject], path=f"clip{number}.mp4", crop=(0, 64, 0, 48))
            record["metadata"]["aesthetic"] = aesthetic
            records[f"key{number}"] = record
        files.append(write_annotations(tmp_path / f"{part}.json", records))
    subset = tmp_path / "subset.jsonl"
    select = ["--select", "aesthetic>5.5,references>=1", "--write", subset]
    assert check("--data", "opens2v", "--annotations", *files, *select) == 0
    lines = [json.loads(line) for line in subset.read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["total_part2/key1", "total_part12/key0"]
    assert (tmp_path / "subset.parts.txt").read_text("utf-8") == "Videos/total_part2/*\nVideos/total_part12/*\n"
    told = capsys.readouterr().out
    assert '--include "Videos/total_part2/*" "Videos/total_part12/*"' in told


def test_a_subset_is_read_as_its_dataset_was(opens2v, tmp_path):
    subset, again = tmp_path / "subset.jsonl", tmp_path / "again.jsonl"
    assert check_opens2v(opens2v, "--cross-pairs", *opens2v.cross_pairs, "--write", subset) == 0
    samples = ["--data", "samples", "--annotations", subset, "--videos", opens2v.videos, *SMALL]
    assert check(*samples, "--write", again) == 0
    lines = [json.loads(line) for line in subset.read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == list(opens2v.sample_ids)
    assert [json.loads(line)["references"] for line in again.read_text("utf-8").splitlines()] == [
        line["references"] for line in lines
    ]


def test_a_subset_has_so_many_samples_at_most(opens2v, tmp_path):
    assert check_opens2v(opens2v, "--max-samples", 2, "--write", tmp_path / "subset.jsonl") == 0
    assert len((tmp_path / "subset.jsonl").read_text("utf-8").splitlines()) == 2


def test_an_empty_subset_is_not_written(opens2v, tmp_path, capsys):
    assert check_opens2v(opens2v, "--select", "beauty>1", "--write", tmp_path / "subset.jsonl") == 1
    told = capsys.readouterr().out
    assert "No sample has the score beauty. There are: aesthetic, duration, fps, height" in told
    assert not list(tmp_path.glob("subset*"))
