import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pem_lightning.files import MAX_ID, id_to_rgb, rgb_to_id


@given(hnp.arrays(np.int32, st.tuples(st.integers(0, 4), st.integers(0, 4)), elements=st.integers(0, MAX_ID)))
def test_ids_survive_the_way_to_colours_and_back(ids):
    assert np.array_equal(rgb_to_id(id_to_rgb(ids)), ids)


def test_red_is_the_lowest_byte():
    assert id_to_rgb(np.array([[1 + 2 * 256 + 3 * 256**2]], np.int32)).tolist() == [[[1, 2, 3]]]


def test_official_file_decodes_to_the_ids_of_its_annotation(reference):
    folder = reference / "panoptic_quality" / "coco_sample" / "panoptic"
    ids = rgb_to_id(np.asarray(Image.open(folder / "000000142238.png").convert("RGB")))
    assert 5314498 in ids


@pytest.mark.parametrize("bad", [-1, MAX_ID + 1])
def test_ids_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=str(bad)):
        id_to_rgb(np.array([[bad]], np.int32))
