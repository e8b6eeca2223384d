#!/usr/bin/env bash
# Make a virtual environment with everything that the demo and the tests need, from PyPI alone.
# usage: setup_venv.sh PYTHON VENV [DETECTRON2 [REQUIREMENTS]], where DETECTRON2 is a pip requirement or empty, and
# REQUIREMENTS a file with the versions of torch and torchvision, and of what else is to have a certain one.
set -eu
python=$1 venv=$2 detectron2=${3:-}
requirements=${4:-$(dirname "$0")/requirements/tried.txt}

"$python" -m venv "$venv"
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
# A detectron2 that is there is the user's own: take it, with the torch it was built for. By a path file, because
# --system-site-packages does not see the packages of an interpreter that lives in a virtual environment itself.
# This clone comes first: the user may have selftrain_d2 there as well.
if [ -z "$detectron2" ] && "$python" -c "import torch, torchvision, detectron2" 2>/dev/null; then
  { pwd && "$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"; } >"$site/detectron2_of_the_user.pth"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
has() { "$venv/bin/python" -c "import $1" 2>/dev/null; }

has torch && has torchvision || pip install --quiet -r "$requirements"
# What follows must not replace them, nor put another numpy under a torch that cannot use it.
kept=$(mktemp)
trap 'rm -f "$kept"' EXIT
"$venv/bin/python" - >"$kept" <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "torchvision", "numpy"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
PYTHON

if [ -n "$detectron2" ]; then
  pip install --quiet setuptools wheel # it is built here, because its set-up needs torch
  pip install --quiet --constraint "$kept" --no-build-isolation "$detectron2"
elif ! has detectron2; then
  # detectron2 has no package of its own on PyPI. This wheel holds its main branch of 2024-04-17; its compiled
  # part is for CPython 3.10, its Python part runs on other ones, hence the explicit target and version.
  requirement=$(mktemp)
  echo "sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561" >"$requirement"
  pip install --quiet --target "$site" --python-version 3.10 --only-binary=:all: --no-deps --require-hashes -r "$requirement"
  rm -rf "$requirement" "$site/tools" # the wheel's stray top-level folder would hide tools/ of other projects
  pip install --quiet --constraint "$kept" fvcore iopath yacs omegaconf hydra-core termcolor tabulate cloudpickle tqdm \
    tensorboard packaging
fi
# Not over an OpenCV of another name (headless, contrib), which is the user's own.
extras=dev,lite
has cv2 || extras=$extras,opencv
pip install --quiet --constraint "$kept" --editable ".[$extras]"
