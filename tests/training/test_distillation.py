"""On-policy distillation: its gradient against torch and against the exact KL, what it does, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pspo_jax as pj
from pspo_jax.config.fields import ConfigError
from pspo_jax.config.strategies import LossConfig
from pspo_jax.config.validation import validate
from pspo_jax.data.synthetic.arithmetic import TOKENIZER
from pspo_jax.distributed.mesh import make_mesh, params_shardings
from pspo_jax.losses import LossInputs, compute_loss, denominators
from pspo_jax.model import transformer
from pspo_jax.model.huggingface.load import read_source
from pspo_jax.model.weights import entries, table, to_hf
from pspo_jax.planning.memory import _residents, _update_details
from pspo_jax.rollout import SamplingParams, make_sampler
from pspo_jax.training.algorithm import build
from pspo_jax.training.saved_weights import source_weights
from pspo_jax.training.setup import prepare
from pspo_jax.training.step import init_state, make_train_step
from pspo_jax.training.teachers import find_teacher, vocabulary_of
from tests.conftest import REPO
from tests.helpers import random_prompts, relative, slow_except, tiny_config, tiny_policy
from tests.losses.golden import evaluate
from tests.model.checkpoints import torch, write_checkpoint
from tests.runs.processes import SMALL, metrics

P, PAD, EOS = 9, 14, 13
ROWS = {"vocab_size": 16, "eos_token_id": 13, "bos_token_id": None, "pad_token_id": 14}
SGD = optax.sgd(1.0)


def rewards_of(rollouts):
    """Varied and cheap: the share of even tokens."""
    even = (rollouts.tokens % 2 == 0) & rollouts.mask
    return even.sum(-1) / rollouts.lengths


# --- gradients ---


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), st.integers(2, 9))
def test_the_expected_gradient_is_that_of_the_reverse_kl(seed, v):
    """Rows are all tokens of one distribution, each weighed by its probability, so that the expectation is exact."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 1.5, v), jnp.float32)
    log_q = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1.5, v), jnp.float32))
    log_pi = jax.nn.log_softmax(logits)

    def loss(logits):
        now = jax.nn.log_softmax(logits)[:, None]
        inputs = LossInputs(
            mask=jnp.ones((v, 1), bool),
            counted=jnp.ones(v, bool),
            advantages=jnp.zeros(v),
            loss_weight=jnp.exp(log_pi) * v,
            old_log_probs=log_pi[:, None],
            behaviour_log_probs=log_pi[:, None],
            token_advantages=(log_q - log_pi)[:, None],
        )
        config = LossConfig(surrogate="clip", ratio="token", aggregation="dapo", clip_low=0.2, clip_high=0.28)
        return compute_loss(now, jnp.zeros((v, 1)), inputs, config, denominators(inputs), 1)[0]

    def kl(logits):
        log_p = jax.nn.log_softmax(logits)
        return (jnp.exp(log_p) * (log_p - log_q)).sum()

    np.testing.assert_allclose(jax.grad(loss)(logits), jax.grad(kl)(logits), atol=2e-5)


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo", "reinforce"])
def test_every_surrogate_takes_advantages_of_tokens(surrogate):
    """Off the policy, each row of one token is what a completion of that advantage would be."""
    rng = np.random.default_rng(3)
    shape = (5, 4)
    log_probs = jnp.asarray(-rng.gamma(1.0, 1.0, shape), jnp.float32)
    old = log_probs + jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
    by_row, by_token = jnp.asarray(rng.normal(size=5), jnp.float32), jnp.asarray(rng.normal(size=shape), jnp.float32)
    config = LossConfig(surrogate=surrogate, ratio="token", aggregation="token_sum", clip_low=0.2, clip_high=0.28)

    def inputs(r, t, advantages, token_advantages, old):
        ones = jnp.ones((r, t), bool)
        return LossInputs(
            mask=ones, counted=jnp.ones(r, bool), advantages=advantages, loss_weight=jnp.ones(r), old_log_probs=old,
            behaviour_log_probs=old, token_advantages=token_advantages,
        )  # fmt: skip

    wide = inputs(5, 4, by_row, by_token, old)
    flat = inputs(20, 1, (by_row[:, None] + by_token).reshape(-1), None, old.reshape(-1, 1))
    one = evaluate(log_probs, jnp.ones(shape), wide, config, denominators(wide))
    other = evaluate(log_probs.reshape(-1, 1), jnp.ones((20, 1)), flat, config, denominators(flat))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1].reshape(-1, 1), other[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(folder of the policy, its torch model, folder of the teacher, its torch model), of two families and sizes; the
    teacher's embedding has four rows more."""
    folder = tmp_path_factory.mktemp("distillation")
    policy = write_checkpoint(folder / "policy", "qwen2", seed=1, **ROWS)
    larger = {"vocab_size": 20, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
    teacher = write_checkpoint(folder / "teacher", "llama", seed=2, **(ROWS | larger | {"num_key_value_heads": 3}))
    TOKENIZER.to_hf().save_pretrained(folder / "teacher")
    return folder / "policy", policy, folder / "teacher", teacher


def test_the_teacher_s_weights_are_in_the_plan(checkpoints):
    """In float32, the type of tiny models; each device holds a quarter of what fsdp splits, and norms as a whole."""
    plain = prepare(tiny_config(mesh__data=2, mesh__fsdp=4), weights=False)
    taught = prepare(tiny_config(mesh__data=2, mesh__fsdp=4, teacher__source=str(checkpoints[2])), weights=False)
    sizes = [p.numel() * (4 if p.ndim == 1 else 1) for p in checkpoints[3].parameters()]
    assert _residents(taught) == _residents(plain) | {"teacher": sum(sizes)}


def test_a_divergence_adds_the_teacher_s_hidden_states_to_the_plan(checkpoints):
    """Of a microbatch of 16 rows of 12 tokens, on one device; the sampled estimate has none in the update."""

    def details(kind):
        fields = {"mesh__data": 1, "loss__microbatch_rows": 16, "teacher__source": str(checkpoints[2])}
        return _update_details(prepare(tiny_config(**fields, teacher__divergence=kind), weights=False))

    name, plain, taught = "the teacher's hidden states", details("sampled"), details("forward_kl")
    assert name not in plain and taught[name] == 16 * 12 * 48 * 4
    # Half a chunk of logits, of 16 ids for the policy alone and of 16 and 20 for both.
    chunk = "a block's activations, or a chunk of logits"
    assert taught[chunk] == pytest.approx(36 / 16 * plain[chunk])


def policy_of(folder, mesh):
    """(architecture, weights) of a checkpoint, two of whose ids are never drawn."""
    source = read_source(dataclasses.replace(tiny_config().model, source=str(folder)))
    a = dataclasses.replace(source.architecture, forbidden=(14, 15))
    return a, source_weights(source, a, mesh)


def torch_log_probs(model, rows, start, n, temperature):
    """Log-probs [T, 14] of all tokens at each place of a row from `start` on, without the ids that are never drawn."""
    logits = model(torch.as_tensor(rows[None]).long()).logits[0, start - 1 : start + n - 1] / temperature
    return torch.log_softmax(logits[:, :14], -1)


def torch_divergence(log_p, log_q, kind):
    """Divergences [T] of two distributions over 14 tokens."""
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    log_m = torch.log((log_p.exp() + 3 * log_q.exp()) / 4)
    of_mixture = 0.75 * kl(log_q, log_m) + 0.25 * kl(log_p, log_m)
    return {"forward_kl": kl(log_q, log_p), "reverse_kl": kl(log_p, log_q), "jsd": of_mixture}[kind]


@pytest.mark.parametrize("kind", slow_except(["sampled"], ["sampled", "forward_kl", "reverse_kl", "jsd"]))
def test_a_step_equals_torch_s(checkpoints, kind):
    folder, torch_policy, teacher_folder, torch_teacher = checkpoints
    settings = {"teacher__weight": 0.7, "teacher__reward_weight": 0.4, "rollout__temperature": 0.8}
    settings |= {"teacher__divergence": kind, "teacher__jsd_beta": 0.75 if kind == "jsd" else 0.5}
    config = tiny_config(algorithm__name="grpo", teacher__source=str(teacher_folder), **settings)
    mesh = make_mesh(config, devices=jax.devices()[:1])
    a, params = policy_of(folder, mesh)
    teacher = find_teacher(config, vocabulary_of(TOKENIZER), a)
    model, algorithm = transformer(a), build(config)
    sample = make_sampler(model, config.rollout.group_size, config.rollout.max_new_tokens, PAD)
    prompts = random_prompts(config.rollout.prompts, P)
    rollouts = sample(params, prompts, jax.random.key(5), SamplingParams.of(config.rollout, [EOS]))
    rewards = rewards_of(rollouts)
    before = jax.tree.map(jnp.copy, params)
    state = init_state(params, SGD, algorithm, config, 40, P, jax.random.key(0)).replace(teacher=teacher.load(mesh))
    after, found = make_train_step(model, SGD, algorithm, config, teacher=teacher.model)(state, rollouts, rewards)

    r = np.asarray(rewards, np.float64)
    by_reward = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    total, count, kl = 0.0, int(rollouts.lengths.sum()), 0.0
    for b, g in np.ndindex(*r.shape):
        start, n = int(prompts.lengths[b]), int(rollouts.lengths[b, g])
        row = np.concatenate([prompts.tokens[b, :start], rollouts.tokens[b, g, :n]])
        every_pi = torch_log_probs(torch_policy, row, start, n, 0.8)
        with torch.no_grad():
            every_q = torch_log_probs(torch_teacher, row, start, n, 0.8)
        drawn = torch.arange(n), torch.as_tensor(row[start:]).long()
        log_pi, log_q = every_pi[drawn], every_q[drawn]
        gain = log_q - log_pi.detach()
        taught = -gain * log_pi if kind == "sampled" else torch_divergence(every_pi, every_q, kind)
        total = total + (0.7 * taught - 0.4 * by_reward[b, g] * log_pi).sum() / count
        kl -= float(gain.sum()) / count
    torch_policy.zero_grad()
    total.backward()
    grads = {name: p.grad.numpy() for name, p in torch_policy.named_parameters()}
    change = {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.subtract, before, after.params))
    }
    ours = {name: to_hf(w, change[path] if i is None else change[path][i]) for path, name, w, i in entries(table(a))}
    assert relative(ours, {name: grads[name] for name in ours}) < 2e-4
    assert float(found["teacher/kl"]) == pytest.approx(kl, rel=1e-4)
    assert float(found["teacher/kl"]) > 0.1


