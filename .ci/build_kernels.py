"""Builds `mask2former._C` in place, for the tests, if anything that it is made from has changed.

    python .ci/build_kernels.py

Without a C++ compiler nothing is built and the kernels' tests are skipped; with one, a failure is a failure.
MASK2FORMER_BUILD, see setup.py, decides what is built; the default here is the kernels that this machine can run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Build if needed; returns the exit code."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        print("no C++ compiler: the kernels are not built, their tests will be skipped")
        return 0
    wish = os.environ.setdefault("MASK2FORMER_BUILD", "auto" if torch.cuda.is_available() else "cpu")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    stamp, built = ROOT / f"build/kernels{suffix}.stamp", ROOT / f"mask2former/_C{suffix}"
    state = fingerprint(wish)
    if built.exists() and stamp.exists() and stamp.read_text() == state:
        print(f"{built.name} is up to date")
        return 0
    print(f"building {built.name} ({wish}), about a minute", flush=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-6000:], sep="\n")
        return done.returncode
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(state)
    return 0


def fingerprint(wish: str) -> str:
    """Changes with the sources, PyTorch, the interpreter and what is asked for."""
    digest = hashlib.sha256(f"{wish} {torch.__version__} {sys.version} {sys.prefix}".encode())
    sources = (path for path in (ROOT / "mask2former/ops/csrc").rglob("*") if path.is_file())
    for path in (ROOT / "setup.py", *sorted(sources)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
