"""Finds or makes the Python environment of `make demo`, `make train` and `make test`; standard library only.

    python3 .ci/environment.py requirements.txt ...    prints the interpreter to use, messages go to stderr
    python3 .ci/environment.py --detectron2            says in one line whether Detectron2's tests can run

The interpreter that runs this file is used as it is if it has all that the requirements files list. Otherwise
what is missing, and nothing else, is installed: into that interpreter's environment if it is a virtual one, or
into `.venv`, which sees the packages of the machine. TORCH_SPEC, default the line in requirements.txt, is what pip
gets where PyTorch is missing ("torch==2.9.1", "torch --index-url URL").
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MINIMUM_PYTHON = (3, 10)

# Packages whose module has another name; OpenCV may come from any of its packages.
_MODULES = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml", "pytest-xdist": "xdist"}
# Runs in the other interpreter; real imports, because a package may be there and lack a system library.
_PROBE = """
import importlib, importlib.metadata, json, sys
found = {}
for name, module in json.loads(sys.argv[1]).items():
    try:
        version = getattr(importlib.import_module(module), "__version__", None)
        found[name] = version if isinstance(version, str) else importlib.metadata.version(name)
    except Exception as error:
        found[name] = None
        if not isinstance(error, ModuleNotFoundError) or error.name != module:
            print(f"{name} cannot be imported: {error}", file=sys.stderr)
print("\\n" + json.dumps(found))
"""


class EnvironmentUnusableError(Exception):
    """No environment can be had; the text is for the user."""


def main(arguments: list[str]) -> int:
    """Run; returns the exit code."""
    if arguments == ["--detectron2"]:
        print(detectron2_line())
        return 0
    start = time.perf_counter()
    try:
        print(prepare(read_requirements(ROOT / name for name in arguments)))
        say(f"ready after {time.perf_counter() - start:.1f} s")
    except EnvironmentUnusableError as error:
        say(str(error))
        return 1
    return 0


def prepare(requirements: dict[str, str]) -> str:
    """The interpreter to use, with all requirements installed."""
    if sys.version_info < MINIMUM_PYTHON:
        raise EnvironmentUnusableError(
            f"Python must be 3.10 or newer, {sys.executable} is {sys.version.split()[0]}; "
            "name another one: make PYTHON=python3.12 ..."
        )
    python = sys.executable
    missing = missing_requirements(python, requirements)
    if not missing:
        say(f"using {python}, which has everything")
        return python
    if sys.prefix == sys.base_prefix:
        python = venv_python()
        missing = missing_requirements(python, requirements)
    if missing:
        install(python, missing)
        if still_missing := missing_requirements(python, missing):
            raise EnvironmentUnusableError(
                f"these are installed in {python} but cannot be used: {', '.join(still_missing)} (reasons above). An "
                f"environment without the machine's packages may help: {sys.executable} -m venv FOLDER, then make "
                "PYTHON=FOLDER/bin/python ..."
            )
    say(f"using {python}")
    return python


def read_requirements(files: Iterable[Path]) -> dict[str, str]:
    """The lines of requirements files by package name, in lower case."""
    lines = [line.strip() for file in files for line in file.read_text("utf-8").splitlines()]
    return {package_name(line): line for line in lines if line and not line.startswith("#")}


def package_name(requirement: str) -> str:
    """The package of a line such as "torch>=2.5"."""
    return re.split(r"[^\w.-]", requirement)[0].lower()


def missing_requirements(python: str, requirements: dict[str, str]) -> dict[str, str]:
    """Those that the interpreter cannot import, or has in too old a version."""
    modules = {name: _MODULES.get(name, name.replace("-", "_")) for name in requirements}
    probe = subprocess.run(
        [python, "-c", _PROBE, json.dumps(modules)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if probe.returncode != 0:
        raise EnvironmentUnusableError(f"{python} does not work (exit code {probe.returncode})")
    found = json.loads(probe.stdout.splitlines()[-1])
    return {name: line for name, line in requirements.items() if not is_enough(found[name], line)}


def is_enough(version: str | None, requirement: str) -> bool:
    """Whether a version meets the lower bound of a requirement; None is a package that is not there."""
    if version is None:
        return False
    bound = requirement.partition(">=")[2]
    return numbers(version) >= numbers(bound)


def numbers(version: str) -> list[int]:
    """The release numbers of a version: 2.13.0+cpu -> [2, 13, 0]."""
    release = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in release[0].split(".")] if release else []


def venv_python() -> str:
    """The interpreter of `.venv`, which is made if it is not there or no longer works."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if works(python):
        return str(python)
    say(f"making the environment {VENV}, which also sees the packages of {sys.executable}")
    command = [sys.executable, "-m", "venv", "--clear", "--system-site-packages"]
    if importlib.util.find_spec("ensurepip") is None:
        if importlib.util.find_spec("pip") is None:
            raise EnvironmentUnusableError("Python lacks venv; on Debian and Ubuntu: apt-get install python3-venv")
        command.append("--without-pip")  # the machine's pip is visible in it
    if subprocess.run([*command, str(VENV)], stdout=sys.stderr, check=False).returncode != 0:
        raise EnvironmentUnusableError(f"{VENV} could not be made; on Debian and Ubuntu: apt-get install python3-venv")
    return str(python)


def works(python: Path) -> bool:
    """Whether an interpreter is there and starts; one whose base was removed does not."""
    return python.exists() and subprocess.run([str(python), "-c", ""], check=False).returncode == 0


def install(python: str, missing: dict[str, str]) -> None:
    """Install with pip, PyTorch first, which other packages build on."""
    torch = missing.get("torch")
    others = [line for name, line in missing.items() if name != "torch"]
    steps = [shlex.split(os.environ.get("TORCH_SPEC") or torch)] if torch else []
    for specs in [*steps, *([others] if others else [])]:
        note = ", which is large and takes a while" if specs is not others else ""
        say(f"installing {' '.join(specs)} for {python}{note}")
        done = subprocess.run([python, "-m", "pip", "install", *specs], stdout=sys.stderr, check=False)
        if done.returncode != 0:
            raise EnvironmentUnusableError(f"pip could not install {' '.join(specs)}; its message is above")


def detectron2_line() -> str:
    """Whether this interpreter has Detectron2."""
    try:
        version = importlib.import_module("detectron2").__version__
    except ImportError as error:
        return f"Detectron2: not there ({error}), so tests/d2 were skipped; README.md has the commands to install it"
    return f"Detectron2: {version}, so tests/d2 were run"


def say(text: str) -> None:
    """A message for the user, apart from the result."""
    print(f"environment: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
