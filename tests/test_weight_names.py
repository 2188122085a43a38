"""Names of transformers: both directions, what is refused, and transformers' own model with converted weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mask2former.__main__ import main
from mask2former.build import build_model, preset
from mask2former.checkpoint import ModelDescription, load_model_file, load_weights, save_model_file, save_weights
from mask2former.convert import convert
from mask2former.finetune import load_start
from mask2former.modeling.backbones.swin import relative_position_index
from mask2former.modeling.mask2former import Mask2Former
from mask2former.weight_files import read_weights, state_dict_of, write_weights
from mask2former.weight_names import naming_of, to_published, to_transformers
from tests.golden import load_shapes
from tests.tiny import architecture, assert_equal_states, categories

ENCODER = "model.pixel_level_module.encoder."
ATTENTION = f"{ENCODER}encoder.layers.0.blocks.1.attention.self."
QKV = "backbone.layers.0.blocks.1.attn.qkv.weight"


def tiny(backbone: str, *, norm: str = "FrozenBN", num_classes: int = 4) -> Mask2Former:
    """Random weights; with four points, and bottlenecks of a quarter of the channels, as transformers has them."""
    layout = architecture(backbone=backbone, num_classes=num_classes)
    layout["pixel_decoder"]["num_points"] = 4
    if backbone == "resnet":
        layout["backbone"] |= {"res2_out_channels": 32, "norm": norm}
    torch.manual_seed(5)
    model = build_model(layout).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def swin() -> Mask2Former:
    return tiny("swin")


@pytest.fixture(scope="module")
def resnet() -> Mask2Former:
    return tiny("resnet")


# ---- the names themselves


@pytest.mark.parametrize(
    ("published", "transformers"),
    [
        ("backbone.layers.2.blocks.11.norm2.bias", f"{ENCODER}encoder.layers.2.blocks.11.layernorm_after.bias"),
        ("backbone.layers.3.blocks.0.mlp.fc2.weight", f"{ENCODER}encoder.layers.3.blocks.0.output.dense.weight"),
        ("backbone.norm0.weight", f"{ENCODER}hidden_states_norms.stage1.weight"),
        ("backbone.stem.conv1.norm.running_var", f"{ENCODER}embedder.embedder.normalization.running_var"),
        ("backbone.res4.22.conv3.weight", f"{ENCODER}encoder.stages.2.layers.22.layer.2.convolution.weight"),
        (
            "backbone.res2.0.shortcut.norm.bias",
            f"{ENCODER}encoder.stages.0.layers.0.shortcut.normalization.bias",
        ),
        (
            "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.norm1.weight",
            "model.pixel_level_module.decoder.encoder.layers.5.self_attn_layer_norm.weight",
        ),
        (
            "sem_seg_head.pixel_decoder.adapter_1.norm.weight",
            "model.pixel_level_module.decoder.adapter_1.1.weight",
        ),
        (
            "sem_seg_head.predictor.transformer_cross_attention_layers.8.multihead_attn.in_proj_weight",
            "model.transformer_module.decoder.layers.8.cross_attn.in_proj_weight",
        ),
        (
            "sem_seg_head.predictor.mask_embed.layers.1.bias",
            "model.transformer_module.decoder.mask_predictor.mask_embedder.1.0.bias",
        ),
        ("sem_seg_head.predictor.query_feat.weight", "model.transformer_module.queries_features.weight"),
        ("sem_seg_head.predictor.class_embed.bias", "class_predictor.bias"),
        ("criterion.empty_weight", "criterion.empty_weight"),
    ],
)
def test_names_by_hand(published: str, transformers: str) -> None:
    tensor = torch.rand(3)
    there = to_transformers({published: tensor}).tensors
    assert there.pop(transformers) is tensor
    assert all(name.endswith("num_batches_tracked") for name in there)
    assert to_published({transformers: tensor}).tensors == {published: tensor}


def test_query_key_and_value_lie_one_after_the_other() -> None:
    weight = torch.arange(12.0).reshape(6, 2)
    there = to_transformers({QKV: weight}).tensors
    assert {name.removeprefix(ATTENTION): tensor.tolist() for name, tensor in there.items()} == {
        "query.weight": [[0, 1], [2, 3]],
        "key.weight": [[4, 5], [6, 7]],
        "value.weight": [[8, 9], [10, 11]],
    }
    assert torch.equal(to_published(dict(reversed(there.items()))).tensors[QKV], weight)


def stand_in(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of few numbers: of the real shape where it tells something, as the size of a window."""
    if name.endswith("relative_position_index"):
        return relative_position_index(round(shape[0] ** 0.5))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    return torch.rand(shape if "bias_table" in name else [3 if size % 3 == 0 else 1 for size in shape])


