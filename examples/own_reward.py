"""A reward of your own on a task of the package, with a callback. Run it with `python examples/own_reward.py [FOLDER]`.

The task is the embedded arithmetic, whose completions are sums such as `-4=23+8=31$`. The reward pays for the last
number alone, and the callback stops the run once the mean reward of a step is high enough.
"""

import sys

import pspo_jax as pj


def last_number(completions: list[str], answers: list[str]) -> list[float]:
    """1 where the text after the last `=` is the gold answer; a quarter where it is within one of it."""
    rewards = []
    for text, gold in zip(completions, answers, strict=True):
        found = text.rpartition("=")[2]
        near = found.isdecimal() and abs(int(found) - int(gold)) <= 1
        rewards.append(1.0 if found == gold else 0.25 if near else 0.0)
    return rewards


def stop_at(wanted: float) -> pj.Callback:
    """A callback that prints each step's mean reward, and stops the run when it reaches `wanted`."""

    def callback(step: int, metrics: dict[str, float | int]) -> bool:
        print(f"step {step}: reward {metrics['reward']:.3f}")
        return metrics["reward"] >= wanted

    return callback


def main(folder: str, wanted: float = 0.8, **fields: float | str | bool) -> pj.TrainResult:
    settings = {"run.dir": folder, "run.steps": 40, "log.report": False}
    config = pj.replace(pj.Config(), settings | {k.replace("__", "."): v for k, v in fields.items()})
    return pj.train(config, reward=last_number, callbacks=[stop_at(wanted)])


if __name__ == "__main__":
    result = main(*sys.argv[1:] or ["runs/own_reward"])
    print(f"{'finished' if result.finished else 'stopped'} at step {result.step}: {result.scores}")
