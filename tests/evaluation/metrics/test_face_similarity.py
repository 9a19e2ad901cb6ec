from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refalign.video import write_video
from refalign_evaluation.benchmark import BenchmarkSample
from refalign_evaluation.metrics import face_similarity
from refalign_evaluation.metrics.curricular_face import CurricularFace
from refalign_evaluation.metrics.face_similarity import FaceSimilarity, find_detector, person_of, similarity
from refalign_training.data.fields import Unusable
from tests.evaluation.tiny_metrics import FACE_NETWORK, MAGENTA, RED, draw, write_detector, write_face_network


def sample(*images: Path) -> BenchmarkSample:
    return BenchmarkSample("singleface_1", "a man laughs", images, ("Man",) * len(images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    write_detector(folder / "detector")
    write_face_network(folder / "network.safetensors")
    return folder


@pytest.fixture
def measure(folder, tmp_path, monkeypatch):
    """The metric, by real insightface on a tiny detector and a small network of IR-101's kind."""
    monkeypatch.setattr(face_similarity, "CurricularFace", partial(CurricularFace, **FACE_NETWORK))
    return FaceSimilarity(tmp_path, folder / "detector", folder / "network.safetensors", torch.device("cpu"))


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "Images/man/1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(draw((64, 128, RED))).save(path)
    return path


# -- Which reference, and how cosines become a score ------------------------------------------------------------------


def test_the_first_reference_of_a_person_counts(tmp_path):
    dog, woman, man = (tmp_path / name for name in ("Images/dog/1.jpg", "Images/crop_woman/2.jpg", "Images/man/3.jpg"))
    assert person_of(tmp_path, sample(dog, woman, man)) == woman


def test_the_folders_own_path_makes_no_person_of_a_dog(tmp_path):
    root = tmp_path / "man" / "benchmark"
    with pytest.raises(Unusable, match="none of its references lies in a folder of people"):
        person_of(root, sample(root / "Images/dog/1.jpg"))


def test_cosines_below_0_do_not_count_and_others_are_averaged():
    reference = np.array([1.0, 0.0])
    faces = [np.array([0.8, 0.6]), np.array([-1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.4, 0.9165])]
    assert similarity(reference, faces) == pytest.approx(0.6)


def test_without_a_face_the_score_is_0():
    assert similarity(np.array([1.0, 0.0]), []) == 0.0


# -- By models --------------------------------------------------------------------------------------------------------


def test_the_same_face_gives_1_wherever_it_is(measure, reference, tmp_path):
    frames = [draw((64, 128, RED)), draw((128, 64, RED))]
    video = write_video(frames, tmp_path / "a.mp4")
    assert measure.measure(video, sample(reference)) == pytest.approx(1, abs=0.02)


def test_frames_without_a_face_are_left_out(measure, reference, tmp_path):
    frames = [draw((64, 128, RED)), draw(), draw(), draw()]
    video = write_video(frames, tmp_path / "a.mp4")
    assert measure.measure(video, sample(reference)) == pytest.approx(1, abs=0.02)


def test_a_video_without_a_face_gives_0(measure, reference, tmp_path):
    video = write_video([draw(), draw()], tmp_path / "a.mp4")
    assert measure.measure(video, sample(reference)) == 0


def test_a_reference_without_a_face_is_told(measure, tmp_path):
    path = tmp_path / "Images/man/1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(draw()).save(path)
    video = write_video([draw((64, 128, RED))], tmp_path / "a.mp4")
    with pytest.raises(Unusable, match=r"no face is found in its reference Images/man/1\.png$"):
        measure.measure(video, sample(path))


def test_a_broken_reference_is_told(measure, tmp_path):
    path = tmp_path / "Images/man/1.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(Unusable, match="cannot be read"):
        measure.measure(tmp_path / "a.mp4", sample(path))


def test_the_largest_face_counts(measure):
    points = measure._find(draw((32, 32, RED), (224, 224, MAGENTA), size=32)[..., ::-1])
    assert points.mean(0) == pytest.approx([224, 224], abs=5)


def test_colours_come_in_the_detectors_order(measure):
    assert measure.embed(draw((64, 128, RED))) is not None
    assert measure.embed(draw((64, 128, RED[::-1]))) is None


def test_a_face_that_fills_the_image_is_found_in_a_wider_one(measure, monkeypatch):
    image = draw((0, 0, RED), side=320, size=320)
    found, sizes = np.full((5, 2), 100.0), []
    found += [[0, 0], [60, 0], [30, 30], [5, 60], [55, 60]]

    def find(picture):
        sizes.append(picture.shape)
        return found.copy() if picture.shape[0] > 320 else None

    cuts = []
    monkeypatch.setattr(measure, "_find", find)
    import insightface.utils.face_align as align

    monkeypatch.setattr(align, "norm_crop", lambda picture, landmark, image_size: cuts.append(landmark) or picture)
    measure._cut_out(image)
    assert sizes == [(320, 320, 3), (480, 480, 3)]
    assert np.array_equal(cuts[0], found - 80)


def test_the_wider_image_is_grey_around():
    wider, corner = face_similarity._widen(np.zeros((40, 60, 3), np.uint8))
    assert wider.shape == (60, 90, 3) and corner == (15, 10)
    assert (wider[:10] == 128).all() and (wider[10:50, 15:75] == 0).all()


def test_embeddings_are_of_length_1_and_differ_by_face(measure):
    picture = draw((64, 128, RED))
    other = picture.copy()
    other[80:110, 140:180] = (250, 90, 60)
    one, two = measure.embed(picture), measure.embed(other)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert abs(one - two).max() > 1e-3


def test_the_network_sees_rgb_from_minus_1_to_1(measure, monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "_network", lambda pixels: seen.append(pixels) or torch.ones(1, 512))
    monkeypatch.setattr(measure, "_cut_out", lambda image: image[:224, :224])
    measure.embed(np.full((224, 224, 3), (255, 0, 127), np.uint8))
    assert seen[0].shape == (1, 3, 112, 112)
    assert seen[0][0, :, 5, 5].tolist() == pytest.approx([1, -1, -0.004], abs=1e-3)


# -- Models that are not what they should be --------------------------------------------------------------------------


def test_nothing_is_downloaded_for_a_folder_without_models(tmp_path):
    with pytest.raises(ValueError, match="has no models of insightface"):
        find_detector(tmp_path)


def test_the_folder_may_be_insightfaces_own_root(tmp_path):
    inner = write_detector(tmp_path / "models" / "buffalo_l")
    assert find_detector(tmp_path) == inner


def test_a_broken_detector_is_told(folder, tmp_path):
    (tmp_path / "det.onnx").write_bytes(b"not a model")
    measure = FaceSimilarity(tmp_path, tmp_path, folder / "network.safetensors", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"The face detector of .* cannot be loaded"):
        measure.load()


def test_a_detector_without_points_is_told(measure, monkeypatch):
    from insightface.model_zoo.scrfd import SCRFD

    prepare = SCRFD.prepare

    def without_points(self, *arguments, **options):
        prepare(self, *arguments, **options)
        self.use_kps = False

    monkeypatch.setattr(SCRFD, "prepare", without_points)
    with pytest.raises(ValueError, match="finds no eyes, nose and mouth"):
        measure.load()


def test_weights_of_another_network_are_told(folder, tmp_path):
    measure = FaceSimilarity(tmp_path, folder / "detector", folder / "network.safetensors", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"The face network's weights .* is not what it should be"):
        measure.load()
