"""``python -m mask2former export``: files, comparison, and what it says when it cannot."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mask2former.__main__ import main
from mask2former.build import build_model
from mask2former.checkpoint import ModelDescription, PredictionSettings, load_model_file, save_model_file
from mask2former.export import files
from mask2former.export.check import made_up_picture, reference
from mask2former.export.graph import OUTPUTS, SegmentationGraph
from tests.tiny import architecture, categories, lively_model

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = PredictionSettings(
    tasks=("panoptic", "instance"), shortest=64, longest=160, object_mask_threshold=0.3, overlap_threshold=0.2, top_k=9
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has model.safetensors."""
    path = tmp_path_factory.mktemp("export")
    description = ModelDescription(
        architecture=architecture(), categories=categories(), settings=SETTINGS, notes={"made": "here"}
    )
    save_model_file(path / "model.safetensors", lively_model(), description)
    Image.fromarray(made_up_picture()).save(path / "photo.jpg")
    return path


@pytest.fixture(scope="module")
def exported(folder):
    """Has model.onnx and model.pt2 too: one tracing for both, as it takes most of the time."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    network, description = load_model_file(folder / "model.safetensors")
    program = files.trace(SegmentationGraph(network, description, "panoptic"))
    details = files.metadata("panoptic", description)
    files.write_program(folder / "model.pt2", program, details)
    files.write_onnx(folder / "model.onnx", program, details)
    return folder


@pytest.fixture(scope="module", params=["model.onnx", "model.pt2"])
def program(request, exported):
    """Either file, loaded."""
    return (files.onnx_runner if request.param.endswith("onnx") else files.program_runner)(exported / request.param)


def run(*words):
    return main(["export", *(str(word) for word in words)])


def test_the_traced_program_takes_any_size():
    """Whether the model can be traced at all; what is written from it is tested in the slow tests."""
    parts = architecture()
    parts["transformer_decoder"]["num_layers"] = 1
    description = ModelDescription(architecture=parts, categories=categories(), settings=SETTINGS)
    torch.manual_seed(0)
    network = build_model(parts).eval()
    program = files.module_runner(files.trace(SegmentationGraph(network, description, "instance")).module())
    for height, width in ((64, 64), (131, 90), (20, 30), (33, 300)):
        image = np.random.default_rng(0).uniform(0, 255, (1, 3, height, width)).astype(np.float32)
        found, expected = program(image), reference(network, description, "instance", image)
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
        assert found["masks"].shape == expected["masks"].shape == (len(expected["scores"]), height, width)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(90, 131), (64, 64), (200, 77), (20, 30)])
def test_programs_give_what_the_model_gives_at_any_size(folder, program, size):
    network, description = load_model_file(folder / "model.safetensors")
    picture = np.asarray(Image.fromarray(made_up_picture()).resize(size[::-1]))
    image = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], dtype=np.float32)
    found, expected = program(image), reference(network, description, "panoptic", image)
    assert tuple(found) == OUTPUTS["panoptic"]
    assert found["ids"].shape == size
    assert (found["ids"] != expected["ids"]).mean() < 1e-3
    assert found["categories"].tolist() == expected["categories"].tolist()
    assert found["is_thing"].tolist() == expected["is_thing"].tolist()
    assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in expected.items()}
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
    assert size != (90, 131) or len(expected["scores"]) > 1


@pytest.mark.slow
def test_programs_run_without_this_package(exported):
    """The example of the document, and a program in PyTorch."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/export.md").read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 1
    code = f"import sys; sys.modules.update(torch=None, mask2former=None)\n{blocks[0]}"
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 class \d é [01]\.\d\d \d+ pixels$", done.stdout, re.M)
    code = """
import sys; sys.modules.update(mask2former=None)
import json, torch
extra = {"mask2former.json": ""}
program = torch.export.load("model.pt2", extra_files=extra).module()
print(sorted(program(torch.zeros(1, 3, 50, 70))), json.loads(extra["mask2former.json"])["task"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("]")[1].strip() == "panoptic"


@pytest.mark.slow
def test_metadata_and_no_paths_of_this_machine(exported):
    import onnx

    model = onnx.load(exported / "model.onnx")
    assert {o.domain: o.version for o in model.opset_import}[""] == 18
    details = json.loads({p.key: p.value for p in model.metadata_props}["mask2former"])
    assert (details["task"], details["shortest"], details["longest"]) == ("panoptic", 64, 160)
    assert [c["name"] for c in details["categories"]] == [c.name for c in categories()]
    for name in ("model.onnx", "model.pt2"):
        assert str(ROOT).encode() not in (exported / name).read_bytes(), name


def test_safetensors_from_a_model_file_and_its_check(folder, capsys):
    target = folder / "copy.safetensors"
    words = ["--to", target, "--dtype", "float32", "--note", "by=me", "--check"]
    assert run("--model", folder / "model.safetensors", *words) == 0
    network, description = load_model_file(target)
    assert description.notes == {"made": "here", "by": "me"}
    old = load_model_file(folder / "model.safetensors")[0].state_dict()
    assert all(torch.equal(x, old[name]) for name, x in network.state_dict().items())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{target}: 4 classes, for panoptic, instance; ")
    assert [line.split(":")[0] for line in lines[1:]] == ["240 x 317", "389 x 262", "288 x 288"]
    assert all("smallest IoU 1.00000" in line for line in lines[1:])


def test_check_finds_a_file_that_differs(folder, capsys, monkeypatch):
    def spoiled(path, *args):
        network, description = load_model_file(path, *args)
        with torch.no_grad():
            network.sem_seg_head.predictor.class_embed.bias[0] += 1.0
        return network, description

    words = ["--to", folder / "bad.safetensors", "--task", "instance", "--check"]
    monkeypatch.setattr("mask2former.checkpoint.load_model_file", spoiled)
    assert run("--model", folder / "model.safetensors", *words) == 1
    assert "is not equal to the model" in capsys.readouterr().out


def test_check_without_anything_found_is_no_success(folder, capsys, tmp_path):
    network, description = load_model_file(folder / "model.safetensors")
    with torch.no_grad():
        network.sem_seg_head.predictor.class_embed.bias[-1] = 50.0  # all is "no object"
    save_model_file(tmp_path / "blind.safetensors", network, description)
    assert run("--model", tmp_path / "blind.safetensors", "--to", tmp_path / "x.safetensors", "--check") == 1
    assert "nothing was compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "{}/no/x.onnx"], r"--to must name a file in an existing folder, got .*/no/x.onnx"),
        (["--to", "{}/x.onnx", "--task", "semantic"], "--task must be one of panoptic, instance, which"),
        (["--to", "{}/x.onnx", "--weights", "w.pth"], "--weights must be given with --config-file, and only with it"),
        (["--to", "{}/x.onnx", "A.KEY", "1"], "KEY VALUE must be given with --config-file only, got A.KEY 1"),
        (["--to", "{}/x.onnx", "--check-picture", "p.jpg"], "--check-picture must be given with --check only"),
        (["--to", "{}/x.safetensors", "--task", "panoptic"], "--task must not be given for .safetensors without"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(folder, tmp_path, capsys, words, message):
    assert run("--model", folder / "model.safetensors", *(word.format(tmp_path) for word in words)) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(f"python -m mask2former export: {message}[^\n]*\n", errors), errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"x"])
def test_no_model_file(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "m.safetensors").write_bytes(content)
    assert run("--model", tmp_path / "m.safetensors", "--to", tmp_path / "x.pt2") == 2
    assert "m.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "x.pt2").exists()


@pytest.mark.parametrize("words", [["--to", "x.engine"], ["--to", "x"]])
def test_unknown_suffix(folder, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        run("--model", folder / "model.safetensors", *words)
    assert stopped.value.code == 2
    assert "must end with .safetensors, .onnx or .pt2, got x" in capsys.readouterr().err


def test_missing_packages_are_named_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None if name.startswith("onnx") else object())
    assert run("--model", tmp_path / "not.there", "--to", tmp_path / "x.onnx", "--check") == 2
    wanted = "this needs onnx and onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime"
    assert capsys.readouterr().err == f"python -m mask2former export: {wanted}\n"


def test_nothing_is_left_when_writing_fails(folder, tmp_path, monkeypatch):
    """The disk fills up while the new file is written: the old one stays."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", full)
    assert run("--model", folder / "model.safetensors", "--to", target) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert target.read_bytes() == b"old"
