import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.inference.sources import find_images, read_image
from pem_lightning.types import UserError


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

    @pytest.mark.parametrize(
        ("orientation", "stored"),
        [
            (1, lambda upright: upright),
            (2, lambda upright: upright[:, ::-1]),
            (3, lambda upright: upright[::-1, ::-1]),
            (4, lambda upright: upright[::-1]),
            (5, lambda upright: upright.transpose(1, 0, 2)),
            (6, lambda upright: np.rot90(upright, 1)),
            (7, lambda upright: upright[::-1, ::-1].transpose(1, 0, 2)),
            (8, lambda upright: np.rot90(upright, -1)),
        ],
    )
    def test_every_exif_orientation_becomes_upright(self, tmp_path, orientation, stored):
        upright = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(stored(upright)))
        assert (self.save(tmp_path / "x.png", image, exif=exif) == upright).all()
        with Image.open(tmp_path / "x.png") as opened:
            assert (read_image(opened) == upright).all()

    @pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
    def test_sixteen_bit_colours_are_scaled(self, tmp_path, suffix):
        values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
        cv2.imwrite(str(tmp_path / f"x.{suffix}"), values[..., ::-1])
        assert np.abs(read_image(tmp_path / f"x.{suffix}") - values / 257).max() < 1

    def test_values_of_no_known_range_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="floating-point"):
            self.save(tmp_path / "x.tif", Image.fromarray(np.full((2, 2), 0.5, np.float32)))

    def test_the_first_frame_of_an_animation_is_taken(self, tmp_path):
        frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
        read = self.save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
        assert read.tolist() == np.full((2, 3, 3), (255, 0, 0)).tolist()
        assert find_images(tmp_path) == [tmp_path / "x.gif"]

    @pytest.mark.slow
    def test_sixty_seven_megapixels_without_a_warning(self, tmp_path, recwarn):
        Image.new("RGB", (8192, 8192), (1, 2, 3)).save(tmp_path / "x.png", compress_level=1)
        read = read_image(tmp_path / "x.png")
        assert read.shape == (8192, 8192, 3)
        assert read[-1, -1].tolist() == [1, 2, 3]
        assert not recwarn.list

    def test_a_decompression_bomb_gets_one_line(self, tmp_path, monkeypatch, recwarn):
        Image.new("L", (30, 30)).save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 30 - 1)
        assert read_image(tmp_path / "bomb.png").shape == (30, 30, 3)  # here Pillow warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 30 // 2 - 1)
        with pytest.raises(UserError, match=r"bomb\.png has more than .* million pixels: shrink it") as error:
            read_image(tmp_path / "bomb.png")
        assert "\n" not in str(error.value)
        assert not recwarn.list

    def test_pillow_images(self):
        assert read_image(Image.new("L", (3, 2), 7)).tolist() == np.full((2, 3, 3), 7).tolist()

    def test_arrays(self):
        array = np.random.default_rng(0).integers(0, 256, (2, 3, 4), np.uint8)
        rgb = array[..., :3]
        assert read_image(rgb) is rgb
        grey = read_image(array[..., 0])
        assert all((grey[..., channel] == array[..., 0]).all() for channel in range(3))
        assert (read_image(array[..., :1]) == grey).all()
        array[0, 0, 3], array[1, 1, 3] = 0, 255
        assert read_image(array)[0, 0].tolist() == [255] * 3
        assert (read_image(array)[1, 1] == rgb[1, 1]).all()

    def test_tensors(self):
        tensor = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
        assert (read_image(tensor) == tensor.permute(1, 2, 0).numpy()).all()

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((4, 4, 3), np.float32),
            np.zeros((3, 4, 9), np.uint8),
            np.zeros((2, 4, 4, 3), np.uint8),
            np.zeros((0, 4, 3), np.uint8),
            torch.zeros(3, 4, 4),
            torch.zeros(4, 4, 3, dtype=torch.uint8),
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        ],
    )
    def test_other_arrays_and_tensors_are_refused(self, array):
        with pytest.raises(UserError, match=r"uint8 (array|tensor) .* not (float32|uint8) \["):
            read_image(array)

    def test_a_pillow_image_of_a_truncated_file(self, tmp_path):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "x.bmp")
        (tmp_path / "cut.bmp").write_bytes((tmp_path / "x.bmp").read_bytes()[:500])
        with Image.open(tmp_path / "cut.bmp") as image, pytest.raises(UserError, match="complete image"):
            read_image(image)

    def test_files_that_are_no_complete_image_are_named(self, tmp_path):
        broken = {"text.png": b"no image", "empty.jpg": b"", "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
            buffer = io.BytesIO()
            photo.save(buffer, kind)
            broken[f"cut.{kind.lower()}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
        for name, content in broken.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name) as error:
                read_image(tmp_path / name)
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=r"gone\.png does not exist"):
            read_image(tmp_path / "gone.png")
        with pytest.raises(UserError, match="cannot read"):
            read_image(tmp_path)
