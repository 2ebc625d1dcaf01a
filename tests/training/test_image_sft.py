"""Supervised fine-tuning on demonstrations with images: its loss is transformers', and it trains by its command."""

from __future__ import annotations

import base64
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pspo_jax.arrays.rows import RowImages, Rows
from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import PromptConfig
from pspo_jax.data.demonstrations import demonstration_task, read_examples
from pspo_jax.data.image_batches import image_room
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.model.transformer import transformer
from pspo_jax.sft import main as sft
from pspo_jax.sft import read_config
from pspo_jax.system.progress import Progress
from pspo_jax.training.scoring import score
from pspo_jax.training.setup import architecture_for
from pspo_jax.training.supervised import _with_images as with_images
from pspo_jax.training.supervised import cold_start, file_examples, settings, sft_loss
from tests.data.made_images import picture
from tests.data.visual_tokenizer import TEMPLATE, transformers_processor
from tests.helpers import relative
from tests.model.test_pretrained import load
from tests.model.visual_checkpoints import torch, transformers, write_visual_policy

FILES = [picture(60 + 29 * i, 150 - 31 * i, i) for i in range(4)]
ANSWER = "It is 12 cm."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Qwen2.5-VL of random weights with the small tokenizer; its folder, and torch's model."""
    folder = tmp_path_factory.mktemp("visual") / "source"
    return folder, write_visual_policy(folder, layers=1)


def part(value):
    return {"type": "image", "image": value}


def text(value):
    return {"type": "text", "text": value}


def rows(folder):
    """One question in each form that rows have, with the messages and images that each of them means."""
    for i, data in enumerate(FILES):
        (folder / f"{i}.png").write_bytes(data)
    codes = [base64.b64encode(data).decode() for data in FILES]
    answer = {"role": "assistant", "content": ANSWER}
    one = [{"role": "user", "content": [{"type": "image"}, text("Find x.")]}]
    two = [{"role": "user", "content": [text("Is "), {"type": "image"}, text(" as "), {"type": "image"}, text("?")]}]
    data_url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{codes[2]}"}}
    return [
        ({"prompt": "<image>Find x.", "completion": ANSWER, "images": ["0.png"]}, one, [0]),
        ({"prompt": "Find x.", "completion": ANSWER, "image": codes[1]}, one, [1]),
        ({"prompt": "Is <image> as <image>?", "completion": ANSWER, "images": [codes[0], "3.png"]}, two, [0, 3]),
        ({"messages": [{"role": "user", "content": [part("2.png"), text("Find x.")]}, answer]}, one, [2]),
        ({"messages": [{"role": "user", "content": [data_url, text("Find x.")]}, answer]}, one, [2]),
        ({"messages": [*two, answer], "images": ["1.png", {"path": "2.png", "bytes": None}]}, two, [1, 2]),
        ({"prompt": one, "completion": [answer], "images": ["3.png"]}, one, [3]),
        (
            {
                "image": "1.png",
                "conversations": [
                    {"from": "human", "value": "<image>Find x."},
                    {"from": "gpt", "value": ANSWER},
                ],
            },
            one,
            [1],
        ),
        ({"prompt": "What is 5 + 7?", "completion": ANSWER}, [{"role": "user", "content": "What is 5 + 7?"}], []),
    ]


def write(folder, records):
    path = folder / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def setup(source, folder, records, **more):
    """(config, task, architecture) of supervised training on these records."""
    data = write(folder, records)
    fields = {"model.source": source[0], "sft.data": data, "run.dir": folder / "run", "task.cache": folder / "cache"}
    fields |= {"sft.batch": 3, "sft.warmup": 0, "model.compute_dtype": "float32", "prompt.max_tokens": 256} | more
    config = read_config([str(word) for k, v in fields.items() for word in (f"--{k}", v)])
    _, tokenizer, architecture = architecture_for(config)
    return replace(config, {"rollout.prompts": 2}), demonstration_task(config, tokenizer), architecture


def batch_of(config, task, architecture):
    """All examples as one batch."""
    examples = file_examples(config, task)
    columns = {name: x for name, x in examples._asdict().items() if name != "images"}
    indices = np.arange(len(examples.prompts))
    room = image_room(architecture.vision, examples)
    return with_images(columns | {"images": indices}, examples.images, room)


