from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pem_lightning.data.transforms import EvalTransform
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.predictor import Predictor
from pem_lightning.inference.prototypes import (
    COLORS,
    DecoderTrace,
    LayerPrototypes,
    draw_prototypes,
    draw_trace,
    trace_decoder,
)
from pem_lightning.models.pem import build_pem
from pem_lightning.models.prototype_attention import PrototypeCrossAttention
from pem_lightning.types import ClassInfo, DatasetInfo, Predictions, UserError

INFO = DatasetInfo("toy", tuple(ClassInfo(f"class{i}", (i, i, i), i % 2 == 0, i) for i in range(4)))


@pytest.fixture(scope="module")
def network():
    """With statistics of images and a mask head that does not shrink, so that masks have many sizes, and some none."""
    torch.manual_seed(0)
    network = build_pem("stdc1", num_classes=4, num_queries=9, num_layers=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    for linear in network.transformer_decoder.mask_head.layers:
        nn.init.orthogonal_(linear.weight)
    with torch.no_grad():
        network.train()(torch.randn(2, 3, 96, 160))
        network.transformer_decoder.class_head.bias[-1] = -10  # "no object" is never found
    return network.eval()


def predictor_of(model, **options):
    inference = TaskInference("panoptic", INFO.thing_classes, object_mask_threshold=0.0, overlap_threshold=0.0)
    return Predictor.from_parts(model, INFO, inference, device="cpu", **options)


@pytest.fixture(scope="module")
def photo():
    """Of no multiple of 32 at either side."""
    return np.random.default_rng(0).integers(0, 256, (75, 130, 3), np.uint8)


@pytest.fixture(scope="module")
def traced(network, photo):
    return trace_decoder(predictor_of(network), photo)


def test_the_layers_are_those_of_the_network(network, photo):
    """Against a selection on keys and queries that are projected here; strides in turns."""
    inputs = []
    attentions = [m for m in network.modules() if isinstance(m, PrototypeCrossAttention)]
    handles = [m.register_forward_pre_hook(lambda m, args: inputs.append(args)) for m in attentions]
    traced = trace_decoder(predictor_of(network), photo)
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert [(layer.layer, layer.stride) for layer in traced.layers] == [(1, 32), (2, 16), (3, 8), (4, 32)]
    for layer, attention, (queries, query_positions, features, mask_logits) in zip(
        traced.layers, attentions, inputs, strict=True
    ):
        height, width = 96 // layer.stride, 160 // layer.stride  # padded
        with torch.no_grad():
            keys = attention.feature_conv(attention.feature_norm(features)).flatten(2).mT
            keys = nn.functional.normalize(attention.feature_linear(keys), dim=-1)
            projected = attention.query_linear(attention.query_norm(queries + query_positions))
            projected = nn.functional.normalize(projected, dim=-1)
        background = mask_logits.flatten(2) < 0
        _, positions = attention.selection(keys, projected, background)
        assert layer.masks.shape == (9, height, width)
        assert torch.equal(layer.masks.flatten(1), ~background[0] | background.all())
        assert torch.equal(layer.cells[..., 0] * width + layer.cells[..., 1], positions[0])
        heads = positions.shape[1]
        highest = torch.einsum(
            "qmd,pmd->mqp", projected[0].unflatten(1, (heads, -1)), keys[0].unflatten(1, (heads, -1))
        ).gather(2, positions[0][..., None])
        torch.testing.assert_close(layer.similarity, highest[..., 0])


def test_prototypes_lie_inside_their_querys_mask(traced):
    chose = 0
    for layer in traced.layers:
        for query in torch.nonzero(~layer.empty).flatten().tolist():
            rows, columns = layer.cells[:, query].unbind(-1)
            assert layer.masks[query, rows, columns].all()
            chose += 1
        assert not layer.cells[:, layer.empty].any()
    assert chose > 9


def test_positions_are_in_the_images_own_pixels(network, photo):
    """The image is halved for the network; a cell of the network's 32 pixels has 64 of the photograph's."""
    large = photo.repeat(2, axis=0).repeat(2, axis=1)
    trace = trace_decoder(predictor_of(network, resize=EvalTransform(75, 1000)), large)
    assert trace.input_size == (75, 130)
    layer = trace.layers[0]
    assert layer.cell_size == (64, 64)
    assert torch.equal(layer.positions, 64 * layer.cells.flip(-1) + 32.0)
    assert trace.masks_of(0).shape == (5, 150, 260)
    assert trace.image is large


def test_predictions_follow_the_queries(network, photo, traced):
    """The last are the network's, the first are the learned queries', and those between are deep supervision's."""
    network.transformer_decoder.auxiliary = "always"
    with torch.no_grad():
        out = network(predictor_of(network).prepare(photo)[None])
    network.transformer_decoder.auxiliary = "training"
    expected = (*out.auxiliary, out)
    assert len(traced.predictions) == len(expected) == 5
    for ours, theirs in zip(traced.predictions, expected, strict=True):
        torch.testing.assert_close(ours.class_logits, theirs.class_logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.mask_logits, theirs.mask_logits, rtol=1e-3, atol=1e-3)
    final = traced.masks_of(3)[-1]
    logits = nn.functional.interpolate(out.mask_logits, scale_factor=4, mode="bilinear")[0, 3, :75, :130]
    torch.testing.assert_close(final, logits.sigmoid(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_optimised_network_can_be_traced(network, photo, traced, precision):
    """Folding and precision change digits, and with them a choice here and there."""
    trace = trace_decoder(predictor_of(OptimizedNetwork(network, precision)), photo)
    same = [(a.cells == b.cells).all(-1) for a, b in zip(trace.layers, traced.layers, strict=True)]
    assert torch.stack(same).float().mean() > (0.98 if precision == "float32" else 0.5)
    assert trace.predictions[-1].mask_logits.dtype == torch.float32


def test_numbers_of_a_layer():
    cells = torch.tensor([[[0, 1], [0, 0], [1, 0]], [[0, 1], [0, 1], [0, 1]], [[0, 1], [1, 1], [1, 0]]])
    layer = LayerPrototypes(1, 8, cells, (10.0, 20.0), torch.zeros(3, 3), torch.ones(3, 2, 2, dtype=torch.bool))
    assert layer.num_distinct.tolist() == [1, 3, 2]
    assert layer.positions[0].tolist() == [[15.0, 10.0], [5.0, 10.0], [5.0, 30.0]]


def test_masks_that_are_all_empty_are_off(network, photo):
    with torch.no_grad():
        bias = network.transformer_decoder.mask_head.layers[-1].bias
        before = bias.clone()
        bias.fill_(-1e4)  # mask features are not negative
        trace = trace_decoder(predictor_of(network), photo)
        bias.copy_(before)
    for layer in trace.layers:
        assert layer.masks.all()
        assert not layer.empty.any()


def test_the_queries_behind_segments(network, photo):
    predictor = predictor_of(network)
    trace, result = trace_decoder(predictor, photo), predictor(photo)
    queries = trace.queries_of(result)
    assert len(set(queries.values())) == len(queries) > 0
    labels = trace.predictions[-1].class_logits[0].argmax(-1)
    for segment in result.segments:
        if segment.id in queries:
            query = queries[segment.id]
            assert labels[query] == segment.class_id
            if segment.is_thing:
                inside = trace.masks_of(query)[-1][result.panoptic == segment.id]
                assert (inside >= 0.5).float().mean() > 0.95
    semantic = Predictor.from_parts(network, INFO, TaskInference("semantic", ()), device="cpu")(photo)
    with pytest.raises(UserError, match="task=panoptic"):
        trace.queries_of(semantic)


class Blind(nn.Module):
    """A network of another kind."""

    def forward(self, images):
        return Predictions(torch.zeros(1, 1, 5), torch.zeros(1, 1, 8, 8))


def test_networks_that_cannot_be_looked_into(network, photo):
    with pytest.raises(UserError, match="Blind has no transformer decoder"):
        trace_decoder(predictor_of(Blind()), photo)
    ablation = build_pem("stdc1", num_classes=4, num_queries=9, num_layers=1, hidden_channels=16, attention="mean")
    with pytest.raises(UserError, match="attention=mean chooses no prototypes"):
        trace_decoder(predictor_of(ablation), photo)
    compiled = OptimizedNetwork(network)
    compiled.compile_mode = "default"  # in name only, which spares the compiler
    with pytest.raises(UserError, match="compile=None"):
        trace_decoder(predictor_of(compiled), photo)


@pytest.mark.parametrize("variant", [{"masked": False}, {"interaction": False}])
def test_ablations_with_prototypes_can_be_traced(photo, variant):
    torch.manual_seed(0)
    network = build_pem("stdc1", num_classes=4, num_queries=9, num_layers=2, hidden_channels=16, **variant)
    layers = trace_decoder(predictor_of(network), photo).layers
    assert len(layers) == 2
    assert layers[0].masks.all() == ("masked" in variant)


GREY = 100
ORANGE, BLUE = COLORS[:2]


class TestDrawing:
    @pytest.fixture
    def image(self):
        return np.full((64, 128, 3), GREY, np.uint8)

    @pytest.fixture
    def layer(self):
        """Two heads, three queries, cells of 32 pixels: query 0 agrees on cell (0, 1), query 1 does not, 2 is empty."""
        cells = torch.tensor([[[0, 1], [1, 3], [0, 0]], [[0, 1], [0, 3], [0, 0]]])
        masks = torch.zeros(3, 2, 4, dtype=torch.bool)
        masks[0, 0, 1] = masks[1, :, 3] = masks[1, 1, 2] = True
        return LayerPrototypes(1, 32, cells, (32.0, 32.0), torch.zeros(2, 3), masks)

    @pytest.mark.parametrize("scale", [2, 3])
    def test_choices_are_framed_where_they_are(self, image, layer, scale):
        picture = draw_prototypes(image, layer, [0, 1], scale)
        assert picture.shape == (64 * scale, 128 * scale, 3)
        corners = {
            (row, column): tuple(cell(picture, row, column, 32 * scale)[1, 1].tolist())
            for row in range(2)
            for column in range(4)
        }
        assert {place for place, color in corners.items() if color == ORANGE} == {(0, 1)}
        assert {place for place, color in corners.items() if color == BLUE} == {(0, 3), (1, 3)}
        frame = cell(picture, 0, 1, 32 * scale)
        for edge in (frame[0], frame[-1], frame[:, 0], frame[:, -1]):
            assert (edge == ORANGE).all()
        middle = frame[8 * scale : -8 * scale, 8 * scale : -8 * scale]  # with the plate
        assert has_color(middle, ORANGE)
        assert has_color(middle, (255, 255, 255))

    def test_masks_are_tinted_and_the_rest_is_not(self, image, layer):
        picture = draw_prototypes(image, layer, [0, 1]).astype(int)
        tinted = cell(picture, 1, 2)[4:-4, 4:-4]  # in query 1's mask, but chosen by none
        assert (tinted[..., 2] > GREY).all()
        assert (tinted[..., 0] < GREY).all()
        assert (cell(picture, 0, 0)[1:-1, 1:-1] == GREY).all()

    def test_queries_that_did_not_choose_are_left_out(self, image, layer):
        assert np.array_equal(draw_prototypes(image, layer, [2]), draw_prototypes(image, layer, []))

    def test_padding_is_cut_off(self, layer):
        picture = draw_prototypes(np.full((50, 100, 3), GREY, np.uint8), layer, [0, 1])
        assert picture.shape == (50, 100, 3)
        assert has_color(picture[:, 96:], BLUE)

    def test_layers_stand_in_rows_under_their_titles(self, image, layer):
        layers = tuple(replace(layer, layer=number) for number in range(1, 6))
        trace = DecoderTrace(image, (64, 128), layers, ())
        sheet, row = draw_trace(trace, [0], per_row=2), draw_trace(trace, [0], layers=[1, 2])
        assert sheet.shape == (3 * row.shape[0], *row.shape[1:])
        first, second, third = np.split(sheet, 3)
        assert np.array_equal(first, row)
        assert not np.array_equal(first, second)  # by their titles
        assert (third[:, -128:] == 255).all()
        assert np.array_equal(third[-64:, :128], draw_prototypes(image, layer, [0]))


def has_color(part, color):
    return bool((part == np.array(color)).all(-1).any())


def cell(picture, row, column, side=32):
    return picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
