"""The models in demo/models: what their files say is what their configs say, and they are small."""

from pathlib import Path

import pytest

from mask2former.checkpoint import load_model_file
from mask2former.config import architecture_arguments
from mask2former.data import catalog
from mask2former.inference import prediction_settings
from mask2former.model_description import ModelDescription

pytest.importorskip("yaml")
from mask2former.engine.config import get_config

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "demo/models"
CONFIGS = {
    "panoptic": ROOT / "configs/quick_schedules/coco_sample_panoptic_tiny.yaml",
    "nuclei": MODELS / "nuclei_2.yaml",
}
LIMIT = 16 * 2**20


def test_every_model_has_a_config_and_a_card_and_together_they_are_small() -> None:
    files = sorted(MODELS.glob("*.safetensors"))
    assert {file.stem for file in files} == CONFIGS.keys()
    assert all(file.with_suffix(".md").read_text("utf-8").startswith("# ") for file in files)
    assert sum(file.stat().st_size for file in files) <= LIMIT


@pytest.mark.parametrize("name", CONFIGS)
def test_file_describes_the_model_of_its_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the data need not be there to read the config
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = get_config(CONFIGS[name])
    for row in cfg.DATASETS.CUSTOM:  # other tests ask for all that is registered
        catalog.remove(row["NAME"])
    description = load_model_file(MODELS / f"{name}.safetensors")[1]
    expected = ModelDescription(
        architecture=architecture_arguments(cfg),
        categories=description.categories,
        settings=prediction_settings(cfg),
    )
    # newer releases know more arguments, whose defaults are what older files mean
    assert description.architecture.keys() == expected.architecture.keys()
    for part, arguments in description.architecture.items():
        assert arguments.items() <= expected.architecture[part].items(), part
    assert description.settings == expected.settings
    assert set(description.notes) == {"training", "data", "date", "hardware"}


def test_list_of_the_nuclei_pictures_names_none_of_the_shown_ones() -> None:
    names = (MODELS / "nuclei_training_images.txt").read_text("utf-8").split()
    assert len(names) == len(set(names)) == 527
    credits = (ROOT / "demo/pictures/CREDITS.csv").read_text("utf-8")
    assert not [name for name in names if Path(name).stem in credits]
