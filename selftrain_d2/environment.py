"""Whether this plugin can run here: said at import in one sentence, not by a traceback in the middle of a training."""

from __future__ import annotations

import importlib
import re
from functools import reduce

#: Oldest versions of what is the user's own. Those of the packages that pip installs with this one are in setup.py.
OLDEST = {"torch": "2.2", "torchvision": "0.17"}

_TORCH_GUIDE = "https://pytorch.org/get-started"
_DETECTRON2_GUIDE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
# What to do where a module cannot be imported.
_ADVICE = {
    "torch": f"install it as {_TORCH_GUIDE} says",
    "torchvision": f"install the one that goes with your torch as {_TORCH_GUIDE} says",
    "cv2": "pip install opencv-python-headless, or another package of OpenCV",
    "detectron2": f"follow {_DETECTRON2_GUIDE}, then import selftrain_d2 again",
}
# What is used of detectron2 and its release 0.6 lacks: module and name. Versions do not tell, main's is 0.6 as well.
_DETECTRON2_FEATURES = (
    ("detectron2.engine", "HookBase.after_backward"),
    ("detectron2.modeling", "Backbone.padding_constraints"),
    ("detectron2.checkpoint", "DetectionCheckpointer._torch_load"),
    ("detectron2.config.defaults", "_C.SOLVER.RESCALE_INTERVAL"),
)


def check_environment() -> None:
    """Raise ImportError if torch, torchvision, OpenCV or detectron2 is missing, broken, or too old."""
    for name, oldest in OLDEST.items():
        version = str(_imported(name).__version__)
        if _release(version) < _release(oldest):
            raise ImportError(
                f"selftrain_d2 needs {name} {oldest} or later, this is {version}: {_ADVICE[name]}."
            )
    _check_numpy()
    _imported("cv2")
    _imported("detectron2")
    try:
        lacking = [name for module, name in _DETECTRON2_FEATURES if not _has(module, name)]
    except (ImportError, AttributeError) as error:  # release 0.6 wants what Pillow 10 no longer has
        lacking = [f"what its own modules import ({error})"]
    if lacking:
        raise ImportError(
            "selftrain_d2 needs detectron2's main branch of 2023-03-05 (commit 778fedc7) or later, and this detectron2 "
            f"lacks {', '.join(lacking)}, as its release 0.6 does: {_ADVICE['detectron2']}."
        )


def _imported(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that does not fit its neighbours may raise anything
        problem = f"cannot be imported ({error})"
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            problem = "is not installed"
        title = {"cv2": "OpenCV (cv2)"}.get(name, name)
        use = "is a plugin for" if name == "detectron2" else "needs"
        raise ImportError(f"selftrain_d2 {use} {title}, which {problem}: {_ADVICE[name]}.") from None


def _check_numpy() -> None:
    import numpy as np
    import torch

    try:
        torch.from_numpy(np.zeros(1))
    except RuntimeError as error:
        raise ImportError(
            f"torch {torch.__version__} cannot use numpy {np.__version__} ({error}): pip install 'numpy<2', "
            "or a later torch."
        ) from None


def _has(module: str, name: str) -> bool:
    imported = importlib.import_module(module)
    try:
        reduce(getattr, name.split("."), imported)
    except AttributeError:
        return False
    return True


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
