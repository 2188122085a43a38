"""Who may import whom (the layers), and that the core works without Detectron2, pycocotools and OpenCV."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mask2former"

WITHOUT_ENGINES = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"detectron2", "fvcore", "iopath", "pycocotools", "cv2"}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Blocker())

import torch

torch.set_num_threads(1)
import mask2former
import mask2former.build
import mask2former.data
import mask2former.evaluation
import mask2former.modeling.postprocessing
import mask2former.ops
import mask2former.solver
from mask2former import MaskTarget, build_model
from tests.tiny import K, architecture

model = build_model(architecture())
image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
target = MaskTarget(torch.tensor([1]), torch.ones(1, 64, 64, dtype=torch.bool))
sum(model.losses([image], [target]).values()).backward()
(prediction,) = model.eval()(model.batch_images([image]))
geometry = mask2former.modeling.postprocessing.MaskGeometry((64, 64), (64, 64), (20, 30))
scores = mask2former.modeling.postprocessing.semantic_segmentation(
    prediction.class_logits[0], prediction.mask_logits[0], geometry
)
assert scores.shape == (K, 20, 30)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"detectron2", "fvcore", "iopath", "pycocotools", "cv2"}
print("works")
"""


def test_core_works_without_detectron2_pycocotools_and_opencv() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_ENGINES], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "works", result.stderr


def test_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    import mask2former

    with pytest.raises(AttributeError, match="no attribute 'add_maskformer3_config'"):
        _ = mask2former.add_maskformer3_config


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(full name of an imported module or member, at the top of the module or not), relative ones resolved."""
    tree = ast.parse(path.read_text())
    top_level = {id(node) for node in ast.walk(tree)} - {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            yield from ((f"{base}.{alias.name}", id(node) in top_level) for alias in node.names)


def _part_of(path: Path) -> str:
    """First name below the package: a folder, or a module of layer 2."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))
LAYER_1 = {"modeling", "data", "evaluation", "solver"}
ENGINES = {"d2", "engine"}
LAYER_2 = {p.stem for p in PACKAGE.glob("[a-z]*.py")} - LAYER_1
LAYER_2 |= {"analysis", "export", "own_data", "proposals", "tiling"}
STARTS_AN_ENGINE = {PACKAGE / "analysis" / "command.py", PACKAGE / "export" / "sources.py"}

# Parts of this package that each part may import besides itself. What is not named is layer 2 and may import the
# whole core.
OWN: dict[str, set[str]] = {
    "ops": set(),
    "modeling": {"ops"},
    "data": {"modeling.structures", "evaluation"},
    "evaluation": {"modeling.structures", "data"},
    "solver": set(),
}
CORE_PARTS = {"ops"} | LAYER_1 | LAYER_2 | {"load"}  # of layer 2, but that it stands in the package itself

# Packages from outside that the lower layers may import; others may import anything but Detectron2.
OUTSIDE: dict[str, set[str]] = {
    "ops": {"torch", "torchvision"},  # the second where it is installed
    "modeling": {"torch", "numpy", "scipy", "timm"},  # the last one where it is installed
    "solver": {"torch"},
    "data": {"torch", "numpy", "PIL", "pycocotools", "tqdm"},
    "evaluation": {"torch", "numpy", "PIL", "cv2", "pycocotools", "faster_coco_eval", "tqdm"},  # one is optional
}


def test_the_scan_sees_imports() -> None:
    seen = {name for path in FILES for name, _ in _imports(path)}
    assert "mask2former.ops.ms_deform_attn_fused" in seen
    assert "mask2former.modeling.structures.MaskTarget" in seen
    assert "torch" in seen
    assert {"ops", "modeling", "data", "evaluation", "solver", "build"} <= {_part_of(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_layer_and_below(path: Path) -> None:
    part = _part_of(path)
    allowed = OWN.get(part, CORE_PARTS) | {part}
    for name, is_top in _imports(path):
        head, _, own = name.partition(".")
        if head == "mask2former":
            if (part == "__init__" or path in STARTS_AN_ENGINE) and not is_top and own.split(".")[0] in ENGINES:
                continue  # the lazy attribute, and what a command reads a config with
            if part in ENGINES and own.split(".")[0] not in CORE_PARTS | ENGINES:
                continue  # public names of the package
            assert any(own == a or own.startswith(a + ".") for a in allowed), f"{part} must not import {name}"
        elif head not in sys.stdlib_module_names:
            assert part not in OUTSIDE or head in OUTSIDE[part], f"{part} must not import {name}"


def test_scipy_and_numpy_stay_in_the_matcher() -> None:
    users = {
        path.name
        for path in (PACKAGE / "modeling").rglob("*.py")
        for name, _ in _imports(path)
        if name.split(".")[0] in ("scipy", "numpy")
    }
    assert users <= {"matcher.py"}


def test_the_package_imports_d2_only_when_asked() -> None:
    top_level = [name for name, is_top in _imports(PACKAGE / "__init__.py") if is_top]
    assert not any(name.startswith("mask2former.d2") for name in top_level)
    below = [name for name, is_top in _imports(PACKAGE / "__init__.py") if not is_top]
    assert [name for name in below if name.split(".")[1] in ENGINES] == ["mask2former.d2"]
    assert set(below) == {"mask2former.d2", "mask2former.predictor.Predictor", "mask2former.zoo"}  # of `load`


def test_only_d2_and_its_tests_import_detectron2_and_fvcore() -> None:
    allowed = (PACKAGE / "d2", ROOT / "tests" / "d2")
    folders = ("mask2former", "tests", "demo", "benchmarks", "datasets")
    paths = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
    users = {
        str(path.relative_to(ROOT))
        for path in paths
        if not any(folder in path.parents for folder in allowed)
        for name, _ in _imports(path)
        if name.split(".")[0] in ("detectron2", "fvcore")
    }
    assert users <= {"benchmarks/loader.py"}  # its peer, where it is installed


@pytest.mark.slow
def test_tests_of_the_core_pass_without_detectron2_pycocotools_and_opencv() -> None:
    """The model, its operators, solver and builder need none of them, in their tests either."""
    blocker = WITHOUT_ENGINES.split("import torch\n")[0]
    folders = ["tests/ops", "tests/modeling", "tests/test_build.py", "tests/test_solver.py"]
    program = f"{blocker}\nimport pytest\nsys.exit(pytest.main(['-q', '-m', 'not slow', *{folders!r}]))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout
