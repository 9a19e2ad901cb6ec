"""The measures of the small world, on clips of which we know what they show."""

import dataclasses
import json

import numpy as np
import pytest

from refalign_evaluation.cli import main
from refalign_evaluation.judge import Case, Judge, Verdict, judge
from refalign_evaluation.sprites import (
    Sprites,
    drawn_clip,
    evaluate,
    generate,
    make_cases,
    references_of,
    summarise,
    swapped,
)
from refalign_training.sprites.subject import Subject, subjects
from refalign_training.sprites.vae import draw_frames
from refalign_training.sprites.world import ACTS, CROSSES


SAMPLES = 3
FIGURES = ("identity", "identity_same_colours", "motion", "both_right", "swapped", "doubled", "missing", "confusion")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return make_cases(SAMPLES, seed=0)


@pytest.fixture(scope="module")
def clips(cases) -> list[np.ndarray]:
    return [drawn_clip(case) for case in cases]


@pytest.fixture(scope="module")
def judged() -> Judge:
    """One for all tests: it keeps what it draws."""
    return Judge()


def two(acts=("hops", "spins")) -> Case:
    """A case of two subjects."""
    case = make_cases(1, seed=3)[1]
    return dataclasses.replace(case, scene=dataclasses.replace(case.scene, acts=acts))


def confusion_of(case: Case, judged: Judge, *shown: Subject) -> str:
    scene = dataclasses.replace(case.scene, subjects=shown)
    return judge(case, draw_frames(scene), judged).confusion


def test_drawn_clips_are_right(cases, clips):
    figures = evaluate(cases, clips, "drawn")
    assert min(figures[name] for name in ("identity", "identity_same_colours", "motion", "both_right")) >= 0.9
    assert figures["copy_paste"] == 0
    assert figures["psnr"] > 20


def test_against_other_references_all_is_wrong(cases, clips):
    figures = evaluate(list(map(swapped, cases)), clips, "drawn")
    assert figures["identity"] == figures["both_right"] == 0
    assert figures["swapped"] >= 0.9


def test_cases_are_held_out_and_the_same_again(cases):
    assert make_cases(SAMPLES, seed=0) == cases
    assert all(subject.is_held_out for case in cases for subject in (*case.scene.subjects, *case.others))
    assert [len(case.scene.subjects) for case in cases] == [1] * SAMPLES + [2] * SAMPLES


def test_one_is_told_from_seven_others_of_any_and_of_its_colours(cases):
    case = cases[0]
    assert len({*case.scene.subjects, *case.others}) == len({*case.scene.subjects, *case.alike}) == 8
    assert {other.body for other in case.alike} == {case.scene.subjects[0].body}


@pytest.mark.parametrize("act", ACTS)
def test_each_act_is_told_from_the_others(act, cases, judged):
    scene = dataclasses.replace(cases[0].scene, acts=(act,))
    verdict = judge(dataclasses.replace(cases[0], scene=scene), draw_frames(scene), judged)
    assert verdict.motion and verdict.identity


def test_another_act_than_the_prompts_is_told(cases, judged):
    (asked,) = cases[0].scene.acts
    other = "grows" if asked == "falls" else "falls"
    scene = dataclasses.replace(cases[0].scene, acts=(other,))
    assert not judge(cases[0], draw_frames(scene), judged).motion


def test_exchanged_subjects_are_swapped(judged):
    case = two()
    assert confusion_of(case, judged, *case.scene.subjects[::-1]) == "swapped"


def test_the_same_subject_twice_is_doubled(judged):
    case = two()
    first = case.scene.subjects[0]
    assert confusion_of(case, judged, first, first) == "doubled"


def test_a_place_where_nothing_happens_is_missing(judged):
    case = two()
    clip = drawn_clip(case).copy()
    clip[:, :, 32:] = clip[0, :, 62:63]  # the edge's colours, row by row
    assert judge(case, clip, judged).confusion == "missing"


def test_a_stranger_is_none_of_the_others(judged):
    case = two()
    assert confusion_of(case, judged, case.scene.subjects[0], case.others[0]) == "other"


def test_two_that_change_places_are_right(judged):
    case = two((CROSSES, CROSSES))
    verdict = judge(case, drawn_clip(case), judged)
    assert (verdict.confusion, verdict.motion) == ("right", True)


def test_a_copied_pose_is_noticed(cases, judged):
    case = next(case for case in cases if case.scene.acts == ("hops",) or "slides" in case.scene.acts[0])
    from refalign_training.sprites import world

    def tilted(act: str, place: str, time: float, own=world.pose):
        return dataclasses.replace(own(act, place, time), tilt=case.tilts[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "pose", tilted)
        clip = draw_frames(case.scene)
    assert judge(case, clip, judged).copied
    assert not judge(case, drawn_clip(case), judged).copied


def test_figures_are_shares_of_their_clips():
    verdicts = [Verdict(identity=i < 3, same_colours=True, motion=True, copied=None, psnr=20.0) for i in range(4)]
    verdicts += [Verdict(confusion=name, motion=False, psnr=24.0) for name in ("right", "swapped", "missing", "other")]
    figures = summarise(verdicts, "a model")
    assert (figures["identity"], figures["motion"], figures["motion_of_two"]) == (0.75, 1.0, 0.0)
    shares = {name: figures[name] for name in ("both_right", "swapped", "doubled", "missing", "confusion")}
    assert shares == {"both_right": 0.25, "swapped": 0.25, "doubled": 0.0, "missing": 0.25, "confusion": 0.75}
    assert figures["psnr"] == 22.0 and (figures["clips"], figures["clips_of_two"]) == (8, 4)


def test_intervals_are_wilsons():
    verdicts = [Verdict(identity=i < 8, same_colours=True, motion=True, psnr=20.0) for i in range(10)]
    low, high = summarise(verdicts, "a model")["intervals"]["identity"]
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


def test_the_command_writes_its_figures(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["sprites", "--drawn", "--samples", "1", "--json", str(file), "--sheet", str(tmp_path / "a.png")]) == 0
    figures = json.loads(file.read_text("utf-8"))
    assert set(FIGURES) | {"copy_paste", "psnr", "intervals", "clips", "model"} <= figures.keys()
    assert "identity" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()


def test_wrong_options_are_told_in_a_line(capsys):
    assert main(["sprites", "--samples", "0"]) == 1
    assert capsys.readouterr().err == "refalign-eval: --samples is 0: pass 1 or more.\n"


def test_references_are_in_a_pose_of_their_own(cases):
    (reference,) = references_of(cases[0])
    assert reference.mode == "RGB"
    assert abs(cases[0].tilts[0]) >= 12
    assert subjects(held_out=True)


def test_options_of_speed_reach_the_pipeline(monkeypatch):
    seen = {}
    monkeypatch.setattr("refalign_evaluation.sprites.generate_by", lambda *_, **settings: seen.update(settings) or [])
    list(generate(Sprites(batch_passes=False, guidance_gate=(0.5, 0.5), steps=3), []))
    assert seen["batch_passes"] is False and seen["guidance_gate"] == (0.5, 0.5)
    assert seen["num_inference_steps"] == 3