@pytest.mark.parametrize(
    "config",
    [
        "r50_coco_panoptic",
        "r101_coco_panoptic",
        "r50_cityscapes_semantic",  # its norms count batches
        "swin_tiny_coco_instance",
        "swin_base384_coco_panoptic",
        "swin_large_ade20k_semantic",
    ],
)
def test_every_published_name_has_a_counterpart(config: str) -> None:
    state = {name: stand_in(name, shape) for name, shape in load_shapes(config).items()}
    there = to_transformers(state).tensors
    assert naming_of(state) == "published"
    assert naming_of(there) == "transformers"
    assert_equal_states(ordered(to_published(there).tensors), ordered(state))


def ordered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(state.items()))


# ---- refusals


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no published names .*: backbone\.absolute_pos_embed, head\.x$"):
        to_transformers({"backbone.absolute_pos_embed": torch.ones(1), "head.x": torch.ones(1)})
    unknown = f"{ENCODER}encoder.layers.0.blocks.0.attention.self.q_norm.weight"
    with pytest.raises(ValueError, match=r"no transformers names of a Mask2Former: .*q_norm\.weight$"):
        to_published({unknown: torch.ones(1), "class_predictor.bias": torch.ones(5)})
    with pytest.raises(ValueError, match="and 5 more"):
        to_published({f"class_predictor.{i}": torch.ones(1) for i in range(15)})


def test_query_without_key_or_of_another_size_is_refused(swin: Mask2Former) -> None:
    there = to_transformers(swin.state_dict()).tensors
    name = ATTENTION + "key.bias"
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias needs query, key and value .*got .*query\.bias"):
        to_published({n: t for n, t in there.items() if n != name})
    with pytest.raises(ValueError, match=r"key\.bias \(3,\)"):
        to_published({**there, name: torch.ones(3)})
    with pytest.raises(ValueError, match=r"key\.bias \(16,\) torch\.float16"):
        to_published({**there, name: there[name].half()})
    with pytest.raises(ValueError, match=r"equal size, got shape \(4,\)"):
        to_transformers({QKV: torch.ones(4)})


def test_other_position_indices_are_refused(swin: Mask2Former) -> None:
    """They follow from the size of the window, and are made again on the way back: another one would be lost."""
    state = swin.state_dict()
    name = "backbone.layers.0.blocks.0.attn.relative_position_index"
    for wrong in (state[name].flip(0), state[name][:4], torch.tensor(3)):
        with pytest.raises(ValueError, match=rf"{name} must be the usual index"):
            to_transformers({name: wrong})
    with pytest.raises(ValueError, match=r"rows, got shape \(24, 2\)"):
        to_published({f"{ATTENTION}relative_position_bias_table": torch.ones(24, 2)})


def test_one_tensor_under_two_names_is_refused() -> None:
    file, memory = (f"{ENCODER}{part}embeddings.norm.bias" for part in ("", "swin."))
    with pytest.raises(ValueError, match=f"mean the same, got {file} and {memory}"):
        to_published({file: torch.ones(1), memory: torch.ones(1)})


# ---- counters of batches, which frozen norms do not have


def test_counters_follow_the_model_or_else_their_values() -> None:
    counting = tiny("resnet", norm="BN")
    state = counting.state_dict()
    assert sum(name.endswith("num_batches_tracked") for name in state) == 53
    there = to_transformers(state).tensors
    assert not any(name.endswith("num_batches_tracked") for name in to_published(there).tensors)
    assert_equal_states(ordered(to_published(there, state.keys()).tensors), ordered(state))
    report = load_weights(tiny("resnet", norm="BN"), there)
    assert report.complete
    there[f"{ENCODER}embedder.embedder.normalization.num_batches_tracked"] += 3
    assert to_published(there).tensors["backbone.stem.conv1.norm.num_batches_tracked"] == 3
    frozen = load_weights(tiny("resnet"), there)
    assert frozen.complete
    assert len(frozen.unused) == 53


