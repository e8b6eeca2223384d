"""Backbones and meta architectures. Importing this package registers them with detectron2."""

from selftrain_d2.modeling import backbone, meta_arch  # noqa: F401  (registers)
