"""From an exported file and images to results, with NumPy, Pillow and the file's runtime alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from pem_lightning.basic_types import UserError, check_task
from pem_lightning.deploy.postprocess import postprocess
from pem_lightning.deploy.sessions import open_session
from pem_lightning.images import ImageLike, Images, Photo, read_photo, resize, resized_size
from pem_lightning.inference.results import SegmentedImage, find_classes, only_classes
from pem_lightning.shapes import UInt8


class Runtime:
    """Segments images of any size with an exported network; the counterpart of `Predictor`.

    Results are the same objects, with arrays instead of tensors.

    Args:
        path: of a file that export.py wrote: .onnx, .xml, .tflite or .pt2. It knows its classes, its task and the size
            at which the network was evaluated.
        task: "panoptic", "semantic" or "instance"; by default the file's.
        classes: names of the classes to keep; None keeps all.
        score_threshold: instances with a lower score are left out.
        object_mask_threshold, overlap_threshold: see `inference.panoptic`; by default the file's.
        threads: of the runtime; None leaves it to the runtime.
        precision: see `open_session`.

    Raises:
        UserError: the file cannot be opened, its runtime is missing, or an option is impossible.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        task: str | None = None,
        classes: Iterable[str] | None = None,
        score_threshold: int | float = 0.0,
        object_mask_threshold: int | float | None = None,
        overlap_threshold: int | float | None = None,
        threads: int | None = None,
        precision: str | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UserError(f"threads={threads}: choose 1 or more")
        if task is not None:
            check_task(task)
        self.session = open_session(path, threads=threads, precision=precision)
        self.metadata = self.session.metadata
        if self.metadata.results is not None:
            raise UserError(
                f"{Path(path).name} has its results merged in the graph, which serves other languages: "
                "export with results=false"
            )
        self.info = self.metadata.dataset_info
        self.classes = None if classes is None else find_classes(classes, self.info)
        self.score_threshold = score_threshold
        settings = dict(self.metadata.task)
        self.task: str = task or settings["name"]
        thresholds = {"object_mask_threshold": object_mask_threshold, "overlap_threshold": overlap_threshold}
        settings |= {key: value for key, value in thresholds.items() if value is not None}
        self.settings = {key: value for key, value in settings.items() if key != "name"}

    def __repr__(self) -> str:
        return f"Runtime({str(self.session.path)!r}, task={self.task!r})"

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
            UserError: an image cannot be read, does not have the size that the file is for, or is too large for the
                memory.
        """
        if not isinstance(image, list | tuple):
            assert name is None or isinstance(name, str)
            return self.segment(read_photo(image, name))
        names = [None] * len(image) if name is None else list(name)
        return list(self.stream(read_photo(one, its_name) for one, its_name in zip(image, names, strict=True)))

    def stream(self, photos: Iterable[Photo]) -> Iterator[SegmentedImage]:
        """Segment images as they come."""
        return map(self.segment, photos)

    def segment(self, photo: Photo) -> SegmentedImage:
        """Segment one image that is in memory."""
        height, width = photo.image.shape[:2]
        try:
            image = self._resized(photo.image)
            class_logits, mask_logits = self.session.run(image[None])
            result = postprocess(
                class_logits[0],
                mask_logits[0],
                task=self.task,
                thing_classes=self.info.thing_classes,
                image_size=(image.shape[0], image.shape[1]),
                output_size=(height, width),
                **self.settings,
            )
        except Exception as error:  # every runtime has errors of its own
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise UserError(
                    f"an image of {width} x {height} pixels needs more memory than there is: shrink it"
                ) from error
            raise
        if self.classes is not None:
            result = only_classes(result, self.classes)
        result = result._replace(instances=tuple(i for i in result.instances if i.score >= self.score_threshold))
        return SegmentedImage(photo.name, photo.image, self.info, result, self.task, photo.file)

    def _resized(self, image: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
        """As in evaluation."""
        if self.metadata.resize is None:
            return image
        size = resized_size(image.shape[0], image.shape[1], **self.metadata.resize)
        return resize(np.ascontiguousarray(image), size)
