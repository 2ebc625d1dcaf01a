"""The embedded task with images: what is drawn, what is right, and what demonstrations get wrong."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pspo_jax.config.fields import ConfigError
from pspo_jax.data.image_batches import image_batch
from pspo_jax.data.images.processor import normalised
from pspo_jax.data.images.prompt_images import joined_images
from pspo_jax.data.synthetic import segments as task_of
from pspo_jax.data.synthetic.segments import PROCESSOR, TOKENIZER, UNIT, draw, examples, generate, segments, sums
from pspo_jax.data.task import CompletionBatch
from tests.helpers import tiny_config


def make(**fields):
    return segments(tiny_config(**{f"task__{name}": value for name, value in fields.items()}).task, 4)


def measured(image):
    """Lengths of the bars of an image, read off its pixels, row by row."""
    out = []
    for row in range(3):
        part = image[8 * row : 8 * row + 8] == 255
        lines = part.sum(axis=1)
        assert sorted(lines)[:6] == [0] * 6 and len({n for n in lines if n}) == 1
        (places,) = np.nonzero(part.any(axis=0))
        assert len(places) == places[-1] - places[0] + 1 == lines.max()
        out.append(int(lines.max()) // 2)
    return out


def image_of(patches, grid):
    """The image of patches in the order of units."""
    out = np.zeros((4 * grid[0], 4 * grid[1]), np.uint8)
    units = itertools.product(range(0, grid[0], 2), range(0, grid[1], 2), range(2), range(2))
    for patch, (row, column, i, j) in zip(patches, units, strict=True):
        out[4 * (row + i) : 4 * (row + i) + 4, 4 * (column + j) : 4 * (column + j) + 4] = patch.reshape(4, 4)
    return out


@pytest.mark.parametrize("widths", [(24,), (24, 32)])
def test_prompts_can_be_solved_by_measuring_their_images(widths):
    prompts = make(image_widths=",".join(map(str, widths)), train_prompts=60).train
    batch = image_batch(prompts, np.arange(60))
    sizes = set()
    for i, (ids, n, (image,)) in enumerate(zip(*batch, strict=True)):
        text = TOKENIZER.decode(ids[:n].tolist())
        head, _, question = text.partition("]")
        tokens = image.rows * image.columns // 4
        assert (head, image.first_token, image.rows) == ("[" + "#" * tokens, 1, 6) and question == prompts.texts[i]
        lengths = measured(image_of(image.patches, (image.rows, image.columns)))
        asked = [int(row) - 1 for row in question.removesuffix("=").split("+")]
        assert len(set(asked)) == len(asked) in (2, 3)
        assert prompts.answers[i] == str(sum(lengths[row] for row in asked))
        assert prompts.difficulty[i] == sum(lengths[row] >= 5 for row in asked)
        assert (ids[n:] == TOKENIZER.pad_token_id).all()
        sizes.add((image.rows, image.columns))
    assert sizes == {(6, width // 4) for width in widths}
    assert batch.tokens.shape[1] % 4 == 0 and batch.images[0][0].patches.dtype == np.uint8
    np.testing.assert_allclose(np.unique(normalised(batch.images[0][0].patches, PROCESSOR)), [-0.1, 0.9], atol=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_drawings_are_deterministic_and_whole(seed, n):
    one, two = (generate(np.random.default_rng(seed), n) for _ in range(2))
    for image, again, lengths in zip(draw(one), draw(two), one.length.tolist(), strict=True):
        np.testing.assert_array_equal(image, again)
        assert measured(image) == lengths


def test_the_text_alone_tells_nothing():
    prompts = make(train_prompts=2000, heldout_prompts=100)
    train = prompts.train
    assert len(set(train.texts)) == 12
    assert len(set(train.content().tolist())) == 2000
    assert not set(train.content().tolist()) & set(prompts.heldout.content().tolist())
    # The best guess of an answer from the text is rarely right.
    by_text = {}
    for text, answer in zip(train.texts, train.answers, strict=True):
        by_text.setdefault(text, []).append(answer)
    assert sum(max(map(answers.count, answers)) for answers in by_text.values()) / 2000 < 0.2


def test_runs_depend_on_images():
    one, two = make(train_prompts=40), make(train_prompts=40)
    assert one.train.fingerprint() == two.train.fingerprint()
    assert make(train_prompts=40, seed=1).train.fingerprint() != one.train.fingerprint()
    assert one.heldout.fingerprint() == make(train_prompts=80).heldout.fingerprint()


def completions_of(task, texts):
    """A batch with one completion of each prompt; `$` ends it."""
    width = max(map(len, texts))
    ids = [TOKENIZER.encode(text) for text in texts]
    tokens = np.array([row + [TOKENIZER.pad_token_id] * (width - len(row)) for row in ids])[:, None]
    lengths = np.array([[len(text)] for text in texts])
    ended = np.array([[text.endswith("$")] for text in texts])
    return CompletionBatch(task.train, np.arange(len(texts)), tokens, lengths, ended, 0)


def test_verdicts():
    task = make(train_prompts=40)
    answers = list(task.train.answers[:7])
    wrong = str(int(answers[5]) + 1)
    texts = [
        f"3+4={answers[0]}$",
        f"={answers[1]}$",
        f"{answers[2]}$",
        f"1={answers[3]}",
        f"={answers[4]}=$",
        f"={wrong}$",
    ]
    texts.append(f"=0{answers[6]}$")
    result = task.reward_fn(completions_of(task, texts))()
    assert result.verdicts[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert result.answers[0] == [answers[0]] and result.answers[2] == [None]
    np.testing.assert_array_equal(result.reward, result.verdicts)


def test_demonstrations_misread_long_bars_alone():
    c = tiny_config(task__heldout_prompts=50)
    blocks = list(examples(c.task, 4, 3, 2000))
    assert sum(len(block.prompt_lengths) for block in blocks) == 2000
    joined = joined_images([block.images for block in blocks])
    assert len(joined.keys) == 2000 and joined.first.tolist() == list(range(2001))
    np.testing.assert_array_equal(joined.read(1500), blocks[1].images.read(1500 - len(blocks[0].prompts)))
    short, total, easy_wrong = 0, 0, 0
    for block in blocks:
        for i, (ids, n) in enumerate(zip(block.completions, block.completion_lengths, strict=True)):
            text = TOKENIZER.decode(ids[:n].tolist())
            terms, _, rest = text.partition("=")
            read = [int(term) for term in terms.split("+")]
            assert rest == f"{sum(read)}$"
            (image,) = block.images.of(i, block.prompts[i, : block.prompt_lengths[i]].tolist())
            lengths = measured(image_of(image.patches, (image.rows, image.columns)))
            question = TOKENIZER.decode(block.prompts[i, 11 : block.prompt_lengths[i]].tolist())
            for row, value in zip(question.removesuffix("=").split("+"), read, strict=True):
                true = lengths[int(row) - 1]
                assert value in (true, true - 1)
                short += true >= 5 and value < true
                total += true >= 5
                easy_wrong += true < 5 and value < true
    expected = np.mean([min(0.25 + 0.06 * length, 0.8) for length in range(5, 10)])
    assert abs(short / total - expected) < 0.03 and easy_wrong < 40


def test_demonstrations_hold_no_heldout_problem():
    task = make(heldout_prompts=50)
    held = set(zip(task.heldout.texts, task.heldout.images.keys, strict=True))
    c = tiny_config(task__heldout_prompts=50)
    block = next(examples(c.task, 4, 0, 1024))
    texts = [TOKENIZER.decode(ids[11:n].tolist()) for ids, n in zip(block.prompts, block.prompt_lengths, strict=True)]
    assert not held & set(zip(texts, block.images.keys, strict=True))
    again = next(examples(c.task, 4, 0, 1024))
    np.testing.assert_array_equal(block.completions, again.completions)
    np.testing.assert_array_equal(block.completions, next(task.demonstrations(0, 1024)).completions)
    assert list(block.images.keys) == list(again.images.keys)


def test_tokens_of_images_are_forbidden():
    task = make()
    assert {TOKENIZER.decode([i]) for i in task.forbidden} >= set("_[#]?")
    assert not {*TOKENIZER.encode("0123456789+=$")} & set(task.forbidden) and UNIT in task.forbidden


def test_strata_and_wrong_labels_change_training_prompts_alone():
    plain = make(train_prompts=40)
    task = make(train_prompts=40, strata="0=0.5, 2+=0.5", wrong_labels=0.25)
    assert sorted(task.train.difficulty.tolist())[19:21] == [0, 2] and set(task.train.labels) == {
        "difficulty_0",
        "difficulty_2+",
    }
    assert task.heldout.content().tolist() == plain.heldout.content().tolist()
    right = make(train_prompts=40, strata="0=0.5, 2+=0.5").train.answers
    assert sum(a != b for a, b in zip(task.train.answers, right, strict=True)) == 10
    with pytest.raises(ConfigError, match="takes 40 prompts"):
        make(train_prompts=40, strata="4=1")


def test_another_prompts_image_leaves_the_text():
    prompts = make(train_prompts=200).train
    other = prompts._replace(images=prompts.images.exchanged(1))
    one, two = (image_batch(x, np.arange(200)) for x in (prompts, other))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert other.images.all_differ(prompts.images).all() and not prompts.images.all_differ(prompts.images).any()
    right = 0
    for i, ((a,), (b,)) in enumerate(zip(one.images, two.images, strict=True)):
        assert a[:3] == b[:3] and (a.patches != b.patches).any()
        lengths = measured(image_of(b.patches, (6, 6)))
        asked = prompts.texts[i].removesuffix("=").split("+")
        right += str(sum(lengths[int(row) - 1] for row in asked)) == prompts.answers[i]
    assert right / 200 < 0.15


def test_sums_are_of_the_asked_bars():
    problems = generate(np.random.default_rng(0), 50)
    for lengths, asked, total in zip(problems.length, problems.asked, sums(problems), strict=True):
        assert total == sum(lengths[row] for row in asked if row >= 0)
    assert len("9+9+9=27$") == task_of.MAX_RESPONSE


def test_an_image_of_its_own_size_stays():
    images = make(train_prompts=8).train.images
    grids = images.grids.copy()
    grids[3] = 6, 8
    alone = images._replace(grids=grids, first=np.array([0, 2, 2, 3, 4, 5, 6, 7, 8]))
    differ = alone.exchanged(0).all_differ(alone)
    assert differ.tolist() == [True, False, True, False, True, True, True, True]