@functools.cache
def updated(mesh_of: tuple[int, ...] = (), **fields):
    """(params after a step of SGD, metrics) of a tiny policy and a teacher of another shape, on equal rollouts."""
    config = tiny_config(algorithm__name="grpo", teacher__source="teacher", **fields)
    model, params, a = tiny_policy(config)
    teacher = dataclasses.replace(a, layers=3, width=32, layer_rotary=(0,) * 3, windows=(None,) * 3)
    of_teacher = transformer(teacher)
    weights = jax.jit(of_teacher.init)(jax.random.key(7))
    sample = make_sampler(model, config.rollout.group_size, config.rollout.max_new_tokens, PAD)
    prompts = random_prompts(config.rollout.prompts, P)
    rollouts = sample(params, prompts, jax.random.key(5), SamplingParams.of(config.rollout, [EOS]))
    algorithm = build(config)

    def step(place=lambda model, tree: tree):
        state = init_state(place(model, params), SGD, algorithm, config, 40, P, jax.random.key(0))
        state = state.replace(teacher=place(of_teacher, weights))
        made = make_train_step(model, SGD, algorithm, config, teacher=of_teacher)
        after, found = made(state, rollouts, rewards_of(rollouts))
        return jax.device_get(after.params), {name: float(value) for name, value in found.items()}

    if not mesh_of:
        return step()
    sizes = dict(zip(("data", "fsdp", "tensor", "slices"), mesh_of, strict=False))
    mesh = make_mesh(tiny_config(**{f"mesh__{name}": size for name, size in sizes.items()}), a)
    with jax.set_mesh(mesh):
        return step(lambda model, tree: jax.device_put(tree, params_shardings(mesh, tree, model.axes)))


