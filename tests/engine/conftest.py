"""A tiny training for the tests of the embedded engine, in this process or in its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed, see requirements-train.txt")
pytest.importorskip("yaml", reason="PyYAML is not installed, see requirements-train.txt")

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("program.py")
SMOKE = ROOT / "configs/quick_schedules/smoke.yaml"


class Run:
    """What a program did: exit code, text, losses by iteration (all bits), output folder."""

    def __init__(self, code, text, losses, folder):
        self.code, self.text, self.losses, self.folder = code, text, losses, folder


class Tiny:
    """The smoke config on four images, at 64 pixels; overrides by keyword with __ for a dot."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "RANK", "WORLD"))}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def overrides(self, **changes):
        values = {
            "OUTPUT_DIR": self.folder / "output",
            "DATASETS__TRAIN": "('four_train_panoptic',)",
            "DATASETS__TEST": "('four_val_panoptic',)",
            "INPUT__IMAGE_SIZE": 64,
            "INPUT__MIN_SIZE_TEST": 64,
            "INPUT__MAX_SIZE_TEST": 96,
            "SOLVER__IMS_PER_BATCH": 2,
            "MODEL__MASK_FORMER__TRAIN_NUM_POINTS": 128,
            "MODEL__MASK_FORMER__NUM_OBJECT_QUERIES": 20,
            **changes,
        }
        return [str(x) for key, value in values.items() for x in (key.replace("__", "."), value)]

    def cfg(self, **changes):
        from mask2former.engine.config import get_config

        return get_config(SMOKE, self.overrides(**changes))

    def command(self, *flags, program=(PROGRAM,), **changes):
        words = [sys.executable, *program, "--config-file", SMOKE, *flags, *self.overrides(**changes)]
        return [str(word) for word in words]

    def start(self, *flags, environment=(), program=(PROGRAM,), own_group=False, **changes):
        """Start the program in a process of its own."""
        losses = self.folder / "losses"
        variables = {**self.environment, "LOSSES": str(losses), **dict(environment)}
        command = self.command(*flags, program=program, **changes)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=variables, cwd=ROOT, start_new_session=own_group, **streams)

    def run(self, *flags, environment=(), program=(PROGRAM,), timeout=300, **changes):
        """Run the program to its end."""
        process = self.start(*flags, environment=environment, program=program, **changes)
        try:
            text, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Run(process.returncode, text, self.losses(), self.folder / "output")

    def losses(self):
        """Iteration -> set of the losses that were written for it, by all runs in this folder."""
        path = self.folder / "losses"
        found = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            iteration, loss = line.split()
            found.setdefault(int(iteration), set()).add(loss)
        return found


@pytest.fixture
def tiny(tmp_path, four_images):
    return Tiny(tmp_path)


@pytest.fixture
def make_tiny(tmp_path_factory, four_images):
    return lambda: Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def four_images():
    """Registers the data sets of four images in this process too."""
    from functools import partial

    from mask2former.data import catalog
    from mask2former.data.coco_datasets import CocoSplit, sample_root

    for split in ("train", "val"):
        part = CocoSplit(root=sample_root, split=split, first=4)
        for name, make in (
            (f"four_{split}_panoptic", partial(part.panoptic, with_semantic=True)),
            (f"four_{split}_semantic", part.semantic),
        ):
            if name not in catalog.names():
                catalog.register_lazily(name, partial(make, name))
