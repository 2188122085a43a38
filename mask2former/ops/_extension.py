"""Loads the compiled kernels, `mask2former._C`, once; keeps the reason when it cannot."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

_NAME = "mask2former._C"
_RECORD = Path(__file__).with_name("_build_record.txt")

# What the kernels take. Half types are summed in float32.
_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}


@dataclass(frozen=True)
class Extension:
    """The compiled module, or why there is none.

    Attributes:
        module: None if the PyTorch reference is used instead.
        reason: why there is no module; empty if there is one.
        archs: compiled CUDA architectures, 90 for sm_90; empty without the CUDA kernel.
        has_ptx: whether devices newer than the newest architecture can compile its code for themselves.
    """

    module: ModuleType | None
    reason: str = ""
    archs: tuple[int, ...] = ()
    has_ptx: bool = False

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the CUDA kernel has code for a device of this compute capability."""
        device = 10 * capability[0] + capability[1]
        same_major = any(arch // 10 == capability[0] and arch <= device for arch in self.archs)
        return same_major or (self.has_ptx and bool(self.archs) and max(self.archs) < device)


def load() -> Extension:
    """Import the compiled module, which registers its operators; a file that does not load is warned about."""
    if os.environ.get("MASK2FORMER_KERNEL") == "0":
        return Extension(None, "MASK2FORMER_KERNEL=0 switches it off")
    if importlib.util.find_spec(_NAME) is None:
        return Extension(None, f"{_NAME} is not there ({_record() or 'it was never built'})")
    try:
        module = importlib.import_module(_NAME)
    except (ImportError, OSError) as error:
        return _rejected(f"{_NAME} does not load: {error}")
    if _release(module.torch_version) != _release(torch.__version__):
        return _rejected(f"{_NAME} was built for PyTorch {module.torch_version} and this is {torch.__version__}")
    archs = tuple(int(arch) // 10 for arch in module.cuda_archs.split(",") if arch)
    return Extension(module, archs=archs, has_ptx=bool(module.cuda_ptx))


def kernel_applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel takes a value of this device and type; all facts but tracing and exporting."""
    if extension.module is None or dtype not in _DTYPES.get(device.type, ()):
        return False
    return device.type == "cpu" or (bool(extension.archs) and _device_is_covered(device.index))


def has_kernels(kind: str, *operators: str) -> bool:
    """Whether the processor runs the extension's kernels of a kind, with operators that an earlier version may lack."""
    names = (f"has_{kind}_kernels", *operators)
    if extension.module is None or not all(hasattr(torch.ops.mask2former, name) for name in names):
        return False
    return bool(getattr(torch.ops.mask2former, names[0])())


@contextmanager
def reference_only() -> Iterator[None]:
    """Use the PyTorch reference inside, to compare; not for several threads."""
    global extension
    kept, extension = extension, replace(extension, module=None, reason="reference_only() switches it off")
    try:
        yield
    finally:
        extension = kept


def describe() -> str:
    """One sentence: what is used on which device, and why."""
    here = f"PyTorch {torch.__version__}"
    if extension.module is None:
        return f"ms_deform_attn: PyTorch reference, because {extension.reason}; {here}."
    if not extension.archs:
        why = "this PyTorch has no CUDA" if torch.version.cuda is None else _record() or "not built"
        return f"ms_deform_attn: compiled kernel on CPU ({_capability()}), reference on CUDA ({why}); {here}."
    archs = ", ".join(f"sm_{arch}" for arch in extension.archs) + (" and PTX" if extension.has_ptx else "")
    cuda = f"compiled kernel on CUDA ({extension.module.cuda_version}: {archs})"
    return f"ms_deform_attn: compiled kernel on CPU ({_capability()}), {cuda}; {here}; {_devices()}."


def _rejected(reason: str) -> Extension:
    reason = f"{reason} (Python extension at {_location()}; PyTorch {torch.__version__}, CUDA {torch.version.cuda})"
    warnings.warn(
        f"mask2former.ops: {reason}. The slower PyTorch reference is used; to build it again: "
        "pip install --force-reinstall --no-deps --no-build-isolation .",
        stacklevel=2,
    )
    return Extension(None, reason)


def _record() -> str:
    """What setup.py says about kernels that it did not build."""
    return _RECORD.read_text("utf-8").strip() if _RECORD.exists() else ""


def _location() -> str | None:
    spec = importlib.util.find_spec(_NAME)
    return spec.origin if spec else None


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _runs_on_device(index: int | None) -> bool:
    return extension.runs_on(torch.cuda.get_device_capability(index))


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _devices() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    texts = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        covered = "" if extension.runs_on((major, minor)) else ", not among them: reference"
        texts.append(f"device {index} is {torch.cuda.get_device_name(index)} (sm_{major}{minor}{covered})")
    return ", ".join(texts)


extension = load()

# Asked while a graph is traced, it is a fact of the machine, not a part of the graph. Saying so imports PyTorch's
# compiler, which takes seconds; without the CUDA kernel nobody asks.
_device_is_covered = torch.compiler.assume_constant_result(_runs_on_device) if extension.archs else _runs_on_device
