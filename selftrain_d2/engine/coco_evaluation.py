"""Evaluation on COCO files that are repaired first, and what has to be right for it before training."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from selftrain_d2.data.coco_datasets import catalog_with, coco_dataset
from selftrain_d2.data.coco_file import evaluation_truth, read_coco
from selftrain_d2.data.training_sets import check_keypoints
from selftrain_d2.errors import InputError
from selftrain_d2.files import write_json

# Keypoints that pycocotools has sigmas of (a person's).
_COCO_KEYPOINTS = 17


class RepairedCOCOEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, whose truth is the dataset as training reads it.

    COCOEvaluator reads the JSON file that the metadata names, with its faults, in every process; of a dataset that
    is none it takes a copy that an earlier run may have left in the output folder under the same name. This one
    makes the truth when it is needed, where it is needed, from the repaired file or the dataset itself.
    """

    def __init__(
        self, dataset_name: str, output_dir: str, *, masks: bool = False, kpt_oks_sigmas: Sequence[float] = ()
    ):
        """
        Args:
            dataset_name: of detectron2's catalog.
            output_dir: for the predictions.
            masks: whether masks are judged; see :func:`selftrain_d2.data.coco_file.read_coco`.
            kpt_oks_sigmas: one a keypoint; none: COCO's, of 17.
        """
        with tempfile.TemporaryDirectory() as folder:
            nothing, stand_in = os.path.join(folder, "nothing.json"), f"{dataset_name} is read later"
            write_json(nothing, {"images": [], "categories": [], "annotations": []})
            MetadataCatalog.get(stand_in).json_file = nothing
            try:
                super().__init__(stand_in, output_dir=output_dir, kpt_oks_sigmas=list(kpt_oks_sigmas))
            finally:
                MetadataCatalog.remove(stand_in)
        self._metadata = MetadataCatalog.get(dataset_name)
        self._masks = masks

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, Any] | None:
        if comm.is_main_process() or not self._distributed:
            content = self._truth()
            self._do_evaluation = "annotations" in content  # COCO's test sets have none
            self._coco_api = evaluation_truth(content)
        return super().evaluate(img_ids)

    def _truth(self) -> dict[str, Any]:
        name = self._metadata.name
        if name in DatasetCatalog and (dataset := coco_dataset(name)) is not None:
            return dataset.read(self._masks).content
        if self._metadata.get("json_file") is not None:
            return read_coco(self._metadata.json_file, masks=self._masks).content
        load = DatasetCatalog[name]
        with catalog_with({name: lambda: copy.deepcopy(load())}):  # the conversion shifts keypoints in place
            return convert_to_coco_dict(name)


def check_evaluation(cfg: CfgNode) -> None:
    """Read the COCO files of DATASETS.TEST, so that a fault is told before training and not after it.

    Raises:
        InputError: see :func:`selftrain_d2.data.coco_file.read_coco`; or MODEL.KEYPOINT_ON is set and the keypoints
            have other names or numbers, or TEST.KEYPOINT_OKS_SIGMAS does not have a sigma for each.
    """
    for name in cfg.DATASETS.TEST:
        dataset = coco_dataset(name)
        if dataset is not None and (cfg.MODEL.MASK_ON or not dataset.checked):
            dataset.read(cfg.MODEL.MASK_ON)
    if cfg.MODEL.KEYPOINT_ON:
        check_keypoints(cfg, cfg.DATASETS.TEST)
        points, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        if points != (sigmas or _COCO_KEYPOINTS):
            raise InputError(
                f"There are {points} keypoints, but TEST.KEYPOINT_OKS_SIGMAS has {sigmas} numbers"
                f"{'' if sigmas else f', which stands for the {_COCO_KEYPOINTS} of a person'}: give one for each "
                "keypoint, the spread of people's clicks relative to the object's size (COCO: 0.025 for an eye, 0.107 "
                "for a hip)."
            )
