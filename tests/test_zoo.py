"""Published models by name: the table against the configs, loading from a server on the loopback, the command."""

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mask2former import build
from mask2former.build import Architecture, build_model
from mask2former.checkpoint import load_model_file, save_model_file
from mask2former.config import architecture_arguments
from mask2former.data import catalog
from mask2former.engine.config import get_config
from mask2former.inference import prediction_settings
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.mask2former import Mask2Former
from mask2former.predictor import Predictor
from mask2former.zoo import (
    MODELS,
    DownloadError,
    PublishedModel,
    fetch,
    find_model,
    is_model_name,
    load_model,
    load_predictor,
)
from mask2former.zoo_commands import add_models_command
from tests.configs import CONFIGS, ROWS
from tests.file_server import FileServer, hash_prefix, published_pickle, running
from tests.model_tables import DOCUMENT, with_tables
from tests.tiny import architecture, assert_equal_states, fresh_model, lively_model, picture

per_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
PATH = "some/model_final_{}.pkl"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy between the tests and the loopback, no network beyond, and a cache of their own."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "DETECTRON2_DATASETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASK2FORMER_MODEL_URL", "http://127.0.0.1:9/nothing-listens-here")
    monkeypatch.setenv("MASK2FORMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with running(FileServer({})) as server:
        monkeypatch.setenv("MASK2FORMER_MODEL_URL", server.address + "/base/")
        yield server


def publish(server: FileServer, network: Mask2Former, layout: Architecture) -> PublishedModel:
    """Make a tiny model of four classes available."""
    content = published_pickle(network)
    path = PATH.format(hash_prefix(content))
    server.files[f"/base/{path}"] = content
    categories = MODELS["cityscapes-instance-r50"].categories[:4]
    return replace(
        MODELS["coco-panoptic-r50"],
        name="tiny",
        path=path,
        architecture=layout,
        categories=categories,
        settings=replace(MODELS["coco-panoptic-r50"].settings, shortest=64, longest=160, overlap_threshold=0.2),
    )


# ---- the table


def test_each_published_config_has_one_model() -> None:
    assert sorted(model.config for model in MODELS.values()) == sorted(row["config"] for row in ROWS)
    assert len(MODELS) == len({model.cached_file for model in MODELS.values()}) == 47
    assert all(re.fullmatch(r"[0-9a-f]{6}", model.sha256_prefix) for model in MODELS.values())


@per_model
def test_name_follows_the_rule(model: PublishedModel) -> None:
    backbone = model.backbone.lower().replace(" (in21k)", "-in21k")
    for letter, word in {"t": "tiny", "s": "small", "b": "base", "l": "large"}.items():
        backbone = re.sub(rf"^swin-{letter}\b", f"swin-{word}", backbone)
    assert model.name == f"{model.data}-{model.task}-{backbone}"
    assert model.config.startswith(f"{model.data}/{model.task}-segmentation/")
    assert ("IN21k" in model.config) == model.name.endswith("-in21k") == ("IN21k" in model.path)
    assert model.path.startswith(f"mask2former/{model.data.replace('-', '_')}/{model.task}/")
    assert model.license == "CC BY-NC 4.0"


@per_model
def test_it_is_what_its_config_describes(model: PublishedModel) -> None:
    cfg = get_config(CONFIGS / model.config)
    ours, configs = filled(model.architecture), filled(architecture_arguments(cfg))
    if model.architecture["backbone"]["name"] == "swin":
        assert ours["backbone"]["ape"] is False  # without it, nothing depends on the size of pre-training
        del ours["backbone"]["pretrain_image_size"], configs["backbone"]["pretrain_image_size"]
    assert ours == configs

    settings = prediction_settings(cfg)
    own_first = sorted(settings.tasks, key=lambda task: task != model.task)
    assert model.settings == replace(settings, tasks=tuple(own_first))
    assert model.settings.tasks[0] == model.task
    assert model.data == "ade20k" or model.settings == settings

    assert model.dataset in cfg.DATASETS.TEST
    assert model.categories == catalog.get(model.dataset).metadata.categories
    assert len(model.categories) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    assert model.description().image_format == cfg.INPUT.FORMAT


def filled(layout: Architecture) -> Architecture:
    """With the default of each argument that is not given; tuples as lists."""
    parts: dict[str, Any] = {
        "backbone": build._BACKBONES[layout["backbone"]["name"]],
        "pixel_decoder": build._PIXEL_DECODERS[layout["pixel_decoder"]["name"]],
        "transformer_decoder": build._TRANSFORMER_DECODERS[layout["transformer_decoder"]["name"]],
        "criterion": SetCriterion,
        "input": Mask2Former,
    }
    full = {part: {**defaults(kind), **layout[part]} for part, kind in parts.items()}
    full["pixel_decoder"].setdefault("in_features", list(full["backbone"]["out_features"]))  # as build_model does
    full["input"].setdefault("image_format", "RGB")  # as ModelDescription does
    return {
        part: {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
        for part, arguments in full.items()
    }


def defaults(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@per_model
def test_number_of_parameters_is_that_of_the_config(model: PublishedModel) -> None:
    (row,) = [row for row in ROWS if row["config"] == model.config]
    assert f"{model.million_parameters:.1f}" == f"{float(row['params_m']):.1f}"


def test_documentation_has_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASK2FORMER_MODEL_URL")
    text = DOCUMENT.read_text("utf-8")
    assert with_tables(text) == text, "run python -m tests.model_tables"
    assert text.count("https://dl.fbaipublicfiles.com/maskformer/mask2former/") == 47


def test_names_are_known_or_similar_ones_are_told() -> None:
    assert is_model_name("coco-panoptic-r50")
    assert not is_model_name("demo/model.safetensors")
    assert find_model("coco-panoptic-r50") is MODELS["coco-panoptic-r50"]
    with pytest.raises(ValueError, match=r"no published model has the name 'coco-panoptic-r5'; .*coco-panoptic-r50"):
        find_model("coco-panoptic-r5")
    with pytest.raises(ValueError, match="python -m mask2former models lists all"):
        find_model("?")


# ---- loading


def test_predictor_of_a_fetched_model_segments_like_the_model(server: FileServer) -> None:
    network = lively_model()
    model = publish(server, network, architecture())
    state = torch.random.get_rng_state()
    predictor = load_model(model, shortest=80)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_equal_states(predictor.model.state_dict(), network.state_dict())
    assert predictor.categories == model.categories
    assert predictor.settings == replace(model.settings, shortest=80)

    expected = Predictor(network, categories=model.categories, **vars(predictor.settings))(picture(), threshold=0.3)
    result = predictor(picture(), threshold=0.3)
    assert len(result.segments) > 1
    assert result.segments == expected.segments
    np.testing.assert_array_equal(result.ids, expected.ids)


def test_fetched_model_needs_no_server_the_second_time(server: FileServer) -> None:
    model = publish(server, fresh_model(), architecture())
    load_model(model)
    server.status = 500
    load_model(model)
    assert len(server.requests) == 1
    assert fetch(model) == model.cached_file


def test_published_model_becomes_a_model_file(server: FileServer, tmp_path: Path) -> None:
    network = fresh_model()
    model = publish(server, network, architecture())
    path = tmp_path / "model.safetensors"
    save_model_file(path, load_model(model).model, model.description())
    loaded, description = load_model_file(path)
    assert_equal_states(loaded.state_dict(), network.state_dict())
    assert description.categories == model.categories
    assert description.notes == {"name": "tiny", "file": model.path, "license": "CC BY-NC 4.0"}


def test_weights_must_fit_entirely(server: FileServer) -> None:
    model = publish(server, fresh_model(num_queries=7), architecture())
    with pytest.raises(ValueError, match=rf"{model.sha256_prefix}\.pkl does not fit the model") as caught:
        load_model(model)
    assert "query_feat.weight (7, 32) in the file, (8, 32) in the model" in str(caught.value)


def test_unknown_settings_are_refused(server: FileServer) -> None:
    model = publish(server, fresh_model(), architecture())
    with pytest.raises(TypeError, match="no_such_setting"):
        load_model(model, no_such_setting=1)


def test_name_leads_to_its_published_file(server: FileServer, tmp_path: Path) -> None:
    model = MODELS["coco-panoptic-r50"]
    server.files["/base/mask2former/coco/panoptic/maskformer2_R50_bs16_50ep/model_final_94dc52.pkl"] = b"not this"
    with pytest.raises(DownloadError, match=r"gave 8 bytes whose SHA-256 begins with .* and not with 94dc52"):
        load_predictor("coco-panoptic-r50")
    assert model.cached_file == tmp_path / "cache/model_final_94dc52.pkl"
    assert not model.cached_file.exists()


def test_base_address_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASK2FORMER_MODEL_URL", "/mnt/models")
    with pytest.raises(
        ValueError, match="MASK2FORMER_MODEL_URL must begin with http:// or https://, got '/mnt/models'"
    ):
        fetch(MODELS["coco-panoptic-r50"])


@pytest.mark.slow
def test_full_model_is_loaded(server: FileServer) -> None:
    published = MODELS["cityscapes-panoptic-r50"]
    network = build_model(published.architecture)
    content = published_pickle(network)
    path = PATH.format(hash_prefix(content))
    server.files[f"/base/{path}"] = content
    predictor = load_model(replace(published, path=path), shortest=64, longest=128)
    assert_equal_states(predictor.model.state_dict(), network.state_dict())
    assert predictor(picture()).ids.shape == (50, 70)


# ---- the command


def command(*arguments: str, models: dict[str, PublishedModel] | None = None) -> int:
    parser = argparse.ArgumentParser()
    add_models_command(parser.add_subparsers())
    args = parser.parse_args(["models", *arguments])
    return args.run(args, models)


def test_list_has_a_line_for_each(capsys: Any) -> None:
    assert command() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(MODELS)
    assert head.split() == ["name", "task", "data", "backbone", "score", "parameters", "licence"]
    assert lines[6].split("  ")[0] == "coco-panoptic-swin-large-in21k"
    assert re.split(r"  +", lines[6])[1:] == [
        "panoptic",
        "coco",
        "Swin-L (IN21k)",
        "PQ 57.8",
        "215.5 M",
        "CC BY-NC 4.0",
    ]


def test_list_can_be_filtered(capsys: Any) -> None:
    assert command("--task", "semantic", "--data", "mapillary-vistas") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["mapillary-vistas-semantic-r50", "mapillary-vistas-semantic-swin-large-in21k"]


def test_list_as_json_has_everything(capsys: Any) -> None:
    assert command("--json", "--task", "instance", "--data", "cityscapes") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 6
    row = rows[0]
    assert row["scores"] == {"AP": 37.4, "AP50": 61.9}
    assert row["sha256_prefix"] == "01a8ed"
    assert row["categories"][0] == "person"
    assert row["settings"]["shortest"] == 1024


def test_download_prints_the_path(server: FileServer, capsys: Any) -> None:
    model = publish(server, fresh_model(), architecture())
    assert command("--download", "tiny", models={"tiny": model}) == 0
    assert capsys.readouterr().out == f"{model.cached_file}\n"
    assert hash_prefix(model.cached_file.read_bytes()) == model.sha256_prefix


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "kitti"], "--data must be one of coco, ade20k, cityscapes, mapillary-vistas, got kitti"),
        (["--download", "coco-panoptic-r5"], "no published model has the name 'coco-panoptic-r5'"),
        (["--download", "coco-panoptic-r50", "--data", "coco"], "--data is for lists"),
        (["--download", "coco-panoptic-r50"], "cannot be reached (Connection refused)"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert command(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    *_, last = output.err.splitlines()
    assert last.startswith("python -m mask2former models: ")
    assert message in last


def test_interrupted_download_ends_with_130(server: FileServer, capsys: Any) -> None:
    class Interrupted(dict[str, PublishedModel]):
        def __getitem__(self, name: str) -> PublishedModel:
            raise KeyboardInterrupt

    assert command("--download", "tiny", models=Interrupted(tiny=MODELS["coco-panoptic-r50"])) == 130
    assert "what has arrived is kept" in capsys.readouterr().err
