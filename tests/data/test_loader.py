import itertools

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from selftrain_d2 import InputError, build_selftrain_train_loader
from selftrain_d2.data.datasets import register_human_labels, register_pseudo_labels
from selftrain_d2.data.loader import MixedBatchSampler, MixedDataset, repeat_factors
from selftrain_d2.data.pseudo_labels.dataset import PseudoLabelDataset
from selftrain_d2.data.pseudo_labels.reader import load_pseudo_labels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.data.training_sets import get_pseudo_dicts

H, P = 6, 10


def _dicts(source, number):
    return [
        {"name": f"{source}{i}", "width": 10 + i % 2 * 20, "height": 20, "label_source": source}
        for i in range(number)
    ]


def _random_mapper(d):
    return {**d, "random": np.random.rand(), "torch_free": int(np.random.randint(1 << 30))}


def _loader(human_batch_size=2, pseudo_batch_size=3, seed=7, **arguments):
    return build_selftrain_train_loader(
        human_dicts=_dicts("human", H),
        pseudo_dicts=_dicts("pseudo", P) if pseudo_batch_size else [],
        mapper=_random_mapper,
        human_batch_size=human_batch_size,
        pseudo_batch_size=pseudo_batch_size,
        seed=seed,
        **arguments,
    )


def _take(loader, number):
    return list(itertools.islice(iter(loader), number))


def test_every_batch_has_its_counts_human_images_first():
    for batch in _take(_loader(), 30):
        assert [s["label_source"] for s in batch] == ["human"] * 2 + ["pseudo"] * 3


@pytest.mark.parametrize("sizes", [(0, 3), (-4, 3), (2, -1)])
def test_batch_sizes_that_are_none(sizes):
    with pytest.raises(InputError, match=r"IMS_PER_BATCH is (0|-4|-1): a step needs at least"):
        _loader(*sizes)


def test_every_image_comes_once_an_epoch():
    batches = _take(_loader(), 30)
    human = [s["name"] for b in batches for s in b[:2]]
    pseudo = [s["name"] for b in batches for s in b[2:]]
    for names, number in ((human, H), (pseudo, P)):
        for start in range(0, len(names) - number + 1, number):
            assert len(set(names[start : start + number])) == number


def test_teacher_has_human_images_alone():
    assert {s["label_source"] for b in _take(_loader(pseudo_batch_size=0), 5) for s in b} == {"human"}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_same_seed_same_samples_whatever_the_number_of_workers(num_workers):
    assert _take(_loader(num_workers=num_workers), 8) == _take(_loader(num_workers=0), 8)


def test_other_seed_other_samples_and_no_two_draws_alike():
    one, other = _take(_loader(), 8), _take(_loader(seed=8), 8)
    numbers = [s["random"] for batches in (one, other) for b in batches for s in b]
    assert len(set(numbers)) == len(numbers)


def test_the_random_state_outside_is_left_alone():
    np.random.seed(0)
    expected = np.random.rand(3)
    np.random.seed(0)
    loader = iter(_loader())
    drawn = [np.random.rand()]
    next(loader)
    drawn += [np.random.rand(), np.random.rand()]
    np.testing.assert_array_equal(drawn, expected)


def test_resumed_where_it_was():
    undisturbed = _take(_loader(), 12)
    resumed = _loader()
    resumed.batch_sampler.first_batch = 5
    assert _take(resumed, 7) == undisturbed[5:]


def test_the_last_steps_have_the_human_images_alone():
    """Those that come without the limit as well; and resumed among them, the same."""
    always = _take(_loader(), 10)
    expected = always[:4] + [batch[:2] for batch in always[4:]]
    assert _take(_loader(pseudo_steps=4), 10) == expected
    for first in (2, 4, 7):
        resumed = _loader(pseudo_steps=4)
        resumed.batch_sampler.first_batch = first
        assert _take(resumed, 10 - first) == expected[first:]


