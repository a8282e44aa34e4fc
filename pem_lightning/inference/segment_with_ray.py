"""The work of predict.py on more images than one process, or one machine, can take: Ray Data shares them out."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track

from pem_lightning.files import remove_leftovers
from pem_lightning.inference.exchange import Coco, Cvat, ExchangeFiles
from pem_lightning.inference.predictor import Photo, Predictor
from pem_lightning.inference.results import CocoPanoptic, SegmentedImage, image_files
from pem_lightning.inference.segment_files import check_names, check_options
from pem_lightning.inference.sources import IMAGE_SUFFIXES, VIDEO_SUFFIXES, prefetch
from pem_lightning.inference.storage import Folder, find_at, open_address, read_at
from pem_lightning.installation import install_command
from pem_lightning.types import DatasetInfo, UserError

log = logging.getLogger(__name__)

FAILED = "failed.txt"
"""In the output folder: the images that could not be segmented, and why."""
FINISHED = ".finished"
"""In the output folder: records of finished images, one file each; with .jsonl, when a run has ended, all in one."""
_BLOCK = 32
"""Images that a worker gets at once, at most."""
_DEATHS = 3
"""How many workers may die at a block before its images are given up: one of them may be what kills them."""


class Cluster(NamedTuple):
    """What to use of Ray.

    Args:
        address: of a running cluster; None for the one that Ray finds here (RAY_ADDRESS, `ray start`), or else a new
            one on this machine.
        workers: processes with a network each; None for as many as there is room for.
        cpus: of each worker, and its threads.
        gpus: of each worker; None for one where the cluster has some.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1
    gpus: float | None = None


def segment_with_ray(
    make: Callable[[], Predictor],
    source: str | Path | list[str | Path],
    output: str | Path,
    task: str,
    info: DatasetInfo,
    *,
    save: str | None = None,
    formats: str | Sequence[str] | None = None,
    settings: str = "",
    cluster: Cluster | None = None,
) -> None:
    """Segment images on all machines of a Ray cluster; the files are those of `segment_files`.

    An image is finished when its record is written, after its files. A finished one is not segmented again as long as
    `settings` are the same and its files are there, of the same size.

    Args:
        make: makes the predictor in every worker.
        source: an image, a folder of them or a pattern, local or by address (s3://...); or a list.
        output: folder for the results, local or by address. All machines have to reach both.
        task, info: the predictor's.
        save, formats: see `segment_files`.
        settings: any text that stands for what decides on the results.
        cluster: see there.

    Raises:
        UserError: Ray is missing or cannot be reached, there is nothing to segment, an option is impossible, a worker
            cannot work, or some files could not be read. These are listed in `FAILED`, and raise when all others are
            done.
    """
    cluster = cluster or Cluster()
    _check_installed()
    check_options(save, workers=cluster.workers, cpus=cluster.cpus)
    writer = _Writer(str(output), task, info, save or "all", formats, settings)
    addresses = _find(source, str(output))
    records = _finished(writer.folder, settings)
    waiting = [name for name in addresses if name not in records]
    failed: dict[str, str] = {}
    if waiting:
        with _connected(cluster.address):
            _sort(_rows(make, writer, [addresses[name] for name in waiting], cluster), len(waiting), records, failed)
    done = [records[name] for name in addresses if name in records]
    writer.write_collected(done)
    _keep(writer.folder, records)
    _list_failed(writer.folder, {addresses[name]: text for name, text in sorted(failed.items())})
    before = len(addresses) - len(waiting)
    again = f" ({before} of them before)" if before else ""
    print(f"{len(done)} of {len(addresses)} images segmented{again}, results in {output}")
    if failed:
        where = f"{str(output).rstrip('/')}/{FAILED}"
        raise UserError(f"{len(failed)} of {len(addresses)} files could not be read: repair or remove those in {where}")


def _sort(rows: Iterator[Mapping[str, str]], count: int, records: dict[str, str], failed: dict[str, str]) -> None:
    """Bring what the workers say, as it comes, into the two dictionaries."""
    for row in track(rows, f"Segmenting {count} images", count, disable=count == 1):
        if row["kind"] == "stop":
            raise UserError(row["text"])
        if row["kind"] == "failed":
            failed[row["name"]] = row["text"]
            print(f"skipped: {row['text']}", file=sys.stderr)
        else:
            records[row["name"]] = row["text"]


def _check_installed() -> None:
    # Ray reads these when it is imported.
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_NUM_REDIS_GET_RETRIES": "3"}
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise UserError(f"launcher=ray needs the package ray with its part data: {install_command('ray')}") from error