# ---- files


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl"])
def test_round_trip_through_files_is_exact(tmp_path: Path, request: Any, backbone: str, suffix: str) -> None:
    """Published names -> safetensors -> transformers' names -> back; then into a model."""
    model = request.getfixturevalue(backbone)
    first, there, back = tmp_path / "a.safetensors", tmp_path / f"b{suffix}", tmp_path / f"c{suffix}"
    save_weights(model, first)
    assert convert(first, there, "transformers").before == "published"
    assert convert(there, back, "published").before == "transformers"
    result = state_dict_of(read_weights(back), "back")
    assert_equal_states(ordered(result), ordered(model.state_dict()))
    for file in (first, there, back):
        target = build_and_load(backbone, file)
        assert_equal_states(target.state_dict(), model.state_dict())
    assert len(list(tmp_path.iterdir())) == 3


def build_and_load(backbone: str, source: Any) -> Mask2Former:
    model = tiny(backbone)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.zero_()
    model.criterion.empty_weight.copy_(tiny(backbone).criterion.empty_weight)  # the config's, whatever the file says
    assert load_weights(model, source).complete
    return model


def test_report_says_whose_names_they_were(swin: Mask2Former) -> None:
    report = load_weights(tiny("swin"), to_transformers(swin.state_dict()).tensors)
    assert report.naming == "transformers"
    assert report.unused == tuple(f"{ENCODER}swin.layernorm.{part}" for part in ("weight", "bias"))
    lines = str(report).splitlines()
    assert lines[0] == f"{len(report.loaded)} tensors fit, renamed from the names of transformers"
    assert lines[1].startswith("  2 left out, which no model here has and needs: model.pixel_level_module")


def test_wrong_number_of_classes_is_told_in_published_names(swin: Mask2Former, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_weights(swin, path, names="transformers")
    message = r"theirs\.safetensors does not fit(.|\n)*class_embed\.weight \(5, 32\) in the file, \(10, 32\) in the"
    with pytest.raises(ValueError, match=message):
        load_weights(tiny("swin", num_classes=9), path)
    odd = tmp_path / "odd.safetensors"
    safetensors.torch.save_file({**read_weights(path), "odd": torch.ones(1)}, odd)
    with pytest.raises(ValueError, match=r"odd\.safetensors: .*no transformers names of a Mask2Former: odd$"):
        load_weights(tiny("swin"), odd, strict=False)


def test_training_starts_from_names_of_transformers(swin: Mask2Former, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_weights(swin, path, names="transformers")
    target = tiny("swin", num_classes=9)
    report = load_start(target, path)
    assert torch.equal(target.backbone.norm3.weight, swin.backbone.norm3.weight)
    assert set(report.unused) == {f"{ENCODER}swin.layernorm.{part}" for part in ("weight", "bias")}
    assert not report.missing


def test_views_are_stored_without_what_they_look_at(tmp_path: Path) -> None:
    whole = torch.rand(1000, 10)
    for suffix in (".safetensors", ".pth", ".pkl"):
        path = tmp_path / f"v{suffix}"
        write_weights(path, {"a": whole[:2], "b": whole[2:4].t(), "c": whole[:2]})
        assert path.stat().st_size < 5000
        back = state_dict_of(read_weights(path), "v")
        assert torch.equal(back["b"], whole[2:4].t())


def test_half_types(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3).bfloat16(), "b": torch.rand(3).half()}
    for suffix in (".safetensors", ".pth"):
        write_weights(tmp_path / f"h{suffix}", tensors)
        assert_equal_states(state_dict_of(read_weights(tmp_path / f"h{suffix}"), "h"), tensors)
    with pytest.raises(ValueError, match=r"hold no torch\.bfloat16, as a is"):
        write_weights(tmp_path / "h.pkl", tensors)
    assert not (tmp_path / "h.pkl").exists()


def test_checkpoints_in_several_files(tmp_path: Path, swin: Mask2Former) -> None:
    state = to_transformers(swin.state_dict()).tensors
    names = sorted(state)
    index = tmp_path / "model.safetensors.index.json"
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        safetensors.torch.save_file({n: state[n].clone() for n in names if place[n] == file}, tmp_path / file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    assert_equal_states(build_and_load("swin", index).state_dict(), swin.state_dict())

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        read_weights(index)
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"00002\.safetensors lacks .*as model\.safetensors\.index\.json says"):
        read_weights(index)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"weight_map": 5}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../x.pth"}}',
        '{"weight_map": {"a": "b.index.json"}}',
        "[" * 100_000,
    ],
)
def test_damaged_indices(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"m\.index\.json (is no index|must name files)"):
        read_weights(path)