def test_two_processes_share_the_stream_of_one(monkeypatch):
    """Steps of 2 x b images are those of 1 x 2b: the same images with the same random numbers."""
    alone = _take(_loader(4, 6), 6)
    halves = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        halves.append(_take(_loader(4, 6), 6))
    for whole, first, second in zip(alone, *halves):
        assert len(first) == len(second) == 5
        key = lambda s: (s["name"], s["random"])  # noqa: E731
        assert sorted(map(key, whole)) == sorted(map(key, first + second))


def test_the_number_of_processes_may_change_on_the_way(monkeypatch):
    """Four, then two, then one: each step has the images and random numbers that it has in one process."""
    alone = _take(_loader(4, 8), 9)
    steps = []
    for first, size in ((0, 4), (3, 2), (6, 1)):
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda size=size: size)
        parts = []
        for rank in range(size):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            loader = _loader(4, 8)
            loader.batch_sampler.first_batch = first
            parts.append(_take(loader, 3))
        steps += [[s for part in step for s in part] for step in zip(*parts)]
    key = lambda s: (s["name"], s["random"])  # noqa: E731
    for whole, step in zip(alone, steps):
        assert sorted(map(key, whole)) == sorted(map(key, step))


def _torch_mapper(d):
    return {**d, "random": torch.rand(()).item()}


def test_processes_draw_other_torch_numbers_whatever_the_number_of_workers(monkeypatch):
    """A mapper may use torchvision's transforms, which draw from torch's state in the worker."""
    drawn = {}
    for rank, workers in itertools.product(range(2), (0, 2)):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        torch.manual_seed(rank)
        expected = torch.rand(2)
        torch.manual_seed(rank)
        first = torch.rand(1)
        loader = build_selftrain_train_loader(
            human_dicts=_dicts("human", H), pseudo_dicts=[], mapper=_torch_mapper, human_batch_size=4,
            pseudo_batch_size=0, seed=7, num_workers=workers,
        )  # fmt: skip
        drawn[rank, workers] = [s["random"] for batch in _take(loader, 5) for s in batch]
        assert torch.equal(torch.cat([first, torch.rand(1)]), expected)  # outside nothing was drawn
    assert drawn[0, 0] == drawn[0, 2] and drawn[1, 0] == drawn[1, 2]
    assert len({*drawn[0, 0], *drawn[1, 0]}) == 20


def test_aspect_ratio_grouping_inside_each_source():
    for batch in _take(_loader(aspect_ratio_grouping=True), 20):
        assert len({s["width"] > s["height"] for s in batch[:2]}) == 1
        assert len({s["width"] > s["height"] for s in batch[2:]}) == 1


