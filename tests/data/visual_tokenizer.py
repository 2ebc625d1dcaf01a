"""A visual checkpoint's folder without weights: a small tokenizer of Qwen2.5 with Qwen2.5-VL's template."""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pspo_jax.config.schema import Config
from tests.conftest import DATA

TEXT_TOKENIZER = DATA / "tokenizers" / "qwen2.5-small"
WHOLE_TOKENIZER = DATA / "tokenizers" / "qwen2.5"
"""The tokenizer with the released checkpoints' ids."""
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != "
    "'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] "
    "}}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in "
    "message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set "
    "image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROCESSOR = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}


def checkpoint_folder(config: Config) -> Path:
    """The folder of the checkpoint that a config names."""
    assert config.model.source
    return Path(config.model.source)


def write_visual(folder: Path, template: str = TEMPLATE, tokenizer: Path = TEXT_TOKENIZER, **processor: Any) -> str:
    """The folder of a visual checkpoint, with the layout of the released ones; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | processor))
    return str(folder)


@functools.cache
def transformers_processor(folder: str) -> Qwen2_5_VLProcessor:
    """transformers' processor of Qwen2.5-VL. Its part for videos needs torchvision and is left out."""
    processor = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor.tokenizer, processor.video_processor = tokenizer, None
    bounds = {name: PROCESSOR[name] for name in ("min_pixels", "max_pixels")}
    processor.image_processor = Qwen2VLImageProcessorPil(**bounds)
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    processor.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return processor


def transformers_ids(folder: str, messages: list[dict[str, Any]], files: list[bytes]) -> list[int]:
    """Ids of a conversation with images by transformers."""
    processor = transformers_processor(folder)
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    images = [Image.open(io.BytesIO(data)) for data in files]
    return list(processor(images=images or None, text=[text])["input_ids"][0])
