"""
FaceSim: how like the reference's face the faces of a video are.

- Source: `eval/get_facesim.py` of OpenS2V-Nexus, its value `cur_score`. insightface finds the largest face of an image
  (detector of the pack in `BestWishYsh/OpenS2V-Weight/face_extractor`), and CurricularFace makes an embedding of it.
- Raw score: the cosine of the reference's face and a frame's, at least 0; the mean of those of 32 frames that are not
  0, or 0 if none is.
- Score: each video's raw score is clipped to 1; the mean is the score.
- Only samples of one person are measured, by the first of their references that is a person's.
"""

import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from refalign.files import identity, naming_component
from refalign_evaluation.benchmark import BenchmarkSample
from refalign_evaluation.metrics.curricular_face import SIDE, CurricularFace
from refalign_evaluation.metrics.frames import FRAMES, spread_frames
from refalign_evaluation.metrics.weights import check_weights, digest, load_weights
from refalign_training.data.fields import Unusable


PEOPLE = ("/man/", "/woman/", "/crop_man/", "/crop_woman/")  # folders of the benchmark's images
PACK = Path("models/buffalo_l")  # where insightface's own root folders keep the detector
DETECTED = 320  # the side that images are scaled to, to find faces
ALIGNED = 224  # pixels of a face as it is cut out, before it is scaled to the network's
MARGIN = 0.25  # of each side, that is added where no face is found
GREY = (128, 128, 128)
NETWORK = "The face network's weights"


def person_of(benchmark: Path, sample: BenchmarkSample) -> Path:
    """
    The first reference that is a person's, as its path in the benchmark says.

    Raises:
        Unusable: if there is none.
    """
    for image in sample.images:
        inside = image.relative_to(benchmark).as_posix()  # the folder's own path may have a /man/ in it
        if any(folder in inside for folder in PEOPLE):
            return image
    raise Unusable("no references", f"none of its references lies in a folder of people ({', '.join(PEOPLE)})")


def similarity(reference: np.ndarray, faces: Iterable[np.ndarray]) -> float:
    """The raw score of embeddings of a video's faces, each of length 1 as the reference's is."""
    cosines = [max(0.0, float(reference @ face)) for face in faces]
    alike = [cosine for cosine in cosines if cosine != 0]
    return fmean(alike) if alike else 0.0


def find_detector(folder: Path) -> Path:
    """
    The folder of insightface's models: the one that is named, or `models/buffalo_l` in it.

    Raises:
        ValueError: if neither has any; insightface would download them.
    """
    for place in (folder, folder / PACK):
        if any(place.glob("*.onnx")):
            return place
    raise ValueError(
        f"{folder} has no models of insightface (*.onnx, there or in {PACK}). Download the folder face_extractor of "
        "BestWishYsh/OpenS2V-Weight, and name it."
    )


class FaceSimilarity:
    """Measures videos, by insightface's detector (a folder) and a safetensors copy of CurricularFace's weights."""

    def __init__(self, benchmark: Path, detector: Path, network: Path, device: torch.device) -> None:
        self._benchmark, self._network_file, self._device = benchmark, network, device
        self._folder = find_detector(detector)
        check_weights(network, NETWORK)
        models = identity(self._folder, self._folder.glob("*.onnx"))
        self.settings: dict[str, Any] = {"frames": FRAMES, "detector": models, "network": digest(network)}

    def load(self) -> None:
        """Loads the models; ValueError if they are others than those that are needed."""
        _ = self._detector, self._network

    @cached_property
    def _detector(self) -> Any:
        import onnxruntime
        from insightface.app import FaceAnalysis

        wanted = ["CUDAExecutionProvider"] if self._device.type == "cuda" else []
        there = set(onnxruntime.get_available_providers())
        providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in there]
        with naming_component("face detector", self._folder):
            # A folder by its path is taken as it is; by its name insightface would download it
            analysis = FaceAnalysis(str(self._folder.resolve()), allowed_modules=["detection"], providers=providers)
            analysis.prepare(ctx_id=self._device.index or 0, det_size=(DETECTED, DETECTED))
        if not getattr(analysis.det_model, "use_kps", False):
            raise ValueError(f"The face detector of {self._folder} finds no eyes, nose and mouth. Pass buffalo_l's.")
        return analysis

    @cached_property
    def _network(self) -> CurricularFace:
        network = CurricularFace()
        load_weights(network, self._network_file, NETWORK)
        return network.to(self._device).eval()

    def measure(self, video: Path, sample: BenchmarkSample) -> float:
        """
        The raw score of a video.

        Raises:
            Unusable: if the video or the reference cannot be read, or the reference has no face that is found.
        """
        path = person_of(self._benchmark, sample)
        name = path.relative_to(self._benchmark)
        reference = self.embed(_read_image(path, name))
        if reference is None:
            raise Unusable("image", f"no face is found in its reference {name}")
        found = map(self.embed, spread_frames(video))
        return similarity(reference, [face for face in found if face is not None])

    @torch.no_grad()
    def embed(self, image: np.ndarray) -> np.ndarray | None:
        """The embedding `(512,)`, of length 1, of the largest face of an RGB image; None if no face is found."""
        import cv2

        face = self._cut_out(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if face is None:
            return None
        small = cv2.resize(cv2.cvtColor(face, cv2.COLOR_BGR2RGB), (SIDE, SIDE))
        pixels = torch.from_numpy(small).permute(2, 0, 1)[None].float().to(self._device)
        embedding = self._network((pixels / 255 - 0.5) / 0.5)[0]
        return torch.nn.functional.normalize(embedding, dim=0).cpu().numpy()

    def _cut_out(self, image: np.ndarray) -> np.ndarray | None:
        """The largest face of a BGR image, turned upright, `(224, 224, 3)`."""
        from insightface.utils import face_align

        points = self._find(image)
        if points is None:
            wider, corner = _widen(image)  # a face that fills the image is found so
            points = self._find(wider)
            if points is None:
                return None
            points = points - np.array(corner)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # insightface 2.1 calls what scikit-image 0.26 deprecates
            return face_align.norm_crop(image, landmark=points, image_size=ALIGNED)

    def _find(self, image: np.ndarray) -> np.ndarray | None:
        """The eyes, nose and corners of the mouth, `(5, 2)`, of a BGR image's largest face."""
        faces = self._detector.get(image)
        return max(faces, key=lambda face: _area(face["bbox"]))["kps"] if faces else None


def _area(box: np.ndarray) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _widen(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The image in grey, and where its corner lies then, as (x, y)."""
    import cv2

    height, width = image.shape[:2]
    y, x = int(height * MARGIN), int(width * MARGIN)
    return cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_CONSTANT, value=GREY), (x, y)


def _read_image(path: Path, name: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise Unusable("image", f"its reference {name} cannot be read: {type(error).__name__}") from error