@pytest.mark.slow
def test_the_teacher_s_part_and_that_of_rewards_add_up():
    initial = tiny_policy(tiny_config(algorithm__name="grpo", teacher__source="teacher"))[1]

    def change(weight, reward_weight):
        fields = {"teacher__weight": weight, "teacher__reward_weight": reward_weight}
        return jax.tree.map(jnp.subtract, updated(**fields)[0], initial)

    alone, both, mixed = change(1.0, 0.0), change(1.0, 1.0), change(0.5, 2.0)
    rewards = jax.tree.map(jnp.subtract, both, alone)
    assert relative(mixed, jax.tree.map(lambda t, r: 0.5 * t + 2.0 * r, alone, rewards)) < 1e-4
    assert relative(alone, both) > 0.1


PACKED = {"loss__packing": True, "loss__microbatch_rows": 8}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("sampled", PACKED),
        ("jsd", PACKED),
        ("jsd", PACKED | {"loss__share_prompts": False}),
        ("jsd", {"loss__microbatch_rows": 8}),
    ],
)
@pytest.mark.slow
def test_packing_and_microbatches_change_nothing(kind, fields):
    plain = updated(loss__microbatch_rows=0, teacher__divergence=kind)
    cut = updated(**fields, teacher__divergence=kind)
    assert relative(cut[0], plain[0]) < 1e-5
    assert cut[1]["teacher/kl"] == pytest.approx(plain[1]["teacher/kl"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *(("sampled", mesh) for mesh in ((8, 1, 1), (2, 2, 2), (1, 4, 2))),
        *(("forward_kl", mesh) for mesh in ((8, 1, 1), (1, 4, 2), (2, 2, 2, 2))),
    ],
)
def test_a_mesh_changes_nothing(kind, mesh):
    fields = {"loss__microbatch_rows": 0, "teacher__divergence": kind}
    plain, split = updated(**fields), updated(mesh, **fields)
    assert relative(split[0], plain[0]) < 1e-5
    assert split[1]["teacher/kl"] == pytest.approx(plain[1]["teacher/kl"], rel=1e-4)


