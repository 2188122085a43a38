"""The same weights in other implementations, for benchmarks."""

import tempfile
from pathlib import Path
from typing import Any

from mask2former.build import Architecture
from mask2former.checkpoint import save_weights
from mask2former.modeling.mask2former import Mask2Former


def transformers_model(architecture: Architecture, model: Mask2Former) -> Any:
    """transformers' Mask2FormerForUniversalSegmentation with the weights of a model, in evaluation mode.

    Args:
        architecture: from `mask2former.build.preset`, what the model was built from.
        model: not changed, its tensors are copied.

    Raises:
        ImportError: if transformers is not installed.
        RuntimeError: if a weight is missing there or here.
    """
    import transformers

    config = _config(transformers, architecture, model)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        save_weights(model, Path(name) / "model.safetensors", names="transformers")
        theirs, report = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
            name, output_loading_info=True
        )
    wrong = {kind: names for kind, names in report.items() if names and kind != "error_msgs"}
    if wrong:
        raise RuntimeError(f"transformers {transformers.__version__} did not take all weights: {wrong}")
    return theirs.eval()


def _config(transformers: Any, architecture: Architecture, model: Mask2Former) -> Any:
    stages = {"out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}
    backbone = architecture["backbone"]
    if backbone["name"] == "swin":
        inner = transformers.SwinConfig(
            embed_dim=backbone.get("embed_dim", 96),
            depths=backbone.get("depths", [2, 2, 6, 2]),
            num_heads=backbone.get("num_heads", [3, 6, 12, 24]),
            window_size=backbone.get("window_size", 7),
            drop_path_rate=backbone.get("drop_path_rate", 0.3),
            **stages,
        )
    else:
        inner = transformers.ResNetConfig(
            embedding_size=model.backbone.stem.conv1.out_channels,
            hidden_sizes=[model.backbone.out_channels[f"res{i}"] for i in (2, 3, 4, 5)],
            depths=[len(getattr(model.backbone, f"res{i}")) for i in (2, 3, 4, 5)],
            layer_type="bottleneck",
            **stages,
        )
    predictor = model.sem_seg_head.predictor
    pixels, decoder = architecture["pixel_decoder"], architecture["transformer_decoder"]
    return transformers.Mask2FormerConfig(
        backbone_config=inner,
        feature_size=pixels.get("conv_dim", 256),
        mask_feature_size=pixels.get("mask_dim", 256),
        encoder_layers=pixels.get("num_layers", 6),
        hidden_dim=decoder.get("hidden_dim", 256),
        dim_feedforward=decoder.get("dim_feedforward", 2048),
        decoder_layers=len(predictor.transformer_ffn_layers) + 1,
        num_queries=len(predictor.query_feat.weight),
        num_labels=model.criterion.num_classes,
        train_num_points=model.criterion.num_points,
    )
