import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.inference.postprocess import instances, panoptic, resize_rows, semantic, source_rows

THINGS = frozenset(range(11, 19))
NETWORK_CASES = [f"city_pan_{name}" for name in ("r50_90x150", "r50_96x160", "stdc1_90x150", "stdc1_96x160")]


def sizes(padded, image, output):
    return {"padded_size": tuple(padded), "image_size": tuple(image), "output_size": tuple(output)}


def same_size(height, width):
    return sizes((height, width), (height, width), (height, width))


def logits_for(classes, num_classes=4, margin=9.0):
    """Class logits of queries that are sure of their class; -1 means "no object"."""
    logits = torch.zeros(len(classes), num_classes + 1)
    for query, class_id in enumerate(classes):
        logits[query, class_id] = margin
    return logits


def masks_for(*rows):
    """Mask logits 4 x 4 of constant columns: -1 background, 1 foreground, in units of 10."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, :].repeat(1, 4, 1) * 10


def margins(class_logits, mask_logits, *, padded_size, image_size, output_size, threshold):
    """By how much every pixel's best query beats the second best, in float64."""
    scores, labels = class_logits.double().softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > threshold)
    masks = F.interpolate(mask_logits[kept][None].double(), padded_size, mode="bilinear")
    masks = masks[..., : image_size[0], : image_size[1]]
    masks = F.interpolate(masks, output_size, mode="bilinear")[0].sigmoid()
    best = (scores[kept][:, None, None] * masks).topk(2, dim=0).values
    return best[0] - best[1]


class TestReference:
    """Against the authors' implementation."""

    @pytest.fixture
    def files(self, reference):
        folder = reference / "pem"
        arrays = np.load(folder / "postproc.npz")
        logits = torch.from_numpy(arrays["pred_logits"]), torch.from_numpy(arrays["pred_masks"])
        return logits, arrays, json.loads((folder / "postproc.json").read_text())["cases"]

    @pytest.mark.parametrize("case", range(5))
    @pytest.mark.parametrize(("order", "resize_first"), [("before", True), ("after", False)])
    def test_semantic(self, files, case, order, resize_first):
        logits, arrays, cases = files
        c = cases[case]
        scores = semantic(
            *logits, **sizes(c["padded_hw"], c["image_hw"], c["output_hw"]), resize_first=resize_first
        ).numpy()
        assert np.array_equal(scores.argmax(0), arrays[f"c{case}_sem_{order}_argmax"])
        assert np.allclose(scores[:, ::6, ::6], arrays[f"c{case}_sem_{order}_s6"], atol=1e-6)

    @pytest.mark.parametrize("case", range(5))
    def test_panoptic(self, files, case):
        logits, arrays, cases = files
        c = cases[case]
        self.check_panoptic(
            logits, sizes(c["padded_hw"], c["image_hw"], c["output_hw"]), c, arrays[f"c{case}_panoptic"]
        )

    @pytest.mark.parametrize("name", NETWORK_CASES)
    def test_outputs_of_the_network(self, reference, name):
        arrays = np.load(reference / "pem" / f"{name}.npz")
        c = json.loads((reference / "pem" / f"{name}.json").read_text())
        logits = torch.from_numpy(arrays["pred_logits"]), torch.from_numpy(arrays["pred_masks"])
        shape = sizes(c["padded_hw"], c["input_hw"], c["output_hw"] or c["input_hw"])
        scores = semantic(*logits, **shape, resize_first=True).numpy()
        assert np.array_equal(scores.argmax(0), arrays["sem_argmax"])
        assert np.allclose(scores[:, ::8, ::8], arrays["sem_seg_s8"], atol=2e-5)
        for thresholds in ("official", "low"):
            self.check_panoptic(logits, shape, c[f"panoptic_{thresholds}"], arrays[f"panoptic_{thresholds}"])

    @staticmethod
    def check_panoptic(logits, shape, expected, expected_map):
        id_map, segments = panoptic(
            *logits,
            **shape,
            thing_classes=THINGS,
            object_mask_threshold=expected["object_mask_threshold"],
            overlap_threshold=expected["overlap_threshold"],
        )
        assert id_map.dtype == torch.int32
        # A pixel may go to another segment only where both scores are equal up to the last bits of the sigmoid, which
        # processors compute differently.
        differs = torch.from_numpy(id_map.numpy() != expected_map)
        if differs.any():
            assert (margins(*logits, **shape, threshold=expected["object_mask_threshold"])[differs] < 5e-7).all()
        official = [(s["id"], s["category_id"], s["isthing"]) for s in expected["segments_info"]]
        assert [(s.id, s.class_id, s.is_thing) for s in segments] == official


class TestSemantic:
    def test_is_one_einsum(self):
        generator = torch.Generator().manual_seed(0)
        class_logits = torch.randn(37, 6, generator=generator)
        mask_logits = torch.randn(37, 5, 7, generator=generator)
        scores = semantic(class_logits, mask_logits, **same_size(5, 7), resize_first=True)
        expected = torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], mask_logits.sigmoid())
        assert torch.allclose(scores, expected, atol=1e-5)

    def test_half_precision_is_computed_in_single(self):
        half = logits_for([0]).half(), masks_for([1, 1, -1, -1]).half()
        assert semantic(*half, **same_size(4, 4), resize_first=False).dtype == torch.float32


