"""Sentences on hand-worked summaries."""

import pytest

from selftrain_d2.engine.loop.findings import in_words, share_of_ceiling


def run(seed=0, task="detection", metric=("bbox", "AP"), labels=None, **values):
    """A summary of one seed with these values of stages; None: nothing found."""
    group, name = metric
    stages = {stage: {"metrics": {group: {name: value}}} for stage, value in values.items()}
    stages["pseudo_labels"] = {
        "boxes": 40,
        "images": 22,
        "skipped": 2,
        "ignored_share": 0.1,
        **(labels or {}),
    }
    return {"task": task, "seed": seed, "score_thresh": 0.5, "stages": stages, "human_boxes_per_image": 2.0}


def text(*runs):
    return " ".join(in_words(runs))


def test_gain_and_share_of_the_ceiling():
    one = run(teacher=35.9, student=36.9, control=35.9, oracle=38.1)
    words = in_words([one])
    assert words[0] == (
        "The student has 36.9 AP: +1.0 over its control, which trained on for the same steps on human labels alone, "
        "and +1.0 over the teacher."
    )
    assert "--seeds" in words[1]
    assert words[2].endswith("has 38.1 AP, +2.2 over the control: the pseudo labels gave 45% of that.")
    assert len(words) == 3
    assert share_of_ceiling([one]) == pytest.approx(1.0 / 2.2)


def test_an_interval_over_seeds():
    # Differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.303, so 2 +- 4.303 / sqrt(3) = 2 +- 2.48.
    runs = [run(s, teacher=30.0, student=37.0 + s, control=36.0) for s in range(3)]
    words = text(*runs)
    assert words.startswith(
        "Over 3 seeds the student has 38.0 AP on average: +2.0 (95 % interval -0.5 to +4.5) over its control"
    )
    assert "The interval includes 0" in words and "What to change" in words
    # 2 +- 4.303 * 0.1 / sqrt(3) = 2 +- 0.25
    sure = [run(s, teacher=30.0, student=38.0 + 0.1 * (s - 1), control=36.0) for s in range(3)]
    assert "+2.0 (95 % interval +1.8 to +2.2) over its control" in text(*sure)
    assert "includes 0" not in text(*sure) and "What to change" not in text(*sure)


def test_the_share_is_of_the_means():
    """Shares of 2/1 and 0/4 have the mean 100 %, but of 5 AP in all 2 were had."""
    runs = [
        run(0, student=12.0, control=10.0, oracle=11.0),
        run(1, student=10.0, control=10.0, oracle=14.0),
    ]
    assert share_of_ceiling(runs) == pytest.approx(0.4)
    assert "gave 40% of that (but its interval includes 0, so that the share says little)" in text(*runs)


def test_a_ceiling_that_is_not_above_the_control():
    words = text(run(teacher=30.0, student=29.0, control=30.0, oracle=29.5))
    assert "29.5 AP, -0.5 against the control: the ceiling is not above it" in words and "%" not in words
    assert "Not the pseudo labels are in the way" in words


def test_a_student_below_its_control_had_none_of_the_ceiling():
    words = text(run(teacher=30.0, student=29.0, control=30.0, oracle=34.0))
    assert "+4.0 over the control: the pseudo labels gave none of that." in words


def test_without_control():
    words = text(run(teacher=30.0, student=33.0, oracle=36.0))
    assert words.startswith("The student has 33.0 AP: +3.0 over the teacher. ") and "--control" in words
    assert "36.0 AP, +3.0 over the student; --control tells" in words


def test_without_validation():
    summary = run()
    summary["stages"].update(teacher={"metrics": {}}, student={"metrics": {}})
    assert in_words([summary]) == [
        "There are no labeled images for validation, so nothing tells what the student gained: give --val-images with "
        "their labels."
    ]


def test_a_detector_that_found_nothing_has_no_ap_which_is_0():
    words = text(run(teacher=None, student=3.0, control=None))
    assert words.startswith("The student has 3.0 AP: +3.0 over its control")
    assert "found anything" in text(run(teacher=None, student=None, control=None))
    # A seed without a number is not left out in silence.
    assert text(run(0, student=4.0), run(1, student=None)).startswith(
        "Over 1 of 2 seeds the student has 4.0 AP"
    )


@pytest.mark.parametrize(
    ("facts", "labels", "values", "fragment"),
    [
        # Truth says what is wrong.
        ((0.9, 0.23), {}, {}, "90% are right, and of the objects 23% have one (by the withheld truth); that is too f"),
        ((0.5, 0.8), {}, {}, "too many wrong ones: raise SELFTRAIN.SCORE_THRESH"),
        ((0.4, 0.3), {}, {}, "both too few and too wrong"),
        ((0.9, 0.8), {}, {}, "The summary shows no reason"),
        # Without truth, people's counts: 2 boxes an image; 20 images were labeled.
        (None, {"boxes": 10}, {}, "have 0.5 boxes an image, people drew 2.0 in the labeled ones; that is too few"),
        (None, {"boxes": 100}, {}, "have 5.0 boxes an image"),
        (None, {"boxes": 40}, {}, "--oracle tells whether more labels help"),
        # The teacher was not trained to its end.
        ((0.9, 0.8), {}, {"teacher": 18.3, "control": 25.0}, "gained +6.7 AP over the teacher by training on"),
    ],
)  # fmt: skip
def test_what_to_change(facts, labels, values, fragment):
    summary = run(labels=labels, **{"teacher": 20.0, "student": 20.0, "control": 20.5, **values})
    if facts is not None:
        summary["selected_quality"] = dict(zip(("precision", "recall"), facts))
    words = text(summary)
    assert fragment in words and "What to change:" in words
    assert ("by training on" in fragment) == ("by training on" in words)
    # Nothing of it where there is a gain.
    summary["stages"]["student"]["metrics"]["bbox"]["AP"] = 30.0
    assert "What to change" not in text(summary)


@pytest.mark.parametrize(
    ("ignored", "accuracy", "fragment"),
    [
        (0.1, 0.6, "leaves 90% of the pixels a class, of which 60% are right (by the withheld truth); that is too"),
        (0.6, 1.0, "that is too few: lower"),
        (0.8, None, "leaves 20% of the pixels a class; that is too few"),
        (0.1, None, "The summary shows no reason"),
    ],
)  # fmt: skip
def test_what_to_change_of_masks(ignored, accuracy, fragment):
    values = {"teacher": 50.0, "student": 50.0, "control": 50.2}
    summary = run(
        task="segmentation", metric=("sem_seg", "mIoU"), labels={"ignored_share": ignored}, **values
    )
    if accuracy is not None:
        row = {"threshold": 0.5, "ignored": ignored, "pixel_accuracy": accuracy}
        summary["pseudo_mask_quality"] = [{**row, "threshold": 0.9, "pixel_accuracy": 0.0}, row]
    assert fragment in text(summary) and "50.0 mIoU" in text(summary)


def test_rounds():
    summary = run(teacher=30.0, student=31.0, control=30.0, **{"round_2/student": 31.5})
    summary["stopped"] = "The teacher of round 3 is worse."
    words = in_words([summary])
    assert words[-2].startswith("The student of round 2 has 31.5 AP, +0.5 over that of round 1")
    assert words[-1] == "The teacher of round 3 is worse."
    assert in_words([summary, {**summary, "seed": 7}])[-1] == "Seed 7: The teacher of round 3 is worse."
