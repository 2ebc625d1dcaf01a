"""Prompts with images from data of every form; unusable rows say why they are left out."""

import base64
import dataclasses
import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.schema import Config, PromptConfig
from pspo_jax.config.validation import validate
from pspo_jax.data.demonstrations import read_examples
from pspo_jax.data.image_batches import gather, image_batch, image_room
from pspo_jax.data.images import cache
from pspo_jax.data.images.processor import ImageProcessor, normalised, patches_of
from pspo_jax.data.task import prompt_text
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.model.architecture import Vision
from pspo_jax.rewards.task import make_task
from pspo_jax.rewards.text_reward import make_pool
from tests.data.made_images import FILES, encoded, noise, picture
from tests.data.test_image_processor import reference
from tests.data.visual_tokenizer import TEMPLATE, TEXT_TOKENIZER, checkpoint_folder, transformers_ids, write_visual
from tests.helpers import tiny_config


@pytest.fixture
def config(tmp_path, visual_folder):
    def make(**fields):
        values = {
            "task__name": "math",
            "task__cache": str(tmp_path / "cache"),
            "task__train_prompts": 0,
            "task__heldout_prompts": 1,
            "model__source": visual_folder,
            "rollout__prompts": 2,
            "prompt__max_tokens": 512,
        }
        return tiny_config(**(values | fields))

    return make


def rows_of(*images, problem="<image>Find x.", **more):
    """Rows with one image each; the last one is held out."""
    return [{"images": [image], "problem": problem, "answer": str(i), **more} for i, image in enumerate(images)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path, rows, column="images"):
    """A parquet file as the hub's visual data sets have it: a list of images with their bytes."""
    table = datasets.Dataset.from_list(rows)
    feature = table.features.copy()
    feature[column] = datasets.List(datasets.Image())
    table.cast(feature).to_parquet(str(path))
    return str(path)


def csv_file(path, rows):
    lines = [f'"[""{i}.png""]",{row["problem"]},{row["answer"]}' for i, row in enumerate(rows)]
    path.write_text("\n".join(["images,problem,answer", *lines, ""]))
    return str(path)


def image_folder(path, files):
    """A folder of images with their questions, as the datasets package reads it."""
    path.mkdir(exist_ok=True)
    rows = []
    for i, data in enumerate(files):
        (path / f"{i}.png").write_bytes(data)
        rows.append({"file_name": f"{i}.png", "problem": "<image>Find x.", "answer": str(i)})
    jsonl(path / "metadata.jsonl", rows)
    return str(path)


def saved(path, rows):
    """A folder that the datasets package saved."""
    table = datasets.Dataset.from_list(rows)
    feature = table.features.copy()
    feature["images"] = datasets.List(datasets.Image())
    table.cast(feature).save_to_disk(str(path))
    return str(path)


def stored(data):
    return {"bytes": data, "path": None}


def ids_of(prompts, i):
    return prompts.tokens[i][: prompts.lengths[i]].tolist()


def refused(call):
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


def sources(tmp_path, files):
    """The same rows with images in every form that data sets have."""
    for i, data in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(data)
    texts = [base64.b64encode(data).decode() for data in files]
    plain = [{k: v for k, v in row.items() if k != "images"} for row in rows_of(*files)]
    turns = [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}]}]
        for text in texts
    ]
    for turn in turns:
        turn[0]["content"].append({"type": "text", "text": "Find x."})
    return {
        "relative paths": jsonl(tmp_path / "a.jsonl", rows_of(*[f"{i}.png" for i in range(len(files))])),
        "one path": jsonl(tmp_path / "b.jsonl", [row | {"image": f"{i}.png"} for i, row in enumerate(plain)]),
        "base64": jsonl(tmp_path / "c.jsonl", rows_of(*texts)),
        "data URLs": jsonl(tmp_path / "d.jsonl", rows_of(*[f"data:image/png;base64,{text}" for text in texts])),
        "bytes": parquet(tmp_path / "e.parquet", rows_of(*map(stored, files))),
        "a CSV file": csv_file(tmp_path / "g.csv", plain),
        "a folder of images": image_folder(tmp_path / "h", files),
        "a saved folder": saved(tmp_path / "i", rows_of(*map(stored, files))),
        "verl's columns": jsonl(
            tmp_path / "j.jsonl",
            [
                {
                    "prompt": [{"role": "user", "content": "<image>Find x."}],
                    "images": [{"bytes": None, "path": f"{i}.png"}],
                    "answer": str(i),
                }
                for i in range(len(files))
            ],
        ),
        "conversations": jsonl(
            tmp_path / "f.jsonl",
            [{"messages": turn, "answer": row["answer"]} for turn, row in zip(turns, plain, strict=True)],
        ),
    }


