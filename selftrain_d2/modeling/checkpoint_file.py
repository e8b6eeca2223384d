"""Checkpoint files: read without running code that a stranger put into them, written whole."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrain_d2.errors import InputError
from selftrain_d2.files import whole_file
from selftrain_d2.storage import open_file

# What a pickle of numpy arrays (detectron2's model zoo) needs, under the names of numpy 1 and 2.
_NUMPY_GLOBALS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"{core}.multiarray", name)
        for core in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    ),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


def read_checkpoint(path: str | Path, allow_unsafe: bool = False) -> Any:
    """The object in a checkpoint file, on the CPU.

    ``.safetensors`` and PyTorch files (read with ``weights_only``) cannot run code. A ``.pkl`` may hold numpy
    arrays and plain containers.

    Args:
        path: a local file.
        allow_unsafe: also unpickle files that need more than that. They can run any code.

    Raises:
        InputError: no such file, damaged file, or a pickle that needs more while ``allow_unsafe`` is False.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Checkpoint {path} does not exist or is no file: correct the path.")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                unpickler = pickle.Unpickler if allow_unsafe else _ArrayUnpickler
                return unpickler(file, encoding="latin1").load()
        return torch.load(path, map_location="cpu", weights_only=not allow_unsafe)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"Checkpoint {path} is damaged, or a pickle that runs code when it is read: fetch it again, "
            "or if you trust its source, give --allow-unsafe."
        ) from error
    except Exception as error:  # damaged bytes make these parsers raise almost anything
        raise InputError(
            f"Checkpoint {path} is damaged or incomplete ({type(error).__name__}): fetch or write it again."
        ) from error


def state_dict_of(loaded: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a loaded checkpoint, whatever key they hang under.

    Args:
        loaded: as returned by :func:`read_checkpoint`: a state dict, or a dict that holds one under
            one of the usual keys: ``model``, ``state_dict``, ``model_state_dict``, ``model_state``.
        path: named in errors.

    Raises:
        InputError: there are no named tensors, or other things between them.
    """
    state = loaded
    if isinstance(loaded, dict):
        inner = (loaded.get(key) for key in ("model", "state_dict", "model_state_dict", "model_state"))
        state = next((value for value in inner if isinstance(value, dict)), loaded)
    if not isinstance(state, dict) or not state:
        raise InputError(f"Checkpoint {path} holds no named tensors: give a file of model weights.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, (torch.Tensor, np.ndarray)):
            raise InputError(
                f"Checkpoint {path} holds {type(value).__name__} under {name!r} where tensors are expected: "
                "give a file of model weights."
            )
        state[name] = torch.as_tensor(value)  # in place: a state dict has versions in an attribute
    return state


def averaged_weights(loaded: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """The moving average of the weights (SELFTRAIN.WEIGHT_EMA_DECAY) that a checkpoint of training carries.

    Args:
        loaded: as returned by :func:`read_checkpoint`.
        path: named in errors.

    Raises:
        InputError: it carries none.
    """
    place = loaded if isinstance(loaded, dict) else {}
    for key in ("trainer", "hooks", "WeightAverage"):
        place = place.get(key) or {}
    prefix = "module."  # of torch's AveragedModel
    averages = {name[len(prefix) :]: value for name, value in place.items() if name.startswith(prefix)}
    if not averages:
        raise InputError(
            f"Checkpoint {path} carries no moving average: give one (model_0001999.pth) of a run with "
            "SELFTRAIN.WEIGHT_EMA_DECAY; weight_average/model_final.pth of such a run is the average itself."
        )
    return averages


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes.

    Raises:
        InputError: no such file.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): correct the path.") from error
    return digest.hexdigest()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NUMPY_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors.") from error
    return load_file(path)


def save_weights(content: dict[str, Any], file: str | os.PathLike) -> None:
    """Write a checkpoint, whole or not at all. The same content gives the same bytes, whatever the file's name.

    Raises:
        InputError: the disk is full, or ``file`` cannot be written.
    """
    with whole_file(file) as temporary:
        try:
            with open(temporary, "wb") as stream:
                torch.save(content, stream)
        except (
            RuntimeError
        ) as error:  # torch cannot close a file that could not be written, and says only that
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