def test_batch_sizes_that_cannot_be(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(InputError, match=r"SOLVER.PSEUDO_IMS_PER_BATCH = 3 does not divide"):
        _loader()


def test_repeat_factors():
    factors = torch.ones(H)
    factors[0] = 5.0
    names = [s["name"] for b in _take(_loader(human_repeat_factors=factors), 50) for s in b[:2]]
    assert names.count("human0") == pytest.approx(5 * names.count("human1"), rel=0.2)


def test_key_fully_decides_a_sample():
    dataset = MixedDataset([_dicts("human", H)], [_random_mapper], seed=1)
    assert dataset[0, 2, 5] == dataset[0, 2, 5] != dataset[0, 2, 6]


def test_resumed_far_into_training():
    loader = _loader(64, 64)
    assert isinstance(loader.batch_sampler, MixedBatchSampler)
    loader.batch_sampler.first_batch = 1000
    assert len(next(iter(loader))) == 128


def _write_pseudo(folder, classes, images, names):
    writer = PseudoLabelWriter(
        folder, {"thing_classes": classes, "score_floor": 0.05, "image_root": images}, names
    )
    writer.write_shard(
        0, [make_row(n, 96, 96, [[1, 1, 30, 30]] * i, [0.9] * i, [0] * i) for i, n in enumerate(names)]
    )
    writer.finish()


@pytest.fixture
def mixed_config(small_config, coco_set, tmp_path):
    register_human_labels("human", coco_set.json_file, coco_set.images)
    _write_pseudo(tmp_path / "pseudo", ["red", "green"], coco_set.images, ["001.png", "002.png", "003.png"])
    register_pseudo_labels("pseudo", tmp_path / "pseudo")
    small_config.DATASETS.TRAIN = ("human",)
    small_config.DATASETS.PSEUDO_TRAIN = ("pseudo",)
    small_config.SOLVER.PSEUDO_IMS_PER_BATCH = 3
    return small_config


def test_from_config_pseudo_images_without_boxes_are_kept(mixed_config):
    for batch in _take(build_selftrain_train_loader(mixed_config), 4):
        assert [s["label_source"] for s in batch] == ["human"] * 2 + ["pseudo"] * 3
        # Three pseudo images a step are the whole set, the one without boxes included.
        assert sorted(s["file_name"][-7:] for s in batch[2:]) == ["001.png", "002.png", "003.png"]
        assert all(s["image"].shape == (3, 96, 96) for s in batch)
        empty = next(s for s in batch[2:] if s["file_name"].endswith("001.png"))
        assert len(empty["instances"]) == 0


def test_from_config_mistakes(mixed_config):
    cfg = mixed_config.clone()
    cfg.SOLVER.PSEUDO_IMS_PER_BATCH = 0
    with pytest.raises(InputError, match="belong together"):
        build_selftrain_train_loader(cfg)
    cfg = mixed_config.clone()
    cfg.DATASETS.TRAIN = ("nobody",)
    with pytest.raises(InputError, match=r"DATASETS\.TRAIN names 'nobody'"):
        build_selftrain_train_loader(cfg)
    MetadataCatalog.remove("pseudo")
    MetadataCatalog.get("pseudo").set(thing_classes=["green", "red"])
    with pytest.raises(InputError, match="other classes"):
        build_selftrain_train_loader(mixed_config)


def test_pseudo_labels_stay_lazy(mixed_config, monkeypatch):
    """No dict is made but for the samples of a batch, whatever is asked of the loader."""
    made = []
    take = PseudoLabelDataset.__getitem__
    monkeypatch.setattr(PseudoLabelDataset, "__getitem__", lambda self, i: made.append(i) or take(self, i))
    cfg = mixed_config
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    cfg.DATALOADER.PSEUDO_SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    assert get_pseudo_dicts(cfg) is not None
    loader = build_selftrain_train_loader(cfg, mapper=dict)
    assert made == []
    batch = next(iter(loader))
    assert len(made) == 3
    assert [s["label_source"] for s in batch] == ["human"] * 2 + ["pseudo"] * 3


def test_several_pseudo_datasets_of_both_kinds(mixed_config, coco_set, tmp_path):
    """A second folder, and a COCO file of pseudo labels, which is a list of dicts."""
    _write_pseudo(tmp_path / "more", ["red", "green"], coco_set.images, ["004.png", "005.png"])
    register_pseudo_labels("more", tmp_path / "more")
    register_human_labels("list", coco_set.json_file, coco_set.images)
    mixed_config.DATASETS.PSEUDO_TRAIN = ("pseudo", "more", "list")
    dicts = get_pseudo_dicts(mixed_config)
    names = [d["file_name"][-7:] for d in dicts]
    assert names == [f"00{i}.png" for i in (1, 2, 3, 4, 5, *range(1, 9))] and len(dicts) == 13
    assert {d["label_source"] for d in dicts} == {"pseudo"}
    mixed_config.DATALOADER.PSEUDO_SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    batch = next(iter(build_selftrain_train_loader(mixed_config, mapper=dict)))
    assert [s["label_source"] for s in batch] == ["human"] * 2 + ["pseudo"] * 3


def test_a_pseudo_dataset_without_images(mixed_config):
    DatasetCatalog.register("nothing", list)
    MetadataCatalog.get("nothing").set(thing_classes=["red", "green"])
    mixed_config.DATASETS.PSEUDO_TRAIN = ("nothing",)
    with pytest.raises(InputError, match="'nothing' has no image"):
        build_selftrain_train_loader(mixed_config)


def test_aspect_ratio_groups_of_pseudo_labels(tmp_path):
    identity = {"thing_classes": ["red"], "score_floor": 0.05, "image_root": "/photos"}
    names = [f"{i}.png" for i in range(20)]
    with PseudoLabelWriter(tmp_path, identity, names) as writer:
        writer.write_shard(0, [make_row(n, 20, 10 + i % 2 * 20) for i, n in enumerate(names)])
        writer.finish()
    labels = load_pseudo_labels(tmp_path)
    loader = build_selftrain_train_loader(
        human_dicts=_dicts("human", H),
        pseudo_dicts=labels,
        mapper=dict,
        human_batch_size=2,
        pseudo_batch_size=3,
        aspect_ratio_grouping=True,
        seed=0,
    )
    seen = set()
    for batch in _take(loader, 20):
        assert len({s["width"] > s["height"] for s in batch[2:]}) == 1
        seen |= {s["width"] for s in batch[2:]}
    assert seen == {10, 30}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=5),
    st.sampled_from([0.0, 0.1, 0.3, 0.9, 1.0]),
)
def test_repeat_factors_are_detectron2s(tmp_path_factory, first, second, threshold):
    parts = []
    for images in filter(None, (first, second)):
        folder = tmp_path_factory.mktemp("labels")
        names = [f"{i}.png" for i in range(len(images))]
        identity = {"thing_classes": list("abcd"), "score_floor": 0.05, "image_root": "/photos"}
        with PseudoLabelWriter(folder, identity, names) as writer:
            writer.write_shard(
                0,
                [
                    make_row(n, 9, 9, [[0, 0, 5, 5]] * len(c), [0.9] * len(c), c)
                    for n, c in zip(names, images)
                ],
            )
            writer.finish()
        parts.append(load_pseudo_labels(folder))
    dicts = parts[0] if len(parts) == 1 else torch.utils.data.ConcatDataset(parts)
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(list(dicts), threshold)
    torch.testing.assert_close(repeat_factors(dicts, threshold), expected, rtol=0, atol=0)