FORMS = (
    *("relative paths", "one path", "base64", "data URLs", "bytes", "conversations"),
    *("a CSV file", "a folder of images", "a saved folder", "verl's columns"),
)


@pytest.mark.parametrize("form", FORMS)
def test_images_of_every_form_give_the_same_prompts(form, config, visual_folder, visual_tokenizer, tmp_path):
    task = make_task(config(task__train_data=sources(tmp_path, FILES[:3])[form]), visual_tokenizer)
    prompts = task.train
    assert list(prompts.answers) == ["0", "1"] and not prompts.left_out
    batch = image_batch(prompts, np.array([1, 0]))
    content = [{"type": "image"}, {"type": "text", "text": "Find x."}]
    for i, (ids, n, images) in zip([1, 0], zip(*batch, strict=True), strict=True):
        expected = transformers_ids(visual_folder, [{"role": "user", "content": content}], [FILES[i]])
        assert ids[:n].tolist() == expected
        patches, grid = patches_of(FILES[i], visual_tokenizer.visual.processor)
        assert [image[1:3] for image in images] == [grid]
        assert images[0].first_token == expected.index(visual_tokenizer.visual.image_id)
        np.testing.assert_array_equal(images[0].patches, patches)
    assert (
        prompts.images.tokens().tolist() == (prompts.tokens[:] == visual_tokenizer.visual.image_id).sum(axis=1).tolist()
    )
    assert len(prompts.images.keys) == 2 and task.heldout.images.keys[0] not in prompts.images.keys


