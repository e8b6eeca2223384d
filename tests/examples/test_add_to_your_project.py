import importlib.util
from pathlib import Path

import torch
from conftest import SMALL_MODEL

from selftrain_d2 import LossNormalizer
from selftrain_d2.cli.common import find_config
from selftrain_d2.data.datasets import register_human_labels
from selftrain_d2.data.pseudo_labels.shards import make_row
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter

EXAMPLE = Path(__file__).parents[2] / "examples" / "add_to_your_project.py"


def test_the_recipe_trains_a_student(coco_set, tmp_path):
    spec = importlib.util.spec_from_file_location("add_to_your_project", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    register_human_labels("human", coco_set.json_file, coco_set.images)
    identity = {"thing_classes": ["red", "green"], "score_floor": 0.05, "image_root": coco_set.images}
    writer = PseudoLabelWriter(tmp_path / "pseudo", identity, ["001.png"])
    writer.write_shard(0, [make_row("001.png", 96, 96, [[10, 10, 60, 60]], [0.9], [0])])
    writer.finish()
    output = tmp_path / "output"
    output.mkdir()
    trainer = example.train_student(
        str(find_config("Base-RetinaNet-EfficientNet-FPN.yaml")),
        str(tmp_path / "pseudo"),
        [*SMALL_MODEL, "SOLVER.PSEUDO_IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "DATASETS.TRAIN", "('human',)",
         "OUTPUT_DIR", str(output)],
    )  # fmt: skip

    normalizer = next(h for h in trainer._hooks if isinstance(h, LossNormalizer))
    assert normalizer.human_average > 0 and normalizer.pseudo_average > 0
    saved = torch.load(output / "model_final.pth", weights_only=True)
    assert saved["trainer"]["hooks"]["LossNormalizer"] == normalizer.state_dict()
