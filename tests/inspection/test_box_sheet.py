"""The pictures: boxes where they are, in the colour of their outcome."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.structures import BoxMode
from matplotlib.colors import to_rgb

from selftrain_d2.errors import InputError
from selftrain_d2.inspection import box_sheet
from selftrain_d2.inspection.box_sheet import STYLES, contact_sheet, image_tile, tile_sheet
from selftrain_d2.inspection.style import WHITE


def box(left, top, right, bottom, score=None, category=0, crowd=0):
    annotation = {
        "bbox": [left, top, right, bottom],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category,
        "iscrowd": crowd,
    }
    return annotation if score is None else {**annotation, "score": score}


def near(picture, color, tolerance=45):
    """(H, W) bool: pixels close to a colour."""
    return np.abs(picture.astype(int) - np.round(255 * np.array(to_rgb(color)))).max(axis=2) <= tolerance


def tiles_of(picture, background, columns):
    """Left edges and right edges of the tiles, found by their uniform background colour."""
    profile = (np.abs(picture.astype(int) - background).max(axis=2) <= 3).any(axis=0).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], profile, [0]])))
    assert len(edges) == 2 * columns
    return edges.reshape(columns, 2)


def read(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


GROUND = (70, 100, 60)


@pytest.fixture
def blank():
    return np.full((100, 100, 3), GROUND, np.uint8)


def test_boxes_are_drawn_in_place_and_in_the_colour_of_their_outcome(tmp_path, blank):
    truth = [[box(10, 10, 40, 40), box(60, 60, 90, 90), box(0, 80, 12, 100, crowd=1)]]
    predicted = [
        [box(12, 10, 42, 40, score=0.9), box(55, 5, 95, 25, score=0.6), box(0, 82, 10, 98, score=0.8)]
    ]
    contact_sheet(tmp_path / "sheet.png", [blank], [("Pseudo boxes", predicted)], truth, width=800)
    picture = read(tmp_path / "sheet.png")
    assert picture.shape[1] == 800
    (human_left, human_right), (pseudo_left, pseudo_right) = tiles_of(picture, GROUND, 2)
    scale = (human_right - human_left) / 100
    rows = np.flatnonzero((np.abs(picture.astype(int) - GROUND).max(axis=2) <= 3).any(axis=1))
    top, bottom = rows[0], rows[-1] + 1
    assert bottom - top == pytest.approx(100 * scale, abs=2)

    def extent(color, left, right):
        """XYXY, in pixels of the image, of what a tile shows in a colour."""
        y, x = np.nonzero(near(picture[top:bottom, left:right], color))
        return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / scale

    styles = {kind: style["color"] for kind, (style, _) in STYLES.items()}
    assert extent(styles["human"], human_left, human_right) == pytest.approx([10, 10, 90, 90], abs=1)
    assert extent(styles["correct"], pseudo_left, pseudo_right) == pytest.approx([12, 10, 42, 40], abs=1)
    assert extent(styles["wrong"], pseudo_left, pseudo_right) == pytest.approx([55, 5, 95, 25], abs=1)
    assert extent(styles["missed"], pseudo_left, pseudo_right) == pytest.approx([60, 60, 90, 90], abs=1)
    human_tile = picture[top:bottom, human_left:human_right]
    assert not any(near(human_tile, styles[kind]).any() for kind in ("correct", "wrong"))


def capture(monkeypatch):
    figures = []
    monkeypatch.setattr(box_sheet, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def texts(figure):
    return [t.get_text() for t in figure.texts], [[t.get_text() for t in axes.texts] for axes in figure.axes]


def test_titles_count_and_boxes_carry_scores_and_class_names(monkeypatch, blank):
    figures = capture(monkeypatch)
    images = [blank, blank[:50]]  # of different shapes
    truth = [[box(10, 10, 40, 40, category=1)], [box(60, 10, 90, 40), box(0, 0, 9, 9, crowd=1)]]
    teacher = [[box(10, 10, 40, 40, score=0.875, category=1)], []]
    student = [[], [box(60, 10, 90, 40, score=1.0), box(20, 20, 50, 45, score=0.5)]]
    contact_sheet(
        "x.png", images, [("Teacher", teacher), ("Student", student)], truth, class_names=["ash", "fir"]
    )
    titles, labels = texts(figures[0])
    assert titles == [
        "Human boxes",
        "2 boxes",
        "Teacher",
        "1 of 2 found, 0 wrong",
        "Student",
        "1 of 2 found, 1 wrong",
    ]
    assert labels == [[], [], ["fir .88"], [], [], ["ash 1.00", "ash .50"]]
    heights = [axes.get_window_extent().height for axes in figures[0].axes[:2]]
    assert heights[0] == pytest.approx(2 * heights[1], abs=1)


def test_without_truth_nothing_is_judged(monkeypatch, blank):
    figures = capture(monkeypatch)
    contact_sheet("x.png", [blank], [("Teacher", [[box(10, 10, 40, 40, score=0.75)]])])
    assert texts(figures[0]) == (["Teacher", "1 box"], [[".75"]])
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == [STYLES["plain"][1]]


def test_the_legend_fits_the_picture(monkeypatch, blank):
    figures = capture(monkeypatch)
    truth = [[box(10, 10, 40, 40), box(60, 60, 90, 90), box(0, 80, 12, 100, crowd=1)]]
    predicted = [[box(12, 10, 42, 40, score=0.9), box(55, 5, 95, 25, score=0.6)]]
    contact_sheet("x.png", [blank], [("Pseudo boxes", predicted)], truth)
    (legend,) = figures[0].legends
    assert len(legend.get_texts()) == len(STYLES) - 1  # every kind but "plain"
    figures[0].canvas.draw()
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figures[0].bbox.width and extent.y0 >= 0


def test_images_are_read_from_files_in_true_colour(tmp_path):
    cv2.imwrite(str(tmp_path / "red.png"), np.full((40, 40, 3), (0, 0, 200), np.uint8))  # BGR
    contact_sheet(tmp_path / "sheet.png", [tmp_path / "red.png"], [("Nothing", [[]])], width=300)
    assert near(read(tmp_path / "sheet.png"), (200 / 255, 0, 0), 3).mean() > 0.5


@pytest.mark.parametrize(("images", "boxes"), [(1, [[], []]), (0, [])])
def test_uneven_or_empty_sheets_are_refused_and_nothing_is_written(tmp_path, blank, images, boxes):
    with pytest.raises(InputError, match="image"):
        contact_sheet(tmp_path / "sheet.png", [blank] * images, [("Teacher", boxes)])
    assert not list(tmp_path.iterdir())


# ---- One image, for the report --------------------------------------------------------------------


def sees(picture, kind):
    """(H, W) bool: pixels of the colour of a kind of box."""
    return near(picture, STYLES[kind][0]["color"])


def test_a_tile_colours_boxes_by_outcome_and_counts_them():
    grey = np.full((50, 100, 3), 90, np.uint8)
    boxes = [box(10, 10, 30, 40, score=0.9), box(60, 10, 80, 40, score=0.8)]
    picture, counts = image_tile(grey, (50, 100), boxes, [box(10, 10, 30, 40), box(40, 5, 55, 45)], side=400)
    assert picture.shape == (200, 400, 3) and counts == "1 of 2 found, 1 wrong"
    for kind, right in (("correct", 30), ("wrong", 80)):  # four pixels each pixel of the image
        assert sees(picture, kind)[60:140, 4 * right - 4 : 4 * right + 4].any(axis=1).all()
    assert not sees(picture, "wrong")[:, :220].any() and not sees(picture, "correct")[:, 220:].any()
    assert image_tile(grey, (50, 100), boxes)[1] == "2 boxes"


def test_a_tile_tints_masks():
    mask = np.zeros((100, 100), np.uint8, order="F")
    mask[20:80, 20:40] = 1
    rle = mask_util.encode(mask)
    rle["counts"] = rle["counts"].decode()  # as the store has it
    boxes = [{**box(10, 10, 90, 90, score=0.9), "segmentation": rle}]
    picture, _ = image_tile(np.full((100, 100, 3), 90, np.uint8), (100, 100), boxes, side=200)
    tinted = 0.6 * 90 + 0.4 * 255 * np.array(to_rgb(STYLES["plain"][0]["color"]))
    np.testing.assert_allclose(picture[60:150, 50:70].mean((0, 1)), tinted, atol=2)
    np.testing.assert_allclose(picture[60:150, 100:150].mean((0, 1)), 90, atol=2)


def test_a_tile_without_an_image_says_so_on_grey():
    boxes = [box(10, 10, 30, 40, score=0.9)]
    picture, counts = image_tile(None, (400, 800), boxes, problem="image file not found", side=300)
    assert picture.shape == (150, 300, 3) and counts == "1 box"
    assert near(picture, WHITE).any() and not near(image_tile(None, (9, 9), [])[0], WHITE).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2)])
def test_tiles_of_odd_shapes(size):
    picture, _ = image_tile(np.zeros((*size, 3), np.uint8), size, [box(0, 0, 1, 1, score=0.5)], side=100)
    assert max(picture.shape[:2]) == 100


def test_a_sheet_of_tiles_shows_each(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    tiles = [np.full((40, 60, 3), color, np.uint8) for color in colors]
    tile_sheet(tmp_path / "sheet.png", tiles, ["words"] * 5, "Title")
    picture = read(tmp_path / "sheet.png")
    assert all(near(picture, np.array(color) / 255).sum() > 2000 for color in colors)
