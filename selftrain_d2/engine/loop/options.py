"""What the loop is asked for, beside data and config."""

from __future__ import annotations

from dataclasses import dataclass, field

from selftrain_d2.engine.process_group import Processes


@dataclass(frozen=True)
class LoopOptions:
    """Options of :func:`~selftrain_d2.engine.loop.pipeline.self_train`; with several seeds, of each one's loop.

    Args:
        rounds: with N > 1 the student becomes the next teacher, N - 1 times; those stages are in
            ``round_2/``, ... Each round's teacher is judged by its labels of the labeled images (in
            ``labels_of_labeled/``, ``round_2/labels_of_labeled/``, ...); one that is worse than the teacher before it
            ends the rounds.
        control: also train, from the weights that the student started from, for its steps on human labels
            alone. What the student gains over this control is what the unlabeled images gave.
        oracle: also train, from those weights and for those steps, on the withheld truth of the unlabeled images in
            place of their pseudo labels: no labels of these images can give more. No other stage sees that truth.
        keep_going: make all rounds, also after one whose teacher is worse.
        score_floor: pseudo boxes, or pixels, of a lower score are not even written.
        fit_anchors: see :func:`~selftrain_d2.engine.box_reach.fit_anchors`; all stages have the fitted anchors.
        allow_unsafe: load MODEL.WEIGHTS even if that is a pickle that can run code.
        processes: of training and labeling; one by default. Under torchrun its processes, of several machines too;
            only the main one runs the loop, in :func:`~selftrain_d2.engine.process_group.main_process_leads`.
    """

    rounds: int = 1
    control: bool = False
    oracle: bool = False
    keep_going: bool = False
    score_floor: float = 0.05
    fit_anchors: bool = False
    allow_unsafe: bool = False
    processes: Processes = field(default_factory=Processes)
