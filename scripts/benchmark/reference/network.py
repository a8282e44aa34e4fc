"""PEM's forward pass as the authors wrote it, on the weights of our network.

After every layer all masks are predicted at a quarter of the image's size and then resized, every head gets its own
copy of the mask, and deformable sampling is `grid_sample`, tap by tap.

Legend: B batch, Q queries, C channels, M heads, D channels of a head, H W spatial, P positions (H * W), T taps (9).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.layers import sine_position_encoding
from pem_lightning.models.pem import PEM, padded_size
from pem_lightning.models.pixel_decoder import ContextSelfModulation, LevelSum
from pem_lightning.models.prototype_attention import PrototypeCrossAttention
from pem_lightning.models.transformer_decoder import NUM_LEVELS
from pem_lightning.types import Predictions, UserError


def predict(network: PEM, images: Float[Tensor, "B 3 H W"]) -> Predictions:
    """Predict what `PEM.forward` does, auxiliary predictions included.

    Raises:
        UserError: the network is an ablation.
    """
    decoder: Any = network.transformer_decoder
    attentions = {type(layer.cross_attention) for layer in decoder.layers}
    parts = {type(module) for module in network.pixel_decoder.modules()}
    whole = attentions == {PrototypeCrossAttention} and {ContextSelfModulation, DeformableConv} <= parts
    if not (whole and decoder.masked) or LevelSum in parts:
        raise UserError("the reference is the authors' algorithm, and this network an ablation of it")
    height, width = images.shape[-2:]
    full_height, full_width = padded_size(height, width)
    images = F.pad(images, (0, full_width - width, 0, full_height - height))
    mask_features, levels = _decode_pixels(network.pixel_decoder, network.backbone(images))
    return _decode_queries(decoder, mask_features, levels)


def _decode_pixels(
    decoder: Any, features: list[Float[Tensor, "B _ _ _"]]
) -> tuple[Float[Tensor, "B C_mask H W"], list[Float[Tensor, "B C _ _"]]]:
    coarse_to_fine = features[::-1]
    context = decoder.global_context(coarse_to_fine[0].mean(dim=(2, 3), keepdim=True))
    levels = []
    for i, module in enumerate(decoder.upsampling):
        x = _modulate(decoder.csm[i], decoder.laterals[i](coarse_to_fine[i])) + context
        offsets, mask = module.deform.offset(x).split((18, 9), dim=1)
        x = F.relu(module.deform_norm(deform_conv(x, offsets, mask.sigmoid(), module.deform.weight)))
        context = F.relu(module.upsample_norm(module.upsample(x)))
        levels.append(x)
    finest = _modulate(decoder.csm[-1], decoder.laterals[-1](coarse_to_fine[-1])) + context
    return decoder.mask_projection(finest), levels


def _modulate(csm: Any, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    return x + x * csm.mlp(x.mean(dim=(2, 3), keepdim=True)).sigmoid().sigmoid()


def deform_conv(
    x: Float[Tensor, "B C_in H W"],
    offsets: Float[Tensor, "B two_T H W"],
    mask: Float[Tensor, "B T H W"],
    weight: Float[Tensor, "C_out C_in 3 3"],
) -> Float[Tensor, "B C_out H W"]:
    """Modulated deformable convolution: `grid_sample` tap by tap, in at least float32, then one matrix product."""
    B, C, H, W = x.shape
    x, offsets, mask = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, offsets, mask))
    rows = torch.arange(H, dtype=x.dtype, device=x.device)[:, None]
    columns = torch.arange(W, dtype=x.dtype, device=x.device)
    samples = []
    for tap in range(9):
        dy, dx = offsets[:, 2 * tap], offsets[:, 2 * tap + 1]
        y, x_ = rows + (tap // 3 - 1) + dy, columns + (tap % 3 - 1) + dx
        grid = torch.stack(((2 * x_ + 1) / W - 1, (2 * y + 1) / H - 1), dim=-1)
        samples.append(F.grid_sample(x, grid, align_corners=False) * mask[:, tap : tap + 1])
    out = weight.flatten(1) @ torch.stack(samples, dim=2).view(B, C * 9, H * W)
    return out.view(B, -1, H, W)


def _decode_queries(
    decoder: Any, mask_features: Float[Tensor, "B C_mask H W"], levels: list[Float[Tensor, "B C_in _ _"]]
) -> Predictions:
    inputs, positions = [], []
    parts = zip(
        levels, decoder.input_projections, decoder.level_embedding.weight, strict=False
    )  # as many as layers need
    for level, projection, embedding in parts:
        inputs.append(projection(level) + embedding[:, None, None])
        y, x = sine_position_encoding(level.shape[2], level.shape[3], decoder.channels, device=level.device)
        positions.append((y + x).to(level.dtype))
    query_positions = decoder.query_positions.weight
    queries = decoder.query_features.weight.expand(len(mask_features), -1, -1)
    predictions = [_predict(decoder, queries, mask_features)]
    for i, layer in enumerate(decoder.layers):
        features = inputs[i % NUM_LEVELS]
        masks = F.interpolate(predictions[-1].mask_logits, features.shape[-2:], mode="bilinear", align_corners=False)
        features = features + positions[i % NUM_LEVELS]
        queries = _attend(layer.cross_attention, queries, query_positions, features, masks)
        queries = layer.feed_forward(layer.self_attention(queries, query_positions))
        predictions.append(_predict(decoder, queries, mask_features))
    *auxiliary, final = predictions
    return final._replace(auxiliary=tuple(auxiliary))


def _predict(
    decoder: Any, queries: Float[Tensor, "B Q C"], mask_features: Float[Tensor, "B C_mask H W"]
) -> Predictions:
    normed = decoder.norm(queries)
    mask_logits = torch.einsum("bqc,bchw->bqhw", decoder.mask_head(normed), mask_features)
    return Predictions(decoder.class_head(normed), mask_logits)


def _attend(
    module: Any,
    queries: Float[Tensor, "B Q C"],
    query_positions: Float[Tensor, "Q C"],
    features: Float[Tensor, "B C H W"],
    mask_logits: Float[Tensor, "B Q H W"],
) -> Float[Tensor, "B Q C"]:
    """PEM-CA with the similarity of every pair of query and position, per head."""
    B, C, H, W = features.shape
    M = module.selection.num_heads
    keys = module.feature_linear(module.feature_conv(module.feature_norm(features)).flatten(2).mT)
    projected = F.normalize(module.query_linear(module.query_norm(queries + query_positions)), dim=-1)
    keys_of_heads = F.normalize(keys, dim=-1).view(B, H * W, M, C // M).transpose(1, 2)  # B M P D
    queries_of_heads = projected.view(B, -1, M, C // M).transpose(1, 2)  # B M Q D
    background = (mask_logits.flatten(2) < 0)[:, None].repeat(1, M, 1, 1)  # B M Q P
    background &= ~background.flatten(1).all(1)[:, None, None, None]
    similarity = (queries_of_heads @ keys_of_heads.mT).masked_fill(background, float("-inf"))  # B M Q P
    index = similarity.argmax(-1)[..., None].expand(-1, -1, -1, C // M)  # B M Q D
    prototypes = keys_of_heads.gather(2, index).transpose(1, 2).flatten(2)  # B Q C
    interaction = F.normalize(module.interaction(prototypes * projected), dim=1)
    return module.output(interaction * module.alpha + prototypes) + queries