def torch_loss(source, task, architecture, examples):
    """Mean loss over completion tokens by transformers' processor and model; ids that are never drawn are left out."""
    folder, model = source
    processor, total, count = transformers_processor(str(folder)), 0.0, 0
    for i, (_, messages, files) in enumerate(examples):
        end = [{"role": "assistant", "content": ANSWER}]
        before, whole = (
            processor.tokenizer.apply_chat_template(
                turns, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=turns is messages
            )
            for turns in (messages, [*messages, *end])
        )
        assert whole.startswith(before)
        images = [Image.open(io.BytesIO(FILES[j])) for j in files]
        prompt, inputs = (processor(images=images or None, text=[t], return_tensors="pt") for t in (before, whole))
        n, ids = prompt["input_ids"].shape[1], inputs["input_ids"][:, :-1]  # without the line's end behind the answer
        assert ids[0, -1] == task.tokenizer.eos_token_id, i
        inputs = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
        model.model.rope_deltas = None
        with torch.no_grad():
            logits = (
                model(input_ids=ids, mm_token_type_ids=(ids == task.tokenizer.visual.image_id).long(), **inputs)
                .logits[0]
                .double()
            )
        logits[:, list(architecture.forbidden)] = -torch.inf
        total += torch.nn.functional.cross_entropy(logits[n - 1 : -1], ids[0, n:], reduction="sum").item()
        count += ids.shape[1] - n
    return total / count


def test_the_loss_is_that_of_transformers(source, tmp_path):
    examples = rows(tmp_path)
    config, task, architecture = setup(source, tmp_path, [record for record, *_ in examples])
    model, params, _ = load(source[0])
    model = transformer(dataclasses.replace(architecture, freezes_vision=False))
    batch = batch_of(config, task, architecture)
    loss = jax.jit(lambda batch: sft_loss(model, params, batch, 64))
    found = float(loss(batch))
    assert found == pytest.approx(torch_loss(source, task, architecture, examples), rel=2e-5)
    patches = 255 - batch["images"].patches
    other = float(loss(batch | {"images": batch["images"].replace(patches=patches)}))
    assert abs(other - found) > 1e-3


def visual_model(source, folder):
    """(config, model whose tower trains, its weights, the rows of every form as one batch)."""
    config, task, architecture = setup(source, folder, [record for record, *_ in rows(folder)])
    model = transformer(dataclasses.replace(architecture, freezes_vision=False))
    return config, model, load(source[0])[1], jax.tree.map(jnp.asarray, batch_of(config, task, architecture))


def test_packed_rows_have_the_loss_of_padded_ones(source, tmp_path):
    config, model, params, batch = visual_model(source, tmp_path)
    mask = jnp.arange(batch["completions"].shape[1]) < batch["completion_lengths"][:, None]
    r, images = len(mask), batch["images"]
    zeros, none = jnp.zeros(mask.shape), jnp.zeros(r)
    packed = Rows(
        mask=mask, counted=none == 0, advantages=none, loss_weight=none, old_log_probs=zeros,
        behaviour_log_probs=zeros, group=jnp.arange(r), prompts=batch["prompts"], lengths=batch["prompt_lengths"],
        tokens=batch["completions"], stale=none > 0, sampling_log_probs=zeros,
        images=RowImages(prompt=jnp.arange(r), unit=images.unit, positions=images.positions, delta=images.delta),
    )  # fmt: skip
    c = replace(config, {"loss.packing": True, "loss.microbatch_rows": 3, "rollout.group_size": 1})
    log_probs = jax.jit(lambda w: score(model, w, packed, jnp.float32(1), c, images=images)[0])(params)
    wanted = float(jax.jit(lambda w: sft_loss(model, w, batch, 64))(params))
    assert float(-jnp.where(mask, log_probs, 0).sum() / mask.sum()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_the_gradient_is_the_same_where_few_prompts_are_encoded_at_a_time(source, tmp_path, monkeypatch):
    _, model, params, batch = visual_model(source, tmp_path)

    def gradient():
        return jax.jit(jax.value_and_grad(lambda p: sft_loss(model, p, batch, 64)))(params)

    at_once = gradient()
    monkeypatch.setattr("pspo_jax.training.supervised._ENCODED_AT_ONCE", 0)
    monkeypatch.setattr("pspo_jax.training.splitting._PROMPTS_ENCODED_AT_A_TIME", 3)
    in_parts = gradient()
    assert float(in_parts[0]) == pytest.approx(float(at_once[0]), rel=1e-6)
    assert relative(in_parts[1], at_once[1]) < 1e-5
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(at_once[1]["vision"])) > 0


