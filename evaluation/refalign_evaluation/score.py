"""
`refalign-eval score`: measures the videos of a run, sample by sample.

Raw scores are kept in the official tools' files, `scores/` in the run's folder. What the official tools measure alone
(NexusScore, MotionSmoothness, NaturalScore) is read from their files there.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from refalign.privacy import shown
from refalign_evaluation.benchmark import BenchmarkSample, Split


if TYPE_CHECKING:
    import torch

    from refalign_evaluation.scoring import MetricScores

MetricName = Literal["aesthetics", "motion_amplitude", "face_similarity", "gme"]
MEASURED: tuple[MetricName, ...] = get_args(MetricName)


@dataclass(frozen=True)
class Score:
    """Measure the videos of a run by metrics of OpenS2V-Eval. Called again, it goes on."""

    videos: Path
    """The run's folder, with <sample id>.mp4 for each sample. Scores are written to its folder scores."""
    benchmark: Path
    """The folder of the benchmark: a copy of the dataset BestWishYsh/OpenS2V-Eval."""
    metrics: tuple[MetricName, ...] = MEASURED
    """What to measure. The other metrics are read from the official tools' files in the folder scores."""
    split: Split | None = None
    """The benchmark's part, for a folder of videos that `refalign-eval generate` did not make."""
    aesthetics_clip: str | None = None
    """For aesthetics: CLIP, as a folder or Hub id. The official one is openai/clip-vit-large-patch14."""
    aesthetics_head: Path | None = None
    """For aesthetics: the predictor's head, aesthetic-model.pth as a safetensors file."""
    face_detector: Path | None = None
    """For face_similarity: the folder of insightface's models, face_extractor of BestWishYsh/OpenS2V-Weight."""
    face_network: Path | None = None
    """For face_similarity: glint360k_curricular_face_r101_backbone.bin as a safetensors file."""
    gme_model: str | None = None
    """For gme: the model, as a folder or Hub id. The official one is Alibaba-NLP/gme-Qwen2-VL-7B-Instruct."""
    device: str = "auto"
    """The device to compute on, such as cuda:1 or cpu. By default it is an accelerator if there is one."""


class Measure(Protocol):
    """A metric's way to measure a video."""

    settings: dict[str, Any]
    """What scores depend on, as JSON."""

    def load(self) -> None:
        """Loads models; ValueError if they are not what is needed."""

    def measure(self, video: Path, sample: BenchmarkSample) -> float:
        """The raw score of a video; `Unusable` if it or the sample has none."""
        ...


def run(command: Score) -> int:
    """
    Measures what is not measured yet, and returns the exit code: 1 if a sample has no score.

    Raises:
        ValueError: if options do not fit, a folder, file or model cannot be used, or scores of other settings are
            there.
    """
    from refalign.devices import find_device
    from refalign.owner import owned, remove_leftovers
    from refalign_evaluation.run_folder import SCORES, SCORING

    _check(command)
    samples = _asked(command)
    device = find_device(command.device)
    measures = {name: MEASURES[name](command, device) for name in dict.fromkeys(command.metrics)}
    folder = command.videos / SCORES
    complete = []
    with owned(folder):
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        remove_leftovers(command.videos, SCORING)
        for name, measure in measures.items():
            complete.append(_measure_all(command.videos, name, measure, samples))
    complete += _tell_others(folder, samples, measures)
    return 0 if all(complete) else 1


def _check(command: Score) -> None:
    if not command.metrics:
        raise ValueError(f"--metrics names none. Name some of {', '.join(MEASURED)}.")
    if not command.videos.is_dir():
        raise ValueError(f"--videos {command.videos} is not a folder. `refalign-eval generate` makes one.")
    for name in command.metrics:
        missing = [option for option in OPTIONS[name] if getattr(command, option) is None]
        if missing:
            options = " and ".join(f"--{option.replace('_', '-')}" for option in missing)
            raise ValueError(f"The metric {name} needs {options}. Pass that, or name others by --metrics.")


def _asked(command: Score) -> dict[str, BenchmarkSample]:
    """The samples that the run should have a video of, by their ids."""
    from refalign_evaluation.benchmark import read_benchmark
    from refalign_evaluation.run_folder import RUN, read_run

    if not (command.videos / RUN).exists():
        if command.split is None:
            raise ValueError(f"{command.videos} has no {RUN}, which says what is in it. Name the benchmark's --split.")
        return read_benchmark(command.benchmark, command.split)
    run = read_run(command.videos)
    if command.split not in (None, run.split):
        raise ValueError(f"{command.videos} holds videos of the split {run.split}, not {command.split}.")
    _check_benchmark(command, run.split, run.settings.get("benchmark"))
    samples = read_benchmark(command.benchmark, run.split)
    foreign = [sample_id for sample_id in run.samples if sample_id not in samples]
    if foreign:
        raise ValueError(
            f"{command.videos / RUN} asks for {foreign[0]}, which {command.benchmark} does not have in the split "
            f"{run.split}. Name the benchmark that the videos were made of."
        )
    return {sample_id: samples[sample_id] for sample_id in run.samples}


def _check_benchmark(command: Score, split: Split, made_of: str | None) -> None:
    from refalign_evaluation.benchmark import find_file
    from refalign_evaluation.metrics.weights import digest

    file = find_file(command.benchmark, split)
    if made_of not in (None, digest(file)):
        raise ValueError(
            f"The videos of {command.videos} were made of another {file.name} than that of {command.benchmark}. Name "
            "the benchmark that they were made of."
        )


# -- Measuring --------------------------------------------------------------------------------------------------------


