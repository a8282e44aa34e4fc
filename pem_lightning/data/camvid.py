"""CamVid: 11 classes of street scenes (Brostow et al., ECCV 2008) in the version and split of SegNet's authors."""

from __future__ import annotations

from pathlib import Path

from pem_lightning.data.dataset import SampleTransform
from pem_lightning.data.semantic_folder import SemanticFolderDataModule, SemanticFolderDataset, read_classes
from pem_lightning.data.transforms import EvalTransform, TrainTransform
from pem_lightning.types import ClassInfo, DatasetInfo, UserError

CAMVID = DatasetInfo(
    "camvid",
    (
        ClassInfo("sky", (128, 128, 128), False, 0),
        ClassInfo("building", (128, 0, 0), False, 1),
        ClassInfo("pole", (192, 192, 128), False, 2),
        ClassInfo("road", (128, 64, 128), False, 3),
        ClassInfo("pavement", (60, 40, 222), False, 4),
        ClassInfo("tree", (128, 128, 0), False, 5),
        ClassInfo("sign", (192, 128, 128), False, 6),
        ClassInfo("fence", (64, 64, 128), False, 7),
        ClassInfo("car", (64, 0, 128), False, 8),
        ClassInfo("pedestrian", (64, 64, 0), False, 9),
        ClassInfo("bicyclist", (0, 128, 192), False, 10),
    ),
)
"""In the order of SegNet's maps, whose values the category ids are."""
VOID = 11

_SHORTEST_EDGES = (240, 288, 336, 384, 432, 480, 540, 600)


class CamVidDataset(SemanticFolderDataset):
    """One split, "train", "val" or "test", in SegNet's layout or that of `SemanticFolderDataset`.

    In SegNet's layout `root` holds images in `<split>`, maps of the same names in `<split>annot`, and maybe a list
    `<split>.txt`, which then says what is in the split: a line has the paths of an image and its map, of which only
    the names count.

    Raises:
        UserError: files are missing or ambiguous, or a `classes.yaml` has other classes.
    """

    hint = (
        "expected are root/{train,val,test}/ and root/{train,val,test}annot/ (SegNet's CamVid), or "
        "root/{images,labels}/{train,val,test}/, see docs/data.md"
    )

    def read_classes(self) -> tuple[DatasetInfo, frozenset[int]]:
        """CamVid's, whether or not there is a `classes.yaml`."""
        path = self.root / "classes.yaml"
        if self._is_segnet() or not path.exists():
            return CAMVID, frozenset({VOID})
        found, void = read_classes(path)
        if (found.class_names, found.category_ids) != (CAMVID.class_names, CAMVID.category_ids):
            names = ", ".join(CAMVID.class_names)
            raise UserError(f"{path} has other classes than CamVid ({names}): choose dataset=semantic_folder")
        return CAMVID, void

    def folders(self, split: str) -> tuple[Path, Path]:
        """Of images and maps."""
        return (self.root / split, self.root / f"{split}annot") if self._is_segnet() else super().folders(split)

    def listed(self, split: str) -> frozenset[str] | None:
        """Names of the files that SegNet's list has; None without one."""
        path = self.root / f"{split}.txt"
        if not self._is_segnet() or not path.is_file():
            return None
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise UserError(f"cannot read {path} ({error}): get it again, or delete it") from error
        return frozenset(Path(line.split()[0]).stem for line in lines if line.strip())

    def values_hint(self) -> str:
        """What to do about an annotation that does not fit."""
        return f"CamVid's values are 0 to 10, and {VOID} for void; for another version take dataset=semantic_folder"

    def _is_segnet(self) -> bool:
        return not (self.root / "images").is_dir()


class CamVidDataModule(SemanticFolderDataModule):
    """CamVid in either layout; `eval_split="test"` evaluates the test images, which no training can use."""

    choice = "camvid"
    dataset = CamVidDataset

    def read_info(self) -> DatasetInfo:
        """CamVid's classes."""
        return CAMVID

    def default_transforms(self) -> tuple[SampleTransform, SampleTransform]:
        """Crops of 288 x 384 for training; 360 pixels for evaluation, the frames' own height."""
        return TrainTransform((288, 384), _SHORTEST_EDGES, max_size=1600, pad=True), EvalTransform(360, 1440)
