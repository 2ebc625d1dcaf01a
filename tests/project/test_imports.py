"""Every module of the package can be the first that is imported, but for the entry point that a function hides."""

import subprocess
import sys

import pytest

from tests.conftest import REPO

SCRIPT = """
import importlib, os, sys, traceback
from pathlib import Path

root = Path(sys.argv[1])
names = [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in
         sorted((root / "pspo_jax").rglob("*.py"))]
names.remove("pspo_jax.train")  # `pspo_jax.train` is the function
for name in names:
    importlib.import_module(name)
for name in [name for name in sys.modules if name.partition(".")[0] == "pspo_jax"]:
    del sys.modules[name]
bad = 0
for name in names:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            importlib.import_module(name)
            status = 0
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    bad += os.waitpid(pid, 0)[1] != 0
print(len(names), bad)
sys.exit(bool(bad))
"""


@pytest.mark.slow
def test_each_module_can_be_imported_first():
    """A fork of an interpreter that has all other packages, and none of this one, stands for a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(REPO)], capture_output=True, text=True, cwd=REPO, timeout=300
    )
    assert done.returncode == 0, done.stderr
    count, bad = map(int, done.stdout.split())
    assert count > 90 and bad == 0


def test_writing_events_imports_no_torch_and_hides_none():
    """tensorboardX imports torch where it is installed; a run has no use for it."""
    code = (
        "import importlib.util, sys, pspo_jax.runs.events\n"
        "print('torch' in sys.modules, importlib.util.find_spec('torch') is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr
