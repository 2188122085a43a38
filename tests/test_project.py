"""The project around the code: documents, their examples, versions, file sizes, the package, the environment script."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

import mask2former

ROOT = Path(__file__).resolve().parents[1]
LARGEST_FILE = 8_500_000
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "demo/README.md", ROOT / "datasets/README.md"])
EXAMPLES = [ROOT / "README.md", ROOT / "docs/backbones.md", ROOT / "docs/extending.md", ROOT / "docs/predictor.md"]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def run(*command, **options):
    """The output of a command that must succeed."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([str(part) for part in command], check=False, **streams, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def with_path(*folders):
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(folder) for folder in folders)}


def project_files():
    """Tracked files, and those that could be."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    output = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [ROOT / name for name in output.split("\0") if name and (ROOT / name).is_file()]


def anchors_of(document):
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks_of(document, *, detectron2):
    """The runnable blocks in their order, those for Detectron2 only if asked for."""
    found = re.findall(r"^```python runnable( detectron2)?\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)
    return [code for needs_detectron2, code in found if detectron2 or not needs_detectron2]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    prose = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_configs_and_programs_exist(document):
    text = document.read_text("utf-8")
    for name in re.findall(r"\b(?:configs|demo|docs|mask2former|tests)/[\w./-]+\.(?:yaml|py|md|json|csv)\b", text):
        assert (ROOT / name).is_file(), name
    folder = None
    for cell in re.findall(r"^\| `([^`]+)`", text, re.M):  # the tables of configs: a folder in the head, files below
        if cell.startswith("configs/"):
            folder = ROOT / cell
        elif cell.endswith(".yaml"):
            assert folder is not None
            assert (folder / cell).is_file(), cell


@pytest.mark.parametrize("document", EXAMPLES, ids=name_of)
def test_examples_run(document):
    if document.stem == "backbones":
        pytest.importorskip("timm", reason="timm is not installed (requirements-timm.txt)")
    blocks = blocks_of(document, detectron2=False)
    assert blocks
    run(sys.executable, "-c", "\n".join(blocks), cwd=ROOT, env=with_path(ROOT))


def test_examples_for_detectron2_run():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    blocks = blocks_of(ROOT / "docs/extending.md", detectron2=True)
    assert len(blocks) > len(blocks_of(ROOT / "docs/extending.md", detectron2=False))
    run(sys.executable, "-c", "\n".join(blocks), cwd=ROOT, env=with_path(ROOT))


def test_no_file_is_too_large():
    assert not {name_of(path): path.stat().st_size for path in project_files() if path.stat().st_size > LARGEST_FILE}


def test_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert first[1] == mask2former.__version__


def test_core_imports_without_detectron2_and_torchvision():
    """Every module below layer 3, not only those that the package itself imports."""
    files = [path.relative_to(ROOT) for path in (ROOT / "mask2former").rglob("*.py")]
    modules = [".".join(f.with_suffix("").parts) for f in files if f.stem != "__main__" and f.parts[1] != "d2"]
    assert "mask2former.modeling.criterion" in modules
    code = (
        "import importlib, sys; sys.modules.update(detectron2=None, fvcore=None, torchvision=None)\n"
        f"for name in {sorted(modules)!r}: importlib.import_module(name)"
    )
    run(sys.executable, "-c", code, cwd=ROOT)


def test_package_holds_all_it_needs(tmp_path):
    """Builds the wheel from a copy, so that no build folder is left in the checkout."""
    absent = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]
    if absent or int(installed_version("setuptools").split(".")[0]) < 64:
        pytest.skip("building the package needs pip, and setuptools 64 or newer")
    source, folder = tmp_path / "source", tmp_path / "wheel"
    source.mkdir()
    for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.txt"), *ROOT.glob("*.md"), ROOT / "setup.py", ROOT / "LICENSE"]:
        shutil.copy(path, source)
    shutil.copytree(ROOT / "mask2former", source / "mask2former", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    run(*command, source, env=os.environ | {"MASK2FORMER_BUILD": "none"})  # kernels: tests/ops/test_install.py

    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"mask2former-{mask2former.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"mask2former-{mask2former.__version__}.dist-info/METADATA").decode()
        archive.extractall(tmp_path / "installed")
    files = {name_of(f) for pattern in ("*.py", "*.json") for f in (ROOT / "mask2former").rglob(pattern)}
    assert not files - names
    assert {name.split("/")[0] for name in names} == {"mask2former", f"mask2former-{mask2former.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)
    assert f"Version: {mask2former.__version__}" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "Requires-Dist: torch>=" in metadata
    code = "from mask2former.data.coco_datasets import coco_panoptic_categories as c; print(len(c()))"
    output = run(sys.executable, "-c", code, cwd=tmp_path, env=with_path(tmp_path / "installed"))
    assert output.split()[-1] == "133"


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text("utf-8")


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target
        assert target == "help" or f'@echo "make {target} ' in makefile, target


@pytest.fixture(scope="module")
def environment():
    spec = importlib.util.spec_from_file_location("environment", ROOT / ".ci/environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_reports_what_is_absent_too_old_or_broken(environment, tmp_path, monkeypatch, capfd):
    (tmp_path / "broken.py").write_text("raise OSError('libGL.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bad = {"pillow": "pillow>=999", "no-such-package": "no-such-package", "broken": "broken"}
    missing = environment.missing_requirements(sys.executable, {"numpy": "numpy>=1.24", **bad})
    assert missing == bad
    assert capfd.readouterr().err == "broken cannot be imported: libGL.so.1: cannot open shared object file\n"


def test_environment_finds_what_the_tests_are_run_with(environment):
    runtime = environment.read_requirements([ROOT / "requirements.txt"])
    assert {"torch", "numpy", "pillow", "opencv-python-headless"} <= runtime.keys()
    assert not environment.missing_requirements(sys.executable, runtime)


@pytest.mark.parametrize(
    ("version", "requirement", "enough"),
    [
        ("2.13.0+cpu", "torch>=2.5", True),
        ("2.5", "torch>=2.5", True),
        ("2.4.1", "torch>=2.5", False),
        ("10.0", "pillow>=9.4", True),
        ("1.0", "tqdm", True),
        (None, "tqdm", False),
    ],
)
def test_environment_compares_versions(environment, version, requirement, enough):
    assert environment.is_enough(version, requirement) is enough


def test_requirements_cover_the_imports(environment):
    """Every package that the code imports is listed, and every listed one is imported."""
    engine = set((ROOT / "mask2former/engine").rglob("*.py"))
    core = {*(ROOT / "mask2former").rglob("*.py"), *(ROOT / "demo").glob("*.py"), ROOT / "train_net.py"} - engine
    listed = modules_of(environment, "requirements.txt")
    for_large = {name for name in modules_of(environment, "requirements-large.txt") if is_module(name)}
    assert imports_of((ROOT / "mask2former/tiling").glob("*.py")) >= for_large
    for_export = modules_of(environment, "requirements-export.txt")
    for_timm = {name for name in modules_of(environment, "requirements-timm.txt") if is_module(name)}
    assert imports_of((ROOT / "mask2former/modeling/backbones").glob("*.py")) >= for_timm
    optional = for_export | modules_of(environment, "requirements-evaluation.txt")
    # torchvision is used where it is, see mask2former/ops/deform_conv.py
    assert listed <= imports_of(core) - for_large - for_timm - {"torchvision"} <= listed | optional
    for_training = modules_of(environment, "requirements-train.txt")
    assert imports_of(engine) - listed - {"wandb"} == for_training - {"tensorboard"}  # torch imports TensorBoard


def modules_of(environment, requirements):
    listed = environment.read_requirements([ROOT / requirements])
    return {environment._MODULES.get(name, name.replace("-", "_")) for name in listed}


def imports_of(files):
    imported = set()
    for file in files:
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", file.read_text("utf-8"), re.M))
    beside = {file.stem for file in (ROOT / "demo").glob("*.py")}
    others = {"mask2former", "detectron2", "fvcore", *beside, *sys.stdlib_module_names}
    return {name for name in imported - others if is_module(name)}


def is_module(name):
    """Leaves out words of docstrings that look like an import."""
    return importlib.util.find_spec(name) is not None