@pytest.mark.slow
def test_each_divergence_acts_and_has_the_same_estimate_beside_it():
    """teacher/kl does not depend on what is minimised, and minibatches of several passes leave it as it is."""
    found = {kind: updated(teacher__divergence=kind) for kind in ("sampled", "forward_kl", "reverse_kl", "jsd")}
    found["cut"] = updated(teacher__divergence="jsd", loss__minibatches=2, loss__num_iterations=2)
    for metrics_of in (metrics_of for _, metrics_of in found.values()):
        assert metrics_of["teacher/kl"] == pytest.approx(found["sampled"][1]["teacher/kl"], rel=1e-4)
    for one, other in itertools.combinations(found, 2):
        assert relative(found[one][0], found[other][0]) > 1e-3


# --- runs ---


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """(folder of the teacher's run, folder of a run of four steps that it taught)."""
    folder = tmp_path_factory.mktemp("taught")
    more = {"model.width": 16, "sft.steps": 60, "sft.batch": 16, "run.steps": 1}
    pj.train(config_of(folder / "teacher", **more))
    pj.train(config_of(folder / "whole", folder / "teacher", **{"run.steps": 4}))
    return folder / "teacher", folder / "whole"


def config_of(folder, teacher=None, **fields):
    values = SMALL | {
        "run.dir": str(folder),
        "run.fingerprint": True,
        "algorithm.name": "grpo",
        "sft.steps": 0,
        "eval.every": 0,
        "eval.samples": 1,
        "checkpoint.every": 1,
        "optimizer.schedule": "constant",
        "log.report": False,
        "log.to": "none",
        "log.completions_every": 0,
    }
    if teacher is not None:
        values |= {"teacher.source": str(teacher), "teacher.step": "cold_start"}
    return pj.replace(pj.Config(), values | fields)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_bit(taught, tmp_path):
    teacher, whole = taught
    stopped = pj.train(config_of(tmp_path, teacher, **{"run.steps": 4}), callbacks=[lambda step, values: step == 2])
    assert (stopped.step, stopped.finished) == (2, False)
    assert pj.train(config_of(tmp_path, teacher, **{"run.steps": 4})).finished
    assert metrics(tmp_path) == metrics(whole)
    assert metrics(whole)[1]["teacher/kl"] > 0.5
    saved = json.loads((whole / "checkpoints" / "4" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert saved["teacher"] and not any("teacher" in name for name in saved["layout"])


@pytest.mark.slow
def test_a_run_with_a_divergence_goes_on_to_the_bit(taught, tmp_path):
    fields = {"run.steps": 4, "teacher.divergence": "forward_kl", "optimizer.learning_rate": 3e-3}
    whole = config_of(tmp_path / "whole", taught[0], **fields)
    parts = config_of(tmp_path / "parts", taught[0], **fields)
    pj.train(whole)
    assert pj.train(parts, callbacks=[lambda step, values: step == 2]).step == 2
    assert pj.train(parts).finished
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    kl = [line["teacher/kl"] for line in metrics(tmp_path / "whole")[1:]]
    assert kl[-1] < kl[0]


@pytest.mark.slow
def test_another_teacher_is_refused_when_a_run_goes_on(taught, tmp_path):
    teacher, other = taught
    pj.train(config_of(tmp_path, teacher, **{"run.steps": 1}))
    config = config_of(tmp_path, other, **{"run.steps": 2, "teacher.step": "4"})
    with pytest.raises(ConfigError, match=r"^teacher\.source=[^\n]*: its weights differ from those that have taught"):
        pj.train(config)


# --- what is refused ---


def test_tokens_are_compared_before_anything_else(checkpoints):
    teacher = checkpoints[2]
    config = tiny_config(teacher__source=str(teacher))
    policy = tiny_policy(config)[2]
    swapped = TOKENIZER.characters[1] + TOKENIZER.characters[0] + TOKENIZER.characters[2:]
    ours = {token: i for i, token in enumerate(swapped)}
    with pytest.raises(ConfigError) as refused:
        find_teacher(config, ours, policy, weights=False)
    text = str(refused.value)
    assert text.startswith(f"teacher.source={teacher}: its tokenizer is not the policy's: 2 of ") and "\n" not in text
    assert f"such as 0, which is {swapped[1]!r} there and {swapped[0]!r} here" in text
    longer = {token: i for i, token in enumerate(TOKENIZER.characters + "é")}
    wide = dataclasses.replace(policy, vocab_size=17)
    with pytest.raises(ConfigError, match=r"1 of 17 ids are other tokens|1 of \d+ ids .* which is no token there"):
        find_teacher(config, longer, wide, weights=False)
    with pytest.raises(ConfigError, match=r"has no get_vocab\(\)"):
        find_teacher(config, None, policy, weights=False)
    found = find_teacher(config, vocabulary_of(TOKENIZER), policy)
    assert found is not None and found.architecture.forbidden == (14, 15, 16, 17, 18, 19)


def test_what_a_teacher_cannot_be(tmp_path):
    policy, tokens = tiny_policy(tiny_config())[2], vocabulary_of(TOKENIZER)
    cases = [
        ({"teacher__source": str(tmp_path / "nothing")}, "no such folder"),
        ({"teacher__source": str(tmp_path)}, "is an empty folder"),
        ({"teacher__source": str(tmp_path), "teacher__step": "best"}, "no folder of a training run"),
    ]
    for fields, words in cases:
        with pytest.raises(ConfigError) as refused:
            find_teacher(tiny_config(**fields), tokens, policy)
        text = str(refused.value)
        assert re.match(r"teacher\.(source|step)=", text) and words in text and "\n" not in text, text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss.name": "vespo"}, r"loss\.surrogate=vespo: cannot be used with teacher\.source"),
        ({"loss.name": "gspo"}, r"loss\.ratio=sequence: cannot be used with teacher\.source"),
        ({"algorithm.name": "popo"}, r"replay\.name=popo: leaves out groups by their rewards"),
        ({"algorithm.name": "dapo"}, r"rollout\.dynamic_sampling_rounds=10: leaves out groups by their rewards"),
        (
            {"teacher.divergence": "forward_kl", "algorithm.name": "grpo_filter"},
            r"replay\.name=filter: leaves out groups by their rewards",
        ),
        ({"teacher.jsd_beta": 0.3}, r"teacher\.jsd_beta=0\.3: teacher\.divergence=sampled does not read it"),
        ({"teacher.divergence": "jsd", "teacher.jsd_beta": 1.0}, r"teacher\.jsd_beta=1\.0: must be less than 1"),
        (
            {"teacher.divergence": "jsd", "loss.clip_low": 0.1},
            r"loss\.clip_low=0\.1: with teacher\.divergence=jsd and teacher\.reward_weight=0 the loss has no surrogate",
        ),
        ({"teacher.step": "last"}, r"teacher\.step='last': must be"),
        (
            {"teacher.source": None, "teacher.weight": 0.5},
            r"teacher\.weight=0\.5: teacher\.source=None does not",
        ),
    ],
)
def test_settings_are_checked(fields, words):
    values = {"algorithm.name": "grpo", "teacher.source": "somewhere"} | fields
    with pytest.raises(ConfigError, match=words):
        validate(pj.replace(pj.Config(), values))
    anyway = {"teacher.step", "teacher.jsd_beta", "loss.name"} & fields.keys()
    if not anyway and values["teacher.source"]:
        validate(pj.replace(pj.Config(), values | {"teacher.reward_weight": 1.0}))


@pytest.mark.slow
def test_the_embedded_policy_learns_from_the_cold_started_one(tmp_path):
    """The commands of docs/teachers.md: from random weights, without a cold start, to nine tenths of the teacher.

    They run as a reader runs them, without the flags of other tests, by which compiled programs are slow. A last run
    takes the teacher over as its own cold start, and evaluates it before its first step.
    """
    page = (REPO / "docs" / "teachers.md").read_text(encoding="utf-8")
    script = re.search(r"```bash\n([^`]*runs/taught[^`]*)```", page)[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(REPO), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    script += "python -m pspo_jax.train --run.dir runs/teacher --run.steps 1 --eval.every 0"
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=env, check=True)
    teacher, taught = (metrics(tmp_path / "runs" / name) for name in ("teacher", "taught"))
    assert taught[-1]["eval/sampled"] >= 0.9 * teacher[0]["eval/sampled"] > 0.3
    assert taught[0]["eval/sampled"] < 0.05
