"""Several seeds summed up, by hand."""

import json

import pytest
from detectron2.config import get_cfg

from selftrain_d2.engine.loop import seeds
from selftrain_d2.engine.loop.options import LoopOptions
from selftrain_d2.engine.loop.seeds import seeds_to_markdown, self_train_seeds, sum_up

VALUES = {
    "teacher": (30.0, 31.0, 32.0),
    "student": (37.0, 38.0, 39.0),
    "control": (36.0, 36.0, 36.0),
    "oracle": (40.0, 40.0, 40.0),
}


def make_run(seed, values):
    stages = {name: {"metrics": {"bbox": {"AP": value}}, "seconds": 60.0} for name, value in values.items()}
    stages["pseudo_labels"] = {"boxes": 40, "images": 20, "skipped": 0, "seconds": 60.0}
    return {"task": "detection", "seed": seed, "score_thresh": 0.5, "stages": stages}


def test_means_intervals_and_paired_differences():
    runs = [make_run(i + 3, {name: values[i] for name, values in VALUES.items()}) for i in range(3)]
    summary = json.loads(json.dumps(sum_up(runs)))
    assert summary["seeds"] == [3, 4, 5] and summary["metric"] == "AP"
    half_width = 4.302653 / 3**0.5  # deviation 1; t(0.975, 2), of a printed table
    student = summary["stages"]["student"]
    assert student["by_seed"] == [37.0, 38.0, 39.0] and student["mean"] == 38.0
    assert student["half_width"] == pytest.approx(half_width, abs=1e-5)
    gain = summary["differences"]["student - control"]
    assert gain["by_seed"] == [1.0, 2.0, 3.0] and gain["mean"] == 2.0
    assert gain["half_width"] == pytest.approx(half_width, abs=1e-5)
    # t = 2 / (1 / sqrt(3)) = 3.464 with 2 degrees: p = 1 - t / sqrt(t^2 + 2)
    assert gain["p"] == pytest.approx(1 - (12 / 14) ** 0.5)
    assert summary["differences"]["student - teacher"]["by_seed"] == [7.0, 7.0, 7.0]
    assert summary["share_of_ceiling"] == pytest.approx(0.5)
    page = seeds_to_markdown(summary)
    assert (
        "| AP | [3](seed_3/summary.md) | [4](seed_4/summary.md) | [5](seed_5/summary.md) | mean | 95 % |"
        in page
    )
    assert "| student | 37.0 | 38.0 | 39.0 | 38.0 | +- 2.5 |" in page
    assert "| student - control | +1.0 | +2.0 | +3.0 | +2.0 | +- 2.5 |" in page
    assert page.splitlines()[2].startswith(
        "Over 3 seeds the student has 38.0 AP on average: +2.0 (95 % interval"
    )


def test_a_round_that_one_seed_did_not_reach():
    runs = [
        make_run(0, {"student": 10.0, "round_2/student": 12.0}),
        {**make_run(1, {"student": 11.0}), "stopped": "The teacher of round 2 is worse."},
    ]
    summary = sum_up(runs)
    assert summary["stages"]["round_2/student"]["by_seed"] == [12.0, None]
    assert "| round_2/student | 12.0 | - | 12.0 | - |" in seeds_to_markdown(summary)
    assert "student - control" not in summary["differences"]


def test_one_after_the_other_stopped_and_resumed(tmp_path, monkeypatch):
    """Each seed has its folder, its SEED and the same options; there is a summary when all are done."""
    called, stop = [], {"at": 2}

    def loop(cfg, task, output, options):
        called.append((cfg.SEED, output, options))
        if stop["at"] == cfg.SEED:
            raise KeyboardInterrupt
        output.mkdir(exist_ok=True)
        values = {"student": 31.0 + cfg.SEED, "control": 30.0}
        (output / "summary.json").write_text(json.dumps(make_run(cfg.SEED, values)))

    monkeypatch.setattr(seeds, "self_train", loop)
    monkeypatch.setattr(seeds, "checked_stages", lambda *arguments: None)
    cfg, output, lines = get_cfg(), tmp_path / "output", []
    asked = LoopOptions(control=True, rounds=2)
    monkeypatch.setattr(seeds.logger, "info", lines.append)
    with pytest.raises(KeyboardInterrupt):
        self_train_seeds(cfg, "task", output, [1, 2, 3], options=asked)
    # Three stages took a minute each, and two seeds are left.
    assert "Seed 1: finished, student 32.0 AP, control 30.0 AP; 1 of 3 seeds, about 6 min to go" in lines
    assert not (output / "summary.json").exists()

    stop["at"] = None
    summary = self_train_seeds(cfg, "task", output, [1, 2, 3], options=asked)
    assert [(seed, folder.name) for seed, folder, _ in called] == [
        (1, "seed_1"), (2, "seed_2"), (1, "seed_1"), (2, "seed_2"), (3, "seed_3"),
    ]  # fmt: skip
    assert all(options == asked for *_, options in called)
    assert json.loads((output / "summary.json").read_text()) == summary and cfg.SEED == -1
    assert summary["differences"]["student - control"]["by_seed"] == [2.0, 3.0, 4.0]
    assert (output / "summary.md").read_text() == seeds_to_markdown(summary)
