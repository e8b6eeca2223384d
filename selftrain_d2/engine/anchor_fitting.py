"""``--fit-anchors``: a run's config with anchors that fit its human boxes, before the run begins."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from selftrain_d2.data.coco_datasets import reading_coco
from selftrain_d2.data.training_sets import check_registered
from selftrain_d2.engine.box_reach import fit_anchors
from selftrain_d2.engine.checks import build_without_memory
from selftrain_d2.engine.launch import DatasetSpec, registered


def with_fitted_anchors(cfg: CfgNode, datasets: Sequence[DatasetSpec]) -> CfgNode:
    """See :func:`~selftrain_d2.engine.box_reach.fit_anchors`; the boxes are those of DATASETS.TRAIN.

    Args:
        datasets: registered for that.

    Raises:
        InputError: there as here; or a dataset cannot be used.
    """
    with registered(datasets):
        names = cfg.DATASETS.TRAIN
        check_registered("DATASETS.TRAIN", names)
        with reading_coco(names, masks=cfg.MODEL.MASK_ON):
            dicts = [sample for name in names for sample in DatasetCatalog.get(name)]
        return fit_anchors(cfg, build_without_memory(cfg), dicts)