class TestPanoptic:
    def run(self, classes, masks, **options):
        id_map, segments = panoptic(logits_for(classes), masks, **same_size(4, 4), thing_classes={0, 1}, **options)
        return id_map[0].tolist(), segments

    def test_equal_things_stay_apart_and_equal_stuff_is_merged(self):
        row, segments = self.run(
            [0, 0, 2, 2], masks_for([1, -1, -1, -1], [-1, 1, -1, -1], [-1, -1, 1, -1], [-1, -1, -1, 1])
        )
        assert row == [1, 2, 3, 3]
        assert [s.class_id for s in segments] == [0, 0, 2]
        assert [s.is_thing for s in segments] == [True, True, False]

    def test_score_is_the_class_probability_and_pixels_outside_every_mask_are_void(self):
        row, segments = self.run([0], masks_for([1, 1, -1, -1]))
        assert row == [1, 1, 0, 0]
        assert segments[0].score == pytest.approx(logits_for([0]).softmax(-1).max().item())

    def test_nothing_found(self):
        assert self.run([-1, -1], masks_for([1, 1, 1, 1], [1, 1, 1, 1])) == ([0] * 4, [])

    def test_a_query_that_is_mostly_covered_is_dropped_and_leaves_a_hole(self):
        # the second query's mask is 3 wide and loses 2 of them: 1/3 is less than 0.8
        masks = masks_for([2, 2, -1, -1], [1, 1, 1, -1])
        assert self.run([0, 1], masks)[0] == [1, 1, 0, 0]
        assert self.run([0, 1], masks, overlap_threshold=0.3)[0] == [1, 1, 2, 0]

    def test_the_score_threshold_itself_is_not_enough(self):
        score = logits_for([0]).softmax(-1).max().item()
        assert self.run([0], masks_for([1, 1, 1, 1]), object_mask_threshold=score)[1] == []

    def test_among_equals_the_first_query_wins(self):
        row, segments = self.run([0, 1], masks_for([1, 1, 1, 1], [1, 1, 1, 1]))
        assert row == [1] * 4
        assert [s.class_id for s in segments] == [0]

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
    def test_map_and_segments_always_agree(self, seed, queries, object_mask_threshold, overlap_threshold):
        generator = torch.Generator().manual_seed(seed)
        id_map, segments = panoptic(
            4 * torch.randn(queries, 5, generator=generator),
            3 * torch.randn(queries, 4, 6, generator=generator),
            **sizes((16, 24), (13, 20), (9, 31)),
            thing_classes={0, 1},
            object_mask_threshold=object_mask_threshold,
            overlap_threshold=overlap_threshold,
        )
        assert id_map.shape == (9, 31)
        assert [s.id for s in segments] == list(range(1, len(segments) + 1))
        assert set(id_map.unique().tolist()) - {0} == {s.id for s in segments}
        stuff = [s.class_id for s in segments if not s.is_thing]
        assert len(stuff) == len(set(stuff))


class TestInstances:
    def run(self, class_logits, masks, **options):
        return instances(class_logits, masks, **same_size(4, 4), thing_classes={0, 1}, **options)

    def test_score_is_class_times_mean_mask_probability(self):
        found = self.run(logits_for([0]), masks_for([1, 1, -1, -1]), top_k=1)
        probability = logits_for([0]).softmax(-1).max().item()
        assert len(found) == 1
        assert found[0].mask[0].tolist() == [True, True, False, False]
        assert found[0].score == pytest.approx(probability * torch.tensor(10.0).sigmoid().item(), rel=1e-5)

    def test_stuff_takes_a_place_but_is_not_returned(self):
        assert self.run(logits_for([2, 0], margin=5), masks_for([1, 1, -1, -1], [-1, -1, 1, 1]), top_k=1) == []
        found = self.run(logits_for([2, 0]), masks_for([1, 1, -1, -1], [-1, -1, 1, 1]), top_k=2)
        assert [i.class_id for i in found] == [0]

    def test_one_query_may_have_several_classes(self):
        found = self.run(logits_for([0]), masks_for([1, 1, -1, -1]), top_k=100)
        assert sorted(i.class_id for i in found) == [0, 1]

    def test_they_come_by_falling_score_not_by_class_probability(self):
        """The surest class has the vaguest mask."""
        masks = torch.stack([torch.full((4, 4), logit) for logit in (0.1, 5.0, 1.0)])
        class_logits = torch.stack([logits_for([0], margin=margin)[0] for margin in (9.0, 3.0, 6.0)])
        found = self.run(class_logits, masks, top_k=3)
        assert [round(i.score, 2) for i in found] == [0.83, 0.72, 0.52]

    def test_an_empty_mask_has_no_score(self):
        assert self.run(logits_for([0]), masks_for([-1, -1, -1, -1]), top_k=1)[0].score == 0


class TestResizingOfRows:
    """Equals resizing everything and taking the rows."""

    @settings(max_examples=30, deadline=None)
    @given(st.data(), *(st.integers(1, 60) for _ in range(4)), st.sampled_from([torch.float32, torch.float64]))
    def test_any_size(self, data, height, width, new_height, new_width, dtype):
        start = data.draw(st.integers(0, new_height - 1))
        rows = range(start, data.draw(st.integers(start + 1, new_height)))
        maps = torch.randn(2, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
        self.check(maps, rows, (new_height, new_width), 1e-5 if dtype == torch.float32 else 1e-12)

    @pytest.mark.parametrize("height", [8192, 12345])
    def test_large_maps_in_single_precision(self, height):
        """Where float32 places of rows are no longer exact, they are the same as those of PyTorch."""
        self.check(torch.randn(1, height // 4, 2), range(height - 100, height), (height, 2), 1e-3)

    @staticmethod
    def check(maps, rows, size, tolerance):
        needed = source_rows(rows, maps.shape[1], size[0])
        actual = resize_rows(maps[:, needed.start : needed.stop], needed, rows, tuple(maps.shape[1:]), size)
        expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(actual, expected[:, rows.start : rows.stop], rtol=0, atol=tolerance)
