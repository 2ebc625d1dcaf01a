"""The layout of images in windows, against oracles that walk over patches and tokens one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.arrays.images import EmbeddedImage, ImageWindows, PatchLayout, PlacedImage, lay_out, lay_out_embeddings

NUMBERS = 3


@st.composite
def batches(draw) -> tuple[PatchLayout, list[list[PlacedImage]], list[int]]:
    """A layout, the images of some prompts, and the prompts' lengths; every patch has numbers of its own."""
    merge = draw(st.integers(1, 3))
    layout = PatchLayout(merge, merge * draw(st.integers(1, 3)))
    count = 0
    prompts, lengths = [], []
    for _ in range(draw(st.integers(1, 3))):
        images, token = [], 0
        for _ in range(draw(st.integers(0, 2))):
            token += draw(st.integers(0, 3))
            rows, columns = (merge * draw(st.integers(1, 7)) for _ in range(2))
            n = rows * columns
            numbers = count + np.arange(n)
            patches = np.stack([numbers // 250 + 1, numbers % 250 + 1, np.full(n, 7)], axis=1).astype(np.uint8)
            images.append(PlacedImage(token, rows, columns, patches))
            count += n
            token += layout.num_tokens(rows, columns)
        prompts.append(images)
        lengths.append(token + draw(st.integers(0 if images else 1, 3)))
    return layout, prompts, lengths


def laid_out(layout: PatchLayout, prompts: list[list[PlacedImage]], lengths: list[int]) -> ImageWindows:
    windows = max(1, *(sum(layout.num_windows(x.rows, x.columns) for x in images) for images in prompts))
    return lay_out(prompts, lengths, max(lengths) + 2, windows, NUMBERS, layout)


def walk(images: list[PlacedImage], length: int, merge: int) -> tuple[list[tuple[int, int, int]], int]:
    """Positions of each token and the position behind the last one, one token at a time."""
    found: list[tuple[int, int, int]] = []
    position = 0
    starts = {x.first_token: x for x in images}
    while len(found) < length:
        image = starts.get(len(found))
        if image is None:
            found.append((position, position, position))
            position += 1
            continue
        for i in range(image.rows // merge):
            for j in range(image.columns // merge):
                found.append((position, position + i, position + j))
        position += max(image.rows, image.columns) // merge
    return found, position


@settings(max_examples=60, deadline=None)
@given(batches())
def test_every_patch_stands_once_at_its_row_and_column(batch):
    layout, prompts, _ = batch
    out = laid_out(*batch)
    down, right = layout.offsets()
    for i, images in enumerate(prompts):
        seen = 0
        for w in range(out.image.shape[1]):
            number = out.image[i, w]
            if number < 0:
                assert not out.patches[i, w].any()
                assert not out.grid[i, w].any()
                continue
            image = images[number]
            assert tuple(out.grid[i, w]) == (image.rows, image.columns)
            for k in range(layout.patches):
                row, column = out.corner[i, w] + (down[k], right[k])
                if row >= image.rows or column >= image.columns:
                    assert not out.patches[i, w, k].any()
                    continue
                m = layout.merge
                unit = (row // m) * (image.columns // m) + column // m
                source = unit * m * m + (row % m) * m + column % m
                np.testing.assert_array_equal(out.patches[i, w, k], image.patches[source])
                seen += 1
        assert seen == sum(len(x.patches) for x in images)
        real = out.patches[i].reshape(-1, NUMBERS)
        real = real[real.any(axis=1)]
        assert len(np.unique(real, axis=0)) == len(real) == seen


@settings(max_examples=60, deadline=None)
@given(batches())
def test_the_unit_of_each_token_holds_its_patches(batch):
    layout, prompts, lengths = batch
    out = laid_out(*batch)
    area = layout.merge**2
    for i, (images, length) in enumerate(zip(prompts, lengths, strict=True)):
        units = out.patches[i].reshape(-1, area, NUMBERS)
        is_image = np.zeros(out.unit.shape[1], bool)
        for image in images:
            for t in range(layout.num_tokens(image.rows, image.columns)):
                is_image[image.first_token + t] = True
                found = units[out.unit[i, image.first_token + t]]
                np.testing.assert_array_equal(found, image.patches[t * area : (t + 1) * area])
        np.testing.assert_array_equal(out.unit[i] >= 0, is_image)
        assert not is_image[length:].any()


@settings(max_examples=60, deadline=None)
@given(batches())
def test_positions_are_those_of_a_walk_over_tokens(batch):
    layout, prompts, lengths = batch
    out = laid_out(*batch)
    for i, (images, length) in enumerate(zip(prompts, lengths, strict=True)):
        expected, behind = walk(images, length, layout.merge)
        np.testing.assert_array_equal(out.positions[i, :length], expected)
        assert out.delta[i] == behind - length <= 0
        padding = behind + np.arange(out.positions.shape[1] - length)
        np.testing.assert_array_equal(out.positions[i, length:], padding[:, None] + np.zeros(3, int))


def test_neighbours_in_a_window_are_a_unit():
    down, right = PatchLayout(2, 4).offsets()
    order = np.zeros((4, 4), int)
    order[down, right] = np.arange(16)
    np.testing.assert_array_equal(order, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])


@pytest.mark.parametrize(
    ("image", "length", "windows", "message"),
    [
        (PlacedImage(0, 4, 12, np.zeros((48, 3), np.uint8)), 12, 1, "2 windows, and there is room for 1"),
        (PlacedImage(1, 4, 4, np.zeros((16, 3), np.uint8)), 4, 1, "ends at token 5 of a prompt of 4 tokens"),
        (PlacedImage(0, 4, 4, np.zeros((15, 3), np.uint8)), 4, 1, "4 x 4 patches has 15 patches"),
        (PlacedImage(0, 3, 4, np.zeros((12, 3), np.uint8)), 4, 1, "must be a multiple of 2"),
    ],
)
def test_images_that_do_not_fit_are_refused(image, length, windows, message):
    with pytest.raises(ValueError, match=message):
        lay_out([[image]], [length], 16, windows, 3, PatchLayout())


@settings(deadline=None, max_examples=60)
@given(batches())
def test_embeddings_stand_in_the_order_of_their_tokens_with_the_positions_of_patches(batch):
    """The tokens of a prompt's images are numbered through, whatever the windows."""
    layout, prompts, lengths = batch
    of_windows = laid_out(layout, prompts, lengths)
    rng, width = np.random.default_rng(0), 3
    embedded = [
        [
            EmbeddedImage(x.first_token, x.rows, x.columns, rng.random((layout.num_tokens(x.rows, x.columns), width)))
            for x in images
        ]
        for images in prompts
    ]
    counts = [sum(len(x.embeddings) for x in images) for images in embedded]
    out = lay_out_embeddings(embedded, lengths, max(lengths) + 2, (max(counts) + 1, width), np.float32, layout)
    np.testing.assert_array_equal(out.positions, of_windows.positions)
    np.testing.assert_array_equal(out.delta, of_windows.delta)
    for i, images in enumerate(embedded):
        right = np.concatenate([x.embeddings for x in images] or [np.zeros((0, width))])
        is_image = out.unit[i] >= 0
        np.testing.assert_array_equal(is_image, of_windows.unit[i] >= 0)
        np.testing.assert_allclose(out.embeddings[i][out.unit[i][is_image]], right.astype(np.float32))
        assert not out.embeddings[i, counts[i] :].any()


@pytest.mark.parametrize(
    ("image", "room", "message"),
    [
        (EmbeddedImage(0, 4, 4, np.zeros((4, 3))), (3, 3), "have 4 tokens, and there is room for 3"),
        (EmbeddedImage(0, 4, 4, np.zeros((4, 2))), (4, 3), "4 tokens has embeddings of shape"),
        (EmbeddedImage(1, 4, 4, np.zeros((4, 3))), (4, 3), "ends at token 5 of a prompt of 4 tokens"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(image, room, message):
    with pytest.raises(ValueError, match=message):
        lay_out_embeddings([[image]], [4], 16, room, np.float32, PatchLayout())