def test_hub_data_are_not_decoded_before_they_are_needed(config, visual_tokenizer, tmp_path, monkeypatch):
    data = parquet(tmp_path / "x.parquet", rows_of(*map(stored, FILES[:3])))

    def decode(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("datasets.Image.decode_example", decode)
    monkeypatch.setattr("pspo_jax.data.images.cache.patches_of", decode)
    monkeypatch.setattr("PIL.Image.Image.load", decode)
    assert make_task(config(task__train_data=data), visual_tokenizer).train.images.grids.shape == (2, 2)


def test_runs_of_image_tokens_are_written_short(config, visual_tokenizer, tmp_path):
    rows = [{"images": [stored(d) for d in FILES[:2]], "problem": "<image> or <image>?", "answer": "1"}]
    rows += [{"images": [], "problem": "Text.", "answer": "1"}, rows_of(stored(FILES[3]))[0]]
    prompts = make_task(config(task__train_data=parquet(tmp_path / "x.parquet", rows)), visual_tokenizer).train
    grids = [patches_of(data, visual_tokenizer.visual.processor)[1] for data in FILES[:2]]
    one, two = (f"[image {columns // 2}x{rows // 2}]" for rows, columns in grids)
    text = prompt_text(prompts, 0, visual_tokenizer)
    assert f"user\n<|vision_start|>{one}<|vision_end|> or <|vision_start|>{two}<|vision_end|>?<|im_end|>" in text
    assert prompt_text(prompts, 1, visual_tokenizer) == visual_tokenizer.decode(ids_of(prompts, 1))


def test_several_images_stand_in_their_order(config, visual_tokenizer, tmp_path):
    rows = [{"images": [stored(d) for d in FILES[:2]], "problem": "<image> or <image>?", "answer": "1"}] * 2
    rows = [rows[0], rows_of(stored(FILES[3]))[0] | {"answer": "2"}, rows_of(stored(FILES[4]))[0]]
    prompts = make_task(config(task__train_data=parquet(tmp_path / "x.parquet", rows)), visual_tokenizer).train
    batch = image_batch(prompts, np.array([0, 1]))
    assert [len(images) for images in batch.images] == [2, 1]
    for image, data in zip(batch.images[0], FILES, strict=False):
        np.testing.assert_array_equal(image.patches, patches_of(data, visual_tokenizer.visual.processor)[0])


def test_images_count_in_duplicates_and_held_out_rows(config, visual_tokenizer, tmp_path):
    first, second, third = map(stored, FILES[:3])
    train = parquet(tmp_path / "x.parquet", rows_of(first, second, first, third))
    heldout = parquet(tmp_path / "y.parquet", rows_of(third))
    task = make_task(config(task__train_data=train, task__heldout_data=heldout), visual_tokenizer)
    assert [(item.row, item.reason) for item in task.train.left_out] == [(2, "duplicate"), (3, "also held out")]
    assert len(set(task.train.texts)) == 1 and len(task.train.lengths) == 2


def test_fingerprints_depend_on_images_and_their_bounds(config, visual_folder, visual_tokenizer, tmp_path):
    def fingerprint(files, **bounds):
        c = config(task__train_data=parquet(tmp_path / "x.parquet", rows_of(*map(stored, files))), **bounds)
        return make_task(c, load_tokenizer(c, checkpoint_folder(c), None)).train.fingerprint()

    whole = fingerprint(FILES[:3])
    assert fingerprint(FILES[:3]) == whole
    assert fingerprint([FILES[0], FILES[3], FILES[2]]) != whole
    assert fingerprint(FILES[:3], prompt__max_pixels=4000) != whole
    # An image of the same size and another grey value.
    changed = encoded(noise("RGB", 60, 130, 1))
    assert fingerprint([changed, *FILES[1:3]]) != whole


def test_a_changed_file_is_found(config, visual_tokenizer, tmp_path):
    for i, data in enumerate(FILES[:3]):
        (tmp_path / f"{i}.png").write_bytes(data)
    c = config(task__train_data=jsonl(tmp_path / "x.jsonl", rows_of("0.png", "1.png", "2.png")))
    before = make_task(c, visual_tokenizer).train
    (tmp_path / "0.png").write_bytes(FILES[4])
    after = make_task(c, visual_tokenizer).train
    assert before.images.keys[0] != after.images.keys[0] and before.images.keys[1] == after.images.keys[1]
    assert before.fingerprint() != after.fingerprint()


def test_long_prompts_name_the_share_of_their_images(config, visual_tokenizer, tmp_path):
    rows = rows_of(*map(stored, [FILES[0], picture(280, 280), FILES[1], FILES[2]]))
    c = config(task__train_data=parquet(tmp_path / "x.parquet", rows), prompt__max_tokens=100)
    (left,) = make_task(c, visual_tokenizer).train.left_out
    assert left.row == 1 and "prompt.max_tokens=100 with images (up to 1" in left.reason
    assert "100 of them for images" in left.reason


def test_rows_that_cannot_be_used_say_why(config, visual_tokenizer, tmp_path):
    (tmp_path / "ok.png").write_bytes(FILES[0])
    (tmp_path / "also.png").write_bytes(FILES[1])
    (tmp_path / "film.mp4").write_bytes(b"x")
    bad = {
        "gone.png": f"its file cannot be read (No such file or directory; paths are relative to {tmp_path})",
        "https://example.org/x.png": "it is an address",
        "film.mp4": "it is a video",
        base64.b64encode(b"no image" * 20).decode(): "it is no image",
        base64.b64encode(picture(2, 402)).decode(): "ratio above 200",
    }
    rows = [*rows_of(*bad), *rows_of("ok.png", "also.png"), {"images": [], "problem": "<image>?", "answer": "1"}]
    rows += [{"images": ["ok.png"] * 2, "problem": "<image>?", "answer": "1"}, {"problem": "Text.", "answer": "1"}]
    c = config(task__train_data=jsonl(tmp_path / "x.jsonl", rows))
    task = make_task(c, visual_tokenizer)
    found = [item.reason for item in task.train.left_out]
    for reason, words in zip(found, [*bad.values(), "1 mark <image> for 0 images", "for 2 images"], strict=True):
        assert words in reason
    assert list(task.heldout.texts) == ["Text."] and task.heldout.images is None


def test_images_without_marks_come_first_and_it_is_said(config, visual_tokenizer, tmp_path):
    said = []
    c = config(task__train_data=parquet(tmp_path / "x.parquet", rows_of(*map(stored, FILES[:3]), problem="Find x.")))
    make_task(c, visual_tokenizer, say=said.append)
    assert sum("3 prompts do not mark the places of their images" in line for line in said) == 1
    assert sum("3,136 to 12,845,056 pixels" in line for line in said) == 1


def test_a_model_of_text_refuses_images_by_name(config, tmp_path):
    rows = [row | {"problem": f"Find x{i}."} for i, row in enumerate(rows_of(*map(stored, FILES[:3])))]
    data = parquet(tmp_path / "x.parquet", rows)
    c = config(task__train_data=data, model__source=None, model__tokenizer=str(TEXT_TOKENIZER))
    text = load_tokenizer(c, None, None)
    message = refused(lambda: make_task(c, text))
    assert "has images in its column images" in message and "task.image_column=off" in message
    off = dataclasses.replace(c, task=dataclasses.replace(c.task, image_column="off"))
    assert make_task(off, text).train.images is None


def test_text_trains_a_visual_model(config, visual_tokenizer, tmp_path):
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    prompts = make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", rows)), visual_tokenizer).train
    assert prompts.images is None and image_batch(prompts, np.array([0])).images == [[]]
    rows = [row | {"problem": "<image>" + row["problem"]} for row in rows]
    message = refused(lambda: make_task(config(task__train_data=jsonl(tmp_path / "y.jsonl", rows)), visual_tokenizer))
    assert "1 mark <image> for 0 images" in message


def test_columns_that_are_not_there_are_refused(config, visual_tokenizer, tmp_path):
    c = config(task__train_data=jsonl(tmp_path / "x.jsonl", rows_of("a")), task__image_column="nothing")
    message = refused(lambda: make_task(c, visual_tokenizer))
    assert "task.image_column=nothing: there is no such column" in message and "images, problem" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task.image_column": ""}, "task.image_column='': must not be empty"),
        (
            {"prompt.min_pixels": 10, "prompt.max_pixels": 9},
            "prompt.min_pixels=10: must be at most prompt.max_pixels=9",
        ),
        ({"prompt.max_pixels": 0}, "prompt.max_pixels=0"),
    ],
)
def test_fields_are_checked_before_any_work(fields, words):
    text = {"task.name": "math", "task.train_data": "x.jsonl", "model.source": "x"}
    assert words in refused(lambda: validate(replace(Config(), text | fields)))


