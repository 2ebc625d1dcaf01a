"""Visual checkpoints of random weights, written by transformers, and what torch computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pspo_jax.model.architecture import Vision
from tests.data.visual_tokenizer import TEXT_TOKENIZER, WHOLE_TOKENIZER, write_visual
from tests.model.checkpoints import torch, transformers
from tests.pictures import END, IMAGE, START, VIDEO, Picture, VisualPrompts

SMALL_TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1]},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4, "in_channels": 3}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": SMALL_TOWER
    | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16}
    | {"fullatt_block_indexes": [1]},
    "qwen2_vl": SMALL_TOWER | {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32},
}


def write_visual_checkpoint(
    folder: Path,
    model_type: str,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    tower: dict[str, Any] | None = None,
    tied: bool = True,
    ids: tuple[int, int, int, int] = (IMAGE, VIDEO, START, END),
) -> Any:
    """A torch model of random weights, biases and norms, saved to `folder`.

    Args:
      ids: ids of an image's tokens, of a video's, and of those around an image.
    """
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config=SMALL_TEXT | (text or {}),
        vision_config=TOWERS[model_type] | (tower or {}),
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                std = 0.2 if "embed_tokens" in name else 1.3 / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn_like(parameter) * std)
    model.save_pretrained(folder)
    return model


class Vocabulary(NamedTuple):
    """A tokenizer's folder, and the ids of a checkpoint with it."""

    tokenizer: Path
    rows: int
    """Rows of the embedding."""
    eos: int
    images: tuple[int, int, int, int]
    """Ids of an image's tokens, of a video's, and of those around an image."""


SMALL_VOCABULARY = Vocabulary(TEXT_TOKENIZER, 4224, 4098, (4108, 4109, 4105, 4106))
RELEASED_VOCABULARY = Vocabulary(WHOLE_TOKENIZER, 151936, 151645, (151655, 151656, 151652, 151653))
"""That of Qwen2.5-VL-3B."""


def write_visual_policy(folder: Path, vocabulary: Vocabulary = SMALL_VOCABULARY, layers: int = 2) -> Any:
    """A Qwen2.5-VL of random weights and a tower of two blocks, with tokenizer, template and processor; torch's model.

    Args:
      layers: layers of the language model.
    """
    write_visual(folder, tokenizer=vocabulary.tokenizer)
    tower = {"depth": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    text = {"num_hidden_layers": layers, "vocab_size": vocabulary.rows}
    text |= {"bos_token_id": None, "eos_token_id": vocabulary.eos}
    return write_visual_checkpoint(folder, "qwen2_5_vl", text=text, tower=tower, ids=vocabulary.images)


def pixel_values(v: Vision, picture: Picture) -> np.ndarray:
    """What an image processor of transformers makes of it: normalised, and each frame the same."""
    x = picture.patches.reshape(-1, v.channels, 1, v.patch**2).astype(np.float32) / np.float32(255)
    mean, std = (np.asarray(n, np.float32)[:, None, None] for n in (v.mean, v.std))
    return np.repeat((x - mean) / std, v.frames, axis=2).reshape(len(x), -1)


def torch_inputs(v: Vision, batch: VisualPrompts, left: bool = False, image_id: int = IMAGE) -> dict[str, Any]:
    """The arguments of a torch model for a batch, padded on one side; `image_id` is that of an image's tokens."""
    width = max(len(ids) for ids in batch.tokens)
    ids, mask = np.zeros((2, len(batch.tokens), width), np.int64)
    for i, row in enumerate(batch.tokens):
        part = slice(width - len(row), width) if left else slice(len(row))
        ids[i, part], mask[i, part] = row, 1
    pictures = [x for of in batch.pictures for x in of]
    out = {
        "input_ids": torch.as_tensor(ids),
        "attention_mask": torch.as_tensor(mask),
        "mm_token_type_ids": torch.as_tensor((ids == image_id).astype(np.int64)),
    }
    if pictures:
        out["pixel_values"] = torch.as_tensor(np.concatenate([pixel_values(v, x) for x in pictures]))
        out["image_grid_thw"] = torch.as_tensor([[1, x.rows, x.columns] for x in pictures])
    return out


def torch_logits(model: Any, v: Vision, batch: VisualPrompts, image_id: int = IMAGE) -> list[np.ndarray]:
    """Logits of each prompt's tokens, one prompt at a time; `image_id` is that of an image's tokens."""
    found = []
    for i in range(len(batch.tokens)):
        alone = batch._replace(tokens=batch.tokens[i : i + 1], pictures=batch.pictures[i : i + 1])
        model.model.rope_deltas = None
        with torch.no_grad():
            found.append(model(**torch_inputs(v, alone, image_id=image_id)).logits[0].float().numpy())
    return found


def torch_greedy(model: Any, v: Vision, batch: VisualPrompts, count: int) -> np.ndarray:
    """`count` greedy tokens of each prompt, in one batch that is padded on the left; ids of images are forbidden."""
    inputs = torch_inputs(v, batch, left=True)
    model.model.rope_deltas = None
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[IMAGE, VIDEO, START, END],
        )
    return out[:, inputs["input_ids"].shape[1] :].numpy()
