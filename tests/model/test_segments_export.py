"""The embedded visual policy as a checkpoint of Qwen2.5-VL: transformers computes the same logits from images."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pspo_jax.commands.export import write_model
from pspo_jax.config.defaults import replace
from pspo_jax.config.schema import Config
from pspo_jax.data.image_batches import gather, image_room
from pspo_jax.data.images.processor import normalised
from pspo_jax.data.synthetic.segments import PROCESSOR, TOWER, UNIT
from pspo_jax.model.huggingface.load import load_params, read_source
from pspo_jax.model.transformer import transformer
from pspo_jax.model.vision import image_tokens
from pspo_jax.model.weights import table
from pspo_jax.rewards.task import make_char_tokenizer, make_task
from pspo_jax.training.architectures import architecture_for
from tests.model.checkpoints import torch, transformers

FIELDS = {"task.name": "segments", "task.image_widths": "24,32", "task.train_prompts": 8, "rollout.prompts": 8}


def test_transformers_reads_the_export(tmp_path):
    config = replace(Config(), FIELDS)
    architecture = architecture_for(config)[2]
    model = transformer(architecture)
    noise = jax.random.split(jax.random.key(1), 100)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise[x.size % 100], x.shape), model.init(noise[0]))
    write_model(tmp_path, config, params)
    hf, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    train = make_task(config, make_char_tokenizer(config)).train
    rows = np.arange(4)
    batch = gather(train, rows, np.ones(4, np.float32), image_room(TOWER, train))
    assert len(set(batch.lengths.tolist())) > 1

    @jax.jit
    def logits(params, tokens, images):
        embedded = image_tokens(model.encode_images(params, images), images)
        return model.logits(params, model.hidden(params, tokens, images=embedded))

    ours = logits(params, jnp.asarray(batch.tokens), jax.tree.map(jnp.asarray, batch.images))
    allowed = [i for i in range(20) if i not in architecture.forbidden]
    for i, n in enumerate(batch.lengths.tolist()):
        ids = torch.as_tensor(batch.tokens[i : i + 1, :n].astype(np.int64))
        (image,) = train.images.of(i, ids[0].tolist())
        hf.model.rope_deltas = None
        with torch.no_grad():
            right = hf(
                input_ids=ids,
                pixel_values=torch.as_tensor(normalised(image.patches, PROCESSOR)),
                image_grid_thw=torch.as_tensor([[1, image.rows, image.columns]]),
                mm_token_type_ids=(ids == UNIT).long(),
            ).logits[0]
        np.testing.assert_allclose(ours[i, :n][:, allowed], right.numpy()[:, allowed], atol=2e-5)

    again = read_source(replace(Config(), {"task.name": "math", "model.source": str(tmp_path)}).model, True)
    assert again.architecture.vision == TOWER
    here = NamedSharding(jax.make_mesh((1,), ("one",)), PartitionSpec())
    shardings = jax.tree.map(lambda _: here, params)
    loaded = load_params(again, table(again.architecture), shardings, "float32")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
