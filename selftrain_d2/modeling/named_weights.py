"""Published weights by name in MODEL.WEIGHTS: ``timm://tf_efficientnet_b0.ns_jft_in1k``, ``effdet://tf_efficientdet_d0``.

A scheme is an entry of SCHEMES. Its files lie in the library's own cache; they are converted in memory when loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from selftrain_d2.errors import InputError
from selftrain_d2.modeling.checkpoint_file import read_checkpoint, state_dict_of
from selftrain_d2.modeling.efficientdet_weights import EFFICIENTDET_NAMES
from selftrain_d2.modeling.weight_conversion import INPUT_STATISTICS, converted_state


class Scheme(NamedTuple):
    """Where weights of a name come from.

    Attributes:
        fetch: a name to the path of its file in the library's cache, downloaded if it is not there.
        convert: a name and the tensors of its file to a checkpoint, as ``convert_weights`` writes it.
    """

    fetch: Callable[[str], str]
    convert: Callable[[str, dict[str, torch.Tensor]], dict[str, Any]]


def scheme_of(path: str) -> tuple[Scheme, str] | None:
    """The scheme of a path and the name behind it; None for paths of other kinds."""
    prefix, separator, name = path.partition("://")
    return (SCHEMES[prefix], name) if separator and prefix in SCHEMES else None


def load_named(path: str, file: str, allow_unsafe: bool = False) -> dict[str, Any] | None:
    """The checkpoint that a name stands for, made of its file; None where the path is no name.

    Raises:
        InputError: an unknown name, or a file that is not what the name says.
    """
    found = scheme_of(path)
    if found is None:
        return None
    scheme, name = found
    return scheme.convert(name, state_dict_of(read_checkpoint(file, allow_unsafe), path))


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError("Weights timm://... need timm: pip install 'selftrain_d2[timm]'.") from error
    return timm


def _timm_config(name: str) -> Any:
    """timm's own record of a model: where its weights are and what they were trained with."""
    try:
        config = _timm().get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        config = None
    if config is None or not config.has_weights:
        raise InputError(
            f"MODEL.WEIGHTS timm://{name}: timm has no such weights; see timm.list_pretrained('tf_efficientnet*')."
        )
    return config


def _fetch_from_timm(name: str) -> str:
    _backbone_of_timm(name)
    config = _timm_config(name)
    file = config.hf_hub_filename or "model.safetensors"
    return _fetch(f"timm://{name}", config.url, (config.hf_hub_id, file) if config.hf_hub_id else None)


def _fetch(path: str, url: str, hub: tuple[str, str] | None = None) -> str:
    """A file in timm's cache, from an address, or from a model and file of the hub."""
    _timm()
    from timm.models import _hub

    try:
        return str(_hub.download_from_hf(*hub) if hub else _hub.download_cached_file(url))
    except Exception as error:  # of the hub, of its HTTP client, or of the system
        raise InputError(
            f"MODEL.WEIGHTS {path} are not in timm's cache and cannot be fetched ({type(error).__name__}): "
            "connect to the network once, or copy the cache of a machine that has them."
        ) from error


def _backbone_of_timm(name: str) -> str:
    """ "tf_efficientnet_b0.ns_jft_in1k" to "efficientnet-b0"."""
    match = re.fullmatch(r"tf_(efficientnet)_(b\d|l2|lite\d)(\..+)?", name)
    if match is None:
        raise InputError(
            f"MODEL.WEIGHTS timm://{name}: only timm's tf_efficientnet_* fit our backbones, for example "
            "timm://tf_efficientnet_b0.ns_jft_in1k."
        )
    return f"{match[1]}-{match[2]}"


def _convert_from_timm(name: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    config = _timm_config(name)
    statistics = tuple([round(255 * value, 3) for value in values] for values in (config.mean, config.std))
    converted = converted_state(state, "timm", _backbone_of_timm(name), f"timm://{name}", statistics)
    return {
        "model": converted.model,
        "matching_heuristics": True,  # names lack the detector's prefix
        "input": converted.input,
    }


def _effdet_config(name: str) -> Any:
    """effdet's own record of a detector: where its weights are and what they were trained with."""
    try:
        from effdet.config import get_efficientdet_config
    except ImportError as error:
        raise InputError("Weights effdet://... need effdet: pip install effdet.") from error
    try:
        config = get_efficientdet_config(name)
    except KeyError:
        config = None
    if config is None or not config.url or _detector_of_effdet(name) not in EFFICIENTDET_NAMES:
        raise InputError(
            f"MODEL.WEIGHTS effdet://{name}: there are the authors' own weights of tf_efficientdet_d0 to d7 and d7x, "
            "and with AdvProp, such as tf_efficientdet_d0_ap, to d5."
        )
    return config


def _detector_of_effdet(name: str) -> str:
    """ "tf_efficientdet_d0_ap" to "efficientdet-d0"."""
    match = re.fullmatch(r"tf_(efficientdet)_(d\dx?)(_ap)?", name)
    return f"{match[1]}-{match[2]}" if match else ""


def _fetch_from_effdet(name: str) -> str:
    return _fetch(f"effdet://{name}", _effdet_config(name).url)


def _convert_from_effdet(name: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    # effdet's preprocessing is ImageNet's where its record does not say otherwise.
    statistics = INPUT_STATISTICS["inception" if _effdet_config(name).get("mean") else "imagenet"]
    converted = converted_state(state, "effdet", _detector_of_effdet(name), f"effdet://{name}", statistics)
    return {"model": converted.model, "input": converted.input, **converted.facts}


SCHEMES = {
    "timm": Scheme(_fetch_from_timm, _convert_from_timm),
    "effdet": Scheme(_fetch_from_effdet, _convert_from_effdet),
}


class _NamedWeights(PathHandler):
    """Lets detectron2's PathManager know the names, as it knows ``detectron2://``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [f"{scheme}://" for scheme in SCHEMES]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        scheme, name = scheme_of(path)
        return scheme.fetch(name)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return True  # what is not one is told when it is fetched


PathManager.register_handler(_NamedWeights())