def test_broken_images_are_left_out_before_training(config, visual_tokenizer, tmp_path):
    broken = picture(90, 90)[:-2000]
    rows = rows_of(*map(stored, [FILES[0], broken, FILES[1], FILES[2]]))
    c = config(task__train_data=parquet(tmp_path / "x.parquet", rows), task__check_gold=False, verifier__workers=1)
    with make_pool(c) as pool:
        train = make_task(c, visual_tokenizer, pool).train
    assert [(item.row, item.reason) for item in train.left_out] == [
        (1, "an image cannot be used: it is broken or cut off")
    ]
    assert list(train.answers) == ["0", "2"]
    assert len(list((tmp_path / "cache" / "images").glob("*/*/*.npy"))) == 3
    assert not list((tmp_path / "cache" / "images").glob("*/*/*.partial"))


def test_videos_are_refused_by_name(config, visual_tokenizer, tmp_path):
    rows = [{"videos": ["x.mp4"], "problem": "?", "answer": "1"}] * 3
    message = refused(lambda: make_task(config(task__train_data=jsonl(tmp_path / "x.jsonl", rows)), visual_tokenizer))
    assert "has videos in its column videos" in message


def test_rewards_get_no_image_bytes(config, visual_tokenizer, tmp_path):
    for form in ("bytes", "conversations"):
        data = sources(tmp_path, [picture(300, 300, i) for i in range(3)])[form]
        prompts = make_task(config(task__train_data=data), visual_tokenizer).train
        columns = prompts.columns(0)
        assert "images" not in columns and columns["answer"] == "0"
        assert len(pickle.dumps(columns)) < 1000
        assert prompts.column("images") == [None, None]


