"""Own data train from a config file with the embedded engine."""

import pytest

from tests.own_data.small import KINDS
from tests.own_data.training import EXPECTED, write_config

pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed, see requirements-train.txt")
pytest.importorskip("yaml", reason="PyYAML is not installed, see requirements-train.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_two_iterations_and_an_evaluation(kind, tmp_path, monkeypatch):
    from mask2former.engine.config import get_config
    from mask2former.engine.launch import train_or_evaluate

    monkeypatch.setenv("MASK2FORMER_CACHE", str(tmp_path / "cache"))
    file = write_config(tmp_path, f"embedded_{kind}", kind, KINDS[kind](tmp_path / "data"))
    results = train_or_evaluate(get_config(file))
    task, metric = EXPECTED[kind][3]
    assert set(results) <= {task, "bbox"}
    assert 0 <= results[task][metric] <= 100


def test_a_wrong_list_is_an_error_of_the_config(tmp_path):
    from mask2former.engine.config import ConfigError, get_config

    with pytest.raises(ConfigError, match="NAME must be the data set's name, got None"):
        get_config(None, ["DATASETS.CUSTOM", "[{'IMAGES': 'x'}]"])
