import io

import numpy as np
import pytest
from PIL import Image

from pem_lightning.errors import UserError
from pem_lightning.inference.images import find_images, read_image


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


class TestFind:
    def test_one_file_of_any_name(self, folder):
        assert find_images(folder / "notes.txt") == [folder / "notes.txt"]

    def test_folder_without_subfolders_in_order(self, folder):
        assert [p.name for p in find_images(str(folder))] == ["a.JPG", "b.png"]

    def test_pattern(self, folder):
        assert [p.name for p in find_images(f"{folder}/**/*.png")] == ["b.png", "c.png"]

    def test_brackets_in_a_name_that_exists_are_no_pattern(self, tmp_path):
        (tmp_path / "a[1].png").write_bytes(b"")
        assert find_images(tmp_path / "a[1].png") == [tmp_path / "a[1].png"]

    @pytest.mark.parametrize(
        ("source", "message"),
        [("nowhere", "does not exist"), ("*.gif", "no images in pattern"), ("empty", "no images in folder")],
    )
    def test_nothing_found_is_said_in_one_line(self, folder, source, message):
        (folder / "empty").mkdir()
        with pytest.raises(UserError, match=message) as error:
            find_images(folder / source)
        assert "\n" not in str(error.value)


class TestRead:
    def save(self, path, image, **options):
        image.save(path, **options)
        return read_image(path)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
    def test_every_mode_becomes_rgb(self, tmp_path, mode):
        suffix = "tif" if mode == "CMYK" else "png"
        read = self.save(tmp_path / f"x.{suffix}", Image.new("RGB", (5, 4), "white").convert(mode))
        assert read.dtype == np.uint8
        assert read.shape == (4, 5, 3)
        assert (read == 255).all()

    def test_sixteen_bit_grey_is_scaled(self, tmp_path):
        values = np.array([[0, 257 * 100, 65535]], np.uint16)
        assert self.save(tmp_path / "x.png", Image.fromarray(values))[0, :, 0].tolist() == [0, 100, 255]

    def test_transparent_pixels_are_white(self, tmp_path):
        pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)
        assert self.save(tmp_path / "x.png", Image.fromarray(pixels)).tolist() == [[[255] * 3, [10, 20, 30]]]

    def test_palette_with_transparency(self, tmp_path):
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        assert self.save(tmp_path / "x.png", image, transparency=0).tolist() == [[[255] * 3, [40, 50, 60]]]

    def test_exif_orientation_is_applied(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        image = Image.new("RGB", (20, 10), "blue")
        image.paste("red", (0, 0, 10, 10))
        read = self.save(tmp_path / "x.jpg", image, exif=exif, quality=95)
        assert read.shape == (20, 10, 3)
        assert read[2, 5, 0] > 200 > 50 > read[17, 5, 0]

    def test_arrays_and_pillow_images(self):
        array = np.zeros((2, 3, 3), np.uint8)
        assert read_image(array) is array
        assert read_image(Image.new("L", (3, 2), 7)).tolist() == np.full((2, 3, 3), 7).tolist()

    @pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
    def test_other_arrays_are_refused(self, array):
        with pytest.raises(UserError, match="uint8 array"):
            read_image(array)

    def test_files_that_are_no_complete_image_are_named(self, tmp_path):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
        for name, content in (
            ("text.png", b"no image"),
            ("cut.png", buffer.getvalue()[:3000]),
            ("empty.jpg", b""),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name) as error:
                read_image(tmp_path / name)
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=r"gone\.png does not exist"):
            read_image(tmp_path / "gone.png")
        with pytest.raises(UserError, match="cannot read"):
            read_image(tmp_path)
