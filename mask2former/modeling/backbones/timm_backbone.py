"""Backbones of the library timm, which is optional: any of its models that tells the strides of its maps.

What differs between timm's models and the backbones here is settled in this module: names and sizes of maps, the
order of channels, image sizes other than the one that a model was trained with, and what it means to be frozen.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.backbones.simple_pyramid import SimpleFeaturePyramid

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
"""Stride of each map by its name."""
WEIGHTS_SCHEME = "timm://"
"""What the name of timm's pretrained weights begins with where a file of weights could stand."""


class _TimmModel(nn.Module):
    """A model of timm without its classifier, as ``model``, under timm's own names of tensors.

    Images may have any size. A frozen model has no gradients and stays in evaluation mode, so that neither statistics
    of batches change nor paths are dropped; its weights are part of the state dict all the same.
    """

    def __init__(self, *, model_name: str, drop_path_rate: float, frozen: bool, image_format: str) -> None:
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        timm = import_timm()
        _check_name(timm, model_name)
        self._name = model_name
        self._arguments = _arguments(timm, model_name, drop_path_rate)
        self.model = timm.create_model(model_name, **self._arguments)
        self.frozen = frozen
        self._is_bgr = image_format == "BGR"
        self._indices: list[int] = []

    def train(self, mode: bool = True) -> "_TimmModel":
        """As of any module, but a frozen model stays as it is evaluated."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def _strides(self) -> dict[int, int]:
        """The strides that timm reports, each with the last map that has it."""
        return {info["reduction"]: index for index, info in enumerate(self.model.feature_info)}

    def _keep(self, indices: Sequence[int], cell: int) -> list[int]:
        """Remove what none of these maps needs, so that every parameter gets a gradient; freeze if wanted.

        timm does not remove everything; what is left over needs no gradient, which several processes insist on.

        Args:
            indices: of the maps.
            cell: sizes of images will be multiples of it.

        Returns:
            The channels of the maps.
        """
        self._indices = list(indices)
        needless = self._check_maps((1, 3, 256 // cell * cell + cell, 320 // cell * cell))
        self._prune(self.model)
        for name, parameter in self.model.named_parameters():
            if self.frozen or name in needless:
                parameter.requires_grad_(False)
        self.train(self.training)
        return [self.model.feature_info[index]["num_chs"] for index in indices]

    def _prune(self, model: Any) -> None:
        model.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)

    def _check_maps(self, shape: tuple[int, int, int, int]) -> set[str]:
        """Refuse a model that takes images of its own size only, or whose maps are not as timm reports.

        Returns:
            Names of the parameters that the maps do not depend on.
        """
        rule = "model_name (MODEL.TIMM.NAME) must be a timm model for images of any size"
        height, width = shape[-2:]
        # On this device nothing takes memory, and as good as no time.
        with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
            model = import_timm().create_model(self._name, **self._arguments).eval()
            self._prune(model)
            try:
                maps = self._maps(torch.empty(shape), model)
                torch.stack([x.sum() for x in maps]).sum().backward()
            except (AssertionError, RuntimeError, ValueError) as error:  # each of timm's models has its own way
                raise ValueError(f"{rule}, got {self._name!r}, which fails for {height}x{width}: {error}") from error
        for index, found in zip(self._indices, maps, strict=True):
            channels, stride = (model.feature_info[index][key] for key in ("num_chs", "reduction"))
            expected = (1, channels, -(-height // stride), -(-width // stride))
            if found.shape != expected:
                raise ValueError(f"{rule} with maps of shape {expected}, got {self._name!r} with {tuple(found.shape)}")
        return {name for name, parameter in model.named_parameters() if parameter.grad is None}

    def _maps(self, images: Tensor, model: Any = None) -> list[Tensor]:
        """The maps (B, C, h, w) that are kept, in the order of the model."""
        rgb = images.flip(1) if self._is_bgr else images
        return (self.model if model is None else model).forward_intermediates(
            rgb, indices=self._indices, intermediates_only=True, output_fmt="NCHW", norm=False
        )


class TimmBackbone(_TimmModel):
    """A model of timm that has maps of several strides: ConvNeXt, ResNet, Swin, EfficientNet, ...

    Attributes:
        out_channels: channels of each output, by name.
        out_strides: stride of each output, by name.
        frozen: whether the weights of timm's model are constants.
    """

    def __init__(
        self,
        *,
        model_name: str,
        out_features: Sequence[str] = tuple(STRIDES),
        drop_path_rate: float = 0.0,
        frozen: bool = False,
        image_format: str = "RGB",
    ) -> None:
        """Build with random weights; `pretrained_weights` has timm's.

        Args:
            model_name: as timm lists it, with or without a tag.
            out_features: names of the outputs, some of `STRIDES`. Of several maps of a stride the last one is given.
            drop_path_rate: of stochastic depth, for the models of timm that have it.
            frozen: make the weights constants.
            image_format: channel order of the images, "RGB" or "BGR"; timm's models get RGB.

        Raises:
            ModuleNotFoundError: if timm is not installed.
            ValueError: if the model is unknown or lacks a stride, or another argument is out of its range.
        """
        super().__init__(model_name=model_name, drop_path_rate=drop_path_rate, frozen=frozen, image_format=image_format)
        names = _in_order(out_features)
        given = self._strides()
        missing = [STRIDES[name] for name in names if STRIDES[name] not in given]
        if missing:
            plain = len(given) == 1
            raise ValueError(
                f"model_name (MODEL.TIMM.NAME) must be a timm model with maps of the strides "
                f"{[STRIDES[name] for name in names]}, got {model_name!r} with {sorted(given)}"
                + ("; TimmSimplePyramid (MODEL.BACKBONE.NAME) makes them of a plain one" if plain else "")
            )
        channels = self._keep([given[STRIDES[name]] for name in names], STRIDES["res5"])
        self.out_channels = dict(zip(names, channels, strict=True))
        self.out_strides = {name: STRIDES[name] for name in names}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            images: (B, 3, H, W), normalised. Sizes that the largest stride does not divide are padded with zeros.

        Returns:
            Maps (B, C, ceil(H / stride), ceil(W / stride)) by name.
        """
        maps = dict(zip(self.out_channels, self._maps(_padded(images, STRIDES["res5"])), strict=True))
        return _cropped(maps, images, self.out_strides)


