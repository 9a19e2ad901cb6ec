"""OpenS2V-Eval from end to end with the small world's model: generate, score, total, compare, card."""

import json
from functools import partial

import pytest
from PIL import Image

from refalign_evaluation.cli import main
from refalign_evaluation.metrics import face_similarity
from refalign_evaluation.metrics.curricular_face import CurricularFace
from refalign_evaluation.score import MEASURED as MEASURED_BY_US
from refalign_evaluation.scores import METRICS
from tests.evaluation.small_benchmark import MAN, SAMPLES, write_benchmark
from tests.evaluation.small_results import PERFECT, write_official
from tests.evaluation.tiny_metrics import (
    FACE_NETWORK,
    RED,
    draw,
    write_clip,
    write_detector,
    write_face_network,
    write_gme,
    write_head,
)


# A face, a thing and both
CHOSEN = {name: SAMPLES[name] for name in ("singleface_1", "singleobj_1", "humanobj_1")}
# What is measured of each run; the rest is as of the official tools, for the second run more, which takes less time
MEASURED = {"0": MEASURED_BY_US, "1": ("aesthetics", "motion_amplitude")}


@pytest.fixture
def benchmark(tmp_path):
    folder = write_benchmark(tmp_path / "benchmark", samples=CHOSEN)
    Image.fromarray(draw((64, 128, RED))).save(folder / MAN)
    return folder


@pytest.fixture
def models(tmp_path):
    """The options that name tiny models."""
    made = {
        "--aesthetics-clip": write_clip(tmp_path / "clip"),
        "--aesthetics-head": write_head(tmp_path / "head.safetensors"),
        "--face-detector": write_detector(tmp_path / "detector"),
        "--face-network": write_face_network(tmp_path / "faces.safetensors"),
        "--gme-model": write_gme(tmp_path / "gme"),
    }
    return [str(word) for pair in made.items() for word in pair]


def test_from_the_benchmark_to_the_card(benchmark, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(face_similarity, "CurricularFace", partial(CurricularFace, **FACE_NETWORK))
    runs = []
    for seed, measured in MEASURED.items():
        run = str(tmp_path / f"seed-{seed}")
        shared = ["--benchmark", str(benchmark), "--device", "cpu"]
        settings = ["--steps", "2", "--num-frames", "5", "--cut-out", "false", "--seed", seed]
        assert main(["generate", *shared, "--output", run, *settings]) == 0
        for name in METRICS.keys() - set(measured):
            scores = dict.fromkeys(filter(METRICS[name].applies, CHOSEN), PERFECT[name])
            write_official(tmp_path / f"seed-{seed}/scores", name, scores)
        assert main(["score", *shared, "--videos", run, *models, "--metrics", *measured]) == 0
        assert main(["total", run]) == 0
        runs.append(run)

    total = json.loads((tmp_path / "seed-0/total.json").read_text("utf-8"))
    assert total.keys() == {"total_score", *(metric.upload_key for metric in METRICS.values())}
    capsys.readouterr()
    assert main(["compare", *runs, "--published", "--output", str(tmp_path / "report")]) == 0
    table = capsys.readouterr().out
    assert f"{100 * total['total_score']:.2f}" in table and "60.42" in table
    page = (tmp_path / "report/index.html").read_text("utf-8")
    assert all(sample_id in page for sample_id in CHOSEN)

    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n", "utf-8")
    assert main(["card", runs[0], "--model", str(model)]) == 0
    assert f"value: {round(100 * total['total_score'], 2)}" in (model / "README.md").read_text("utf-8")
