"""The README's example runs as it stands and learns."""

import re

import numpy as np

from tests.conftest import REPO


def test_example_learns():
    text = (REPO / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    history = []
    code = code.replace(
        "    state, metrics = train_step",
        "    history.append(reward.mean())\n    state, metrics = train_step",
    )
    exec(compile(code, "README.md", "exec"), names | {"history": history})
    assert np.mean(history[-5:]) > np.mean(history[:5]) + 0.2, history
