"""Metadata of the package, and the build of its optional kernels; settings of the tools are in pyproject.toml.

MASK2FORMER_BUILD says which kernels `mask2former._C` gets: "cuda" (and CPU), "cpu", "none", or "auto" (the default):
what this machine can build. A kernel that is named and cannot be built is an error; "auto" never fails the install.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
SOURCES = "mask2former/ops/csrc"
RECORD = "mask2former/ops/_build_record.txt"  # read by mask2former/ops/_extension.py

# Only these need to know whether there is anything to compile; others, such as egg_info, must not import PyTorch.
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
# Used if TORCH_CUDA_ARCH_LIST is not set, as far as nvcc knows them. Code for 8.0 runs on 8.6 and 8.9.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
OLDEST_TORCH = (2, 4)


class NotPossibleError(Exception):
    """A kernel cannot be built here; the text says why."""


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


def build_arguments() -> dict[str, Any]:
    """The arguments of setup() that decide what is compiled."""
    wish = os.environ.get("MASK2FORMER_BUILD", "auto")
    if wish not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"MASK2FORMER_BUILD must be auto, cpu, cuda or none, got {wish!r}")
    if not BUILD_COMMANDS & set(sys.argv):
        return {}
    if wish == "none":
        return {"cmdclass": {"build_py": recording_build_py("MASK2FORMER_BUILD=none when it was installed")}}
    try:
        import_torch()
        check_compiler()
        extension, reason = plan(wish)
    except NotPossibleError as error:
        if wish != "auto":
            raise SystemExit(f"MASK2FORMER_BUILD={wish} is not possible: {error}") from error
        print(f"mask2former: kernels are not built: {error}", file=sys.stderr)
        return {"cmdclass": {"build_py": recording_build_py(f"when it was installed, {error}")}}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": kernel_builder(wish, reason)}}


def plan(wish: str) -> tuple[Any, str]:
    """The extension to compile first, and why it has no CUDA kernel (empty if it has)."""
    if wish == "cpu":
        return cpu_extension(), "MASK2FORMER_BUILD=cpu when it was installed"
    try:
        return cuda_extension(), ""
    except NotPossibleError as error:
        if wish == "cuda":
            raise
        return cpu_extension(), f"when it was installed, {error}"


# ---- what is there


def import_torch() -> None:
    """Make PyTorch importable, also inside of pip's build isolation.

    pip builds in an environment that hides the installed PyTorch, but the kernels must fit exactly that one. The same
    interpreter without pip's PYTHONPATH knows where it is.
    """
    if sys.platform == "win32":
        raise NotPossibleError("the kernels need GCC or Clang, and this is Windows")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    if importlib.util.find_spec("torch") is None:
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if found.returncode != 0 or not found.stdout.strip():
            raise NotPossibleError("there was no PyTorch to build against")
        sys.path.append(str(Path(found.stdout.strip()).parent))
    try:
        import torch
    except (ImportError, OSError) as error:  # a shared library of it that is missing or does not fit
        raise NotPossibleError(f"PyTorch could not be imported: {first_line(error)}") from error
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise NotPossibleError(f"PyTorch was {torch.__version__}, and the kernels need 2.4")


def compiler() -> str:
    """The C++ compiler's command."""
    return os.environ.get("CXX", "c++").split()[0]


def check_compiler() -> None:
    """Refuse if there is no C++ compiler."""
    if shutil.which(compiler()) is None:
        raise NotPossibleError(f"there was no C++ compiler ({compiler()})")


def cuda_home() -> Path:
    """CUDA's folder. A wrapper of nvcc may stand elsewhere, so that headers decide between several."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named:
        homes = [Path(named)]
    else:
        homes = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
        homes.append(Path("/usr/local/cuda"))
    homes = [home for home in homes if (home / "bin/nvcc").exists()]
    if not homes:
        raise NotPossibleError(f"there was no nvcc{f' in {named}' if named else ''}")
    return next((home for home in homes if (home / "include/cuda_runtime.h").exists()), homes[0])


def nvcc_output(home: Path, argument: str) -> str:
    """What nvcc prints."""
    done = subprocess.run([home / "bin/nvcc", argument], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotPossibleError(f"nvcc {argument} failed: {done.stderr.strip()[-200:]}")
    return done.stdout


def architectures(home: Path) -> str:
    """The value of TORCH_CUDA_ARCH_LIST."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        return named
    known = set(re.findall(r"compute_(\d+)", nvcc_output(home, "--list-gpu-arch")))
    return ";".join(arch for arch in ARCHITECTURES if arch.replace(".", "") in known) + "+PTX"


