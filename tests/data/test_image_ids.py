"""Ids of prompts with images are those of transformers' processor, and marks that do not fit are refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.conversations import IMAGE_PLACE, read_prompt
from pspo_jax.data.images.processor import grid_of, patches_of
from pspo_jax.data.images.prompts import first_tokens
from pspo_jax.data.rendering import PromptError
from pspo_jax.data.tokenizer import load_tokenizer
from tests.data.made_images import FILES, encoded, noise
from tests.data.test_image_processor import MODES
from tests.data.visual_tokenizer import TEXT_TOKENIZER, transformers_ids, write_visual
from tests.helpers import tiny_config


def refused(call):
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


CASES = [
    ("<image>Find x.", 1, [{"type": "image"}, {"type": "text", "text": "Find x."}]),
    (
        "Is <image> larger than <image>?",
        2,
        [
            {"type": "text", "text": "Is "},
            {"type": "image"},
            {"type": "text", "text": " larger than "},
            {"type": "image"},
            {"type": "text", "text": "?"},
        ],
    ),
    ("Find x.", 1, [{"type": "image"}, {"type": "text", "text": "Find x."}]),
    ("Find x.", 2, [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Find x."}]),
    ("Find x.", 0, "Find x."),
    ("Find x: <image>", 1, [{"type": "text", "text": "Find x: "}, {"type": "image"}]),
]


@pytest.mark.parametrize(("text", "count", "content"), CASES)
def test_ids_are_those_of_transformers(text, count, content, visual_folder, visual_tokenizer):
    processor = visual_tokenizer.visual.processor
    grids = [patches_of(data, processor)[1] for data in FILES[:count]]
    expected = transformers_ids(visual_folder, [{"role": "user", "content": content}], FILES[:count])
    assert visual_tokenizer.prompt(text, PromptConfig(), grids) == expected
    turns = [{"role": "system", "content": "Look."}, {"role": "user", "content": content}]
    expected = transformers_ids(visual_folder, turns, FILES[:count])
    assert visual_tokenizer.prompt(read_prompt(turns), PromptConfig(), grids) == expected
    assert visual_tokenizer.prompt(text, PromptConfig(system="Look."), grids) == expected


def test_ids_of_images_of_many_sizes_are_those_of_transformers(visual_folder, visual_tokenizer):
    rng = np.random.default_rng(0)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Find x."}]}]
    for i in range(200):
        height, width = (int(n) for n in np.exp(rng.uniform(1, 5.5, 2)))
        data = encoded(noise(MODES[i % len(MODES)], height, width, i))
        ids = visual_tokenizer.prompt(
            "<image>Find x.", PromptConfig(), [grid_of(data, visual_tokenizer.visual.processor)]
        )
        assert ids == transformers_ids(visual_folder, turns, [data])


def test_the_suffix_stands_behind_the_question(visual_folder, visual_tokenizer):
    suffix = (
        " You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
        "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
    )
    content = [{"type": "image"}, {"type": "text", "text": "Find x." + suffix}]
    expected = transformers_ids(visual_folder, [{"role": "user", "content": content}], FILES[:1])
    grid = patches_of(FILES[0], visual_tokenizer.visual.processor)[1]
    assert visual_tokenizer.prompt("<image>Find x.", PromptConfig(question="geo3k"), [grid]) == expected


@given(st.lists(st.one_of(st.just("<image>"), st.sampled_from(["a", " b", "\n", "?"])), max_size=9), st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_each_image_has_its_run_of_tokens(visual_tokenizer, pieces, data):
    count = pieces.count("<image>")
    sides = st.tuples(st.integers(1, 4), st.integers(1, 4))
    grids = [(2 * a, 2 * b) for a, b in data.draw(st.lists(sides, min_size=count, max_size=count))]
    numbers = [a * b // 4 for a, b in grids]
    ids = visual_tokenizer.prompt("x" + "".join(pieces), PromptConfig(), grids)
    pad = visual_tokenizer.visual.image_id
    starts = first_tokens(ids, pad, numbers)
    for start, number in zip(starts, numbers, strict=True):
        assert set(ids[start : start + number]) == {pad}
        assert visual_tokenizer.decode([ids[start - 1], ids[start + number]]) == "<|vision_start|><|vision_end|>"
    assert ids.count(pad) == sum(numbers)


@pytest.mark.parametrize(
    ("prompt", "count", "words"),
    [
        ("<image> <image>", 1, "has 2 marks <image> for 1 image"),
        ("<image>", 2, "has 1 mark <image> for 2 images"),
        ("<image>", 0, "has 1 mark <image> for 0 images"),
        (f"{IMAGE_PLACE}?", 2, "has 1 image among its turns, and 2"),
        ("a <|image_pad|>", 1, "2 <|image_pad|>"),
        ("a <|image_pad|>", 0, "1 <|image_pad|>"),
    ],
)
def test_images_that_do_not_fit_their_marks_are_refused(prompt, count, words, visual_tokenizer):
    with pytest.raises(PromptError) as error:
        visual_tokenizer.prompt(prompt, PromptConfig(), [(4, 4)] * count)
    assert words in str(error.value)


def test_templates_other_than_chat_hold_images(visual_tokenizer):
    ids = visual_tokenizer.prompt("a<image>b", PromptConfig(template="none"), [(4, 4)])
    assert visual_tokenizer.decode(ids) == "a<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>b"


def test_a_template_for_text_alone_is_refused(tmp_path):
    text = json.loads((TEXT_TOKENIZER / "tokenizer_config.json").read_text())["chat_template"]
    config = tiny_config(task__name="math", model__source=write_visual(tmp_path / "x", text))
    assert "0 <|image_pad|>" in refused(lambda: load_tokenizer(config, tmp_path / "x", None))


def test_tokens_of_images_are_never_drawn(visual_tokenizer):
    vocab = visual_tokenizer.hf.get_vocab()
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    assert {vocab[f"<|{name}|>"] for name in names} <= set(visual_tokenizer.forbidden)
    assert not set(visual_tokenizer.stop_ids) & set(visual_tokenizer.forbidden)


def test_bounds_for_a_model_of_text_are_refused():
    config = tiny_config(task__name="math", model__tokenizer=str(TEXT_TOKENIZER), prompt__max_pixels=10**6)
    assert "prompt.max_pixels=1000000" in refused(lambda: load_tokenizer(config, None, None))
