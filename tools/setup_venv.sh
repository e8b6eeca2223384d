#!/usr/bin/env bash
# Make a virtual environment with everything that the demo and the tests need, from PyPI alone.
# usage: setup_venv.sh PYTHON VENV [DETECTRON2], where DETECTRON2 is a pip requirement or empty.
set -eu
python=$1 venv=$2 detectron2=${3:-}

"$python" -m venv "$venv"
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
# A detectron2 that is there is the user's own: take it, with the torch it was built for. By a path file, because
# --system-site-packages does not see the packages of an interpreter that lives in a virtual environment itself.
if [ -z "$detectron2" ] && "$python" -c "import torch, torchvision, detectron2" 2>/dev/null; then
  "$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" >"$site/detectron2_of_the_user.pth"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
has() { "$venv/bin/python" -c "import $1" 2>/dev/null; }

# This pair is tried. torchvision has no CPU build on PyPI, so this is the CUDA build; it runs without a GPU.
has torch && has torchvision || pip install --quiet torch==2.11.0 torchvision==0.26.0

if [ -n "$detectron2" ]; then
  pip install --quiet --no-build-isolation "$detectron2"
elif ! has detectron2; then
  # detectron2 has no package of its own on PyPI. This wheel holds its main branch of 2024-04-17; its compiled
  # part is for CPython 3.10, its Python part runs on later ones, hence the explicit target and version.
  requirement=$(mktemp)
  echo "sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561" >"$requirement"
  pip install --quiet --target "$site" --python-version 3.10 --only-binary=:all: --no-deps --require-hashes -r "$requirement"
  rm -rf "$requirement" "$site/tools" # the wheel's stray top-level folder would hide tools/ of other projects
  pip install --quiet fvcore iopath yacs omegaconf hydra-core termcolor tabulate cloudpickle tqdm tensorboard packaging
fi
pip install --quiet --editable ".[dev,lite]"
