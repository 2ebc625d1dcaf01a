"""An embedded task with images: lengths of bars, which must be measured, and their sums.

An image is grey and has three rows of 8 pixels. In each row lies one horizontal bar that is 2 pixels thick and 2 L
long, for a length L from 1 to 9, at any place of its row. A prompt is the image and the rows to add, such as
`[#########]3+1=`, and its right response the lengths with their sum, `7+4=11$`. There are twelve texts, so the text
alone tells nothing: two prompts are the same only if their images are too. The reward is 1 if and only if EOS came and
the last number is right.

The noisy demonstrator reads long bars one too short more often than not, and adds what it read without mistakes. What
remains to be learnt after the cold start is thus to see, not to add. A prompt's difficulty is its number of long bars.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from pspo_jax.arrays.images import PatchLayout
from pspo_jax.config.schema import TaskConfig
from pspo_jax.config.text_fields import Stratum, parse_strata, parse_widths
from pspo_jax.data.char_tokenizer import CharTokenizer
from pspo_jax.data.images.processor import ImageProcessor, cut
from pspo_jax.data.images.prompt_images import PromptImages, first_of
from pspo_jax.data.strata import counts_of, labels_of, stratum_of, too_few, wrong_label_draws, wrong_rows
from pspo_jax.data.synthetic.last_number import last_number
from pspo_jax.data.task import CompletionBatch, Demonstrations, PromptDataset, RewardResult, Task, digest, pad_rows
from pspo_jax.model.architecture import Vision

CHARACTERS = "0123456789+-=$_*[#]"
VOCAB = 20
BARS, ROW, HEIGHT = 3, 8, 24
"""Number of bars, pixels of a bar's row, and pixels of an image's height."""
LONGEST, LONG = 9, 5
"""Length of the longest bar, and the length from which on bars are long."""
SLIP = 0.003
"""Probability that the noisy demonstrator reads a bar that is not long one too short."""
PROCESSOR = ImageProcessor(
    min_pixels=1, max_pixels=2**20, patch_size=4, merge_size=2, mean=(0.1, 0.1, 0.1), std=(1.0, 1.0, 1.0)
)
"""Sizes of patches and units, and the constants of the one channel."""
MAX_RESPONSE = 2 * BARS + 3
TOKENIZER = CharTokenizer(CHARACTERS, VOCAB, of_prompts="[#]")
START, UNIT, END = (CHARACTERS.index(c) for c in "[#]")
IMAGE_IDS = {"vision_start_token_id": START, "image_token_id": UNIT, "vision_end_token_id": END}
"""Ids of the tokens around an image and of an image's units, by the names of their fields in config.json."""
TOWER = Vision(
    layers=2,
    width=32,
    heads=4,
    mlp_width=64,
    whole_image=(1,),
    layout=PatchLayout(PROCESSOR.merge_size, 2 * PROCESSOR.merge_size),
    patch=PROCESSOR.patch_size,
    channels=1,
    frames=1,
    mean=PROCESSOR.mean[:1],
    std=PROCESSOR.std[:1],
)
"""The vision tower of a model that begins with random weights. Windows have 16 pixels, so that an image's edge cuts
them."""
_BLOCK = 1024
_IDLE_BLOCKS = 50
"""Blocks in a row without a new problem of a stratum after which no more are expected."""
_STRATA_STREAM = 6
"""Number of the stream of random numbers that draws the training prompts of task.strata."""
_LARGEST = LONGEST * BARS
"""Largest sum."""


class Problems(NamedTuple):
    """n images with rows to add."""

    length: Int[np.ndarray, "n 3"]
    """Length of each row's bar, from 1 to 9."""
    left: Int[np.ndarray, "n 3"]
    """Column of each bar's first pixel."""
    top: Int[np.ndarray, "n 3"]
    """Row of each bar's first pixel."""
    width: Int[np.ndarray, "n"]
    """Width of each image in pixels."""
    asked: Int[np.ndarray, "n 3"]
    """Rows to add, from 0 to 2, in their order; -1 = no further one."""

    def take(self, which: Sequence[int] | np.ndarray) -> Problems:
        """Some of the problems."""
        return Problems(*(column[which] for column in self))


def segments(config: TaskConfig, prompt_bucket: int) -> Task:
    """The task of a config; prompts are padded to a multiple of `prompt_bucket`."""
    widths = parse_widths(config.image_widths)
    train, heldout = _split(config, widths)
    room, strata = _room(prompt_bucket, widths), parse_strata(config.strata)

    def demonstrations(seed: int, count: int) -> Iterator[Demonstrations]:
        return examples(config, prompt_bucket, seed, count)

    return Task(
        name="segments",
        tokenizer=TOKENIZER,
        vocab_size=VOCAB,
        forbidden=TOKENIZER.forbidden,
        stop_ids=(TOKENIZER.eos_token_id,),
        train=_prompt_dataset(train, _labelled(config, strata, train), room, strata),
        heldout=_prompt_dataset(heldout, sums(heldout), room, strata),
        reward_fn=grade,
        demonstrations=demonstrations,
        encode_prompt=TOKENIZER.encode_prompt,
    )