def _measure_all(run: Path, name: str, measure: Measure, samples: Mapping[str, BenchmarkSample]) -> bool:
    """Measures the samples that are not measured yet; whether all have a score."""
    from tqdm import tqdm

    from refalign_evaluation.scores import METRICS
    from refalign_evaluation.scoring import read_metric

    scores = read_metric(run, name)
    mine = [sample for sample in samples.values() if METRICS[name].applies(sample.id)]
    left = []
    for sample in mine:
        video = _digest_of_video(run, sample)
        if video is None:
            if sample.id not in scores.entries:  # a score stays, though its video was put elsewhere
                scores.tell_failure(sample.id, _why_missing(run, sample))
        elif not scores.is_done(sample.id, video):
            left.append((sample, video))
    if left or scores.settings is not None:
        scores.use(measure.settings)
    if left:
        _load(name, measure)
    for sample, video in tqdm(left, desc=name, unit="video", mininterval=5):
        _measure_one(run, sample, video, measure, scores)
    return _tell(name, [sample.id for sample in mine], scores.raw(), scores.unscored)


def _load(name: str, measure: Measure) -> None:
    try:
        measure.load()
    except ImportError as error:
        raise ImportError(
            f"The metric {name} needs a package that is not installed ({error}). Install the extra: "
            "pip install 'refalign[evaluate]'."
        ) from error


def _measure_one(run: Path, sample: BenchmarkSample, video: str, measure: Measure, scores: "MetricScores") -> None:
    from refalign.command_line import one_line
    from refalign_evaluation.run_folder import video_of
    from refalign_training.data.fields import Unusable

    try:
        score = measure.measure(video_of(run, sample.id), sample)
        reason = None if math.isfinite(score) else f"its score is {score}, which is not a finite number"
    except Unusable as error:
        score, reason = math.nan, error.detail
    except Exception as error:  # one bad video never ends the others
        score, reason = math.nan, one_line(error)
    if reason is None:
        scores.keep(sample.id, score, video)
    else:
        scores.tell_failure(sample.id, reason.replace(f"{run}/", ""))  # folders of this machine are nobody's business


def _digest_of_video(run: Path, sample: BenchmarkSample) -> str | None:
    """A digest of a sample's video; None if there is none."""
    from refalign_evaluation.metrics.weights import digest
    from refalign_evaluation.run_folder import video_of

    video = video_of(run, sample.id)
    return digest(video) if video.is_file() else None


def _why_missing(run: Path, sample: BenchmarkSample) -> str:
    from refalign_evaluation.run_folder import read_failures, video_of

    reason = read_failures(run).get(sample.id)
    missing = f"there is no {video_of(run, sample.id).name}"
    return missing if reason is None else f"{missing}: it could not be made ({reason})"


# -- Telling ----------------------------------------------------------------------------------------------------------


def _tell(name: str, ids: Sequence[str], raw: Mapping[str, float], unscored: Mapping[str, str]) -> bool:
    """Says how many samples have a score, and why the others do not; whether all have."""
    from refalign_evaluation.scores import METRICS

    there = [raw[sample_id] for sample_id in ids if sample_id in raw]
    score = METRICS[name].score(there)
    value = "no score" if score is None else f"{100 * score:.2f} %"
    print(f"{name}: {len(there)} of {len(ids)} samples scored, {value}")
    for sample_id in ids:
        if sample_id not in raw:
            reason = unscored.get(sample_id, "it was not measured")
            print(f"refalign-eval: {name}: {sample_id} is not scored: {shown(reason)}", file=sys.stderr)
    return len(there) == len(ids)


def _tell_others(folder: Path, samples: Mapping[str, BenchmarkSample], told: Mapping[str, Any]) -> list[bool]:
    """Says the same of the official tools' files that are there."""
    from refalign_evaluation.scores import METRICS, read_raw

    complete = []
    for name, raw in read_raw(folder).items():
        if name not in told:
            ids = [sample_id for sample_id in samples if METRICS[name].applies(sample_id)]
            complete.append(_tell(name, ids, raw.scores, raw.unscored))
    return complete


# -- The metrics ------------------------------------------------------------------------------------------------------


def _aesthetics(command: Score, device: "torch.device") -> Measure:
    from refalign_evaluation.metrics.aesthetics import Aesthetics

    assert command.aesthetics_clip is not None and command.aesthetics_head is not None
    return Aesthetics(command.aesthetics_clip, command.aesthetics_head, device)


def _motion_amplitude(command: Score, device: "torch.device") -> Measure:
    from refalign_evaluation.metrics.motion_amplitude import MotionAmplitude

    return MotionAmplitude()


def _face_similarity(command: Score, device: "torch.device") -> Measure:
    from refalign_evaluation.metrics.face_similarity import FaceSimilarity

    assert command.face_detector is not None and command.face_network is not None
    return FaceSimilarity(command.benchmark, command.face_detector, command.face_network, device)


def _gme(command: Score, device: "torch.device") -> Measure:
    from refalign_evaluation.metrics.gme import Gme

    assert command.gme_model is not None
    return Gme(command.gme_model, device)


OPTIONS: dict[MetricName, tuple[str, ...]] = {
    "aesthetics": ("aesthetics_clip", "aesthetics_head"),
    "motion_amplitude": (),
    "face_similarity": ("face_detector", "face_network"),
    "gme": ("gme_model",),
}
MEASURES: "dict[MetricName, Callable[[Score, torch.device], Measure]]" = {
    "aesthetics": _aesthetics,
    "motion_amplitude": _motion_amplitude,
    "face_similarity": _face_similarity,
    "gme": _gme,
}
