"""Backbones, meta architectures and an anchor generator. Importing this package registers them with detectron2."""

from selftrain_d2.modeling import anchor_shapes, backbone, meta_arch  # noqa: F401  (registers)
