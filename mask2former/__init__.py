"""Mask2Former: masked-attention mask transformer for panoptic, instance and semantic segmentation.

`load` gives a predictor from a model file or the name of a published model.

Importing this package never imports Detectron2. `add_maskformer2_config`, which configs for Detectron2 need, and
`SemanticSegmentorWithTTA` are loaded from `mask2former.d2` when they are first asked for.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mask2former.build import build_model, preset
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.structures import MaskPrediction, MaskTarget, PixelFeatures

if TYPE_CHECKING:
    import torch

    from mask2former.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "Mask2Former",
    "MaskPrediction",
    "MaskTarget",
    "PixelFeatures",
    "SemanticSegmentorWithTTA",
    "add_maskformer2_config",
    "build_model",
    "load",
    "preset",
]


def load(path_or_name: str | Path, device: "str | torch.device" = "cpu", **overrides: Any) -> "Predictor":
    """A predictor, ready for pictures.

    Args:
        path_or_name: a model file, as `python -m mask2former export` writes it; or, as a string, the name of a
            published model, as `python -m mask2former models` lists them. A file of such a name is meant by
            ``./coco-panoptic-r50``.
        device: where to compute.
        **overrides: arguments of `Predictor` other than the model and what its file knows for sure.

    Raises:
        FileNotFoundError: if there is neither such a file nor such a published model.
        ValueError: if the file is no model file, or a value is out of its range.
        TypeError: if there is no such argument.
        OSError: if a published model cannot be fetched; the message says why.
    """
    from mask2former import zoo
    from mask2former.predictor import Predictor

    if isinstance(path_or_name, str) and zoo.is_model_name(path_or_name):
        return zoo.load_predictor(path_or_name, device, **overrides)
    if not Path(path_or_name).exists():
        near = get_close_matches(str(path_or_name), zoo.MODELS)
        hint = f"similar names: {', '.join(near)}" if near else "`python -m mask2former models` lists those"
        raise FileNotFoundError(f"there is no file {path_or_name}, and no published model of that name; {hint}")
    return Predictor.from_file(path_or_name, device, **overrides)


def __getattr__(name: str) -> Any:
    if name in ("SemanticSegmentorWithTTA", "add_maskformer2_config"):
        from mask2former import d2

        return getattr(d2, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
