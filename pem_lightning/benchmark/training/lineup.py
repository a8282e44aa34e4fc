"""Who takes part in a benchmark of training, by name, and how each is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from pem_lightning.benchmark.memory import Memory, measure_own
from pem_lightning.benchmark.training.settings import Kind, TrainingSettings, draw_batch
from pem_lightning.benchmark.training.steps import OurStep, StraightforwardStep, TrainingStep
from pem_lightning.benchmark.weights import random_weights
from pem_lightning.losses import UniformSource
from pem_lightning.models.pem import PEM
from pem_lightning.types import Batch, UserError


@dataclass(frozen=True)
class Plan:
    """A contestant before it is built."""

    kind: Kind
    backbone: str
    precision: str = "float32"
    compile: str | None = None

    @property
    def name(self) -> str:
        """Unique within a benchmark."""
        compiled = f" compile={self.compile}" if self.compile else ""
        return f"{self.backbone} {self.kind} {self.precision}{compiled}"

    @property
    def baseline(self) -> str:
        """Name of the straightforward path in the same precision."""
        return Plan("straightforward", self.backbone, self.precision).name

    @property
    def is_optional(self) -> bool:
        """May fail without spoiling the benchmark, because the device or the compiler may not be up to it."""
        return self.precision != "float32" or self.compile is not None

    def build(self, network: PEM, settings: TrainingSettings, rand: UniformSource | None = None) -> TrainingStep:
        """Make the step, which copies the network's weights."""
        kind = StraightforwardStep if self.kind == "straightforward" else OurStep
        return kind(network, precision=self.precision, compile=self.compile, num_points=settings.num_points, rand=rand)


def line_up(settings: TrainingSettings) -> list[Plan]:
    """Everyone who is asked to take part."""
    plans = []
    for backbone in settings.backbones:
        for precision in settings.precisions:
            if "straightforward" in settings.contestants:
                plans.append(Plan("straightforward", backbone, precision))
            if "ours" in settings.contestants:
                modes = (None if mode == "none" else mode for mode in settings.compile)
                plans += [Plan("ours", backbone, precision, mode) for mode in modes]
    return plans


def make_networks(settings: TrainingSettings) -> Callable[[str], PEM]:
    """Backbone -> its network, made once, on the device."""
    return cache(lambda backbone: random_weights(backbone).to(settings.torch_device).network)


def build_all(
    plans: list[Plan],
    network: Callable[[str], PEM],
    batch: Batch,
    settings: TrainingSettings,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[Plan, TrainingStep], dict[str, str]]:
    """Build the contestants, and try each once.

    Returns:
        Those that work, and why others do not.
    """
    steps: dict[Plan, TrainingStep] = {}
    skipped: dict[str, str] = {}
    for plan in plans:
        say(f"building {plan.name}")
        try:
            step = plan.build(network(plan.backbone), settings)
            step.settle(batch)
        except Exception as error:  # whatever a library or torch.compile raises
            if not plan.is_optional:
                raise
            lines = str(error).strip().splitlines()
            skipped[plan.name] = type(error).__name__ + (f": {lines[0]}" if lines else "")
            say(f"skipped {plan.name}: {skipped[plan.name]}")
        else:
            steps[plan] = step
    return steps, skipped


def measure_memory(settings: TrainingSettings, name: str) -> Memory:
    """Measure one contestant in this process, which must be fresh.

    It takes a second step, in which the optimiser's state is there from the start.

    Raises:
        UserError: nobody has the name.
    """
    plans = {plan.name: plan for plan in line_up(settings)}
    if name not in plans:
        raise UserError(f"--measure-memory {name!r}: choose of {', '.join(plans)}")

    def job() -> None:
        # Of the weights that are copied nothing is kept.
        step = plans[name].build(make_networks(settings)(plans[name].backbone), settings)
        batch = draw_batch(settings)
        step.settle(batch)
        step.run(batch)

    return measure_own(job, settings.torch_device)
