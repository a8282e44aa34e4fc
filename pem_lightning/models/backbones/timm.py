"""Every feature extractor of timm (PyTorch Image Models) that has strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.installation import install_command
from pem_lightning.models.layers import Backbone
from pem_lightning.types import UserError

STRIDES = (4, 8, 16, 32)


class TimmBackbone(Backbone):
    """A network of timm without its classification head.

    Some pretrained weights expect images that are not normalised by ImageNet's statistics: the scale and shift between
    the two are saved with the weights.

    Args:
        name: of the model, with or without a tag of weights: "convnext_tiny", "convnext_tiny.fb_in22k".
        pretrained: False for random weights; else see `load_pretrained`.
        norm: "batch", or "frozen" for batch normalisations that keep their statistics and weights.
        options: further arguments of `timm.create_model`, such as `drop_path_rate` or `img_size`.

    Raises:
        UserError: timm does not load, the model or its weights are unknown, or it lacks a stride.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(
        self,
        name: str = "convnext_tiny",
        pretrained: bool | str = False,
        norm: str = "batch",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "frozen"):
            raise UserError(f"unknown backbone norm {norm!r}: choose batch or frozen")
        timm = import_timm()
        _check_name(timm, name)
        self.name, self.frozen = name, norm == "frozen"
        any_size = _any_size(timm, name)
        self._one_size = any_size is None
        self._arguments = {"features_only": True, **(any_size or {}), **(options or {})}
        with torch.device("meta"):
            levels = self._create(timm).feature_info
        deepest = dict(zip(levels.reduction(), levels.out_indices, strict=True))  # level of every stride
        if missing := [stride for stride in STRIDES if stride not in deepest]:
            raise UserError(
                f"backbone.name={name} has features of stride {', '.join(map(str, deepest))}, but none of stride "
                f"{', '.join(map(str, missing))}: choose a model with a pyramid, e.g. convnext_tiny"
            )
        self._arguments["out_indices"] = tuple(deepest[stride] for stride in STRIDES)
        self.model = self._create(timm)
        self.channels = tuple(self.model.feature_info.channels())
        self._channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        self.register_buffer("input_scale", torch.ones(3, 1, 1))
        self.register_buffer("input_shift", torch.zeros(3, 1, 1))
        for batch_norm in self._frozen_norms():
            batch_norm.requires_grad_(False)
        if pretrained:
            self.load_pretrained(pretrained)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Extract features; raises `UserError` if the model does not take images of this size."""
        height, width = images.shape[-2:]
        try:
            features = self.model(torch.addcmul(self.input_shift, images, self.input_scale))
        except (AssertionError, RuntimeError) as error:  # timm and PyTorch refuse a size in many ways
            if not (self._one_size or isinstance(error, AssertionError)) or "memory" in str(error):
                raise
            hint = f", or use one size everywhere and say +backbone.options.img_size=[{height},{width}]"
            raise UserError(
                f"backbone.name={self.name} does not take images of {height} x {width} ({_first_line(error)}): "
                f"choose another{hint if self._one_size else ''}"
            ) from error
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        for feature, stride in zip(features, STRIDES, strict=True):
            if feature.shape[-2:] != (height // stride, width // stride):
                raise UserError(
                    f"backbone.name={self.name} makes {feature.shape[-2]} x {feature.shape[-1]} features of an image "
                    f"of {height} x {width} where {height // stride} x {width // stride} are needed: choose another"
                )
        return features

    def load_pretrained(self, source: bool | str = True) -> None:
        """Load timm's weights (True), downloaded once into Hugging Face's cache, or a file (.safetensors, .pth).

        Raises:
            UserError: they do not exist or cannot be loaded.
        """
        timm = import_timm()
        file = {} if source is True else {"pretrained_cfg_overlay": {"file": str(source)}}
        with torch.random.fork_rng(devices=[]):  # equal draws show which parameters the weights leave out
            torch.manual_seed(0)
            random = self._create(timm)
            torch.manual_seed(0)
            try:
                model = self._create(timm, pretrained=True, **file)
            except Exception as error:  # timm, huggingface_hub and their HTTP client have no common error
                config = timm.get_pretrained_cfg(self.name)
                hub = config and config.hf_hub_id and f"model.safetensors of https://huggingface.co/{config.hf_hub_id}"
                place = hub or (config and config.url)
                hint = f"get {place} by hand and give backbone.pretrained=FILE" if place else "timm has none; use false"
                message = f"no pretrained weights for backbone.name={self.name} ({_first_line(error)}): {hint}"
                raise UserError(message) from error
        pairs = zip(model.named_parameters(), random.parameters(), strict=True)
        empty = [name for (name, p), q in pairs if p.ndim > 1 and torch.equal(p, q)]
        if file and empty:  # timm accepts any file
            raise UserError(f"backbone.pretrained={source} has no {empty[0]}: give the weights of {self.name}")
        self.model.load_state_dict(model.state_dict())
        imagenet = (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
        own = (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        imagenet_mean, imagenet_std, mean, std = (torch.tensor(values)[:, None, None] for values in (*imagenet, *own))
        self.input_scale.copy_(imagenet_std / std)
        self.input_shift.copy_((imagenet_mean - mean) / std)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay by timm's rule: vectors (norms, biases, scales), tables, tokens."""
        return {n for n, p in self.named_parameters() if p.ndim <= 1 or not n.endswith("weight")}

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode; frozen batch normalisations stay in evaluation mode."""
        super().train(mode)
        for batch_norm in self._frozen_norms():
            batch_norm.eval()
        return self

    def _frozen_norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if self.frozen and isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]

    def _create(self, timm: ModuleType, **extra: Any) -> Any:
        try:
            return timm.create_model(self.name, **self._arguments, **extra)
        except (TypeError, RuntimeError) as error:
            if extra:
                raise
            message = f"timm cannot make features of backbone.name={self.name} ({_first_line(error)}): choose another"
            raise UserError(message) from error


def import_timm() -> ModuleType:
    """Import timm; raises `UserError` if it is not installed or does not load."""
    try:
        import timm
        import timm.data
    except Exception as error:  # a torchvision built for another torch raises RuntimeError on import
        cause = _first_line(error)
        raise UserError(f"backbone=timm needs a working timm ({cause}): {install_command('timm')}") from error
    return timm


def _check_name(timm: ModuleType, name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model backbone.name={name}: choose one of timm.list_models()")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise UserError(f"timm has no weights backbone.name={name}: choose one of {', '.join([architecture, *tagged])}")


def _any_size(timm: ModuleType, name: str) -> dict[str, bool] | None:
    """Arguments with which a model of one image size takes others; None if its architecture cannot."""
    config = timm.get_pretrained_cfg(name)
    if not config or not config.fixed_input_size:
        return {}
    try:
        with torch.device("meta"):
            timm.create_model(name, strict_img_size=False)
    except TypeError:  # an architecture without this argument
        return None
    return {"strict_img_size": False}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