def examples(config: TaskConfig, prompt_bucket: int, seed: int, count: int) -> Iterator[Demonstrations]:
    """Blocks of fresh examples by the noisy demonstrator, `count` in all; the held-out problems are left out."""
    widths = parse_widths(config.image_widths)
    banned = set(_keys(_split(config, widths)[1]))
    rng, room, made = np.random.default_rng([seed, 2]), _room(prompt_bucket, widths), 0
    while made < count:
        problems = generate(rng, _BLOCK, widths)
        fresh = [i for i, key in enumerate(_keys(problems)) if key not in banned]
        problems = problems.take(fresh[: count - made])
        made += len(problems.width)
        prompts = pad_rows(write_prompts(problems), room, TOKENIZER.pad_token_id)
        responses = write_responses(problems, misread(problems.length, rng))
        yield Demonstrations(*prompts, *responses, _images(problems))


def _room(prompt_bucket: int, widths: Sequence[int]) -> int:
    """Tokens for which a prompt has room: those of the widest image and of the longest question, `3+1+2=`."""
    longest = max(widths) // PROCESSOR.unit() * (HEIGHT // PROCESSOR.unit()) + 2 + 2 * BARS
    return -(-longest // prompt_bucket) * prompt_bucket


def generate(rng: np.random.Generator, n: int, widths: Sequence[int] = (HEIGHT,)) -> Problems:
    """n random problems; lengths, places and the twelve texts are uniform."""
    length = rng.integers(1, LONGEST + 1, (n, BARS))
    width = rng.choice(np.array(widths), n)
    left = rng.integers(0, width[:, None] - 2 * length + 1)
    top = ROW * np.arange(BARS) + rng.integers(1, ROW - 2, (n, BARS))
    asked = rng.permuted(np.tile(np.arange(BARS), (n, 1)), axis=1)
    asked[rng.random(n) < 0.5, -1] = -1
    return Problems(length, left, top, width, asked)


def draw(problems: Problems) -> UInt8[np.ndarray, "n h w"]:
    """The images, white bars on black, padded on the right to the widest of them."""
    y, x = np.arange(HEIGHT)[:, None], np.arange(problems.width.max(initial=0))
    out = np.zeros((len(problems.width), HEIGHT, len(x)), bool)
    for bar in range(BARS):
        left, top, length = (column[:, bar, None, None] for column in (problems.left, problems.top, problems.length))
        out |= (y >= top) & (y < top + 2) & (x >= left) & (x < left + 2 * length)
    return out.astype(np.uint8) * np.uint8(255)


def sums(problems: Problems) -> Int[np.ndarray, "n"]:
    """The right answers."""
    return np.where(problems.asked >= 0, np.take_along_axis(problems.length, problems.asked, axis=1), 0).sum(axis=1)


def num_long(problems: Problems) -> Int[np.ndarray, "n"]:
    """Number of long bars among those to add."""
    asked = np.take_along_axis(problems.length, problems.asked, axis=1)
    return ((problems.asked >= 0) & (asked >= LONG)).sum(axis=1)


def misread(length: Int[np.ndarray, "n 3"], rng: np.random.Generator) -> Int[np.ndarray, "n 3"]:
    """Lengths as the noisy demonstrator reads them.

    A long bar is one too short with probability min(0.25 + 0.06 L, 0.8), and another one with probability SLIP.
    """
    chance: Float[np.ndarray, "n 3"] = np.where(length >= LONG, np.minimum(0.25 + 0.06 * length, 0.8), SLIP)
    return length - (rng.random(length.shape) < chance)


def write_prompts(problems: Problems) -> list[list[int]]:
    """Ids of the prompts, such as those of `[#########]3+1=`."""
    tokens = problems.width // PROCESSOR.unit() * (HEIGHT // PROCESSOR.unit())
    places = [[START, *[UNIT] * int(n), END] for n in tokens]
    return [place + TOKENIZER.encode(text) for place, text in zip(places, _texts(problems), strict=True)]


def write_responses(
    problems: Problems, read: Int[np.ndarray, "n 3"]
) -> tuple[Int[np.ndarray, "n MAX_RESPONSE"], Int[np.ndarray, "n"]]:
    """Ids of responses such as `7+4=11$` for lengths as they were read, padded, and their lengths."""
    texts = []
    for lengths, asked in zip(read.tolist(), problems.asked.tolist(), strict=True):
        terms = [lengths[row] for row in asked if row >= 0]
        texts.append(f"{'+'.join(map(str, terms))}={sum(terms)}$")
    return pad_rows([TOKENIZER.encode(text) for text in texts], MAX_RESPONSE, TOKENIZER.pad_token_id)


def grade(batch: CompletionBatch) -> Callable[[], RewardResult]:
    """The reward function: 1 if a completion ends in EOS and the text after its last `=` is the answer, else 0."""
    return last_number(batch, TOKENIZER)


def _texts(problems: Problems) -> list[str]:
    """The questions, such as `3+1=`."""
    return ["+".join(str(row + 1) for row in asked if row >= 0) + "=" for asked in problems.asked.tolist()]


def _patches(problems: Problems) -> list[UInt8[np.ndarray, "k c"]]:
    """The patches of each image."""
    drawn = draw(problems)
    return [cut(image[:, :width, None], PROCESSOR) for image, width in zip(drawn, problems.width, strict=True)]


def _images(problems: Problems) -> PromptImages:
    """The images, one for each prompt."""
    patches = _patches(problems)
    grids = np.stack([np.full_like(problems.width, HEIGHT), problems.width], axis=1) // PROCESSOR.patch_size
    keys = [
        hashlib.sha256(f"{width} ".encode() + x.tobytes()).hexdigest()
        for width, x in zip(problems.width, patches, strict=True)
    ]
    return PromptImages(
        first_of([1] * len(patches)), grids.astype(np.int32), keys, patches.__getitem__, PROCESSOR, UNIT
    )


def _keys(problems: Problems) -> list[bytes]:
    """A key for each problem that is equal for equal images with equal texts alone."""
    columns = np.concatenate([*problems[:3], problems.width[:, None], problems.asked], axis=1)
    return [row.tobytes() for row in columns.astype(np.int16)]


def _split(config: TaskConfig, widths: Sequence[int]) -> tuple[Problems, Problems]:
    """Training and held-out problems, all distinct; task.strata changes training problems alone."""
    rng = np.random.default_rng([config.seed, 1])
    seen: set[bytes] = set()
    heldout = _fresh(rng, widths, seen, (), [config.heldout_prompts])
    strata = parse_strata(config.strata)
    if not strata:
        return _fresh(rng, widths, seen, (), [config.train_prompts]), heldout
    rng = np.random.default_rng([config.seed, _STRATA_STREAM])
    train = _fresh(rng, widths, seen, strata, counts_of(config.train_prompts, strata))
    return train.take(rng.permutation(len(train.width))), heldout


def _fresh(
    rng: np.random.Generator,
    widths: Sequence[int],
    seen: set[bytes],
    strata: Sequence[Stratum],
    wanted: Sequence[int],
) -> Problems:
    """Problems that are not in `seen`, which they join: so many of each stratum, or of all if there are no strata.

    Raises:
      ConfigError: many random problems in a row hold no further one of a stratum.
    """
    parts: list[Problems] = []
    left = list(wanted)
    idle = 0
    while any(left):
        block = generate(rng, _BLOCK, widths)
        stratum = stratum_of(num_long(block).astype(np.float32), strata) if strata else np.zeros(_BLOCK, int)
        taken = []
        for i, (key, s) in enumerate(zip(_keys(block), stratum.tolist(), strict=True)):
            if s >= 0 and left[s] and key not in seen:
                seen.add(key)
                left[s] -= 1
                taken.append(i)
        parts.append(block.take(taken))
        idle = 0 if taken else idle + 1
        if idle == _IDLE_BLOCKS:
            short = next(s for s, n in enumerate(left) if n)
            raise too_few(strata, strata[short], wanted[short], wanted[short] - left[short])
    return _joined(parts or [generate(rng, 0, widths)])


def _joined(parts: Sequence[Problems]) -> Problems:
    """Problems, one part after the other."""
    return Problems(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _labelled(config: TaskConfig, strata: Sequence[Stratum], problems: Problems) -> Int[np.ndarray, "n"]:
    """The answers, of which task.wrong_labels are replaced by another sum from 1 to the largest."""
    right, n = sums(problems), len(problems.width)
    if not config.wrong_labels:
        return right
    stratum = stratum_of(num_long(problems).astype(np.float32), strata) if strata else None
    wrong = wrong_rows(config.wrong_labels, config.seed, n, stratum)
    shift = wrong_label_draws(config.seed).integers(1, _LARGEST, n)
    return np.where(wrong, 1 + (right - 1 + shift) % _LARGEST, right)


def _prompt_dataset(
    problems: Problems, answers: Int[np.ndarray, "n"], room: int, strata: Sequence[Stratum]
) -> PromptDataset:
    """The prompts, labelled by stratum if there are strata."""
    tokens, lengths = pad_rows(write_prompts(problems), room, TOKENIZER.pad_token_id)
    difficulty, images = num_long(problems).astype(np.float32), _images(problems)
    texts, golds = _texts(problems), [str(answer) for answer in answers]
    whole = zip(texts, images.keys, golds, strict=True)
    return PromptDataset(
        tokens,
        lengths,
        golds,
        texts,
        difficulty=difficulty,
        labels=labels_of(difficulty, strata) if strata else None,
        digests=np.array([digest(f"{text}\0{key}".encode(), gold) for text, key, gold in whole], np.uint64),
        identity=PROCESSOR.identity(),
        images=images,
    )
