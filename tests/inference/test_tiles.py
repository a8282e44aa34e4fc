"""Images in tiles: the cutting, and results that are joined as if the image had been seen whole."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pem_lightning.data.transforms import EvalTransform
from pem_lightning.inference.postprocess import Instance, Result, TaskInference
from pem_lightning.inference.tiles import ClassMap, JoinedInstances, JoinedSegments, TiledInference, cut
from pem_lightning.inference.tta import TestTimeAugmentation
from pem_lightning.types import Predictions, Segment, UserError
from tests.inference.toy import Objects, Stripes, predictor

CPU = torch.device("cpu")


def scene(height, width, *boxes):
    """Black, with boxes (top, left, bottom, right), each in a red of its own."""
    image = np.zeros((height, width, 3), np.uint8)
    for number, (top, left, bottom, right) in enumerate(boxes, 1):
        image[top:bottom, left:right, 0] = 20 * number
    return image


def iou(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


class TestCutting:
    @pytest.mark.parametrize("overlap", [0, 1, 16, 40, 63])
    @pytest.mark.parametrize("length", [65, 100, 129, 500])
    def test_tiles_cover_the_axis(self, length, overlap):
        cuts = cut(length, length, 64, overlap)
        assert cuts[0].seen.start == 0
        assert cuts[-1].seen.stop == length
        assert all(c.seen.stop - c.seen.start == 64 and c.shown == c.seen for c in cuts)
        assert [x for c in cuts for x in range(length)[c.own]] == list(range(length))
        for a, b in pairwise(cuts):
            assert a.seen.stop - b.seen.start >= overlap
            assert a.used.stop - b.used.start == overlap
        for c in cuts:
            assert c.seen.start <= c.used.start <= c.own.start <= c.own.stop <= c.used.stop <= c.seen.stop
            assert len(c.weight) == c.used.stop - c.used.start
            assert (c.weight > 0).all()

    def test_weights_of_two_tiles_add_up_to_one(self):
        total = torch.zeros(500)
        for c in cut(500, 500, 128, 32):
            total[c.used] += c.weight
        assert total.allclose(torch.ones(500))

    def test_no_more_tiles_than_needed(self):
        assert len(cut(64, 64, 64, 16)) == 1
        assert len(cut(40, 40, 64, 16)) == 1
        assert len(cut(112, 112, 64, 16)) == 2
        assert len(cut(113, 113, 64, 16)) == 3

    def test_another_output_size(self):
        cuts = cut(100, 333, 64, 16)
        assert [x for c in cuts for x in range(333)[c.own]] == list(range(333))
        assert all(abs(c.shown.stop - 3.33 * c.seen.stop) <= 0.5 for c in cuts)


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
@pytest.mark.parametrize("tile", [[64, 128], [1024, 1024]])
def test_one_tile_that_covers_the_image_is_the_whole_image(task, tile):
    photo = np.random.default_rng(0).integers(0, 256, (60, 128, 3), np.uint8)
    whole, tiled = Stripes(), Stripes()
    photos = [photo, photo[::-1].copy()]
    expected = predictor(task, whole, batch_size=2)(photos)
    results = predictor(task, tiled, batch_size=2, tile=tile, overlap=16)(photos)
    (seen,), (seen_tiled,) = whole.inputs, tiled.inputs
    assert seen.equal(seen_tiled)
    for a, b in zip(expected, results, strict=True):
        assert a.segments == b.segments
        assert (a.semantic is b.semantic is None) or a.semantic.equal(b.semantic)
        assert (a.panoptic is b.panoptic is None) or a.panoptic.equal(b.panoptic)
        assert [(i.score, i.class_id) for i in a.instances or ()] == [(i.score, i.class_id) for i in b.instances or ()]
        assert all(i.mask.equal(j.mask) for i, j in zip(a.instances or (), b.instances or (), strict=True))


def test_the_network_sees_one_tile_at_a_time():
    model = Objects()
    predictor("panoptic", model, tile=[64, 96], overlap=16)(scene(150, 100))
    assert [tuple(x.shape) for x in model.inputs] == [(1, 3, 64, 96)] * 6


class TestSemantic:
    @pytest.mark.parametrize(("size", "tile", "overlap"), [((130, 201), (64, 64), 16), ((97, 70), (64, 64), 50)])
    @pytest.mark.parametrize("scale", [1, 2])
    def test_scores_are_added_up_as_if_all_were_held(self, size, tile, overlap, scale):
        rows, columns = (cut(a, scale * a, b, overlap) for a, b in zip(size, tile, strict=True))
        joined = ClassMap(rows, columns, CPU)
        total = torch.zeros(5, *joined.map.shape)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                scores = torch.rand(5, len(row.weight), len(column.weight))
                total[:, row.used, column.used] += scores * (row.weight[:, None] * column.weight)
                joined.add(scores, i, j)
        assert (joined.map == total.argmax(0)).float().mean() > 0.9999  # sums in another order may round otherwise

    def test_the_surer_tile_reaches_further(self):
        """Two tiles contradict each other: where both count, scores decide, and the change of weights is smooth."""

        def border(sure_left, sure_right):
            answers = iter([[sure_left, 1e-6, 1 - sure_left], [1e-6, sure_right, 1 - sure_right]])

            def network(images):
                shape = 1, 1, images.shape[2] // 4, images.shape[3] // 4
                return Predictions(torch.tensor([[next(answers)]]).log(), torch.full(shape, 5.0))

            augmentation = TestTimeAugmentation(TaskInference("semantic", {0}))
            image = torch.zeros(3, 64, 96, dtype=torch.uint8)
            (result,) = TiledInference(augmentation, [64, 64], 32)(network, [image], (64, 96))
            changes = result.semantic.diff(dim=1).nonzero()[:, 1]
            assert changes.unique().numel() == 1
            return int(changes[0]) + 1

        assert border(0.5, 0.5) == 48
        assert 48 < border(0.9, 0.5) < border(0.9, 0.1) < 64
        assert 32 < border(0.1, 0.9) < 48

    @pytest.mark.parametrize("size", [(130, 201), (65, 64), (64, 300), (301, 31)])
    @pytest.mark.parametrize("views", [{}, {"flip": True}])
    def test_a_scene_is_seen_as_if_whole(self, size, views):
        photo = scene(*size, (10, 20, 58, 60), (20, 100, 120, 180))
        result = predictor("semantic", Objects(), tile=[64, 64], overlap=16, **views)(photo)
        expected = torch.from_numpy(photo[..., 0] == 0).int()
        assert (result.semantic == expected).float().mean() > 0.96
        model = Objects()
        predictor("semantic", model, tile=[64, 64], overlap=16, **views)(photo)
        assert max(x.shape[-1] for x in model.inputs) <= 64

    def test_panoptic_evaluation_gets_both_from_one_pass(self):
        model = Objects()
        tiled = TiledInference(TestTimeAugmentation(TaskInference("panoptic", {0})), [64, 64], 16)
        photo = scene(64, 200, (10, 20, 50, 180))
        image = torch.from_numpy(photo).permute(2, 0, 1)
        (result,) = tiled(model, [image], (64, 200), with_semantic=True)
        assert len(model.inputs) == len(cut(200, 200, 64, 16))
        assert result.semantic.shape == result.panoptic.shape == (64, 200)
        (car,) = (s.id for s in result.segments if s.is_thing)
        assert iou(result.semantic == 0, result.panoptic == car) > 0.95


SCENES = {
    "across a seam": (64, 112, (20, 28, 52, 92)),
    "across four tiles": (112, 112, (20, 20, 90, 90)),
    "across many tiles, odd": (203, 307, (7, 11, 190, 301)),
    "in one overlap": (64, 112, (20, 52, 40, 60)),
    "touching at the seam": (64, 112, (10, 20, 50, 56), (10, 56, 50, 100)),
    "touching along the seam": (112, 112, (10, 10, 56, 100), (56, 10, 100, 100)),
    "one in each tile": (112, 112, (8, 8, 40, 40), (8, 72, 40, 104), (72, 8, 104, 40), (72, 72, 104, 104)),
    "nothing": (112, 112),
}


class TestObjects:
    @pytest.mark.parametrize("overlap", [16, 40])
    @pytest.mark.parametrize("name", SCENES)
    def test_segments_are_those_of_the_scene(self, name, overlap):
        height, width, *boxes = SCENES[name]
        photo = scene(height, width, *boxes)
        result = predictor("panoptic", Objects(), tile=[64, 64], overlap=overlap)(photo)
        assert [s.id for s in result.segments] == list(range(1, len(result.segments) + 1))
        assert [s.name for s in result.segments].count("sky") == 1
        cars = [result.panoptic == s.id for s in result.segments if s.is_thing]
        assert len(cars) == len(boxes)
        for number in range(1, len(boxes) + 1):
            truth = torch.from_numpy(photo[..., 0] == 20 * number)
            assert max(iou(car, truth) for car in cars) > 0.9

    @pytest.mark.parametrize("overlap", [16, 40])
    @pytest.mark.parametrize("name", SCENES)
    def test_instances_are_those_of_the_scene(self, name, overlap):
        height, width, *boxes = SCENES[name]
        photo = scene(height, width, *boxes)
        result = predictor("instance", Objects(), tile=[64, 64], overlap=overlap, score_threshold=0.5)(photo)
        assert len(result.instances) == len(boxes)
        scores = [i.score for i in result.instances]
        assert scores == sorted(scores, reverse=True)
        for number in range(1, len(boxes) + 1):
            truth = torch.from_numpy(photo[..., 0] == 20 * number)
            assert max(iou(i.mask, truth) for i in result.instances) > 0.9

    def test_without_overlap_things_stay_apart_and_stuff_is_joined(self):
        result = predictor("panoptic", Objects(), tile=[64, 64], overlap=0)(scene(64, 128, (10, 20, 50, 100)))
        assert sorted(s.name for s in result.segments) == ["car", "car", "sky"]

    def test_stuff_is_joined_across_what_lies_between(self):
        result = predictor("panoptic", Objects(), tile=[64, 64], overlap=16)(scene(64, 300, (0, 30, 64, 270)))
        assert sorted(s.name for s in result.segments) == ["car", "sky"]

    @pytest.mark.parametrize("task", ["panoptic", "instance"])
    def test_the_score_is_the_mean_over_the_area(self, task):
        """Of the car's 48 columns, 8 lie in the first tile's half and 40 in the second's."""
        model = Objects(certainties=[0.85, 1.0])
        result = predictor(task, model, tile=[64, 64], overlap=16)(scene(64, 112, (8, 48, 56, 96)))
        found = result.instances if task == "instance" else [s for s in result.segments if s.is_thing]
        assert found[0].score == pytest.approx((8 * 0.85 + 40 * 1.0) / 48, abs=0.02)  # also the mask's probability

    @pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
    @pytest.mark.parametrize("edge", [65, 160])
    def test_results_of_resized_images_have_the_size_of_the_photo(self, task, edge):
        photo = scene(80, 120, (16, 20, 64, 100))
        tiled = predictor(task, Objects(), tile=[64, 64], overlap=32, resize=EvalTransform(edge), score_threshold=0.5)
        result = tiled(photo)
        if task == "semantic":
            cars = result.semantic == 0
        elif task == "panoptic":
            cars = torch.isin(result.panoptic, torch.tensor([s.id for s in result.segments if s.is_thing]))
        else:  # also the blurred edge of the resized image, in other reds
            cars = torch.stack([i.mask for i in result.instances]).any(0)
        assert iou(cars, torch.from_numpy(photo[..., 0] > 0)) > 0.85