def _find(source: str | Path | list[str | Path], output: str) -> dict[str, str]:
    """The images' addresses by the names of their results, in the order of `segment_files`."""
    found = [
        address
        for one in (source if isinstance(source, list) else [source])
        for address in find_at(str(one), IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    ]
    files = [Path(address) for address in found]
    if videos := [address for address in found if Path(address).suffix.lower() in VIDEO_SUFFIXES]:
        raise UserError(f"launcher=ray is for images, and {videos[0]} is a video: leave out the one or the other")
    check_names(files, [], Path(output), source)
    return {file.stem: address for file, address in zip(files, found, strict=True)}


class _Writer:
    """Writes the files of each image, and the files with all of them."""

    def __init__(
        self, output: str, task: str, info: DatasetInfo, save: str, formats: str | Sequence[str] | None, settings: str
    ) -> None:
        self.folder = Folder(output)
        self.exchange = ExchangeFiles(
            Path(self.folder.path), [formats] if isinstance(formats, str) else list(formats or ())
        )
        self.info = info
        self.masks, self.overlays = save != "overlays", save != "masks"
        self.panoptic = self.masks and task == "panoptic"
        self.settings = settings

    def write(self, result: SegmentedImage, address: str) -> str:
        """Write an image's files, and then its record, which is returned: their sizes, and its parts of other files."""
        beside = type(open_address(address)[0]) is type(self.folder.fs)
        files = image_files(result, masks=self.masks, overlays=self.overlays)
        files |= self.exchange.image_files(result, None if beside else address)
        for name, content in files.items():
            self.folder.write(name, content)
        collectors = self._collectors()
        for collector in collectors.values():
            collector.add(result)
        sizes = {name: len(content) for name, content in files.items()}
        parts = {name: str(collector) for name, collector in collectors.items()}
        record = {"name": result.name, "settings": self.settings, "files": sizes, "parts": parts}
        self.folder.write(_record(result.name), (text := json.dumps(record)).encode())
        return text

    def write_collected(self, records: Sequence[str]) -> None:
        """Write the files with all images."""
        collectors = self._collectors()
        for record in records:
            for name, part in json.loads(record)["parts"].items():
                collectors[name].merge(part)
        for name, collector in collectors.items():
            self.folder.write(name, str(collector).encode())

    def _collectors(self) -> dict[str, CocoPanoptic | Coco | Cvat]:
        panoptic = {"panoptic.json": CocoPanoptic(self.info)} if self.panoptic else {}
        return {**panoptic, **self.exchange.collectors()}


def _record(name: str) -> str:
    return f"{FINISHED}/{name}.json"


def _finished(folder: Folder, settings: str) -> dict[str, str]:
    """The records of images, by name, that were finished with these settings and are whole; others are removed."""
    sizes = folder.sizes()
    texts = (folder.read(f"{FINISHED}.jsonl") or "").splitlines()
    inside = [name for name in sizes if name.startswith(f"{FINISHED}/")]
    texts += [folder.read(name) or "{}" for name in inside if name.endswith(".json")]
    records = {}
    for text in texts:
        record = json.loads(text)
        whole = all(sizes.get(name) == size for name, size in record.get("files", {}).items())
        if whole and record.get("settings") == settings:
            records[record["name"]] = text
    if texts or inside:
        _keep(folder, records)
    return records


def _keep(folder: Folder, records: Mapping[str, str]) -> None:
    """Bring the records into one file."""
    folder.write(f"{FINISHED}.jsonl", "".join(f"{text}\n" for text in records.values()).encode())
    if names := [name for name in folder.sizes() if name.startswith(f"{FINISHED}/")]:
        folder.remove(names)
    if folder.is_local:
        remove_leftovers(Path(folder.path))  # of workers that were killed
        with suppress(OSError):  # there is no such folder
            Path(folder.path, FINISHED).rmdir()


def _list_failed(folder: Folder, failed: Mapping[str, str]) -> None:
    if failed:
        folder.write(FAILED, "".join(f"{address}\t{reason}\n" for address, reason in failed.items()).encode())
    elif folder.read(FAILED) is not None:
        folder.remove([FAILED])


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Ray, which prints nothing, sends nothing home and leaves signals to us."""
    import ray

    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if machine := re.fullmatch(r"([\w.-]+):(\d+)", address or ""):  # Ray itself would try for minutes
            socket.create_connection((machine[1], int(machine[2])), timeout=5).close()
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        where = "Ray" if address is None else f"Ray at launcher.address={address}"
        raise UserError(
            f"cannot connect to {where} ({reason}): start it by `ray start`, or correct the address"
        ) from error
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _rows(
    make: Callable[[], Predictor], writer: _Writer, addresses: Sequence[str], cluster: Cluster
) -> Iterator[Mapping[str, str]]:
    """What `_Worker` says of every image, as it comes."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    workers, gpus = _room(cluster)
    block = max(1, min(_BLOCK, len(addresses) // (4 * workers)))
    blocks = -(-len(addresses) // block)
    workers = min(workers, blocks)
    log.info("%d images on %d workers of %d CPUs and %g GPUs", len(addresses), workers, cluster.cpus, gpus)
    images = ray.data.from_items([{"address": address} for address in addresses], override_num_blocks=blocks)
    outcomes = images.map_batches(
        _Worker,
        fn_constructor_args=(make, writer, cluster.cpus),
        batch_size=None,
        # With one worker at least, Ray does not wait for those that a lost machine has no room for any more.
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=cluster.cpus,
        num_gpus=gpus,
    )
    yield from outcomes.iter_rows()


def _room(cluster: Cluster) -> tuple[int, float]:
    """How many workers, and the GPUs of each."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = cluster.gpus
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
    room = [machine.get("CPU", 0) // cluster.cpus for machine in machines]
    if gpus:
        room = [min(few, machine.get("GPU", 0) // gpus) for few, machine in zip(room, machines, strict=True)]
    if not sum(room):
        raise UserError(f"no machine has {cluster.cpus} CPUs and {gpus:g} GPUs: lower launcher.cpus or launcher.gpus")
    return cluster.workers or int(sum(room)), gpus


class _Worker:
    """An actor of Ray's: segments blocks of images, and says of each what became of it.

    Users' mistakes come as rows: an error would end in Ray's own pages.
    """

    def __init__(self, make: Callable[[], Predictor], writer: _Writer, threads: int) -> None:
        torch.set_num_threads(threads)
        self.writer, self.problem = writer, ""
        try:
            self.predictor = make()
        except UserError as error:
            self.problem = str(error)

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[str]]:
        """Segment images; returns name, kind (finished, failed or stop) and text (a record, or why)."""
        rows: list[tuple[str, str, str]] = []
        try:
            if self.problem:
                raise UserError(self.problem)
            addresses = [str(address) for address in block["address"]]
            rows += self._give_up(addresses) if self._deaths(addresses[0]) >= _DEATHS else self._segment(addresses)
        except UserError as error:
            rows = [("", "stop", str(error))]
        names, kinds, texts = zip(*rows, strict=True)
        return {"name": list(names), "kind": list(kinds), "text": list(texts)}

    def _deaths(self, first: str) -> int:
        """How often a block was begun before, and ended with its worker."""
        mark = f"{FINISHED}/{Path(first).stem}.begun"
        before = int(self.writer.folder.read(mark) or 0)
        self.writer.folder.write(mark, str(before + 1).encode())
        return before

    def _give_up(self, addresses: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        for address in addresses:
            record = self.writer.folder.read(_record(name := Path(address).stem))
            why = (
                f"cannot segment {address}: {_DEATHS} workers died at it or its neighbours, perhaps for lack of "
                "memory; start again with fewer workers, or inference.tile=[1024,1024]"
            )
            yield (name, "finished", record) if record else (name, "failed", why)

    def _segment(self, addresses: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        with prefetch(map(self._read, addresses)) as read:
            while some := list(islice(read, self.predictor.batch_size)):
                yield from (row for row, photo, _ in some if photo is None)
                photos = [photo for _, photo, _ in some if photo is not None]
                try:
                    results = list(self.predictor.stream(photos))
                except UserError as error:  # too large for the memory
                    yield from ((photo.name, "failed", str(error)) for photo in photos)
                    continue
                known = [address for _, photo, address in some if photo is not None]
                for result, address in zip(results, known, strict=True):
                    yield result.name, "finished", self.writer.write(result, address)

    def _read(self, address: str) -> tuple[tuple[str, str, str], Photo | None, str]:
        """A row if an image cannot be segmented or was, by a worker that died; else the image."""
        name = Path(address).stem
        if record := self.writer.folder.read(_record(name)):
            return (name, "finished", record), None, address
        try:
            return ("", "", ""), read_at(address), address
        except UserError as error:
            return (name, "failed", str(error)), None, address
