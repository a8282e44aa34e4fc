"""From a checkpoint and images to results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pem_lightning.checkpoints import Checkpoint, load_network, read_checkpoint
from pem_lightning.deploy.network import ExportedNetwork
from pem_lightning.images import ImageLike, Images
from pem_lightning.images import Photo as Photo
from pem_lightning.images import read_photo as read_photo
from pem_lightning.inference.optimize import OptimizedNetwork, shorten
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.results import SegmentedImage, find_classes, only_classes
from pem_lightning.inference.tiles import TiledInference
from pem_lightning.inference.tta import TestTimeAugmentation
from pem_lightning.preprocess import normalize
from pem_lightning.types import VOID_ID, DatasetInfo, Sample, UserError, check_task


class Predictor:
    """Segments images of any size with a trained network.

    Results are on the CPU and at each image's own size.

    Args:
        checkpoint: the path of a .ckpt that train.py wrote or of a file that export.py wrote, "camvid" for the network
            that ships, a folder of `save_pretrained`, or one that is read already. It knows the network, its classes
            and the size at which it was evaluated.
        task: "panoptic", "semantic" or "instance"; by default the checkpoint's.
        device: see `choose_device`.
        classes: names of the classes to keep; None keeps all.
        batch_size: how many images of one size run through the network at once.
        object_mask_threshold, overlap_threshold: see `postprocess.panoptic`; by default the checkpoint's.
        score_threshold: instances with a lower score are left out.
        scales, flip: see `TestTimeAugmentation`.
        tile, overlap: see `TiledInference`; larger images run through the network in parts.
        precision, compile: see `OptimizedNetwork`, and `ExportedNetwork` for exported files.
        decoder_layers, queries: see `shorten`; not for exported files.

    Raises:
        UserError: the checkpoint cannot be read, or an option is impossible.
    """

    trained: Checkpoint | None = None
    """What it was made from, without the weights; None after `from_parts`."""

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        task: str | None = None,
        object_mask_threshold: int | float | None = None,
        overlap_threshold: int | float | None = None,
        precision: str = "float32",
        compile: str | None = None,
        decoder_layers: int | None = None,
        queries: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        from hydra.utils import instantiate  # here, because `from_parts` needs no Hydra

        trained = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
        self.trained = trained._replace(network={}, raw=None, session=None)
        task = trained.config["task"]["name"] if task is None else task
        check_task(task)
        device = options.get("device", "auto")
        shorter = {"decoder_layers": decoder_layers, "queries": queries}
        network = fast_network(trained, trained.config["network"], precision, compile, device, **shorter)
        thresholds = {"object_mask_threshold": object_mask_threshold, "overlap_threshold": overlap_threshold}
        chosen = {key: value for key, value in thresholds.items() if value is not None}
        settings = {**trained.config["task"]["inference"], **chosen}
        self._set_up(
            network,
            trained.info,
            TaskInference(task, trained.info.thing_classes, **settings),
            resize=instantiate(trained.config["recipe"]["eval_transform"]),
            **options,
        )

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, trust: Sequence[str] = (), **options: Any
    ) -> Predictor:
        """Make a predictor from a folder, or a repository "user/name" of the Hugging Face Hub.

        `options` are those of the class, the others those of `hub.load_pretrained`.
        """
        from pem_lightning.checkpoints.hub import load_pretrained

        return cls(load_pretrained(name, revision, trust), **options)

    def save_pretrained(self, folder: str | Path, **card: Any) -> Path:
        """Write the network as it was trained as a folder with a model card. See `hub.save_pretrained`."""
        from pem_lightning.checkpoints.hub import save_pretrained

        return save_pretrained(self._checkpoint(), folder, **card)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload that folder to "user/name" of the Hugging Face Hub; returns the address. See `hub.push_to_hub`."""
        from pem_lightning.checkpoints.hub import push_to_hub

        return push_to_hub(self._checkpoint(), repository, **options)

    def _checkpoint(self) -> Checkpoint:
        if self.trained is None:
            raise UserError("a predictor of from_parts() has no checkpoint to save: make it by Predictor(PATH)")
        return self.trained

    @classmethod
    def from_parts(cls, model: nn.Module, info: DatasetInfo, inference: TaskInference, **options: Any) -> Predictor:
        """Make a predictor without a checkpoint.

        Args:
            model: takes normalised images [B, 3, H, W] of any size and returns `Predictions`; an `OptimizedNetwork`
                for speed. It is put into evaluation mode and moved to `device`.
            info: the classes.
            inference: the task and its thresholds.
            options: `resize`, what evaluation does to an image before the model, such as `EvalTransform(640, 2560)`;
                and `device`, `classes`, `batch_size`, `score_threshold`, `scales`, `flip`, `tile` and `overlap` of the
                class.
        """
        predictor = cls.__new__(cls)
        predictor._set_up(model, info, inference, **options)
        return predictor

    def _set_up(
        self,
        model: nn.Module,
        info: DatasetInfo,
        inference: TaskInference,
        *,
        resize: Callable[[Sample], Sample] | None = None,
        device: str | torch.device = "auto",
        classes: Iterable[str] | None = None,
        batch_size: int = 1,
        score_threshold: int | float = 0.0,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile: Sequence[int] | None = None,
        overlap: int = 128,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: choose 1 or more")
        self.device = choose_device(device)
        self.info = info
        self.classes = None if classes is None else find_classes(classes, info)
        self.inference = inference
        self.tiled = TiledInference(TestTimeAugmentation(inference, scales, flip), tile, overlap)
        self.resize = resize
        self.batch_size = batch_size
        self.score_threshold = score_threshold
        self.model = model.to(self.device).eval()

    @overload
    def __call__(self, image: ImageLike, name: str | None = None) -> SegmentedImage: ...

    @overload
    def __call__(self, image: Images, name: Sequence[str] | None = None) -> list[SegmentedImage]: ...

    def __call__(
        self, image: ImageLike | Images, name: str | Sequence[str] | None = None
    ) -> SegmentedImage | list[SegmentedImage]:
        """Segment one image, or a list of them.

        Args:
            image: see `read_image`.
            name: of the result; for a list a list of names. By default the file's name without suffix, or "image".

        Raises:
            UserError: an image cannot be read, or is too large for the device's memory.
        """
        if not isinstance(image, list | tuple):
            assert name is None or isinstance(name, str)
            return next(self.stream([read_photo(image, name)]))
        names = [None] * len(image) if name is None else list(name)
        photos = [read_photo(one, its_name) for one, its_name in zip(image, names, strict=True)]
        order = sorted(range(len(photos)), key=lambda i: photos[i].image.shape)
        results = dict(zip(order, self.stream(photos[i] for i in order), strict=True))
        return [results[i] for i in range(len(photos))]

    def stream(self, photos: Iterable[Photo]) -> Iterator[SegmentedImage]:
        """Segment images as they come; successive ones of the same size run in batches."""
        for _, alike in groupby(photos, key=lambda photo: photo.image.shape):
            while batch := list(islice(alike, self.batch_size)):
                yield from self._segment(batch)

    @torch.no_grad()
    def _segment(self, photos: Sequence[Photo]) -> list[SegmentedImage]:
        """Segment images of one size."""
        height, width = photos[0].image.shape[:2]
        try:
            images = [self._resized(photo.image) for photo in photos]
            results = [r.cpu() for r in self.tiled(self.model, images, (height, width), device=self.device)]
        except (MemoryError, RuntimeError) as error:
            texts = ("allocate memory", "enough memory", "out of memory")  # on Linux; on Windows; on Apple's GPU
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts):
                what = "an image" if len(photos) == 1 else f"a batch of {len(photos)} images"
                raise UserError(
                    f"{what} of {width} x {height} pixels needs more memory than {self.device} has: "
                    "shrink it, cut it into parts by inference.tile=[1024,1024] or lower batch_size"
                ) from error
            raise
        segmented = []
        for photo, result in zip(photos, results, strict=True):
            kept = result
            if self.classes is not None:
                kept = only_classes(result.convert(Tensor.numpy), self.classes).convert(torch.from_numpy)
            kept = kept._replace(instances=tuple(i for i in kept.instances if i.score >= self.score_threshold))
            segmented.append(SegmentedImage(photo.name, photo.image, self.info, kept, self.inference.task, photo.file))
        return segmented

    def prepare(self, photo: UInt8[np.ndarray, "_ _ 3"]) -> Float[Tensor, "3 height width"]:
        """The network's input: resized exactly as in evaluation, then normalised."""
        return normalize(self._resized(photo).to(self.device))

    def _resized(self, photo: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[Tensor, "3 height width"]:
        image = torch.tensor(np.ascontiguousarray(photo)).permute(2, 0, 1)  # PyTorch takes no negative strides
        if self.resize is not None:
            unlabelled = torch.tensor(VOID_ID, dtype=torch.int32).expand(photo.shape[:2])
            image = self.resize(Sample(image, unlabelled, (), "")).image
        return image


def fast_network(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    precision: str = "float32",
    compile: str | None = None,
    device: str | torch.device = "auto",
    **shorter: Any,
) -> nn.Module:
    """The network of a checkpoint, made fast, or that of an exported file.

    Args:
        config: how the first is built.
        precision, compile: see `OptimizedNetwork` and `ExportedNetwork`.
        device: for the second.
        shorter: arguments of `shorten`, for the first.

    Raises:
        UserError: it cannot be built so.
    """
    from hydra.utils import instantiate  # here, because `from_parts` needs no Hydra

    if checkpoint.session is not None:
        if asked_for := [key for key, value in shorter.items() if value is not None]:
            raise UserError(
                f"{asked_for[0]}= cannot change {checkpoint.path}, which is exported: export the checkpoint with it"
            )
        name = device if device == "auto" else choose_device(device)
        return ExportedNetwork(checkpoint.session, precision, compile, str(name))
    network = instantiate(config, num_classes=checkpoint.info.num_classes)
    load_network(network, checkpoint)
    return OptimizedNetwork(shorten(network, **shorter), precision, compile)


def choose_device(name: str | torch.device) -> torch.device:
    """The device by PyTorch's name, such as "cuda:1"; "auto" is a GPU if there is one and else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # PyTorch has no common error for devices that are not there
        raise UserError(f"there is no device={name} here: choose device=auto or device=cpu") from error
    return device
