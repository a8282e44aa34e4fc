"""Wall time of training, with validation kept apart."""

from __future__ import annotations

import time
from collections import deque


class Stopwatch:
    """Counts steps and images, and how long they took; `time.monotonic` is all it looks at.

    Attributes:
        steps: training steps since the start.
        images: images of these steps, over all processes.
        validations: that were finished.
        validating: seconds of all of them.
    """

    def __init__(self) -> None:
        self.steps = self.images = self.validations = 0
        self.validating = 0.0
        self._start = time.monotonic()
        self._paused: float | None = None
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=101)  # training seconds and images by step

    @property
    def training(self) -> float:
        """Seconds since the start without validation."""
        return (self._paused or time.monotonic()) - self._start - self.validating

    @property
    def paused(self) -> bool:
        """Whether a validation is under way."""
        return self._paused is not None

    def step(self, images: int) -> None:
        """A training step over so many images is done."""
        self.steps += 1
        self.images += images
        self._recent.append((self.training, self.images))

    def pause(self) -> None:
        """Validation begins."""
        self._paused = time.monotonic()

    def resume(self) -> None:
        """Validation is over, if there was one."""
        if self._paused is not None:
            self.validating += time.monotonic() - self._paused
            self.validations += 1
            self._paused = None

    @property
    def seconds_per_step(self) -> float | None:
        """Of the last hundred steps; None before the first."""
        return self._recent_seconds() / (len(self._recent) - 1) if self.steps else None

    @property
    def images_per_second(self) -> float | None:
        """Of the last hundred steps; None before the first."""
        if not self.steps:
            return None
        return (self._recent[-1][1] - self._recent[0][1]) / max(self._recent_seconds(), 1e-9)

    def to_go(self, steps: int, validations: int) -> float | None:
        """Seconds for so many steps and validations; None before the first step.

        A validation counts as long as those before it took, and nothing as long as there was none.
        """
        if (pace := self.seconds_per_step) is None:
            return None
        return pace * steps + validations * self.validating / max(self.validations, 1)

    def _recent_seconds(self) -> float:
        return self._recent[-1][0] - self._recent[0][0]
