"""The lazy dataset against a list of dicts made by a loop over plain rows."""

import copy
import itertools
import pickle
import tempfile
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from selftrain_d2 import InputError, load_pseudo_labels
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.dataset import PseudoLabelDataset
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter

CLASSES = ["car", "dog", "tree"]
SCORES = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
BOX = st.tuples(SCORES, st.integers(0, 2), st.lists(st.floats(0, 900, width=32), min_size=4, max_size=4))
IMAGE = st.fixed_dictionaries(
    {
        "height": st.integers(1, 4000),
        "width": st.integers(1, 4000),
        "boxes": st.lists(BOX, max_size=5),
        "masks": st.booleans(),
        "skipped": st.sampled_from([None, None, None, "OSError: broken"]),
    }
)
BY_CLASS = {"car": 0.1, "dog": 0.9, "tree": 0.5}
SELECTION = st.builds(
    lambda thresholds, top_k, weighted: dict(
        zip(("score_thresh", "ignore_score_thresh"), thresholds),
        top_k=top_k,
        score_weighted=weighted and thresholds[1] is not None,
    ),
    st.sampled_from(
        [
            (0.05, None), (0.3, None), (0.7, None), (BY_CLASS, None),
            (0.3, 0.1), (0.7, 0.05), (BY_CLASS, 0.3), (0.7, {"car": 0.05, "dog": 0.3, "tree": 1.0}),
        ]
    ),
    st.none() | st.integers(1, 3),
    st.booleans(),
)  # fmt: skip


def _name(position):
    return f"ünder/{'x' * (position % 3)}{position}.jpg"


def _mask(position, box):
    return f"{position}R{box}" * (1 + box % 2)


def _write(folder, images):
    identity = {"thing_classes": CLASSES, "score_floor": 0.05, "image_root": "/photos"}
    with PseudoLabelWriter(folder, identity, [_name(i) for i in range(len(images))]) as writer:
        for shard in writer.missing_shards():
            writer.write_shard(shard, [_row(i, images[i]) for i in writer.shard_range(shard)])
        writer.finish()


def _row(position, image):
    if image["skipped"]:
        return make_row(_name(position), skipped=image["skipped"])
    boxes = image["boxes"]
    return make_row(
        _name(position),
        image["height"],
        image["width"],
        np.array([box for _, _, box in boxes]).reshape(-1, 4),
        [score for score, _, _ in boxes],
        [category for _, category, _ in boxes],
        [_mask(position, i) for i in range(len(boxes))] if image["masks"] else None,
    )


def _of_class(score_thresh, category):
    return np.float32(score_thresh[CLASSES[category]] if isinstance(score_thresh, dict) else score_thresh)


def _weight(score, category, score_thresh, ignore_score_thresh):
    high, low = (float(_of_class(x, category)) for x in (score_thresh, ignore_score_thresh))
    score = float(np.float32(score))
    return 1.0 if score >= high else (score - low) / (high - low)


def _expected(images, score_thresh, top_k=None, ignore_score_thresh=None, score_weighted=False):
    dicts = []
    for position, image in enumerate(images):
        if image["skipped"]:
            continue
        kept = []
        for i, (score, category, _) in enumerate(image["boxes"]):
            least = _of_class(score_thresh, category)
            if score_weighted:
                least = min(least, _of_class(ignore_score_thresh, category))
            if np.float32(score) >= least:
                kept.append(i)
        kept = sorted(sorted(kept, key=lambda i: -image["boxes"][i][0])[:top_k])
        ignored = []
        if ignore_score_thresh is not None:
            for i, (score, category, _) in enumerate(image["boxes"]):
                if i not in kept and np.float32(score) >= _of_class(ignore_score_thresh, category):
                    ignored.append(i)
        size = [image["height"], image["width"]]
        annotations = []
        for i in kept + ignored:
            score, category, box = image["boxes"][i]
            annotations.append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": category,
                    "score": float(np.float32(score)),
                }
            )
            if i in ignored:
                annotations[-1]["iscrowd"] = 1
                continue
            if score_weighted:
                weight = _weight(score, category, score_thresh, ignore_score_thresh)
                annotations[-1]["weight"] = pytest.approx(weight, abs=1e-6)
            if image["masks"]:
                annotations[-1]["segmentation"] = {"size": size, "counts": _mask(position, i)}
        dicts.append(
            {
                "file_name": f"/photos/{_name(position)}",
                "image_id": _name(position),
                "height": image["height"],
                "width": image["width"],
                "label_source": "pseudo",
                "annotations": annotations,
            }
        )
        if ignore_score_thresh is not None:
            dicts[-1]["ignore_crowd"] = True
    return dicts


def _objects(d):
    return [a for a in d["annotations"] if not a.get("iscrowd")]


