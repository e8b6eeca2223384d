"""What does not run here says so in one sentence, when it is imported."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import defaults
from detectron2.engine import HookBase
from detectron2.modeling import Backbone

from selftrain_d2.environment import OLDEST, check_environment

ROOT = Path(__file__).parents[1]


def _refused(*fragments):
    with pytest.raises(ImportError) as error:
        check_environment()
    message = str(error.value)
    for fragment in fragments:
        assert fragment in message, message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    "module, version", [(torch, "2.1.2+cu121"), (torch, "1.13.1"), (torchvision, "0.9.0")]
)
def test_versions_that_are_too_old(monkeypatch, module, version):
    monkeypatch.setattr(module, "__version__", version)
    _refused(f"needs {module.__name__} {OLDEST[module.__name__]} or later, this is {version}")


@pytest.mark.parametrize("version", ["2.2.0", "2.10.1+cpu", "3.0.0a0+git123"])
def test_versions_that_are_not(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    check_environment()


def test_a_torch_that_cannot_use_this_numpy(monkeypatch):
    def from_numpy(array):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", from_numpy)
    _refused("cannot use numpy", "Numpy is not available", "'numpy<2'")


@pytest.mark.parametrize("name", ["torch", "torchvision", "cv2", "detectron2"])
def test_what_is_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    _refused(name, "which is not installed: ")


def test_an_opencv_that_wants_a_screen(monkeypatch, tmp_path):
    """What opencv-python does in a container."""
    error = "libGL.so.1: cannot open shared object file"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({error!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2")
    _refused("OpenCV (cv2), which cannot be imported", error, "opencv-python-headless")


@pytest.mark.parametrize(
    "owner, name",
    [
        (HookBase, "after_backward"),
        (Backbone, "padding_constraints"),
        (DetectionCheckpointer, "_torch_load"),
        (defaults._C.SOLVER, "RESCALE_INTERVAL"),
    ],
)
def test_a_detectron2_before_778fedc7(monkeypatch, owner, name):
    """Its version is 0.6, as that of later ones."""
    if isinstance(owner, dict):
        monkeypatch.delitem(owner, name)
    else:
        monkeypatch.delattr(owner, name)
    _refused("778fedc7", f"{name}, as its release 0.6 does")


def test_a_detectron2_that_this_pillow_breaks(monkeypatch):
    def import_module(name):
        if name == "detectron2.engine":
            raise AttributeError("module 'PIL.Image' has no attribute 'LINEAR'")
        return sys.modules[name]

    monkeypatch.setattr(importlib, "import_module", import_module)
    _refused("778fedc7", "'LINEAR'")


def test_importing_the_package_looks():
    code = "import sys; sys.modules['cv2'] = None; import selftrain_d2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: selftrain_d2 needs OpenCV (cv2), which is not installed: pip install"
    )


# ---- what setup.py says -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_arguments():
    """What setup.py gives to setuptools."""
    import setuptools

    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        patch.chdir(ROOT)
        spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return given


def _names(requirements):
    return {re.split(r"[<>=!;\[ ]", requirement)[0].lower() for requirement in requirements}


def test_what_belongs_to_the_user_is_not_required(setup_arguments):
    """pip would put it over what is there, or bring a numpy that the user's torch cannot use."""
    required = _names(setup_arguments["install_requires"])
    assert not [n for n in required if "opencv" in n or n in ("torch", "torchvision", "detectron2")]
    assert _names(setup_arguments["extras_require"]["opencv"]) == {"opencv-python-headless"}


def test_dev_has_what_the_tests_need(setup_arguments):
    extras = setup_arguments["extras_require"]
    assert _names(extras["dev"]) >= _names(extras["lite"] + extras["simclr"] + extras["slurm"])


def test_the_oldest_versions_are_those_of_the_tests_with_them(setup_arguments):
    """Every lower bound stands in the file that `make test-oldest` installs, in the same major and minor version."""
    file = ROOT / "tools" / "requirements" / "oldest.txt"
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {name.lower(): version for name, version in (line.split("==") for line in lines)}
    bounds = dict(OLDEST)
    for requirement in [*setup_arguments["install_requires"], *setup_arguments["extras_require"]["opencv"]]:
        name, bounded, version = requirement.partition(">=")
        if bounded and name.lower() != "efficientnet-pytorch":  # its last version
            bounds[name.lower()] = version
    assert bounds.keys() == pinned.keys()
    for name, version in bounds.items():
        assert f"{pinned[name]}.".startswith(f"{version}."), name