# ---- the command


def run(*arguments: Any) -> int:
    return main(["convert", *(str(argument) for argument in arguments)])


def test_convert_keeps_the_description_where_it_can(
    tmp_path: Path, swin: Mask2Former, capsys: pytest.CaptureFixture[str]
) -> None:
    file, there, copy = tmp_path / "m.safetensors", tmp_path / "t.safetensors", tmp_path / "c.safetensors"
    layout = architecture()
    layout["pixel_decoder"]["num_points"] = 4
    save_model_file(file, swin, ModelDescription(architecture=layout, categories=categories()))
    assert run("--from", file, "--to", copy, "--names", "published") == 0
    assert "published names" in capsys.readouterr().out
    assert_equal_states(load_model_file(copy)[0].state_dict(), swin.state_dict())
    assert run("--from", file, "--to", there, "--names", "transformers") == 0
    assert "left out, which are no weights: the description of the model" in capsys.readouterr().out
    with safetensors.safe_open(there, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert run("--from", there, "--to", tmp_path / "b.pth", "--names", "published") == 0
    assert "left out, which no model computes anything with: model.pixel" in capsys.readouterr().out


def test_convert_names_what_it_leaves_out_of_a_training_checkpoint(
    tmp_path: Path, swin: Mask2Former, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": swin.state_dict(), "optimizer": {"state": {}}, "iteration": 7}, tmp_path / "w.pth")
    assert run("--from", tmp_path / "w.pth", "--to", tmp_path / "w.pkl", "--names", "published") == 0
    assert "left out, which are no weights: optimizer, iteration" in capsys.readouterr().out
    assert build_and_load("swin", tmp_path / "w.pkl")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("none.pth", "b.pth", "there is no file"),
        ("junk.pth", "b.pth", "junk.pth cannot be read as weights"),
        ("empty.safetensors", "b.pth", "empty.safetensors is no safetensors file"),
        ("cut.safetensors", "b.pth", "cut.safetensors is no safetensors file, or is damaged"),
        ("odd.safetensors", "b.pth", "odd.safetensors: these are no published names of a Mask2Former: odd"),
        ("folder", "b.pth", "must be a file"),
        ("good.safetensors", "b.onnx", "--to must end with .safetensors, .pth, .pkl"),
        ("good.safetensors", "good.safetensors", "--to must be another file than --from"),
        ("good.safetensors", "link.safetensors", "--to must be another file than --from"),
        ("good.safetensors", "nowhere/b.pth", "nowhere"),
    ],
)
def test_convert_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, swin: Mask2Former, capsys: pytest.CaptureFixture[str], source: str, target: str, message: str
) -> None:
    save_weights(swin, tmp_path / "good.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(data[:-7])
    safetensors.torch.save_file({"odd": torch.ones(1)}, tmp_path / "odd.safetensors")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    assert run("--from", tmp_path / source, "--to", tmp_path / target, "--names", "transformers") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "good.safetensors").read_bytes() == data