@pytest.mark.slow
def test_it_learns_what_only_the_images_tell(source, tmp_path):
    """The completions differ and the texts do not, so that the loss of reading them blindly is bounded from below."""
    records = [
        {"prompt": "<image>Find x.", "completion": f"{i}", "images": [base64.b64encode(data).decode()]}
        for i, data in enumerate(FILES)
    ]
    more = {"sft.batch": 4, "sft.steps": 60, "sft.learning_rate": 3e-3, "model.vision": "trained"}
    config, task, architecture = setup(source, tmp_path, records, **more)
    _, params, _ = load(source[0])
    model, examples = transformer(architecture), file_examples(config, task)
    room = image_room(architecture.vision, examples)
    parts = config, task, model, params, Progress(False)
    after = cold_start(*parts, stop=lambda: False, room=room, examples=examples)
    # Of the two tokens of a completion the second ends it; four equal guesses cost log(4) / 2 nats a token.
    assert float(sft_loss(model, after, batch_of(config, task, architecture), 64)) < 0.5 * np.log(4) / 2


def test_settings_depend_on_the_images_and_their_bounds(source, tmp_path):
    (tmp_path / "0.png").write_bytes(FILES[0])
    records = [{"prompt": "<image>Find x.", "completion": ANSWER, "images": ["0.png"]}] * 3

    def found(**more):
        config, task, _ = setup(source, tmp_path, records, **more)
        return settings(config, task, "", file_examples(config, task).images)

    before = found()
    assert found() == before
    assert found(**{"prompt.max_pixels": 4000})["sft.images"] != before["sft.images"]
    (tmp_path / "0.png").write_bytes(FILES[1])
    assert found()["sft.images"] != before["sft.images"]


GOOD = {"prompt": "<image>Find x.", "completion": ANSWER, "images": ["0.png"]}
VIDEO = {"type": "video", "video": "x.mp4"}
BAD = [
    ({"images": ["gone.png"]}, "an image cannot be used: its file cannot be read (No such file or directory"),
    ({"images": ["broken.png"]}, "an image cannot be used: it is broken or cut off"),
    ({"images": ["text.png"]}, "an image cannot be used: it is no image of a known format"),
    ({"images": ["long.png"]}, "an image cannot be used: its sides have a ratio above 200"),
    ({"images": ["film.mp4"]}, "an image cannot be used: it is a video"),
    ({"images": ["https://example.org/x.png"]}, "an image cannot be used: it is an address"),
    ({"images": []}, "its prompt has 1 mark <image> for 0 images"),
    ({"images": ["0.png"] * 2}, "its prompt has 1 mark <image> for 2 images"),
    ({"videos": ["film.mp4"]}, "its prompt has videos, and only still images are read"),
    (
        {"messages": [{"role": "user", "content": [VIDEO]}, {"role": "assistant", "content": "1"}]},
        "a part of type video",
    ),
    (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [part("0.png")]}]},
        "its completion holds an image",
    ),
    ({"prompt": "<image>" + "Find x. " * 300}, "tokens, 10 of them for images, allowed 1..256"),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=[words[-20:] for _, words in BAD])
def test_bad_rows_are_refused_by_line(source, tmp_path, fields, words):
    files = {"0.png": FILES[0], "broken.png": picture(90, 90)[:-2000], "text.png": b"x" * 99, "film.mp4": b"x"}
    for name, data in (files | {"long.png": picture(2, 402)}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as error:
        file_examples(*setup(source, tmp_path, [GOOD, GOOD, GOOD, GOOD | fields])[:2])
    message = str(error.value)
    assert message.startswith(f"sft.data={tmp_path / 'demonstrations.jsonl'} line 4: ") and "\n" not in message
    assert words in message


def test_a_model_of_text_refuses_images_by_line(tmp_path):
    (tmp_path / "0.png").write_bytes(FILES[0])
    path = write(
        tmp_path, [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1", "completion": "2", "image": "0.png"}]
    )
    with pytest.raises(
        ConfigError, match=r"line 2: its prompt has images, and the model reads text alone; take them out"
    ):
        read_examples(path, TOKENIZER, TOKENIZER.encode, (TOKENIZER.eos_token_id,), PromptConfig())


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"model.vision": "trained"}, {"lora.rank": 2}], ids=str)
def test_the_command_writes_a_model_that_transformers_loads(source, tmp_path, more, capsys):
    path = write(tmp_path, [record for record, *_ in rows(tmp_path)] * 2)
    fields = {"model.source": source[0], "sft.data": path, "run.dir": tmp_path / "sft", "task.cache": tmp_path / "c"}
    fields |= {"prompt.max_tokens": 256, "sft.learning_rate": 1e-3} | more
    assert sft([str(word) for k, v in fields.items() for word in (f"--{k}", v)]) == 0
    assert "images have 3,136 to 12,845,056 pixels" in capsys.readouterr().out
    before, after = (load_file(f / "model.safetensors") for f in (source[0], tmp_path / "sft" / "model"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and any(name.startswith("visual.") for name in changed) == ("model.vision" in more)
    folder = tmp_path / "sft" / "model"
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
