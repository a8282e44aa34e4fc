"""What a benchmark is asked to do, the machine it does it on, and its input."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pem_lightning.benchmark.peers import PEERS
from pem_lightning.inference.optimize import CompileMode, Precision
from pem_lightning.models.backbones import BACKBONES
from pem_lightning.preprocess import normalize
from pem_lightning.types import UserError

KINDS = ("straightforward", "library", "fast")


@dataclass(frozen=True)
class Settings:
    """A benchmark.

    Attributes:
        backbones: by name; not looked at where there is a checkpoint.
        size: height and width of the image in pixels.
        batch: images at once.
        precisions: of the fast path and of the peers; the other paths run in float32.
        compile: of the fast path: "none" and modes of `torch.compile`.
        contestants: which of `KINDS`.
        peers: names of `peers.PEERS`.
        device: "cpu", "cuda" or "auto".
        threads: of PyTorch on the CPU; None leaves its choice.
        rounds: measurements of every contestant.
        warmup: rounds before them.
        checkpoint: trained weights instead of random ones.
        image: a photograph instead of noise.
        kept_queries: with random weights, how many queries panoptic post-processing has to look at.
        memory: measure peak memory, each contestant in its own process.
        equality: compare the fast path with the straightforward one.
        kernels: compare the kernels of deformable convolution and attention.
        small_ceilings: measure the roofline's ceilings with small operands, to see that it works.

    Raises:
        UserError: a name or a number makes no sense; the message names the choices.
    """

    backbones: tuple[str, ...] = ("stdc1", "resnet50")
    size: tuple[int, int] = (1024, 2048)
    batch: int = 1
    precisions: tuple[str, ...] = ("float32",)
    compile: tuple[str, ...] = ("none",)
    contestants: tuple[str, ...] = ("straightforward", "fast")
    peers: tuple[str, ...] = ()
    device: str = "auto"
    threads: int | None = None
    rounds: int = 5
    warmup: int = 1
    checkpoint: Path | None = None
    image: Path | None = None
    kept_queries: int = 30
    memory: bool = True
    equality: bool = True
    kernels: bool = False
    small_ceilings: bool = False

    def __post_init__(self) -> None:
        check_choices("backbones", self.backbones, BACKBONES)
        check_choices("precisions", self.precisions, get_args(Precision))
        check_choices("compile", self.compile, ("none", *get_args(CompileMode)))
        check_choices("contestants", self.contestants, KINDS)
        check_choices("peers", self.peers, ("all", "none", *PEERS))
        others = {"batch": self.batch, "kept-queries": self.kept_queries}
        check_numbers(self.size, self.rounds, self.warmup, self.threads, others)
        find_device(self.device)

    @property
    def torch_device(self) -> torch.device:
        """Where everything runs."""
        return find_device(self.device)

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The peers, "all" and "none" resolved."""
        return tuple(PEERS) if "all" in self.peers else tuple(name for name in self.peers if name != "none")


def check_choices(option: str, given: tuple[str, ...], choices: Any) -> None:
    """Refuse a name that is none of the choices.

    Raises:
        UserError: and names the choices.
    """
    for name in given:
        if name not in choices:
            raise UserError(f"--{option} {name}: choose of {', '.join(choices)}")


def check_numbers(
    size: tuple[int, int], rounds: int, warmup: int, threads: int | None, others: Mapping[str, int]
) -> None:
    """Refuse numbers that every benchmark has, and others that have to be 1 or more by their options' names.

    Raises:
        UserError: a number is too small.
    """
    positive = {**others, "rounds": rounds} | ({} if threads is None else {"threads": threads})
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    if warmup < 0:
        raise UserError(f"--warmup {warmup}: give 0 or more")
    if min(size) < 32:
        raise UserError(f"--size {size[0]}x{size[1]}: each side needs 32 pixels or more")


def find_device(name: str) -> torch.device:
    """The device of "cpu", "cuda" or "auto".

    Raises:
        UserError: it is none of them, or there is no GPU.
    """
    check_choices("device", (name,), ("cpu", "cuda", "auto"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU here: choose cpu or auto")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "1024x2048".

    Raises:
        UserError: it is no such text.
    """
    height, x, width = text.partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise UserError(f"--size {text}: give height x width in pixels, such as 1024x2048")
    return int(height), int(width)


def load_images(settings: Settings) -> Float[Tensor, "B 3 H W"]:
    """The input, normalised: noise, or a photograph brought to the size.

    Raises:
        UserError: the photograph cannot be read.
    """
    height, width = settings.size
    if settings.image is None:
        images = torch.randn(settings.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        return images.to(settings.torch_device)
    from PIL import Image

    from pem_lightning.inference.sources import read_image

    photo = Image.fromarray(read_image(settings.image)).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
    return normalize(pixels).expand(settings.batch, -1, -1, -1).contiguous().to(settings.torch_device)


def describe_environment(device: torch.device, command: str) -> dict[str, Any]:
    """What numbers depend on, beside the code."""
    found: dict[str, Any] = {
        "command": command,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "onednn": torch.backends.mkldnn.is_available(),
    }
    if hasattr(os, "getloadavg"):
        found["load_average_before"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        }
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
