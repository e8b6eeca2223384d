"""The report: its numbers against the labels it was made of, its page in a real browser."""

import base64
import contextlib
import html
import html.parser
import io
import json
import re
import shlex
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from conftest import make_coco_set
from detectron2.config import get_cfg

from selftrain_d2 import add_selftrain_config
from selftrain_d2.cli import main
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.engine.config_values import merge_options
from selftrain_d2.inspection import box_report as report
from selftrain_d2.inspection.box_report import write_report
from selftrain_d2.inspection.inspect import inspect_labels

CLASSES = ["red", "green", "<b>blue & co"]
THRESH = 0.5
SKIPPED = {
    "broken 1.png": "OSError: cannot identify 'broken 1.png'",
    "broken 2.png": "OSError: cannot identify 'x'",
}


def write_labels(folder, root, rows, classes=CLASSES, floor=0.05):
    """A pseudo-label folder of (file name, height, width, boxes (N, 4), scores, category ids, masks)."""
    rows = [make_row(*row) for row in rows] + [make_row(name, skipped=why) for name, why in SKIPPED.items()]
    identity = {
        "thing_classes": classes,
        "score_floor": floor,
        "image_root": str(root),
        "teacher_weights_sha256": "12ab" * 16,
        "teacher_config_sha256": "34cd" * 16,
    }
    writer = PseudoLabelWriter(folder, identity, [row["file_name"] for row in rows])
    writer.write_shard(0, rows)
    writer.finish(date="2026-01-02T03:04:05+00:00")
    return folder


