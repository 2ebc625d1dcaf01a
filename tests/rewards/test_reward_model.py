"""The reward model: scores of random checkpoints equal transformers', on one device and on eight; what is refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspo_jax.config.defaults import replace
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.rewards import VerifierConfig
from pspo_jax.config.validation import validate
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.data.task import CompletionBatch
from pspo_jax.data.tokenizer import load_tokenizer
from pspo_jax.model.huggingface.load import read_classifier
from pspo_jax.planning.memory import _residents
from pspo_jax.rewards.reward_model import _load, batches, make_scorer, row_of, scores
from pspo_jax.rewards.task import make_task
from pspo_jax.training.setup import prepare
from pspo_jax.verifiers.workers.pool import Pool
from tests.helpers import tiny_config
from tests.model.checkpoints import SMALL, spread, torch, transformers

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}${% endif %}{% endfor %}"


def write_classifier(folder, family, seed=0, labels=1, **fields):
    """A torch reward model of random weights, saved to `folder` with the demo's tokenizer."""
    config = transformers.AutoConfig.for_model(family, **(SMALL | {"num_labels": labels} | fields))
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    spread(model)
    model.save_pretrained(folder)
    tokenizer = TOKENIZER.to_hf()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_scores_are_those_of_transformers(family, tmp_path):
    model = write_classifier(tmp_path, family, seed=3)
    found = read_classifier(str(tmp_path), tiny_config().model, "reward.model")
    rng = np.random.default_rng(0)
    lengths = np.array([1, 5, 9, 12, 12, 3, 7, 2])
    tokens = np.where(np.arange(12) < lengths[:, None], rng.integers(3, 97, (8, 12)), SMALL["pad_token_id"])
    with torch.no_grad():
        want = model(torch.as_tensor(tokens), attention_mask=torch.as_tensor(tokens != 0).long()).logits[:, 0].numpy()
    loaded = _load(found)
    with jax.set_mesh(loaded.mesh):
        ours = scores(found.source.architecture, loaded.weights, loaded.head, jnp.asarray(tokens), jnp.asarray(lengths))
    assert loaded.mesh.devices.size == 8 and found.pad_id == 0
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(folder, torch model) of a reward model over the demo's characters, one of which pads."""
    folder = tmp_path_factory.mktemp("reward_model")
    rows = {"vocab_size": 16, "pad_token_id": 14, "eos_token_id": 13, "bos_token_id": None}
    return folder, write_classifier(folder, "qwen2", seed=5, **rows)


def wanted(model, prompt, completion):
    ids = torch.as_tensor([TOKENIZER.encode(prompt + completion + "$")])
    with torch.no_grad():
        return float(model(ids).logits[0, 0])


def test_its_weights_are_in_the_plan(judged):
    """As many bytes on a device as the loaded model has there."""
    folder, _ = judged
    setup = prepare(tiny_config(mesh__data=2, mesh__fsdp=4), weights=False)
    named = setup._replace(config=replace(setup.config, {"reward.model": str(folder)}))
    loaded = _load(read_classifier(str(folder), setup.config.model, "reward.model"))
    first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded.weights)]
    assert loaded.mesh.devices.size == 8 and sum(first) < sum(x.nbytes for x in jax.tree.leaves(loaded.weights)) / 6
    with_model, without = _residents(named), _residents(setup)
    assert with_model == without | {"reward model": sum(first)} and "reward model" not in without


