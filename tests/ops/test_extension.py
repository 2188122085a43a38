"""Loading the compiled kernel, or saying why not."""

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mask2former.ops import _extension
from mask2former.ops._extension import Extension


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for a module that stands in for mask2former._C."""
    monkeypatch.setattr(_extension, "_NAME", "fake_kernel")
    monkeypatch.setattr(_extension, "_RECORD", tmp_path / "record.txt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MASK2FORMER_KERNEL", raising=False)
    monkeypatch.delitem(sys.modules, "fake_kernel", raising=False)
    return tmp_path


def _write(folder: Path, **changes: object) -> None:
    values = {"torch_version": torch.__version__, "cuda_version": "", "cuda_archs": "", "cuda_ptx": 0, **changes}
    (folder / "fake_kernel.py").write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))


def test_missing_file_and_its_record(fake: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert _extension.load().reason == "fake_kernel is not there (it was never built)"
    (fake / "record.txt").write_text("there was no compiler\n")
    assert _extension.load() == Extension(None, "fake_kernel is not there (there was no compiler)")
    assert not recwarn.list


def test_file_that_does_not_load(fake: Path) -> None:
    file = fake / f"fake_kernel{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    file.write_bytes(b"\x7fELF and no more")
    with pytest.warns(UserWarning, match="fake_kernel does not load: .*PyTorch reference is used") as caught:
        loaded = _extension.load()
    assert len(caught) == 1
    assert loaded.module is None
    for part in (str(file), torch.__version__, str(torch.version.cuda)):
        assert part in loaded.reason


def test_file_for_another_torch(fake: Path) -> None:
    _write(fake, torch_version="1.13.0")
    with pytest.warns(UserWarning, match=r"was built for PyTorch 1\.13\.0 and this is"):
        assert _extension.load().module is None


def test_switched_off(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(fake)
    monkeypatch.setenv("MASK2FORMER_KERNEL", "0")
    assert _extension.load() == Extension(None, "MASK2FORMER_KERNEL=0 switches it off")
    monkeypatch.setenv("MASK2FORMER_KERNEL", "1")
    assert _extension.load().module is not None


def test_devices_of_a_cuda_build(fake: Path) -> None:
    _write(fake, cuda_version="13.0", cuda_archs="750,800,900", cuda_ptx=0)
    loaded = _extension.load()
    assert loaded.archs == (75, 80, 90)
    covered = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)}
    for capability in [*covered, (7, 0), (10, 0), (12, 0)]:
        assert loaded.runs_on(capability) == (capability in covered), capability
    _write(fake, cuda_version="13.0", cuda_archs="800,900", cuda_ptx=1)
    sys.modules.pop("fake_kernel")
    newer = _extension.load()
    assert newer.runs_on((10, 0)) and newer.runs_on((12, 0)) and not newer.runs_on((7, 5))
    assert not Extension(ModuleType("cpu_only")).runs_on((9, 0))


@pytest.mark.parametrize(
    ("extension", "expected"),
    [
        (Extension(None, "of a reason"), "PyTorch reference, because of a reason; PyTorch"),
        (Extension(ModuleType("_C")), "compiled kernel on CPU"),
    ],
)
def test_description_is_one_sentence(extension: Extension, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "extension", extension)
    text = _extension.describe()
    assert expected in text and torch.__version__ in text and text.endswith(".") and "\n" not in text


def test_description_names_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("_C")
    module.cuda_version = "13.0"  # type: ignore[attr-defined]
    monkeypatch.setattr(_extension, "extension", Extension(module, archs=(80, 90), has_ptx=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU{index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    text = _extension.describe()
    assert "13.0: sm_80, sm_90 and PTX" in text
    assert "device 0 is GPU0 (sm_90)" in text
    assert "device 1 is GPU1 (sm_75, not among them: reference)" in text
    assert _extension.kernel_applies(torch.device("cuda", 0), torch.float16)
    assert not _extension.kernel_applies(torch.device("cuda", 1), torch.float16)


def test_facts_of_the_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "extension", Extension(ModuleType("_C")))
    cpu = torch.device("cpu")
    assert _extension.kernel_applies(cpu, torch.float32)
    assert not _extension.kernel_applies(cpu, torch.float16)
    assert not _extension.kernel_applies(torch.device("meta"), torch.float32)
    assert not _extension.kernel_applies(torch.device("cuda", 0), torch.float32)  # built without
    with _extension.reference_only():
        assert not _extension.kernel_applies(cpu, torch.float32)
    assert _extension.kernel_applies(cpu, torch.float32)


def test_command_and_switch() -> None:
    command = [sys.executable, "-m", "mask2former.ops"]
    environment = os.environ | {"MASK2FORMER_KERNEL": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "PyTorch reference, because MASK2FORMER_KERNEL=0 switches it off" in done.stdout
    code = """
import torch
from mask2former.ops import ms_deform_attn
x = torch.randn(1, 6, 2, 4)
with torch.profiler.profile() as profile:
    ms_deform_attn(x, [(2, 3)], torch.rand(1, 3, 2, 1, 1, 2), torch.rand(1, 3, 2, 1, 1))
assert not [e.name for e in profile.events() if e.name.startswith("mask2former")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
