"""The benchmark as its authors hand it out, and copies that are not whole."""

import json

import pytest

from refalign_evaluation.benchmark import FILES, SPLITS, read_benchmark
from tests.evaluation.small_benchmark import SAMPLES, write_benchmark


@pytest.fixture
def folder(tmp_path):
    return write_benchmark(tmp_path / "benchmark")


def edit(folder, sample_id="humanobj_1", **values):
    """Changes a sample in the benchmark's file."""
    file = folder / FILES["open"][0]
    records = json.loads(file.read_text("utf-8"))
    records[sample_id] = {**SAMPLES["humanobj_1"], **values}
    file.write_text(json.dumps(records), "utf-8")


def test_samples_are_read_in_their_order(folder):
    samples = read_benchmark(folder, "open")
    assert list(samples) == list(SAMPLES)
    sample = samples["humanobj_1"]
    assert (sample.prompt, sample.labels) == (SAMPLES["humanobj_1"]["prompt"], ("Man", "Dog", "School"))
    assert sample.images == tuple(folder / path for path in SAMPLES["humanobj_1"]["img_paths"])


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_has_its_file(split, tmp_path):
    folder = write_benchmark(tmp_path, split, {"singleface_7": SAMPLES["singleface_1"]})
    assert read_benchmark(folder, split)["singleface_7"].category == "singleface"


def test_an_older_copy_has_another_name_for_the_third_file(tmp_path):
    write_benchmark(tmp_path, "single")
    (tmp_path / FILES["single"][0]).rename(tmp_path / "SingleObject_Eval.json")
    assert len(read_benchmark(tmp_path, "single")) == len(SAMPLES)


@pytest.mark.parametrize("place", ["nowhere", "benchmark"])
def test_a_folder_without_the_file_is_told(place, folder):
    with pytest.raises(
        ValueError, match=r"is not a copy of OpenS2V-Eval with the split human: .*BestWishYsh/OpenS2V-Eval"
    ):
        read_benchmark(folder.parent / place, "human")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"img_paths": ["Images/gone.jpg", "Images/b.jpg", "Images/c.jpg"]}, r"gone\.jpg is not a file: No such file"),
        ({"img_paths": ["../../etc/passwd", "a", "b"]}, r"'\.\./\.\./etc/passwd' leaves "),
        ({"img_paths": [7, "a", "b"]}, "7 is not a path"),
        ({"img_paths": [], "class_label": []}, "it has 0 img_paths and 0 class_label"),
        ({"class_label": ["Man"]}, "it has 3 img_paths and 1 class_label"),
        ({"img_paths": "a.jpg"}, r"img_paths is 'a\.jpg', which is not a list"),
        ({"prompt": " "}, "its prompt is empty"),
        ({"prompt": ["a man"]}, r"prompt is \['a man'\], which is not a text"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(values, problem, folder):
    edit(folder, **values)
    with pytest.raises(
        ValueError, match=rf"Open-Domain_Eval\.json: the sample 'humanobj_1' cannot be used: .*{problem}"
    ):
        read_benchmark(folder, "open")


@pytest.mark.parametrize("sample_id", ["../../evil", "a/b", ".hidden", "", "a\\b", "a\nb"])
def test_an_id_that_names_no_video_is_refused(sample_id, folder):
    edit(folder, sample_id)
    with pytest.raises(ValueError, match=r"Open-Domain_Eval\.json: the sample .* cannot be used"):
        read_benchmark(folder, "open")


def test_a_file_of_another_version_is_told(folder):
    (folder / FILES["open"][0]).write_text('{"singleface_1": {"img_path": "a.jpg", "text": "a man"}}', "utf-8")
    with pytest.raises(ValueError, match=r"'singleface_1' cannot be used: there is no 'img_paths' among"):
        read_benchmark(folder, "open")


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "is not a whole JSON file"), ("[]", "holds"), ("{}", "no samples")]
)
def test_a_file_that_is_cut_or_empty_is_told(content, problem, folder):
    (folder / FILES["open"][0]).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=rf"Open-Domain_Eval\.json .*{problem}"):
        read_benchmark(folder, "open")
