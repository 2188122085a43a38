"""Killed at any moment and resumed: every checkpoint is whole, and the losses go on with the same bits."""

import random
import signal
import time

import pytest
import torch

ITERATIONS = 24
CHANGES = {
    "SOLVER__MAX_ITER": ITERATIONS,
    "SOLVER__CHECKPOINT_PERIOD": 2,
    "DATASETS__TEST": "()",
    "SOLVER__STEPS": "(10, 20)",
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    from tests.engine.conftest import Tiny

    tiny = Tiny(tmp_path_factory.mktemp("whole"))
    run = tiny.run(**CHANGES)
    assert run.code == 0, run.text
    assert sorted(run.losses) == list(range(ITERATIONS))
    return run


def assert_checkpoints_are_whole(folder):
    names = {path.name for path in folder.glob("*.pth")}
    for name in names:
        assert {"model", "trainer", "iteration"} <= torch.load(folder / name).keys()
    tag = folder / "last_checkpoint"
    assert not tag.exists() or tag.read_text() in names


def assert_equals(tiny, uninterrupted):
    """Every loss that any of the runs computed, and the last weights."""
    assert tiny.losses() == uninterrupted.losses
    ends = [torch.load(folder / "model_final.pth") for folder in (tiny.folder / "output", uninterrupted.folder)]
    for name, tensor in ends[0]["model"].items():
        assert torch.equal(tensor, ends[1]["model"][name]), name


@pytest.mark.parametrize(
    "death",
    [
        "write:2:1000000",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("step:5", "write:2:0", "write:12:20000", "rename:1", "rename:12")
        ),
    ],
)
def test_death_at_a_chosen_moment(tiny, uninterrupted, death):
    killed = tiny.run(environment={"DIE": death}, **CHANGES)
    assert killed.code == -signal.SIGKILL
    assert_checkpoints_are_whole(killed.folder)
    resumed = tiny.run("--resume", **CHANGES)
    assert resumed.code == 0, resumed.text
    assert not list(resumed.folder.glob(".*"))
    assert_equals(tiny, uninterrupted)


@pytest.mark.slow
def test_ten_deaths_at_random_moments(tiny, uninterrupted):
    """One training that is killed ten times, from outside, anywhere between its start and its next ten steps."""
    chance = random.Random(0)
    for _ in range(10):
        before = sum(1 for _ in (tiny.folder / "losses").open()) if (tiny.folder / "losses").exists() else 0
        process = tiny.start("--resume", environment={"STEP_SECONDS": "0.05"}, **CHANGES)
        wanted = chance.randrange(1, 5)
        while process.poll() is None:
            time.sleep(0.01)
            path = tiny.folder / "losses"
            if path.exists() and sum(1 for _ in path.open()) >= before + wanted:
                time.sleep(chance.random() * 0.2)
                break
        process.kill()
        process.communicate()
        assert_checkpoints_are_whole(tiny.folder / "output")
    resumed = tiny.run("--resume", **CHANGES)
    assert resumed.code == 0, resumed.text
    assert_equals(tiny, uninterrupted)
