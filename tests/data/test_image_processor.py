"""Patches of images are those of transformers' Qwen2VLImageProcessor, and unusable images are refused with a reason."""

import io
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.images.processor import (
    ImageError,
    ImageProcessor,
    cut,
    grid_of,
    normalised,
    patches_of,
    png,
    resized,
)
from pspo_jax.data.images.settings import is_visual, read_processor
from tests.data.made_images import encoded, noise, picture

MODES = ("RGB", "RGBA", "L", "P", "LA", "1", "CMYK", "I;16", "YCbCr", "PA")
RELEASED = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
RELEASED |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}


def reference(image, **bounds):
    """Normalised patches of one frame, and the grid, by transformers."""
    found = Qwen2VLImageProcessorPil(**bounds)(images=[image], return_tensors="np")
    frames = found["pixel_values"].reshape(-1, 3, 2, 196)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    return frames[:, :, 0].reshape(-1, 588), tuple(found["image_grid_thw"][0, 1:])


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 10**6), st.integers(0, 10**7))
@example(70, 126, 3136, 10**6)  # halves that round to even multiples: 56 and 112
@example(98, 28, 1, 10**6)
@example(28, 28, 3136, 10**6)
@example(30, 5970, 1, 10**6)  # 1:199
@example(10, 2001, 1, 10**6)
@settings(max_examples=400, deadline=None)
def test_sizes_are_those_of_transformers(height, width, smallest, more):
    processor = ImageProcessor(smallest, smallest + more)
    try:
        expected = smart_resize(height, width, 28, smallest, smallest + more)
    except ValueError:
        with pytest.raises(ImageError, match="ratio above 200"):
            resized(height, width, processor)
        return
    assert resized(height, width, processor) == expected


@pytest.mark.parametrize("mode", MODES)
def test_patches_are_those_of_transformers(mode):
    rng = np.random.default_rng(MODES.index(mode))
    for seed in range(21):
        height, width = (int(n) for n in rng.integers(3, 160, 2))
        smallest = int(rng.choice([784, 3136, 20000]))
        bounds = {"min_pixels": smallest, "max_pixels": smallest + int(rng.choice([784, 10**6]))}
        data = encoded(noise(mode, height, width, seed))
        processor = ImageProcessor(**bounds)
        patches, grid = patches_of(data, processor)
        expected, expected_grid = reference(Image.open(io.BytesIO(data)), **bounds)
        assert grid == expected_grid == grid_of(data, processor)
        assert patches.dtype == np.uint8 and len(patches) == grid[0] * grid[1]
        assert processor.num_tokens(grid) * 4 == len(patches)
        np.testing.assert_allclose(normalised(patches, processor), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("P", "PNG", {"transparency": 3}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("L", "PNG", {"transparency": 7}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        ("P", "GIF", {"transparency": 5}),
        ("RGBA", "WEBP", {"lossless": True}),
    ],
)
def test_transparent_colours_are_those_of_transformers(mode, form, options):
    image = noise(mode, 80, 60)
    if mode == "RGB":
        image.paste((1, 2, 3), (10, 10, 40, 40))
    data = encoded(image, form, **options)
    patches, grid = patches_of(data, ImageProcessor())
    expected, expected_grid = reference(Image.open(io.BytesIO(data)))
    assert grid == expected_grid
    np.testing.assert_allclose(normalised(patches, ImageProcessor()), expected, rtol=0, atol=1e-6)


def test_transparent_pixels_are_white():
    patches, _ = patches_of(encoded(Image.new("RGBA", (56, 56), (0, 0, 0, 0))), ImageProcessor())
    assert (patches == 255).all()


def test_units_follow_one_another_and_channels_are_apart():
    pixels = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    patches = cut(pixels, ImageProcessor(patch_size=2))
    assert patches.shape == (8, 12)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]
    for patch, (row, column) in zip(patches, corners, strict=True):
        np.testing.assert_array_equal(patch, pixels[row : row + 2, column : column + 2].transpose(2, 0, 1).reshape(-1))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_turned_as_their_exif_data_say(form, orientation):
    from datasets import Image as Feature

    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(noise("RGB", 60, 130), form, exif=exif)
    decoded = Feature().decode_example({"bytes": data, "path": None})
    patches, grid = patches_of(data, ImageProcessor())
    expected, expected_grid = reference(decoded)
    assert grid == expected_grid == grid_of(data, ImageProcessor()) == ((10, 4) if orientation > 4 else (4, 10))
    np.testing.assert_allclose(normalised(patches, ImageProcessor()), expected, rtol=0, atol=1e-6)


def test_grids_need_the_header_alone():
    for form in ("PNG", "JPEG"):
        data = encoded(noise("RGB", 300, 200), form)
        short = data[: len(data) // 4]
        assert grid_of(short, ImageProcessor()) == grid_of(data, ImageProcessor())
        with pytest.raises(ImageError, match="it is broken"):
            patches_of(short, ImageProcessor())


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused(data):
    for call in (grid_of, patches_of):
        with pytest.raises(ImageError):
            call(data, ImageProcessor())


def test_long_images_are_refused():
    for call in (grid_of, patches_of):
        with pytest.raises(ImageError, match="ratio above 200"):
            call(picture(2, 402), ImageProcessor())


def test_settings_come_from_the_checkpoint(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED))
    processor, line = read_processor(tmp_path, PromptConfig(), "model.source=x")
    assert processor == ImageProcessor(3136, 12845056)
    assert line == "images have 3,136 to 12,845,056 pixels"
    Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 7840}).save_pretrained(tmp_path / "saved")
    nested = {"image_processor": json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_processor(tmp_path, PromptConfig(), "x")[0] == ImageProcessor(784, 7840)
    chosen = read_processor(tmp_path, PromptConfig(min_pixels=1000, max_pixels=2000), "x")[0]
    assert chosen == ImageProcessor(1000, 2000)
    assert chosen.identity() != ImageProcessor(1000, 2001).identity()


def test_defaults_are_those_of_transformers_and_said(tmp_path):
    processor, line = read_processor(tmp_path, PromptConfig(), "model.source=x")
    hf = Qwen2VLImageProcessorPil()
    assert processor[:2] == (hf.size["shortest_edge"], hf.size["longest_edge"])
    assert (processor.mean, processor.std) == (tuple(hf.image_mean), tuple(hf.image_std))
    assert processor.rescale_factor == hf.rescale_factor
    assert "3,136 to 1,003,520" in line and "model.source=x has no preprocessor_config.json" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type=CLIPImageProcessor"),
        ({"do_resize": False}, "do_resize=False"),
        ({"resample": 2}, "resample=2"),
        ({"max_pixels": "many"}, "max_pixels=many"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "prompt.min_pixels=None"),
    ],
)
def test_settings_that_are_not_supported_are_refused(tmp_path, change, words):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED | change))
    with pytest.raises(ConfigError, match=words):
        read_processor(tmp_path, PromptConfig(), "model.source=x")


def test_checkpoints_with_a_tower_are_known_by_their_config(tmp_path):
    assert not is_visual(tmp_path, "x")
    for content, visual in (({"model_type": "qwen2"}, False), ({"vision_config": {}}, True)):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert is_visual(tmp_path, "x") == visual


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_become_the_image_again(channels):
    processor = ImageProcessor(patch_size=3)
    pixels = np.random.default_rng(channels).integers(0, 256, (12, 18, channels), dtype=np.uint8)
    with Image.open(io.BytesIO(png(cut(pixels, processor), (4, 6), processor))) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)
