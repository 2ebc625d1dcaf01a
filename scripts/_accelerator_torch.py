"""The PyTorch parts of bench_accelerator.py, which run in an interpreter that may lack JAX."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import _bench
from _accelerator import BEGAN, Job, check, emit, low_limit, middle, named, repeat, train_case, train_work
from _bench import Work

GENERATE, AUTOCAST = "Hugging Face generate", "PyTorch autocast, checkpointing"


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_about() -> dict[str, Any]:
    import importlib.metadata as metadata

    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {k: metadata.version(k) for k in ("torch", "transformers")} | {"accelerator": f"{name} (PyTorch)"}


def torch_peak() -> dict[str, float]:
    import torch

    return {"peak_device_mib": torch.cuda.max_memory_allocated() / 2**20} if torch.cuda.is_available() else {}


def qwen(work: Work, dtype: str) -> Any:
    """A transformers model of the same shape with random weights, made on the device."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**_bench.transformers_fields(work))
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(torch_device()):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve_generate(job: Job) -> None:
    """Measure `generate` at the same work, with as many of the new tokens as fit into half of its time limit."""
    import torch
    from transformers import GenerationConfig

    work = job.work
    model = qwen(work, work.dtype).eval()
    ids = torch.tensor(_bench.prompt_ids(work), device=torch_device()).repeat_interleave(work.group_size, dim=0)

    @torch.no_grad()
    def timed(count: int) -> float:
        settings = GenerationConfig(
            max_new_tokens=count, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
        )
        synchronise()
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        synchronise()
        seconds = time.perf_counter() - start
        check(out[:, ids.shape[1] :].numel(), dataclasses.replace(work, new_tokens=count))
        return seconds

    low = low_limit(work)
    timed(low)
    first = time.perf_counter() - BEGAN
    short = timed(low)
    # This estimate includes the prompts and is therefore too high, so that the time limit holds.
    room = int(job.left() / 2 / max(short / low, 1e-6))
    high = max(low + 1, min(work.new_tokens, room))
    long = timed(high)
    step = (long - short) / (high - low)
    values, note = {"tokens_per_s": work.rows / step}, f"(slope from {low} to {high})"
    emit(f"decode, {named(work)}", GENERATE, [step], torch_about(), note, values=values, first=first)
    if high == work.new_tokens:
        values = {"tokens_per_s": work.rows * high / long} | torch_peak()
        emit(f"rollout, {named(work)}", GENERATE, [long], torch_about(), values=values)


def serve_autocast(job: Job) -> None:
    """Measure a policy-gradient step of these rows: autocast over float32 weights, checkpointed blocks, fused AdamW."""
    import torch

    work, device = job.train, torch_device()
    model = qwen(work, "float32").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=device == "cuda")
    p, t = work.prompt_tokens, work.new_tokens
    rows = torch.randint(0, work.shape.vocab, (work.rows, p + t), device=device)
    advantages = torch.randn(work.rows, 1, device=device)

    def backward(part: Any, weight: Any) -> None:
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(input_ids=part).last_hidden_state[:, p - 1 : -1]
            logits = model.lm_head(hidden).float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, p:].flatten(), reduction="none")
        (losses.view(part.shape[0], t) * weight).sum().div(work.rows * t).backward()

    def call() -> dict[str, float]:
        synchronise()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        size = work.microbatch_rows
        for i in range(0, work.rows, size):
            backward(rows[i : i + size], advantages[i : i + size])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        synchronise()
        return {"seconds": time.perf_counter() - start}

    first, calls = repeat(job, call)
    values = {"tokens_per_s": work.rows * (p + t) / middle(calls, "seconds")} | torch_peak()
    more = {"values": values, "work": train_work(work), "first": first}
    note = f"({work.microbatch_rows} rows a microbatch)"
    emit(train_case(work), AUTOCAST, [c["seconds"] for c in calls], torch_about(), note, **more)


PARTS: dict[str, Callable[[Job], None]] = {"generate": serve_generate, "autocast": serve_autocast}

if __name__ == "__main__":
    asked = Job.parse(sys.argv[2])
    if (torch_device() == "cuda") != (asked.platform == "gpu"):
        raise SystemExit(f"PyTorch runs on {torch_device()} here, not on {asked.platform}")
    PARTS[sys.argv[1]](asked)
