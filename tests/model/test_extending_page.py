"""The page on adding a model: its code runs as it stands, and its cached model learns and equals the uncached one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pspo_jax as pj
from pspo_jax.model.huggingface import families
from tests.conftest import REPO
from tests.helpers import slow_except
from tests.project.pages import fences

PAGE = (REPO / "docs" / "extending" / "model.md").read_text()


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's code defines; the page asserts that sampler and trainer agree."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(code, "docs/extending/model.md", "exec"), names)
    return names


def test_the_cached_model_draws_the_tokens_of_the_uncached_one(page):
    model, params = page["model"], page["params"]
    plain = pj.from_logits(
        lambda params, tokens: model.logits(params, model.hidden(params, tokens)),
        model.init,
        model.vocab_size,
        forbidden=[page["PAD"]],
    )
    sample = pj.make_sampler(plain, group_size=4, max_new_tokens=8, pad_id=page["PAD"])
    uncached = sample(params, page["prompts"], jax.random.key(1), page["settings"])
    np.testing.assert_array_equal(page["rollouts"].tokens, uncached.tokens)
    np.testing.assert_allclose(page["rollouts"].log_probs, uncached.log_probs, atol=1e-4)


@pytest.mark.parametrize("name", slow_except(["model"], ["model", "summing"]))
def test_the_models_train(page, name):
    """One step on rewards for a token raises its log-probs."""
    model = page[name]
    fields = {"algorithm.name": "grpo", "rollout.prompts": 4, "rollout.group_size": 8, "rollout.max_new_tokens": 6}
    config = pj.replace(pj.Config(), fields)
    algorithm, optimizer = pj.build(config), optax.adam(1e-2)
    state = pj.init_state(
        model.init(jax.random.key(0)),
        optimizer,
        algorithm,
        config,
        num_prompts=4,
        prompt_length=2,
        key=jax.random.key(0),
    )
    sample = pj.make_sampler(model, group_size=8, max_new_tokens=6, pad_id=page["PAD"])
    train_step = pj.make_train_step(model, optimizer, algorithm, config)
    settings = pj.SamplingParams.of(config.rollout, stop_ids=[14])
    prompts = pj.Prompts(jnp.arange(4), jnp.asarray([[3, 1], [4, 1], [5, 9], [2, 6]]), jnp.full(4, 2), jnp.ones(4))
    shares = []
    for i in range(12):
        rollouts = sample(state.params, prompts, jax.random.key(i), settings)
        reward = (np.asarray(rollouts.tokens) == 7).mean(axis=-1)
        shares.append(reward.mean())
        state, metrics = train_step(state, rollouts, reward)
        assert np.isfinite(float(metrics["loss"]))
    assert np.mean(shares[-3:]) > np.mean(shares[:3]) + 0.1


def test_the_names_that_the_page_edits_exist():
    for name in ("FAMILIES", "_WITH_ATTENTION_BIAS", "_WITH_MLP_BIAS", "_refuse", "HfConfig"):
        assert hasattr(families, name) and name in PAGE
    for path in re.findall(r"`((?:pspo_jax|tests|docs)/[\w/]+\.\w+)`", PAGE):
        assert (REPO / path).exists(), path


@pytest.mark.slow
def test_the_edits_of_a_family_are_all_that_it_needs(tmp_path, child_env):
    """The page's edits are made to a copy, where Granite then passes the tests of every family, as the page says."""
    for name in ("pspo_jax", "tests"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    page = fences(REPO / "docs" / "extending" / "model.md")
    edits = "".join(fence.text for fence in page if fence.language == "diff")
    assert edits.count("+++ b/") == 6
    subprocess.run(["git", "apply", "-C1", "-"], input=edits, text=True, cwd=tmp_path, check=True)
    (verify,) = (fence.text for fence in page if "-k granite" in fence.text)
    words = verify.splitlines()[-1].removeprefix("python ")
    env = os.environ | child_env | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        f"{sys.executable} {words}", shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and re.search(r"\b8 passed", done.stdout), done.stdout[-3000:]