def test_a_column_inside_an_object_is_left_out_too(config, visual_tokenizer, tmp_path):
    rows = rows_of(*[base64.b64encode(data).decode() for data in FILES[:3]])
    rows = [
        {"problem": row["problem"], "answer": row["answer"], "extra": {"a": 1, "pics": row["images"]}} for row in rows
    ]
    c = config(task__train_data=jsonl(tmp_path / "x.jsonl", rows), task__image_column="extra.pics")
    prompts = make_task(c, visual_tokenizer).train
    assert prompts.columns(0)["extra"] == {"a": 1} and len(prompts.images.keys) == 2


def test_mixtures_of_images_and_text(config, visual_tokenizer, tmp_path):
    visual = parquet(tmp_path / "x.parquet", rows_of(*map(stored, FILES)))
    text = jsonl(tmp_path / "y.jsonl", [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)])
    parts = [
        {"name": "math", "train_data": data, "label": name, "weight": 1} for name, data in (("v", visual), ("t", text))
    ]
    c = config(task__mixture=json.dumps(parts), task__heldout_prompts=2, task__name="arithmetic")
    task = make_task(c, visual_tokenizer)
    batch = image_batch(task.train, np.arange(8))
    for i, (ids, n, images) in enumerate(zip(*batch, strict=True)):
        assert len(images) == (task.train.labels[i] == "v") == ("<image>" in task.train.texts[i])
        if images:
            data = FILES[int(task.train.answers[i])]
            np.testing.assert_array_equal(images[0].patches, patches_of(data, visual_tokenizer.visual.processor)[0])
            assert ids[:n].tolist().count(visual_tokenizer.visual.image_id) == len(images[0].patches) // 4
    assert sorted(task.train.labels) == ["t"] * 4 + ["v"] * 4 and task.heldout.images.first[-1] == 1


def test_batches_have_room_for_the_largest_images(config, visual_tokenizer, tmp_path):
    c = config(task__train_data=parquet(tmp_path / "x.parquet", rows_of(*map(stored, FILES[:3]))))
    prompts = make_task(c, visual_tokenizer).train
    tower = Vision(2, 16, 2, 24, (1,))
    room = image_room(tower, prompts)
    windows = [sum(room.layout.num_windows(*image[1:3]) for image in images) for images in batch_of(prompts)]
    assert room.windows == max(windows) and room.patch_numbers == 588
    batch = gather(prompts, np.arange(2), np.ones(2), room)
    assert [(row >= 0).sum() for row in batch.images.image] == windows[:2]
    np.testing.assert_array_equal(batch.images.unit >= 0, batch.tokens == visual_tokenizer.visual.image_id)
    with pytest.raises(ValueError, match="no room"):
        gather(prompts, np.arange(2), np.ones(2))
    assert image_room(tower, prompts._replace(images=None)) is None
    assert "no vision tower" in refused(lambda: image_room(None, prompts))
    other = dataclasses.replace(tower, patch=16)
    assert "patch_size=14" in refused(lambda: image_room(other, prompts))


def batch_of(prompts):
    """The images of all prompts."""
    return image_batch(prompts, np.arange(len(prompts.lengths))).images


