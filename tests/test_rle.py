import numpy as np
import torch
from pycocotools import mask as coco_mask

from pem_lightning.files import encode_mask


def test_is_cocos_own_encoding():
    mask = torch.rand(37, 53, generator=torch.Generator().manual_seed(0)) > 0.7
    encoded = encode_mask(mask)
    expected = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    assert encoded == {"size": [37, 53], "counts": expected["counts"].decode()}
    assert np.array_equal(coco_mask.decode(encoded), mask.numpy())


def test_a_part_of_a_larger_tensor():
    masks = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    part = masks[1, 3:15, ::2]
    assert np.array_equal(coco_mask.decode(encode_mask(part)), part.numpy())