LEFT = {"used": (slice(0, 64), slice(0, 64)), "own": (slice(0, 64), slice(0, 48))}
RIGHT = {"used": (slice(0, 64), slice(32, 96)), "own": (slice(0, 64), slice(48, 96))}
SHOWN = slice(0, 64), slice(0, 64)


class TestWhatIsTheSameObject:
    """Two tiles of 64 x 64, of which the second is 32 further right."""

    @staticmethod
    def joined(left, right, class_right=0):
        """How many things there are; each tile's are given by their columns in the whole image."""
        segments, instances = JoinedSegments((64, 96), CPU, {0, 1}), JoinedInstances((64, 96), CPU, 100)
        for place, spans, offset, class_id in ((LEFT, left, 0, 0), (RIGHT, right, 32, class_right)):
            whole = torch.zeros(64, 64, dtype=torch.int32)
            masks = []
            for number, (start, stop) in enumerate(spans, 1):
                whole[:, start - offset : stop - offset] = number
                masks.append(whole == number)
            listed = tuple(Segment(n, class_id, True, score=0.8) for n in range(1, len(spans) + 1))
            found = tuple(Instance(mask, class_id, 0.8) for mask in masks)
            segments.add(Result(panoptic=whole, segments=listed), SHOWN, **place)
            instances.add(Result(instances=found), SHOWN, **place)
        result, others = segments.finish(), instances.finish().instances
        assert len(result.segments) == len(others)
        assert set(result.panoptic.unique().tolist()) - {0} == {s.id for s in result.segments}
        return len(others)

    def test_both_tiles_see_the_same_pixels(self):
        assert self.joined([(20, 64)], [(32, 80)]) == 1

    def test_another_class(self):
        assert self.joined([(20, 64)], [(32, 80)], class_right=1) == 2

    def test_touching(self):
        assert self.joined([(20, 48)], [(48, 80)]) == 2
        assert self.joined([(20, 48), (48, 64)], [(32, 48), (48, 80)]) == 2

    @pytest.mark.parametrize(("start", "count"), [(42, 1), (49, 2)])
    def test_half_of_the_pixels_must_agree(self, start, count):
        assert self.joined([(20, 64)], [(start, 80)]) == count

    def test_a_second_sight_of_a_part_is_no_object(self):
        """Both tiles see something in the half of the overlap that is the first one's, and differ in its size."""
        assert self.joined([(33, 47)], [(33, 38)]) == 1

    def test_twice_the_same_instance_is_not_joined_to_one(self):
        """The surer one of two is continued."""
        instances = JoinedInstances((64, 96), CPU, 100)
        mask = torch.ones(64, 64, dtype=torch.bool)
        instances.add(Result(instances=(Instance(mask, 0, 0.2), Instance(mask, 0, 0.9))), SHOWN, **LEFT)
        instances.add(Result(instances=(Instance(mask, 0, 0.9),)), SHOWN, **RIGHT)
        best, other = instances.finish().instances
        assert (best.score, best.mask.float().mean()) == pytest.approx((0.9, 1.0))
        assert (other.score, other.mask.float().mean()) == pytest.approx((0.2, 0.5))

    def test_the_best_instances_and_all_sure_ones_are_kept(self):
        instances = JoinedInstances((64, 96), CPU, 2)
        masks = torch.eye(5, 64).bool()[:, None].expand(-1, 64, -1)
        scores = [0.3, 0.6, 0.7, 0.8, 0.1]
        found = tuple(Instance(mask, 0, score) for mask, score in zip(masks, scores, strict=True))
        instances.add(Result(instances=found), SHOWN, **LEFT)
        assert [i.score for i in instances.finish().instances] == [0.8, 0.7, 0.6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": [63, 512]}, r"inference\.tile=\[63,512\]: give height and width .* at least 64 each, e\.g\. \[1024"),
        ({"tile": [0, 0]}, r"inference\.tile=\[0,0\]: .* or null"),
        ({"tile": [512, -512]}, r"inference\.tile=\[512,-512\]: "),
        ({"tile": [512]}, r"inference\.tile=\[512\]: "),
        ({"tile": [512, 512.5]}, r"inference\.tile=\[512,512\.5\]: "),
        ({"tile": 512}, r"inference\.tile=512: "),
        ({"tile": "512x512"}, r"inference\.tile=512x512: "),
        (
            {"tile": [512, 256], "overlap": 256},
            r"inference\.overlap=256: give .* from 0 to 255, .*512,256",
        ),
        ({"tile": [512, 256], "overlap": -1}, r"inference\.overlap=-1: "),
        ({"tile": [512, 256], "overlap": 0.5}, r"inference\.overlap=0\.5: "),
        ({"tile": [512, 256], "overlap": None}, r"inference\.overlap=None: "),
    ],
)
def test_impossible_tiles_are_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        TiledInference(TestTimeAugmentation(TaskInference("panoptic", {0})), **options)
    assert "\n" not in str(caught.value)


MEASURE = """
import resource, sys
from collections import deque
import numpy as np
from tests.inference.toy import Objects, predictor

task, side = sys.argv[1], int(sys.argv[2])
photo = np.zeros((side, side, 3), np.uint8)
photo[side // 4 : side // 2, side // 4 : side // 2, 0] = 100
model = Objects()
model.inputs = deque(maxlen=1)
tiled = predictor(task, model, tile=[256, 256], overlap=32, score_threshold=0.5)
tiled(photo[:512, :512])
tiled(photo)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_memory_grows_by_the_photo_and_its_map_alone(task):
    def peak(side):
        command = [sys.executable, "-c", MEASURE, task, str(side)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        return 1024 * int(done.stdout)

    pixels = 4096**2 - 1024**2
    photo, copy, result = 3, 3, 4  # bytes of a pixel
    assert peak(4096) - peak(1024) < (photo + copy + result) * pixels + 2**25