def test_demonstrations_with_images_are_refused_by_line(config, visual_tokenizer, tmp_path):
    rows = [{"prompt": "What is 1 + 1?", "completion": "2"}, {"prompt": "<image>Find x.", "completion": "3"}]
    path = Path(jsonl(tmp_path / "x.jsonl", rows))

    def encode(prompt):
        return visual_tokenizer.prompt(prompt, PromptConfig())

    message = refused(lambda: read_examples(path, visual_tokenizer, encode, visual_tokenizer.stop_ids, PromptConfig()))
    assert message == f"sft.data={path} line 2: its prompt has 1 mark <image> for 0 images"


# --- patches ---


def test_patches_are_made_once_for_each_distinct_image(config, visual_tokenizer, tmp_path, monkeypatch):
    rows = rows_of(*map(stored, [FILES[0], FILES[0], FILES[1]]))
    rows[1]["problem"] = "<image>Find y."
    c = config(task__train_data=parquet(tmp_path / "x.parquet", rows))
    prompts = make_task(c, visual_tokenizer).train
    made = []
    monkeypatch.setattr(cache, "patches_of", lambda data, p: made.append(data) or patches_of(data, p))
    for _ in range(2):
        one, two = image_batch(prompts, np.array([0, 1])).images
    assert len(made) == 1 and isinstance(one[0].patches, np.memmap) and not one[0].patches.flags.writeable
    np.testing.assert_array_equal(one[0].patches, two[0].patches)
    (kept,) = (tmp_path / "cache" / "images").glob("*/*/*.npy")
    head = kept.read_bytes()[:500]
    kept.unlink()  # The maps above keep the old file.
    kept.write_bytes(head)
    np.testing.assert_array_equal(image_batch(prompts, np.array([0])).images[0][0].patches, two[0].patches)
    assert len(made) == 2
    other = config(task__train_data=c.task.train_data, prompt__max_pixels=4000)
    fewer = make_task(other, load_tokenizer(other, checkpoint_folder(other), None)).train
    assert len(image_batch(fewer, np.array([0])).images[0][0].patches) < len(two[0].patches)
    assert len(list((tmp_path / "cache" / "images").glob("*"))) == 2


def test_patches_are_what_the_tower_reads(config, visual_tokenizer, tmp_path):
    c = config(task__train_data=parquet(tmp_path / "x.parquet", rows_of(*map(stored, FILES[:3]))))
    prompts = make_task(c, visual_tokenizer).train
    found = normalised(np.asarray(prompts.images.read(1)), prompts.images.processor)
    expected, _ = reference(Image.open(io.BytesIO(FILES[1])), min_pixels=3136, max_pixels=12845056)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_another_prompts_image_can_be_shown(config, visual_tokenizer, tmp_path):
    files = [picture(56, 84, i) for i in range(4)] + [picture(112, 84), picture(56, 84, 9)]
    c = config(task__train_data=parquet(tmp_path / "x.parquet", rows_of(*map(stored, files))))
    images = make_task(c, visual_tokenizer).train.images
    other = images.exchanged(3)
    np.testing.assert_array_equal(other.grids, images.grids)
    assert [a == b for a, b in zip(images.keys, other.keys, strict=True)] == [False] * 4 + [True]
    assert sorted(images.keys) == sorted(other.keys)
    for i, key in enumerate(other.keys):
        np.testing.assert_array_equal(other.read(i), images.read(images.keys.index(key)))


@pytest.mark.parametrize("name", ["processor", "template"])
def test_defaults_of_a_folder_without_a_processor(name, tmp_path):
    folder = tmp_path / "x"
    config = tiny_config(task__name="math", model__source=write_visual(folder, TEMPLATE))
    if name == "processor":
        (folder / "preprocessor_config.json").unlink()
        tokenizer = load_tokenizer(config, folder, None)
        assert tokenizer.visual.processor == ImageProcessor() and "transformers' defaults" in tokenizer.visual.line
    else:
        (folder / "chat_template.json").rename(folder / "other.json")
        assert "0 <|image_pad|>" in refused(lambda: load_tokenizer(config, folder, None))
