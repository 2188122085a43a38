"""Metadata of the package; settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version, read without importing the package, which would need PyTorch."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "mask2former/__init__.py").read_text("utf-8"), re.M)
    if found is None:
        raise ValueError('mask2former/__init__.py must have a line __version__ = "..."')
    return found[1]


def requirements(name: str) -> list[str]:
    """The lines of a requirements file without comments."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def ext_modules() -> list[Extension]:
    """Compiled parts: none, all is Python. The next step builds `mask2former._C` here where it can."""
    return []


setup(
    name="mask2former",
    version=version(),
    description="Mask2Former: panoptic, instance and semantic segmentation with one architecture",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["mask2former", "mask2former.*"]),
    package_data={"mask2former.data": ["categories/*.json"]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "dev": requirements("requirements-dev.txt"),
        "train": requirements("requirements-train.txt"),
    },
    ext_modules=ext_modules(),
    zip_safe=False,
)
