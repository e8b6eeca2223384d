import json

import cv2
import numpy as np
import pytest
from PIL import Image

from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.masks import PixelLabels, make_mask_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.errors import InputError
from selftrain_d2.inspection.mask_report import write_mask_report

CLASSES = ["background", "a|b", "never"]
NAMES = ["0.png", "1.png", "2.png", "broken.png"]


def _labels(name):
    """Classes and percents of 20 x 30 pixels; all of image 2 is doubtful."""
    rng = np.random.default_rng(int(name[0]))
    percents = rng.integers(40, 50, (20, 30)) if name == "2.png" else rng.integers(10, 101, (20, 30))
    return PixelLabels(rng.integers(0, 2, (20, 30)).astype(np.uint8), percents.astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Four listed images, three with pseudo masks; true masks are the pseudo masks, but for one row."""
    for part in ("images", "truth"):
        (tmp_path / part).mkdir()
    identity = {"stuff_classes": CLASSES, "score_floor": 0.2, "image_root": str(tmp_path / "images")}
    with PseudoLabelWriter(tmp_path / "masks", identity, NAMES) as writer:
        rows = []
        for name in NAMES[:3]:
            Image.fromarray(np.full((20, 30, 3), 120, np.uint8)).save(tmp_path / "images" / name)
            true = _labels(name).classes.copy()
            true[0] = 2
            Image.fromarray(true).save(tmp_path / "truth" / name)
            rows.append(writer.write_mask(name, _labels(name)))
        writer.write_shard(0, [*rows, make_mask_row("broken.png", skipped="OSError")])
        writer.finish()
    return tmp_path / "masks"


def test_numbers_against_the_arrays(folder, tmp_path):
    numbers = write_mask_report(folder, tmp_path / "report", score_thresh=0.5)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == numbers
    assert numbers["images"] == {"listed": 4, "labeled": 3, "skipped": 1, "all_ignored": 1}
    classes, percents = (np.stack(arrays) for arrays in zip(*map(_labels, NAMES[:3])))
    assert numbers["pixels"] == classes.size
    assert numbers["ignored"] == pytest.approx((percents < 50).mean())
    assert numbers["ignored_by_threshold"] == {
        str(t): pytest.approx((percents < 100 * t).mean()) for t in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    }
    for i, name in enumerate(CLASSES):
        written = (classes == i) & (percents >= 20)
        row = numbers["by_class"][name]
        assert row["share"] == pytest.approx(((classes == i) & (percents >= 50)).mean())
        if name == "never":
            assert row["mean_confidence"] is None
        else:
            assert row["mean_confidence"] == pytest.approx(percents[written].mean() / 100)


def test_the_page_as_a_command(folder, tmp_path, capsys):
    assert main(["inspect", str(folder), "--truth", str(tmp_path / "truth")]) == 0
    printed = capsys.readouterr().out
    report = tmp_path / "masks_report"
    page = (report / "report.md").read_text()
    assert page in printed and str(report / "report.md") in printed
    assert "4 images listed = 3 labeled + 1 skipped." in page and "of 1 images every pixel" in page
    assert r"| a\|b | " in page and "| score at least | pixels ignored | pixel accuracy | mIOU |" in page
    assert "| 0.5 |" in page and " | 95.0 | " in page  # one row of 20 is wrong
    for name in ("confidences.png", "images.png"):
        assert f"]({name})" in page and np.ptp(cv2.imread(str(report / name))) > 100


def test_moved_images(folder, tmp_path, caplog):
    (tmp_path / "images").rename(tmp_path / "moved")
    numbers = write_mask_report(folder, tmp_path / "report")
    assert numbers["images"]["labeled"] == 3 and not (tmp_path / "report" / "images.png").exists()
    assert "images.png" not in (tmp_path / "report" / "report.md").read_text()
    write_mask_report(folder, tmp_path / "report", image_root=tmp_path / "moved")
    assert "](images.png)" in (tmp_path / "report" / "report.md").read_text()


def test_nothing_labeled(tmp_path):
    """No image could be read: nothing is known, and nothing divides by zero."""
    identity = {"stuff_classes": CLASSES, "score_floor": 0.2, "image_root": "/photos"}
    with PseudoLabelWriter(tmp_path / "masks", identity, ["a.png"]) as writer:
        writer.write_shard(0, [make_mask_row("a.png", skipped="OSError")])
        writer.finish()
    numbers = write_mask_report(tmp_path / "masks", tmp_path / "report")
    assert numbers["ignored"] is None and numbers["by_class"]["never"]["share"] is None
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["report.json", "report.md"]


def test_mistakes(folder, tmp_path):
    with pytest.raises(InputError, match=r"0\.1 is outside \[0\.2, 1\]"):
        write_mask_report(folder, tmp_path / "report", score_thresh=0.1)
    (tmp_path / "truth" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png has no mask"):
        write_mask_report(folder, tmp_path / "report", truth_masks=tmp_path / "truth")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_mask_report(folder, tmp_path / "file")
    assert not (tmp_path / "report").exists()