def test_texts_of_any_length_are_scored_in_their_template(judged):
    folder, model = judged
    scorer = make_scorer(tiny_config(reward__model=str(folder), reward__model_rows=2, reward__model_tokens=70))
    texts = ["1", "2+3=5", "9" * 30, "", "7" * 64, "4=4", "8" * 90]
    prompts = [[{"role": "user", "content": f"{i}+1="}] for i in range(len(texts))]
    found = scorer(prompts, texts)()
    want = [wanted(model, f"{i}+1=", text) for i, text in enumerate(texts)]
    np.testing.assert_allclose(found[:-1], want[:-1], rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert np.isnan(found[-1])


def test_rows_end_where_transformers_takes_the_score():
    tokenizer = TOKENIZER.to_hf()
    prompt = [{"role": "user", "content": "1+1="}]
    assert row_of(tokenizer, prompt, "2", None) == TOKENIZER.encode("1+1=2$")
    assert row_of(tokenizer, prompt, "2$", None) == TOKENIZER.encode("1+1=2$")
    assert row_of(tokenizer, prompt, "2", TOKENIZER.eos_token_id) == TOKENIZER.encode("1+1=2")
    tokenizer.chat_template = TEMPLATE
    assert row_of(tokenizer, prompt, "2", None) == TOKENIZER.encode("1+1=2$")


def test_batches_hold_every_text_that_fits_once():
    rng = np.random.default_rng(0)
    ids = [[0] * int(n) for n in rng.integers(0, 20, 50)]
    found = batches(ids, 7, 15)
    places = [i for part in found for i in part]
    assert sorted(places) == [i for i, row in enumerate(ids) if 0 < len(row) <= 15]
    assert all(len(part) <= 7 for part in found)
    lengths = [len(ids[i]) for i in places]
    assert lengths == sorted(lengths)


def test_it_is_a_term_of_the_reward(judged, tmp_path):
    folder, model = judged
    rows = [{"problem": f"{i}+{i}=", "answer": f"{2 * i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        task__name="math", task__train_data=str(tmp_path / "rows.jsonl"), task__train_prompts=0,
        task__heldout_prompts=4, task__cache=str(tmp_path / "cache"), prompt__template="none",
        model__tokenizer=str(folder),
        reward__terms="accuracy=1, reward_model=2", reward__model=str(folder), rollout__prompts=4,
        reward__model_tokens=12,
    )  # fmt: skip
    tokenizer = load_tokenizer(config, None, None)
    with Pool(VerifierConfig(workers=1, deadline=30)) as pool:
        task = make_task(config, tokenizer, pool)
        texts = [["4", "5"], ["5+1=6", "9" * 12]]
        ids = [[TOKENIZER.encode(text + "$") for text in row] for row in texts]
        lengths = np.array([[len(one) for one in row] for row in ids])
        tokens = np.zeros((2, 2, lengths.max()), np.int32)
        for (b, g), n in np.ndenumerate(lengths):
            tokens[b, g, :n] = ids[b][g]
        batch = CompletionBatch(task.train, np.array([2, 3]), tokens, lengths, np.ones((2, 2), bool), 1)
        found = task.reward_fn(batch)()
        bare = task.reward_fn(batch._replace(wants_reward=False))()
    questions = [task.train.texts[2], task.train.texts[3]]
    want = [[wanted(model, question, text) for text in row] for question, row in zip(questions, texts, strict=True)]
    value = found.terms["reward_model"]
    np.testing.assert_allclose(value[0], want[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.reward[0], found.verdicts[0] + 2 * value[0], rtol=1e-5)
    assert np.isnan(value[1, 1]) and np.isnan(found.reward[1, 1]) and found.failed["reward_model"][1, 1]
    assert "reward_model" not in bare.terms


def test_what_is_no_reward_model_is_refused(tmp_path):
    write_classifier(tmp_path / "two", "llama", labels=2)
    config = transformers.AutoConfig.for_model("qwen2", **SMALL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "causal")
    for name, words in (("two", "has 2 labels"), ("causal", "lacks score.weight"), ("none", "no such folder")):
        with pytest.raises(ConfigError) as refused:
            read_classifier(str(tmp_path / name), tiny_config().model, "reward.model")
        text = str(refused.value)
        assert text.startswith(f"reward.model={tmp_path / name}: ") and words in text and "\n" not in text


def test_the_term_needs_a_checkpoint():
    values = {"task__name": "math", "task__train_data": "rows.jsonl", "model__tokenizer": "x"}
    with pytest.raises(ConfigError, match=r"^reward\.model=None: "):
        validate(tiny_config(**values, reward__terms="reward_model=1"))
    with pytest.raises(ConfigError, match=r"^reward\.model=x: "):
        validate(tiny_config(**values, reward__model="x"))
