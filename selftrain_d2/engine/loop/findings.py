"""What one run of the loop, or one for each of several seeds, says: in sentences for who ran it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selftrain_d2.engine.intervals import Interval, PairedTest, mean_interval, paired_test
from selftrain_d2.engine.loop.tasks import TASKS

#: ``summary.json`` of the loop.
Run = Mapping[str, Any]

#: Rule of thumb, in percent: a control that gains this much over the teacher had a teacher that was not trained to its
#: end.
MUCH_BY_TRAINING_ON = 1.0


def value_of(run: Run, stage: str) -> float | None:
    """The first metric of a trained stage; None if it was not trained or not evaluated.

    detectron2 has no AP for a detector that found nothing, which is 0, nor where nothing is to be found; then no stage
    has one.
    """
    values = _values(run)
    known = any(value is not None for value in values.values())
    return (values[stage] or 0.0) if known and stage in values else None


def _values(run: Run) -> dict[str, float | None]:
    """As ``results.json`` has them, of the stages that were evaluated."""
    task = TASKS[run["task"]]
    results = {name: content.get("metrics", {}).get(task.results) for name, content in run["stages"].items()}
    return {name: metrics.get(task.metrics[0]) for name, metrics in results.items() if metrics is not None}


def mean_value(runs: Sequence[Run], stage: str) -> Interval | None:
    """The mean over the runs that have a value, with its interval; None without any."""
    values = [value for value in (value_of(run, stage) for run in runs) if value is not None]
    return mean_interval(values) if values else None


def difference(runs: Sequence[Run], stage: str, baseline: str) -> PairedTest | None:
    """Compare two stages run by run, over the runs that have both; None without any."""
    pairs = [(value_of(run, stage), value_of(run, baseline)) for run in runs]
    pairs = [pair for pair in pairs if None not in pair]
    return paired_test(*zip(*pairs)) if pairs else None


def share_of_ceiling(runs: Sequence[Run]) -> float | None:
    """(student - control) / (oracle - control), of the means; None without these, or where the oracle is not above.

    Means of the runs that have all three, not the mean of their shares: that is wild where a run's oracle gains little.
    """
    names = ("student", "control", "oracle")
    complete = [run for run in runs if all(value_of(run, name) is not None for name in names)]
    if not complete:
        return None
    gain, ceiling = (difference(complete, name, "control").difference.mean for name in ("student", "oracle"))
    return gain / ceiling if ceiling > 0 else None


def in_words(runs: Sequence[Run]) -> list[str]:
    """What the student gained over control and teacher, what share of the ceiling, and what to change if nothing.

    Args:
        runs: summaries of one task, at least one; one a seed.

    Returns:
        Sentences.
    """
    metric = TASKS[runs[0]["task"]].metrics[0]
    student, control = mean_value(runs, "student"), difference(runs, "student", "control")
    if student is None:
        return [
            f"No detector found anything in the validation images, so none has an {metric}: train longer "
            "(SOLVER.MAX_ITER)."
            if any(map(_values, runs))
            else "There are no labeled images for validation, so nothing tells what the student gained: give "
            "--val-images with their labels."
        ]
    teacher = difference(runs, "student", "teacher")
    parts = []
    if control is not None:
        parts.append(
            f"{_signed(control.difference)} over its control, which trained on for the same steps on human labels alone"
        )
    if teacher is not None:
        parts.append(f"{_signed(teacher.difference)} over the teacher")
    number = len(runs) if student.number == len(runs) else f"{student.number} of {len(runs)}"
    start = f"Over {number} seeds the student has" if len(runs) > 1 else "The student has"
    mean = " on average" if len(runs) > 1 else ""
    sentences = [f"{start} {student.mean:.1f} {metric}{mean}{': ' if parts else ''}{', and '.join(parts)}."]
    if control is None:
        sentences.append(
            "What of that came from the unlabeled images is not known: --control trains what to compare with."
        )
    elif control.difference.half_width is None:
        sentences.append("That is one seed, and may be chance: --seeds 0 1 2 3 4 gives an interval.")
    elif _includes_zero(control.difference):
        sentences.append("The interval includes 0: these seeds show neither a gain nor a loss.")
    sentences += _ceiling(runs, metric)
    gained = control or teacher
    if gained is not None and not _is_gain(gained.difference):
        sentences += _what_to_change(runs, metric)
    return sentences + _rounds(runs, metric)


def _ceiling(runs: Sequence[Run], metric: str) -> list[str]:
    oracle = mean_value(runs, "oracle")
    if oracle is None:
        return []
    ceiling = difference(runs, "oracle", "control")
    called = (
        f"A student of the true labels of the unlabeled images, the ceiling, has {oracle.mean:.1f} {metric}"
    )
    if ceiling is None:
        over = difference(runs, "oracle", "student")
        return [
            f"{called}, {_signed(over.difference)} over the student; --control tells what share of the possible gain "
            "was had."
        ]
    share = share_of_ceiling(runs)
    if share is None:
        return [
            f"{called}, {_signed(ceiling.difference)} against the control: the ceiling is not above it, so no labels "
            "of these images could have helped here."
        ]
    reached = (
        f"the pseudo labels gave {share:.0%} of that" if share > 0 else "the pseudo labels gave none of that"
    )
    doubt = (
        " (but its interval includes 0, so that the share says little)"
        if _includes_zero(ceiling.difference)
        else ""
    )
    return [f"{called}, {_signed(ceiling.difference)} over the control: {reached}{doubt}."]


def _what_to_change(runs: Sequence[Run], metric: str) -> list[str]:
    """All that the summaries know of why nothing was gained."""
    reasons = []
    ceiling, trained_on = difference(runs, "oracle", "control"), difference(runs, "control", "teacher")
    if ceiling is not None and ceiling.difference.mean <= 0:
        reasons.append(
            "Not the pseudo labels are in the way: see whether the detector fits the objects (image size, anchors), "
            "and whether it is trained long enough to use more images."
        )
    if trained_on is not None and trained_on.difference.mean >= MUCH_BY_TRAINING_ON:
        reasons.append(
            f"The control gained {_signed(trained_on.difference)} {metric} over the teacher by training on, so the "
            "teacher was not trained to its end, and labeled worse than it could: raise SOLVER.MAX_ITER, in another "
            "output folder."
        )
    reasons += filter(None, [TASKS[runs[0]["task"]].fault_of_labels(runs)])
    if not reasons:
        reasons.append(
            "The summary shows no reason: the teacher was trained to its end as far as the control tells, and the "
            "pseudo labels are neither too few nor too wrong."
            if trained_on is not None
            else "The summary shows no reason; --control would tell whether the teacher was trained to its end."
        )
        if ceiling is None:
            reasons.append(
                "With labels of some unlabeled images, --oracle tells whether more labels help at all."
            )
    return ["What to change:", *reasons]


def _rounds(runs: Sequence[Run], metric: str) -> list[str]:
    """What further rounds gave, and where they ended early."""
    names = dict.fromkeys(name for run in runs for name in run["stages"] if name.endswith("/student"))
    sentences = []
    for name in names:
        value, over = mean_value(runs, name), difference(runs, name, "student")
        if value is not None and over is not None:
            sentences.append(
                f"The student of {name.split('/')[0].replace('_', ' ')} has {value.mean:.1f} {metric}, "
                f"{_signed(over.difference)} over that of round 1, by more steps than the control had."
            )
    for run in runs:
        if "stopped" in run:
            seed = f"Seed {run['seed']}: " if len(runs) > 1 else ""
            sentences.append(f"{seed}{run['stopped']}")
    return sentences


def _is_gain(interval: Interval) -> bool:
    return interval.mean > 0 and not _includes_zero(interval)


def _includes_zero(interval: Interval) -> bool:
    return interval.half_width is not None and abs(interval.mean) <= interval.half_width


def _signed(interval: Interval) -> str:
    """+1.0, or +1.0 (95 % interval -0.5 to +2.5)."""
    text = signed(interval.mean)
    if interval.half_width is not None:
        low, high = (signed(interval.mean + sign * interval.half_width) for sign in (-1, 1))
        text += f" (95 % interval {low} to {high})"
    return text


def signed(value: float) -> str:
    """+1.0; what rounds to 0 has no minus."""
    return f"{round(value, 1) + 0.0:+.1f}"