def test_interrupted_convert_leaves_nothing(
    tmp_path: Path, swin: Mask2Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(swin, tmp_path / "a.safetensors")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    assert run("--from", tmp_path / "a.safetensors", "--to", tmp_path / "b.pth", "--names", "transformers") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_save_weights_checks_its_arguments(tmp_path: Path, swin: Mask2Former) -> None:
    with pytest.raises(ValueError, match="names must be one of published, transformers, got 'timm'"):
        save_weights(swin, tmp_path / "a.pth", names="timm")
    with pytest.raises(ValueError, match=r"must end with .*a\.bin"):
        save_weights(swin, tmp_path / "a.bin")


# ---- transformers' own model


def transformers_folder(folder: Path, layout: dict[str, Any], model: Mask2Former) -> Any:
    """A checkpoint as `from_pretrained` takes it: converted weights, and the configuration that belongs to them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    decoder, pixel_decoder = model.sem_seg_head.predictor, layout["pixel_decoder"]
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config(transformers, model, layout["backbone"]),
        feature_size=pixel_decoder.get("conv_dim", 256),
        mask_feature_size=pixel_decoder.get("mask_dim", 256),
        hidden_dim=decoder.query_feat.weight.shape[1],
        encoder_feedforward_dim=pixel_decoder.get("dim_feedforward", 1024),
        dim_feedforward=layout["transformer_decoder"].get("dim_feedforward", 2048),
        encoder_layers=pixel_decoder.get("num_layers", 6),
        decoder_layers=len(decoder.transformer_ffn_layers) + 1,
        num_attention_heads=pixel_decoder.get("num_heads", 8),
        num_queries=len(decoder.query_feat.weight),
        num_labels=model.criterion.num_classes,
    )
    config.save_pretrained(folder)
    save_weights(model, folder / "model.safetensors", names="transformers")
    theirs, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not info["mismatched_keys"]
    version = int(transformers.__version__.split(".")[0])
    if version >= 5:  # release 4 keeps position indices in its state dict, which it makes itself
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    return theirs.eval()


def backbone_config(transformers: Any, model: Mask2Former, layout: dict[str, Any]) -> Any:
    stages = {"out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}
    if layout["name"] == "swin":
        heads, depths = layout.get("num_heads", [3, 6, 12, 24]), layout.get("depths", [2, 2, 6, 2])
        size = {"embed_dim": layout.get("embed_dim", 96), "window_size": layout.get("window_size", 7)}
        return transformers.SwinConfig(depths=depths, num_heads=heads, drop_path_rate=0.0, **size, **stages)
    widths = [model.backbone.out_channels[f"res{i}"] for i in (2, 3, 4, 5)]
    stem = model.backbone.stem.conv1.out_channels
    depths = [len(getattr(model.backbone, f"res{i}")) for i in (2, 3, 4, 5)]
    return transformers.ResNetConfig(
        embedding_size=stem, hidden_sizes=widths, depths=depths, layer_type="bottleneck", **stages
    )


def assert_equal_logits(ours: Mask2Former, theirs: Any, batch: Tensor) -> None:
    with torch.no_grad():
        expected, actual = theirs(pixel_values=batch), ours.predict(batch)[-1]
    for ours_, theirs_ in (
        (actual.class_logits, expected.class_queries_logits),
        (actual.mask_logits, expected.masks_queries_logits),
    ):
        assert ours_.std() > 0.05  # something to compare
        torch.testing.assert_close(ours_, theirs_, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_transformers_gives_the_same_logits(tmp_path: Path, request: Any, backbone: str) -> None:
    model = request.getfixturevalue(backbone)
    layout = architecture(backbone=backbone)
    theirs = transformers_folder(tmp_path, layout, model)
    for size in ((64, 96), (65, 43)):
        assert_equal_logits(model, theirs, torch.randn(2, 3, *size))
    back = build_and_load(backbone, theirs.state_dict())  # names in memory, which release 5 changed
    assert_equal_states(back.state_dict(), model.state_dict())
    theirs.save_pretrained(tmp_path / "again")
    back = build_and_load(backbone, tmp_path / "again" / "model.safetensors")
    assert_equal_states(back.state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny", "r50"])
def test_transformers_gives_the_same_logits_at_full_size(tmp_path: Path, name: str) -> None:
    layout = preset(name, num_classes=80)
    model = build_model(layout).eval()
    theirs = transformers_folder(tmp_path, layout, model)
    assert_equal_logits(model, theirs, torch.randn(1, 3, 128, 128))