def make_labels(folder):
    """Pseudo labels near the true boxes of ten images, and wrong ones; two images are skipped, one is empty."""
    coco = make_coco_set(folder / "truth", 10, seed=4)
    generator = np.random.default_rng(4)
    rows = []
    for image in coco.content["images"]:
        true = [a for a in coco.content["annotations"] if a["image_id"] == image["id"]]
        boxes, scores, ids = [], [], []
        for annotation in true if image["id"] < 10 else []:
            x, y, width, height = annotation["bbox"]
            boxes.append([x + 1, y, x + width + 1, y + height])
            ids.append(annotation["category_id"] // 10 - 1)
            scores.append(generator.uniform(0.3, 1))
        for _ in range(generator.integers(0, 5)):
            corner = generator.uniform(0, 60, 2)
            boxes.append([*corner, *(corner + 30)])
            ids.append(int(generator.integers(0, 2)))
            scores.append(generator.uniform(0.05, 0.6) if image["id"] < 10 else 0.1)
        rows.append((image["file_name"], 96, 96, np.array(boxes).reshape(-1, 4), scores, ids))
    return write_labels(folder / "labels", coco.images, rows), coco, rows


@pytest.fixture
def labels(tmp_path):
    return make_labels(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Labels, and a report on them with all that can be in one: (coco set, rows, output, report.json, printed)."""
    folder, coco, rows = make_labels(tmp_path_factory.mktemp("full"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        labels = ["--truth", coco.json_file, "--human-labels", coco.json_file]
        found = inspect(folder, *labels, "--config-file", "neon_trees/lite0_256.yaml")
    return coco, rows, *found, printed.getvalue()


def inspect(folder, *arguments):
    output = folder.parent / "report"
    assert main(["inspect", str(folder), "--output", str(output), *map(str, arguments)]) == 0
    return output, json.loads((output / "report.json").read_text())


def test_numbers_are_those_of_the_labels(full):
    coco, rows, output, numbers, printed = full
    kept = [np.asarray(row[4], np.float32) >= np.float32(THRESH) for row in rows]
    assert numbers["images"] == {"listed": 12, "labeled": 10, "empty": 0, "skipped": 2}
    assert numbers["pseudo"]["boxes"] == sum(k.sum() for k in kept)
    assert numbers["pseudo"]["boxes_at_floor"] == sum(map(len, kept))
    assert numbers["pseudo"]["images_without_boxes"] == sum(not k.any() for k in kept) >= 1
    for i, row in enumerate(numbers["classes"]):
        assert row["name"] == CLASSES[i]
        assert row["boxes"] == sum((np.asarray(r[5])[k] == i).sum() for r, k in zip(rows, kept))
        human = sum(a["category_id"] == 10 * (i + 1) for a in coco.content["annotations"])
        assert row["human_boxes"] == human and row["human_boxes_per_image"] == pytest.approx(human / 10)
    quality = numbers["quality"]
    assert quality["images"] == 10 and quality["at_threshold"]["truth"] == len(coco.content["annotations"])
    best = max(quality["by_threshold"], key=lambda row: (row["f1"] or 0, row["threshold"]))
    assert sum(b["boxes"] for b in quality["reliability"]) == numbers["pseudo"]["boxes_at_floor"]
    assert [s["images"] for s in numbers["skipped_reasons"]] == [2]
    key = "SELFTRAIN.SCORE_THRESH_BY_CLASS"
    assert numbers["recommended"][key][0::2] == CLASSES
    assert all(isinstance(t, float) for t in numbers["recommended"][key][1::2])
    # 15 true boxes are too few to choose by; the best F1 is in the figures all the same.
    assert numbers["recommended"]["overall"]["threshold"] == 0.5 and best["f1"] > 0.5
    assert "12 images listed = 10 labeled + 0 empty + 2 skipped." in printed and key in printed
    assert str(output / "report.html") in printed
    for warning in numbers["warnings"]:
        assert warning in printed


def test_human_boxes_out_of_the_detectors_reach(full):
    """Rectangles of 24 to 48 px in images of 96 px; at the config's 256 px they are 64 to 128 px, well within reach."""
    coco, _, output, numbers, _ = full
    reach = numbers["reach"]
    assert reach["image_size"] == 256 and reach["rule"] == "an anchor of IoU 0.5"
    human = [a["category_id"] for a in coco.content["annotations"]]
    assert [row["boxes"] for row in reach["classes"]] == [human.count(10), human.count(20), 0]
    assert [row["out_of_reach"] for row in reach["classes"]] == [0, 0, None]
    # What is smaller than half the smallest anchor has no IoU of a half with any: at 64 px those of under 16 * 32 px.
    for name, category in (("red", 10), ("green", 20)):
        areas = [
            a["area"] * (64 / 96) ** 2 for a in coco.content["annotations"] if a["category_id"] == category
        ]
        least = sum(area < 16 * 32 for area in areas) / len(areas)
        assert reach["out_of_reach_by_image_size"]["64"][name] >= round(least, 4)
    assert sum(reach["out_of_reach_by_image_size"]["64"][name] for name in ("red", "green")) > 0
    assert (output / "reach.png").exists() and report.DIAGRAMS["reach"][:20] in (
        output / "report.html"
    ).read_text()


def test_the_printed_thresholds_are_config_words(full):
    (line,) = [line for line in full[-1].splitlines() if line.startswith("SELFTRAIN.")]
    cfg = get_cfg()
    add_selftrain_config(cfg)
    merge_options(cfg, shlex.split(line))
    assert list(cfg.SELFTRAIN.SCORE_THRESH_BY_CLASS) == ["red", 0.5, "green", 0.5, "<b>blue & co", 0.5]


def test_an_older_report_leaves_no_picture_behind(labels):
    folder, _, _ = labels
    older = folder.parent / "report"
    older.mkdir()
    for name in ("reliability.png", "images_random.png", "mine.png"):
        (older / name).write_bytes(b"older")
    output, numbers = inspect(folder)
    assert numbers["quality"] is None and numbers["human"] is None
    assert not (output / "reliability.png").exists() and not list(output.glob(".*"))
    assert (output / "mine.png").read_bytes() == b"older"
    pictures = {file.name: cv2.imread(str(file)) for file in output.glob("*.png") if file.name != "mine.png"}
    assert len(pictures) == 10 and all(p is not None and p.std() > 1 for p in pictures.values())


@pytest.fixture
def no_diagrams(monkeypatch):
    """Only the images: diagrams take most of the time."""
    monkeypatch.setattr(report, "_diagrams", lambda *_: {})


def test_moved_images_are_found_again_missing_ones_are_told(labels, tmp_path, no_diagrams):
    folder, coco, _ = labels
    moved = tmp_path / "moved"
    shutil.move(coco.images, moved)

    def write(**options):
        found = inspect_labels(folder, images_a_sheet=2, **options)
        return write_report(found, tmp_path / "report"), (tmp_path / "report" / "report.html").read_text()

    numbers, page = write()
    assert numbers["sampled_images"]["shown"] == numbers["sampled_images"]["not_readable"] > 3
    assert any("--image-root" in warning for warning in numbers["warnings"])
    assert "image file not found" in page
    numbers, _ = write(image_root=moved)
    assert numbers["sampled_images"]["not_readable"] == 0
    assert not any("--image-root" in warning for warning in numbers["warnings"])
    for i, file in enumerate(sorted(moved.iterdir())):
        if i % 2:
            file.write_bytes(b"no image")
        else:
            cv2.imwrite(str(file), np.zeros((50, 96, 3), np.uint8))
    _, page = write(image_root=moved)
    assert "cannot be read" in page and "96 x 50, labeled was 96 x 96" in page


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_names(full):
    _, _, output, numbers, _ = full
    text = (output / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "b/blue"}
    assert "<b>blue" not in text and CLASSES[2] in page.text
    sources = [a.get("src") or a.get("srcset") for _, a in page.tags if a.get("src") or a.get("srcset")]
    assert len(sources) > 20 and all(s.startswith("data:image/") for s in sources)
    assert (
        "http" not in re.sub(r"http-equiv", "", re.sub(r"data:image/[^\"]*", "", text)) and "url(" not in text
    )
    for source in sources:
        picture = cv2.imdecode(
            np.frombuffer(base64.b64decode(source.split(",")[1]), np.uint8), cv2.IMREAD_COLOR
        )
        assert picture is not None
    for warning in numbers["warnings"]:
        assert warning in page.text
    assert "12 listed = 10 labeled + 0 empty + 2 skipped" in page.text and "12ab" * 4 in page.text


def test_many_classes_are_folded(tmp_path, no_diagrams):
    classes = [f"class {i}" for i in range(35)]
    boxes = np.tile([10.0, 10, 40, 40], (len(classes), 1))
    rows = [("a.png", 96, 96, boxes, np.full(len(classes), 0.8), np.arange(len(classes)))]
    output, numbers = inspect(write_labels(tmp_path / "labels", tmp_path, rows, classes))
    page = Page((output / "report.html").read_text())
    assert len(numbers["classes"]) == len(classes) and all(name in page.text for name in classes)
    assert [tag for tag, _ in page.tags].count("details") == 2


@pytest.mark.parametrize("rows", [[], [("a.png", 96, 96, np.zeros((0, 4)), [], [])]])
def test_nothing_found_is_a_page_too(tmp_path, rows):
    coco = make_coco_set(tmp_path / "human", 3, seed=0)
    folder = write_labels(tmp_path / "labels", tmp_path, rows)
    output, numbers = inspect(folder, "--human-labels", coco.json_file)
    assert numbers["pseudo"]["boxes"] == 0 and numbers["recommended"]["overall"]["threshold"] == 0.5
    assert (output / "report.html").stat().st_size > 10000
    assert any("not one" in warning.lower() for warning in numbers["warnings"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--score-thresh", "0.01"], "floor 0.05"),
        (["--score-thresh", "1.5"], "outside"),
        (["--truth", "no.json"], "no.json does not exist"),
        (["--truth", "other"], "None of the"),
        (["--config-file", "neon_trees/lite0_256.yaml"], "give --human-labels as well"),
        (
            ["--config-file", "aerial_digits/segmentor_lite0_128.yaml", "--human-labels", "other"],
            "SelfTrainingSegmentor has no upright anchors",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(labels, tmp_path, capsys, arguments, words):
    folder, _, _ = labels
    other = make_coco_set(tmp_path / "other", 2, seed=9)
    for image in other.content["images"]:
        image["file_name"] = f"other_{image['file_name']}"
    file = tmp_path / "other.json"
    file.write_text(json.dumps(other.content))
    arguments = [str(file) if a == "other" else a for a in arguments]
    assert main(["inspect", str(folder), "--output", str(tmp_path / "report"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and error.startswith("selftrain-d2 inspect: error: ")
    assert not (tmp_path / "report").exists()


def test_a_folder_without_pseudo_labels_is_refused(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no pseudo labels" in capsys.readouterr().err


# ---- In a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"
)

# Appended to a copy of the page: says what the browser made of it.
PROBE = """<script>
addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  parent.postMessage(JSON.stringify({
    images: [...document.images].map(
      i => ({alt: i.alt, pixels: i.naturalWidth, dark: i.currentSrc != i.src, box: box(i),
             diagram: i.parentElement.tagName == "PICTURE"})),
    height: document.documentElement.scrollHeight, width: document.documentElement.scrollWidth,
    window: innerWidth, text: document.body.innerText.length,
  }), "*");
});
</script>"""

# The page in a frame of a given size, because a window may not be as narrow as a phone's. Writes down what the
# probe says, where --dump-dom shows it.
FRAME = """<!DOCTYPE html><body style="margin: 0">
<iframe src="{page}" style="display: block; border: 0; width: {width}px; height: {height}px"></iframe>
<script>addEventListener("message", event => {{
  document.body.innerHTML = "<pre id=probe></pre>";
  document.getElementById("probe").textContent = event.data;
}});</script></body>"""


def browse(page, width, height, *arguments):
    """What chromium prints about a page in a frame of ``width`` by ``height`` CSS pixels."""
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.name, width=width, height=height), encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--force-device-scale-factor=1", "--virtual-time-budget=10000"),
        *(f"--user-data-dir={page.with_name('profile')}", f"--window-size={max(width, 800)},{height}"),
        *(*arguments, f"file://{frame}"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def probe(page, width, *arguments):
    """What the browser says of the page's images and size."""
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text).group()
    copy = page.with_name("probed.html")
    copy.write_text(text.replace(policy, "").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    dom = browse(copy, width, 900, "--dump-dom", *arguments)
    return json.loads(html.unescape(re.search(r'<pre id="probe">(.*)</pre>', dom, re.S).group(1)))


def faults(page, width):
    """What is wrong with the page at a width: blank, too wide, or with an image that is not seen."""
    found = probe(page, width)
    screenshot = page.with_name("screenshot.png")
    browse(page, width, found["height"], f"--screenshot={screenshot}")
    pixels = cv2.imread(str(screenshot))[:, :width].astype(float)
    wrong = []
    if found["text"] < 500 or pixels.std() < 5:
        wrong.append("the page is blank")
    if found["window"] != width or found["width"] > width:
        wrong.append(f"the page is {found['width']} pixels wide in a window of {found['window']}")
    for image in found["images"]:
        left, top, wide, high = (round(v) for v in image["box"])
        region = pixels[top : top + high, left : left + wide]
        if not image["pixels"] or wide < 50 or high < 30:
            wrong.append(f"no image: {image['alt']}")
        elif region.shape[:2] != (high, wide) or region.std() < 5:
            wrong.append(f"nothing to see: {image['alt']}")
    return wrong, found


@pytest.fixture
def page(full, tmp_path):
    """A copy of the page, alone in its folder: it needs no other file."""
    return shutil.copy(full[2] / "report.html", tmp_path / "page.html")


@needs_browser
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_every_image(page, width):
    wrong, found = faults(page, width)
    assert not wrong
    assert len(found["images"]) > 20 and not any(image["dark"] for image in found["images"])


@needs_browser
def test_a_dark_browser_gets_dark_diagrams(page):
    found = probe(page, 1000, "--blink-settings=preferredColorScheme=0")
    assert all(image["pixels"] for image in found["images"])
    assert all(image["dark"] == image["diagram"] for image in found["images"])  # photographs stay
    assert {image["diagram"] for image in found["images"]} == {True, False}


@needs_browser
def test_the_browser_test_sees_a_broken_and_a_blank_image(page):
    text = page.read_text(encoding="utf-8")
    broken, empty = re.findall(r'<img src="([^"]*)"', text)[2:4]
    _, white = cv2.imencode(".png", np.full((60, 80, 3), 255, np.uint8))
    blank = "data:image/png;base64," + base64.b64encode(white.tobytes()).decode()
    page.write_text(
        text.replace(broken, "data:image/png;base64,AAAA").replace(empty, blank), encoding="utf-8"
    )
    wrong, found = faults(page, 1600)
    alts = [image["alt"] for image in found["images"]]
    assert wrong == [f"no image: {alts[2]}", f"nothing to see: {alts[3]}"]
    page.write_text(re.sub(r"<main>.*</main>", "", text, flags=re.S), encoding="utf-8")
    assert faults(page, 1600)[0] == ["the page is blank"]
