import pytest
import torch

from pem_lightning.models.transformer_decoder import TransformerDecoder


def decode(training, auxiliary, num_layers=4):
    torch.manual_seed(0)
    sizes = {"num_queries": 5, "channels": 16, "num_heads": 4, "hidden_channels": 32}
    decoder = TransformerDecoder(8, 8, num_classes=3, num_layers=num_layers, auxiliary=auxiliary, **sizes)
    levels = [torch.randn(2, 8, 16 // s, 24 // s) for s in (8, 4, 2)]
    return decoder, decoder.train(training)(torch.randn(2, 8, 16, 24), levels)


@pytest.mark.parametrize(
    ("training", "auxiliary", "count"),
    [(True, "training", 4), (False, "training", 0), (False, "always", 4), (True, "never", 0)],
)
def test_auxiliary_predictions_when_wanted(training, auxiliary, count):
    decoder, out = decode(training, auxiliary)
    assert len(out.auxiliary) == count
    assert out.class_logits.shape == (2, 5, 4)
    assert out.mask_logits.shape == (2, 5, 16, 24)
    if count:  # the first is that of the learned queries
        expected = decoder.class_head(decoder.norm(decoder.query_features.weight))
        torch.testing.assert_close(out.auxiliary[0].class_logits[1], expected)


def test_factors_of_the_masks_where_gradients_are_wanted():
    _, out = decode(True, "training")
    for layer in (out, *out.auxiliary):
        product = torch.einsum("bqc,bchw->bqhw", *layer.mask_factors)
        torch.testing.assert_close(product, layer.mask_logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        _, out = decode(False, "always")
    assert all(layer.mask_factors is None for layer in (out, *out.auxiliary))


def test_masks_guide_without_a_gradient():
    """What layer 1 looks at follows from the first masks, but its loss must not reach them."""
    decoder, out = decode(True, "always", num_layers=1)
    out.class_logits.sum().backward()
    assert all(p.grad is None for p in decoder.mask_head.parameters())


@pytest.mark.parametrize("auxiliary", ["training", "never"])
def test_in_mixed_precision_masks_that_guide_do_not_spoil_the_gradients(auxiliary):
    """Weights that are cast where no gradient is wanted must not be taken, cast, where one is."""
    with torch.autocast("cpu", torch.bfloat16):
        decoder, out = decode(True, auxiliary)
    (out.class_logits.float().sum() + out.mask_logits.float().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.mask_head.parameters())