@settings(max_examples=60, deadline=None)
@given(st.lists(IMAGE, max_size=10), SELECTION, st.slices(10))
def test_it_is_the_list_that_a_loop_makes(images, selection, part):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(pseudo_label_writer, "SHARD_SIZE", 3)
        _write(folder, images)
        labels = load_pseudo_labels(folder, **selection)
    expected = _expected(images, **selection)
    assert list(labels) == expected and labels == expected
    for dataset, dicts in (
        (labels, expected),
        (labels[part], expected[part]),
        (labels[part][::-1], expected[part][::-1]),
        (pickle.loads(pickle.dumps(labels[part])), expected[part]),
    ):
        assert len(dataset) == len(dicts) and list(dataset) == dicts
        assert dataset.box_counts.tolist() == [len(_objects(d)) for d in dicts]
        assert dataset.ignored_counts.tolist() == [len(d["annotations"]) - len(_objects(d)) for d in dicts]
        assert dataset.category_ids.tolist() == [a["category_id"] for d in dicts for a in _objects(d)]
        assert dataset.sizes.tolist() == [[d["height"], d["width"]] for d in dicts]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(IMAGE.filter(lambda image: not image["skipped"]), min_size=1, max_size=8),
    st.floats(0.1, 5),
    st.none() | st.integers(1, 3),
)
def test_as_many_boxes_as_wanted(images, boxes_per_image, top_k):
    """No other threshold gives a number of boxes that is nearer."""
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, images)
        found = load_pseudo_labels(folder, top_k=top_k, boxes_per_image=boxes_per_image).box_counts.sum()
    wanted = boxes_per_image * len(images)
    numbers = [
        sum(len(d["annotations"]) for d in _expected(images, threshold, top_k))
        for threshold in sorted({score for image in images for score, _, _ in image["boxes"]})
    ]
    assert abs(found - wanted) == min((abs(number - wanted) for number in numbers), default=wanted)


def _image(boxes, skipped=None):
    return {"height": 50, "width": 80, "boxes": boxes, "masks": False, "skipped": skipped}


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [
        _image([(s, int(rng.integers(3)), [1.0, 2.0, 3.5, 4.5]) for s in rng.choice([0.1, 0.6, 0.9], i % 4)])
        for i in range(40)
    ]


@pytest.fixture
def labels(tmp_path, images):
    _write(tmp_path / "labels", images)
    return load_pseudo_labels(tmp_path / "labels", 0.5)


def test_indices_as_a_list_takes_them(labels, images):
    dicts = _expected(images, 0.5)
    assert labels[-1] == dicts[-1] and labels[np.int64(3)] == dicts[3]
    for index in (40, -41):
        with pytest.raises(IndexError):
            labels[index]
    with pytest.raises(TypeError):
        labels["0"]
    assert dicts[7] in labels and labels.index(dicts[7]) == 7
    assert list(reversed(labels)) == dicts[::-1]
    assert labels != dicts[:-1] and labels != 3


def test_it_cannot_be_changed(labels):
    with pytest.raises(TypeError):
        labels[0] = {}
    before = copy.deepcopy(labels[3])
    labels[3]["annotations"].clear()
    labels[3]["file_name"] = "elsewhere"
    assert labels[3] == before
    with pytest.raises(TypeError):
        hash(labels)


def test_it_says_what_it_is(labels):
    boxes = sum(len(d["annotations"]) for d in labels)
    assert repr(labels) == f"PseudoLabelDataset(40 images of /photos, {boxes} boxes)"


def test_ignored_boxes_change_nothing_else(tmp_path, images):
    """Nor the threshold that a number of boxes an image chooses."""
    _write(tmp_path, images)
    every_box = sum(len(image["boxes"]) for image in images)
    for selection in ({"score_thresh": 0.7}, {"boxes_per_image": 0.5}, {"score_thresh": 0.2, "top_k": 1}):
        plain = load_pseudo_labels(tmp_path, **selection)
        ignoring = load_pseudo_labels(tmp_path, **selection, ignore_score_thresh=0.1)
        assert [_objects(d) for d in ignoring] == [d["annotations"] for d in plain]
        assert 0 < ignoring.ignored_counts.sum() == every_box - plain.box_counts.sum()
        assert plain.described(CLASSES) in ignoring.described(CLASSES)
        assert f"{ignoring.ignored_counts.sum()} more are ignored" in ignoring.described(CLASSES)


def test_the_chosen_threshold_is_logged(tmp_path, images, caplog):
    _write(tmp_path, images)
    with caplog.at_level("INFO"):
        labels = load_pseudo_labels(tmp_path, boxes_per_image=0.2)
    least = min(a["score"] for d in labels for a in d["annotations"])
    assert f"the score threshold {least:.4f} leaves {labels.box_counts.sum() / 40:.3f} boxes" in caplog.text


def test_moved_images_and_no_images(tmp_path):
    _write(tmp_path / "one", [_image([])])
    assert load_pseudo_labels(tmp_path / "one", image_root="/moved")[0]["file_name"] == f"/moved/{_name(0)}"
    _write(tmp_path / "none", [_image([], skipped="broken")])
    for selection in ({}, {"boxes_per_image": 1.0}, {"top_k": 1}):
        labels = load_pseudo_labels(tmp_path / "none", **selection)
        assert len(labels) == 0 and list(labels) == [] and labels.category_ids.tolist() == []
    with pytest.raises(InputError, match="no class 'bus'"):
        load_pseudo_labels(tmp_path / "one", {"bus": 0.5})


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_it(labels, context):
    loader = DataLoader(
        labels, 7, num_workers=1, collate_fn=_first_to_last, multiprocessing_context=context, timeout=1800
    )
    batches = list(loader)
    assert list(itertools.chain(*batches)) == list(labels)
    # It is still all there in this process, when its memory was moved for spawned ones.
    assert isinstance(labels, PseudoLabelDataset) and labels[39]["image_id"] == _name(39)


def test_spawned_workers_get_no_copy(tmp_path):
    """What is sent to one names shared memory; plain pickles, e.g. to a file, hold everything."""
    images = [_image([(0.9, 1, [1.0, 2.0, 3.5, 4.5])] * 3) for _ in range(300)]
    _write(tmp_path, images)
    labels = load_pseudo_labels(tmp_path)
    sent = [len(ForkingPickler.dumps(labels)) for _ in range(2)]
    assert max(sent) < 4000 < 300 * 3 * 24 < len(pickle.dumps(labels))
    assert labels == _expected(images, 0.5)


def _first_to_last(samples):
    return samples
