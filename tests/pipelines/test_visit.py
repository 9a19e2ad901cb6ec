"""What a visitor of the app sends, and where it goes."""

import numpy as np
import pytest
from PIL import Image

from refalign import prepare_reference_image
from refalign.sprites import SUBJECTS, subject_names
from refalign.visit import MAX_MEGABYTES, MAX_REFERENCES, Visit, without_paths


@pytest.fixture
def visit(tmp_path) -> Visit:
    return Visit(tmp_path / "visits")


def files(visit: Visit) -> list[str]:
    return sorted(file.name for file in visit.root.rglob("*") if file.is_file())


def test_references_are_kept_in_their_order_and_seen_as_the_model_sees_them(visit):
    visit.take_subjects(["red-square", "dotted-ball"])
    wanted = [
        prepare_reference_image(SUBJECTS / f"{name}.png", 32, 48, False) for name in ("red-square", "dotted-ball")
    ]
    assert visit.seen(32, 48) == wanted
    visit.move_back(1)
    assert visit.seen(32, 48) == wanted[::-1]


def test_a_changed_setting_is_seen(visit):
    visit.take_subjects(["red-square"])
    assert [visit.seen(32, 48)[0].size, visit.seen(48, 32)[0].size] == [(48, 32), (32, 48)]


def test_what_is_removed_or_replaced_leaves_no_file(visit):
    visit.take_subjects(["red-square", "dotted-ball"])
    visit.remove(0)
    assert files(visit) == ["dotted-ball.png"]
    visit.take_subjects(["yellow-heart"])
    assert files(visit) == ["yellow-heart.png"]
    visit.close()
    assert files(visit) == []


def test_two_visits_have_two_folders(tmp_path):
    visits = [Visit(tmp_path), Visit(tmp_path)]
    for visit in visits:
        visit.take_subjects(["red-square"])
    visits[0].close()
    assert visits[1].seen(16, 16) and not visits[0].folder.is_relative_to(visits[1].folder)


def test_a_transparent_picture_is_cut_out_already(visit, tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[2:6, 2:6] = 255
    Image.fromarray(image).save(tmp_path / "clear.png")
    visit.add(tmp_path / "clear.png")
    visit.add(SUBJECTS / "red-square.png")
    assert [reference.has_alpha for reference in visit.references] == [True, False]


def test_there_are_as_many_as_are_allowed(visit):
    visit.take_subjects(subject_names()[:MAX_REFERENCES])
    with pytest.raises(ValueError, match=r"red-square.png was left out: there can be 4 references"):
        visit.add(SUBJECTS / "red-square.png")


def test_bad_files_are_told_by_their_names_alone(visit, tmp_path):
    (tmp_path / "words.png").write_text("words")
    (tmp_path / "half.png").write_bytes((SUBJECTS / "red-square.png").read_bytes()[:300])
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    with (tmp_path / "heavy.png").open("wb") as heavy:
        heavy.truncate(MAX_MEGABYTES * 1_000_000 + 1)
    Image.new("RGB", (8, 8)).save(tmp_path / "page.pdf")
    told = {
        "words.png": "is not an image",
        "half.png": "cannot be read",
        "huge.png": "has 10000x5001 pixels; 50 million are allowed",
        "heavy.png": "has 20 MB; 20 are allowed",
        "page.pdf": "is not an image",
    }
    for name, words in told.items():
        with pytest.raises(ValueError, match=f"^{name} {words}"):
            visit.add(tmp_path / name)
    assert visit.references == [] and files(visit) == []


def test_words_for_visitors_hold_no_folders():
    assert without_paths("/tmp/x/secret/cat.png cannot be read, nor /home/me/dog.png.") == (
        "cat.png cannot be read, nor dog.png."
    )