def test_images_of_rare_classes_come_more_often(mixed_config, tmp_path, coco_set):
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": coco_set.images}
    names = [f"00{i}.png" for i in range(1, 9)]
    with PseudoLabelWriter(tmp_path / "rare", identity, names) as writer:
        rows = [make_row(n, 96, 96, [[1, 1, 30, 30]], [0.9], [int(n == "003.png")]) for n in names]
        writer.write_shard(0, rows)
        writer.finish()
    register_pseudo_labels("rare", tmp_path / "rare")
    mixed_config.DATASETS.PSEUDO_TRAIN = ("rare",)
    mixed_config.DATALOADER.PSEUDO_SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    mixed_config.DATALOADER.REPEAT_THRESHOLD = 0.5  # "green" is in 1/8 of the images: sqrt(0.5 * 8) = 2 times
    loader = build_selftrain_train_loader(mixed_config, mapper=dict)
    names = [s["file_name"][-7:] for batch in _take(loader, 120) for s in batch[2:]]
    assert names.count("003.png") == pytest.approx(2 * names.count("001.png"), rel=0.1)
    mixed_config.DATALOADER.PSEUDO_SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(InputError, match=r"DATALOADER\.PSEUDO_SAMPLER_TRAIN 'RandomSubset"):
        build_selftrain_train_loader(mixed_config)
