"""Installing on machines that lack something: it installs, imports, predicts, and says what it uses and why."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD_TOOLS = ("setuptools", "wheel", "pkg_resources", "_distutils_hack", "packaging", "ninja")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="fakes compilers with shell scripts and paths"),
]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")

PREDICT = """
import numpy as np, torch, warnings
from mask2former.predictor import Predictor
from tests.tiny import categories, lively_model
import mask2former
assert "site-packages" in mask2former.__file__, mask2former.__file__
result = Predictor(lively_model(), categories=categories(), shortest=64, longest=96)(
    np.full((48, 64, 3), 99, np.uint8), "panoptic"
)
assert result.ids.shape == (48, 64)
"""


class Machine:
    """An environment of its own, with the sources in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "env/bin/python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        ignore = shutil.ignore_patterns(".git", "build", "*.so", "*.egg-info", "_build_record.txt", ".venv", "datasets")
        self.source = Path(shutil.copytree(ROOT, folder / "source", ignore=ignore))
        self.tools, self.packages = folder / "tools", folder / "packages"
        self._link(self.tools, lambda name: name.startswith(BUILD_TOOLS))
        self._link(self.packages, lambda name: not name.lower().startswith("mask2former"))
        self.variables = {k: v for k, v in os.environ.items() if not k.startswith(("MASK2FORMER", "CUDA", "CXX"))}

    @staticmethod
    def _link(folder: Path, wanted: object) -> None:
        folder.mkdir()
        for kind in ("purelib", "platlib"):
            for path in Path(sysconfig.get_paths()[kind]).iterdir():
                if wanted(path.name) and not (folder / path.name).exists() and path.suffix != ".pth":
                    (folder / path.name).symlink_to(path)

    def show_torch(self) -> None:
        """Put PyTorch and all else into the environment, which pip's isolation would hide from setup.py."""
        site = next((self.folder / "env/lib").glob("python*/site-packages"))
        (site / "machine.pth").write_text(f"{self.packages}\n")

    def install(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """`pip install .`, with setup.py seeing of other packages what it sees in pip's isolation: the build tools."""
        hide = self.folder / "hide"
        hide.mkdir(exist_ok=True)
        (hide / "sitecustomize.py").write_text(
            f"import sys\nsys.path[:] = [p for p in sys.path if p != {str(self.packages)!r}]\n"
        )
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps", "--no-index"]
        command += ["--no-build-isolation", "--force-reinstall", "--no-cache-dir", str(self.source)]
        return self._run(command, PYTHONPATH=f"{hide}:{self.tools}", **variables)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's interpreter with all other packages there, outside of the sources."""
        return self._run([str(self.python), *arguments], PYTHONPATH=f"{self.packages}", **variables)

    def state(self, **variables: str) -> str:
        """What `python -m mask2former.ops` says."""
        done = self.run("-m", "mask2former.ops", **variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        return done.stdout

    def check_prediction(self) -> None:
        """The installed package predicts; the tests' helpers come from the sources."""
        tests = self.folder / "helpers"
        if not tests.exists():
            shutil.copytree(self.source / "tests", tests / "tests")
        code = f"import sys; sys.path.append({str(tests)!r})\n{PREDICT}"
        done = self.run("-c", code)
        assert done.returncode == 0, done.stderr[-2000:]

    def _run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.variables, "PYTHONNOUSERSITE": "1", **variables}
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def _succeeded(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _fake_cuda(folder: Path, release: str) -> str:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.89'\n")
    nvcc.chmod(0o755)
    return str(folder)


def test_without_torch(machine: Machine) -> None:
    _succeeded(machine.install())
    expected = "reference, because mask2former._C is not there (when it was installed, there was no PyTorch to build"
    assert expected in machine.state()
    machine.check_prediction()


def test_without_compiler(machine: Machine) -> None:
    machine.show_torch()
    bare = machine.folder / "bare"
    bare.mkdir()
    _succeeded(machine.install(PATH=str(bare)))
    assert "(when it was installed, there was no C++ compiler (c++))" in machine.state()
    machine.check_prediction()
    failed = machine.install(PATH=str(bare), MASK2FORMER_BUILD="cpu")
    assert failed.returncode != 0
    assert "MASK2FORMER_BUILD=cpu is not possible: there was no C++ compiler" in failed.stdout + failed.stderr


@needs_compiler
def test_with_compiler_and_a_corrupted_file(machine: Machine) -> None:
    machine.show_torch()
    empty = machine.folder / "no_cuda"
    empty.mkdir()
    _succeeded(machine.install(CUDA_HOME=str(empty)))
    state = machine.state()
    assert "compiled kernel on CPU" in state and "reference on CUDA" in state
    assert (f"there was no nvcc in {empty}" if torch.version.cuda else "this PyTorch has no CUDA") in state
    machine.check_prediction()
    assert "reference, because MASK2FORMER_KERNEL=0 switches it off" in machine.state(MASK2FORMER_KERNEL="0")

    (library,) = (machine.folder / "env").rglob("mask2former/_C*.so")
    library.write_bytes(b"not a library")
    done = machine.run("-W", "always", "-c", "import mask2former.ops")
    assert done.returncode == 0
    assert done.stderr.count("Warning") == 1, done.stderr
    assert "mask2former._C does not load:" in done.stderr and str(library) in done.stderr
    assert f"PyTorch {torch.__version__}" in done.stderr
    assert "reference, because mask2former._C does not load:" in machine.state()
    machine.check_prediction()


@needs_compiler
def test_wrong_cuda_major(machine: Machine) -> None:
    machine.show_torch()
    home = _fake_cuda(machine.folder / "cuda", "7.5")
    _succeeded(machine.install(CUDA_HOME=home))
    state = machine.state()
    assert "compiled kernel on CPU" in state
    if torch.version.cuda is None:
        reason = f"PyTorch {torch.__version__} was one without CUDA"
    else:
        reason = f"nvcc was 7.5 and PyTorch's CUDA {torch.version.cuda}"
        assert f"reference on CUDA (when it was installed, {reason})" in state
    machine.check_prediction()
    failed = machine.install(CUDA_HOME=home, MASK2FORMER_BUILD="cuda")
    assert failed.returncode != 0
    assert f"MASK2FORMER_BUILD=cuda is not possible: {reason}" in failed.stdout + failed.stderr


def test_compiler_that_fails(machine: Machine) -> None:
    machine.show_torch()
    compiler = machine.folder / "failing"
    compiler.write_text("#!/bin/sh\necho 'failing 1.0'\ncase $* in *--version*|*-v) exit 0;; *) exit 1;; esac\n")
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "CC": str(compiler), "CUDA_HOME": str(machine.folder)}
    _succeeded(machine.install(**variables))
    assert "is not there (it did not compile when it was installed: " in machine.state()
    machine.check_prediction()
    assert machine.install(**variables, MASK2FORMER_BUILD="cpu").returncode != 0


def test_not_wanted(machine: Machine) -> None:
    machine.show_torch()
    _succeeded(machine.install(MASK2FORMER_BUILD="none"))
    assert "is not there (MASK2FORMER_BUILD=none when it was installed)" in machine.state()
    failed = machine.install(MASK2FORMER_BUILD="gpu")
    assert failed.returncode != 0
    assert "MASK2FORMER_BUILD must be auto, cpu, cuda or none, got 'gpu'" in failed.stdout + failed.stderr
