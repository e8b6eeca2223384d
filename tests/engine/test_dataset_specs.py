import pickle

import pytest
from detectron2.data import DatasetCatalog

from selftrain_d2 import InputError
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter
from selftrain_d2.engine.launch import pseudo_labels, registered

SCORES = [0.3, 0.5, 0.8, 0.9]


@pytest.fixture
def labels(tmp_path):
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": "/photos"}
    with PseudoLabelWriter(tmp_path, identity, ["a.png", "b.png"]) as writer:
        boxes = [[0, 0, 5, 5]] * 4
        writer.write_shard(0, [make_row(n, 9, 9, boxes, SCORES, [0, 1, 0, 1]) for n in ("a.png", "b.png")])
        writer.finish()
    return tmp_path


@pytest.mark.parametrize(
    "keys, kept",
    [
        ({}, [0.5, 0.8, 0.9]),
        ({"SCORE_THRESH": 0.85}, [0.9]),
        ({"SCORE_THRESH_BY_CLASS": ("red", 0.1)}, [0.3, 0.5, 0.8, 0.9]),
        ({"SCORE_THRESH_BY_CLASS": ("red", 0.1), "TOP_K": 2}, [0.8, 0.9]),
        ({"BOXES_PER_IMAGE": 2.0}, [0.8, 0.9]),
    ],
)
def test_the_config_selects_the_boxes_of_a_run(small_config, labels, keys, kept):
    for key, value in keys.items():
        small_config.SELFTRAIN[key] = value
    # As it travels to the processes of a run.
    spec = pickle.loads(pickle.dumps(pseudo_labels("pseudo", labels, small_config)))
    with registered([spec]):
        dicts = DatasetCatalog.get("pseudo")
        assert [[round(a["score"], 4) for a in d["annotations"]] for d in dicts] == [kept, kept]


def test_mistakes_name_what_is_wrong(small_config, labels, tmp_path):
    small_config.SELFTRAIN.SCORE_THRESH_BY_CLASS = ("blue", 0.1)
    with (
        pytest.raises(InputError, match="no class 'blue'"),
        registered([pseudo_labels("p", labels, small_config)]),
    ):
        pass
    with pytest.raises(InputError, match="holds no pseudo labels"):
        pseudo_labels("p", tmp_path / "nothing", small_config)