class TimmPyramid(_TimmModel):
    """A plain vision transformer of timm, which has maps of one stride only, and a `SimpleFeaturePyramid`.

    The pyramid works on the strides that are powers of two. A model whose patches have another size p (14 of DINOv2)
    gets its images resized by p / s, s being the nearest such stride (16), so that a patch covers s pixels of the
    given image. Weights stay as they are, and so does the number of patches of an image that is resized by s / p.

    Attributes:
        out_channels: channels of each output, by name.
        out_strides: stride of each output, by name.
        frozen: whether the weights of timm's model are constants; the pyramid's never are.
    """

    def __init__(
        self,
        *,
        model_name: str,
        pyramid_channels: int = 256,
        out_features: Sequence[str] = tuple(STRIDES),
        drop_path_rate: float = 0.0,
        frozen: bool = False,
        image_format: str = "RGB",
    ) -> None:
        """Build with random weights; `pretrained_weights` has those of timm's model.

        Args:
            model_name: as timm lists it, with or without a tag.
            pyramid_channels: channels of each output.
            out_features: names of the outputs, some of `STRIDES`.
            drop_path_rate: of stochastic depth, for the models of timm that have it.
            frozen: make the weights of timm's model constants.
            image_format: channel order of the images, "RGB" or "BGR"; timm's models get RGB.

        Raises:
            ModuleNotFoundError: if timm is not installed.
            ValueError: if the model is unknown or not plain, or another argument is out of its range.
        """
        super().__init__(model_name=model_name, drop_path_rate=drop_path_rate, frozen=frozen, image_format=image_format)
        names = _in_order(out_features)
        strides = self._strides()
        if len(strides) > 1:
            raise ValueError(
                "model_name (MODEL.TIMM.NAME) must be a timm model whose maps have one stride, a plain vision "
                f"transformer, got {model_name!r} with {sorted(strides)}; TimmBackbone (MODEL.BACKBONE.NAME) takes it"
            )
        ((self._patch, last),) = strides.items()
        (channels,) = self._keep([last], self._patch)
        self._stride = min(STRIDES.values(), key=lambda stride: max(stride / self._patch, self._patch / stride))
        self.out_strides = {name: STRIDES[name] for name in names}
        self.out_channels = dict.fromkeys(names, pyramid_channels)
        self.pyramid = SimpleFeaturePyramid(
            in_channels=channels, in_stride=self._stride, out_channels=pyramid_channels, out_strides=self.out_strides
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            images: (B, 3, H, W), normalised. Sizes that the stride does not divide are padded with zeros.

        Returns:
            Maps (B, C, ceil(H / stride), ceil(W / stride)) by name.
        """
        padded = _padded(images, self._stride)
        if self._patch != self._stride:
            size = [length // self._stride * self._patch for length in padded.shape[-2:]]
            padded = F.interpolate(padded, size, mode="bilinear", align_corners=False)
        (last,) = self._maps(padded)
        return _cropped(self.pyramid(last), images, self.out_strides)


def import_timm() -> Any:
    """The module.

    Raises:
        ModuleNotFoundError: with what to install, if it or something that it needs is not there.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        message = f"backbones of timm need {error.name}: pip install 'mask2former[timm]' or pip install timm"
        raise ModuleNotFoundError(message, name=error.name) from error
    return timm


def normalization(model_name: str, image_format: str = "RGB") -> dict[str, list[float]]:
    """How a model of timm was trained to see images.

    Args:
        model_name: as timm lists it; the tag decides, and without one timm's default tag.
        image_format: channel order of the result, "RGB" or "BGR".

    Returns:
        "pixel_mean" and "pixel_std", in 0..255, to four decimals.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if the model is unknown, or timm does not say.
    """
    timm = import_timm()
    _check_name(timm, model_name)
    trained = timm.get_pretrained_cfg(model_name)
    if trained is None:
        raise ValueError(
            f"MODEL.TIMM.NORMALIZATION must be 'config' for {model_name!r}, of which timm knows no mean and std"
        )
    step = -1 if image_format == "BGR" else 1
    return {
        "pixel_mean": [round(255 * value, 4) for value in trained.mean[::step]],
        "pixel_std": [round(255 * value, 4) for value in trained.std[::step]],
    }


def pretrained_weights(model_name: str) -> dict[str, Tensor]:
    """The weights that timm publishes for a model, without its classifier, by timm's names.

    They are fetched from the Hugging Face Hub unless they are in its cache.

    Raises:
        ModuleNotFoundError: if timm is not installed.
        ValueError: if the model or its tag is unknown, or there are no weights of it.
        OSError: if they cannot be fetched.
    """
    timm = import_timm()
    _check_name(timm, model_name)
    try:
        with torch.random.fork_rng(devices=[]):  # no trace in the caller's random numbers
            return timm.create_model(model_name, pretrained=True, num_classes=0).state_dict()
    except OSError as error:  # the hub's own errors, too
        raise OSError(
            f"{WEIGHTS_SCHEME}{model_name} cannot be fetched: {str(error).splitlines()[0]}; fetch the weights of "
            f"timm/{model_name} at huggingface.co by other means and set MODEL.WEIGHTS to the file, which is called "
            "model.safetensors"
        ) from error
    except RuntimeError as error:  # timm's, where nothing is published under the name
        raise ValueError(f"{WEIGHTS_SCHEME}{model_name} has no weights: {error}") from error


def _check_name(timm: Any, model_name: str) -> None:
    """Refuse what timm does not list."""
    rule = "model_name (MODEL.TIMM.NAME) must be a model of timm, which timm.list_models() lists"
    if not timm.is_model(model_name.partition(".")[0]):
        raise ValueError(f"{rule}, got {model_name!r}")
    try:
        timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:  # because of its tag
        raise ValueError(f"{rule}, with one of its tags or none, got {model_name!r}") from error


def _arguments(timm: Any, model_name: str, drop_path_rate: float) -> dict[str, Any]:
    """What timm builds the model with: without its classifier, and for images of any size where there is a choice."""
    with torch.device("meta"):
        model = timm.create_model(model_name, num_classes=0)
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "prune_intermediate_layers"):
        raise ValueError(f"model_name (MODEL.TIMM.NAME) must be a timm model that gives its maps, got {model_name!r}")
    wanted: dict[str, Any] = {"dynamic_img_size": True, "strict_img_size": False}
    if drop_path_rate:
        wanted["drop_path_rate"] = drop_path_rate
    known = inspect.signature(type(model).__init__).parameters
    if drop_path_rate and "drop_path_rate" not in known:
        raise ValueError(
            f"drop_path_rate (MODEL.TIMM.DROP_PATH_RATE) must be 0 for {model_name!r}, which has no stochastic depth, "
            f"got {drop_path_rate}"
        )
    return {"num_classes": 0, **{name: value for name, value in wanted.items() if name in known}}


def _in_order(out_features: Sequence[str]) -> list[str]:
    """The names by stride, checked."""
    if not out_features or not set(out_features) <= STRIDES.keys():
        raise ValueError(f"out_features must be some of {', '.join(STRIDES)}, got {list(out_features)}")
    return [name for name in STRIDES if name in out_features]


def _padded(images: Tensor, step: int) -> Tensor:
    """Zeros at the bottom and to the right, up to the next multiples of ``step``."""
    height, width = ((length + step - 1) // step * step for length in images.shape[-2:])
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def _cropped(maps: dict[str, Tensor], images: Tensor, strides: dict[str, int]) -> dict[str, Tensor]:
    """Without the cells that lie in the padding alone."""
    height, width = images.shape[-2:]
    return {n: x[..., : -(-height // strides[n]), : -(-width // strides[n])] for n, x in maps.items()}