# ---- what is built

COMPILER_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]


def cpu_extension() -> Any:
    """`mask2former._C` without CUDA."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "mask2former._C", cpp_sources(), extra_compile_args={"cxx": cpp_flags()}
    )


def cuda_extension() -> Any:
    """`mask2former._C` with the kernels of both devices."""
    import torch

    if torch.version.cuda is None:
        raise NotPossibleError(f"PyTorch {torch.__version__} was one without CUDA")
    home = cuda_home()
    found = re.search(r"release (\d+)\.(\d+)", nvcc_output(home, "--version"))
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        theirs = f"{found[1]}.{found[2]}" if found else "of unknown version"
        raise NotPossibleError(f"nvcc was {theirs} and PyTorch's CUDA {torch.version.cuda}")
    os.environ["CUDA_HOME"] = str(home)  # read when cpp_extension is imported
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(home)
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "mask2former._C",
        [*cpp_sources(), f"{SOURCES}/cuda/ms_deform_attn.cu"],
        define_macros=[
            ("MASK2FORMER_WITH_CUDA", None),
            ("MASK2FORMER_CUDA_VERSION", f'"{found[1]}.{found[2]}"'),
            ("MASK2FORMER_CUDA_PTX", str(int("PTX" in os.environ["TORCH_CUDA_ARCH_LIST"]))),
        ],
        extra_compile_args={"cxx": cpp_flags(), "nvcc": ["-O3", "-Xfatbin", "-compress-all"]},
    )


def cpp_sources() -> list[str]:
    """The C++ files, relative as setuptools wants them."""
    return [f"{SOURCES}/library.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / SOURCES / "cpu").glob("*.cpp"))]


def cpp_flags() -> list[str]:
    """Flags of the C++ compiler.

    OpenMP is compiled in but not linked: its functions are then those that PyTorch has loaded, so that there is one
    pool of threads. Clang brings another OpenMP; with it the kernel runs on one thread.
    """
    text = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return [*COMPILER_FLAGS, "-fopenmp"] if "Free Software Foundation" in text else COMPILER_FLAGS


def kernel_builder(wish: str, reason: str) -> type:
    """The build_ext command: with "auto", a kernel that does not compile is left out."""
    from torch.utils.cpp_extension import BuildExtension

    class KernelBuilder(BuildExtension):
        missing = reason

        def run(self) -> None:
            super().run()
            write_record(ROOT if self.inplace else Path(self.build_lib), self.missing)

        def build_extensions(self) -> None:
            planned = self.extensions[0]
            # what an earlier build has left must not stand in for a failure of this one
            Path(self.get_ext_fullpath(planned.name)).unlink(missing_ok=True)
            for extension in [planned] if wish != "auto" or reason else [planned, cpu_extension()]:
                self.extensions[:] = [extension]
                try:
                    super().build_extensions()
                except (CCompilerError, BaseError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                    if wish != "auto":
                        raise
                    self.missing = f"it did not compile when it was installed: {first_line(error)}"
                    print(f"mask2former: a kernel is left out, {self.missing}", file=sys.stderr)
                else:
                    return
            self.extensions.clear()

    return KernelBuilder


def recording_build_py(reason: str) -> type:
    """The build_py command where nothing is compiled: leaves the reason for `python -m mask2former.ops`."""

    class RecordingBuildPy(build_py):
        def run(self) -> None:
            super().run()
            write_record(ROOT if getattr(self, "editable_mode", False) else Path(self.build_lib), reason)

    return RecordingBuildPy


def write_record(root: Path, reason: str) -> None:
    """Keep why a kernel is missing next to the package."""
    (root / RECORD).parent.mkdir(parents=True, exist_ok=True)
    (root / RECORD).write_text(reason + "\n", "utf-8")


def first_line(error: BaseException) -> str:
    """An error in a few words."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
    package_data={"mask2former": ["published_models.json"], "mask2former.data": ["categories/*.json"]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "dev": requirements("requirements-dev.txt"),
        "evaluation": requirements("requirements-evaluation.txt"),
        "export": requirements("requirements-export.txt"),
        "large": requirements("requirements-large.txt"),
        "timm": requirements("requirements-timm.txt"),
        "train": requirements("requirements-train.txt"),
    },
    zip_safe=False,
    **build_arguments(),
)
