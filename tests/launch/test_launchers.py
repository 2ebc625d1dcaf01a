"""The launch scripts: what they would run, what they refuse, and a real run by SLURM's variables."""

import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import xla
from tests.conftest import REPO
from tests.distributed.processes import finish_all, free_port, output
from tests.runs.processes import flags

SCRIPTS = REPO / "scripts"
POD = ["--name", "pod", "--zone", "us-east5-b"]


def dry(script, *words, code=0):
    """What a launcher prints with --dry-run; no gcloud, srun or GPU is needed."""
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *words], capture_output=True, text=True, env=os.environ | {"PYTHON": "python3"}
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_tpu_vm_is_created_with_the_software_of_its_chip():
    for kind, version in {
        "v5litepod-8": "v2-alpha-tpuv5-lite",
        "v6e-8": "v2-alpha-tpuv6e",
        "v5p-8": "v2-alpha-tpuv5",
        "v4-8": "tpu-ubuntu2204-base",
    }.items():
        out = dry("tpu_vm_create.sh", *POD, "--type", kind, "--spot", "--dry-run")
        assert out == (
            "+ gcloud compute tpus tpu-vm create pod --zone us-east5-b "
            f"--accelerator-type {kind} --version {version} --spot\n"
        )
    assert "--version mine" in dry("tpu_vm_create.sh", *POD, "--type", "v9-8", "--version", "mine", "--dry-run")


def test_a_slice_is_queued_as_spot_unless_told_otherwise():
    out = dry("tpu_queued_resource.sh", *POD, "--type", "v6e-64", "--valid-for", "6h", "--project", "p", "--dry-run")
    assert out == (
        "+ gcloud compute tpus queued-resources create pod-queue --node-id pod --zone us-east5-b "
        "--accelerator-type v6e-64 "
        "--runtime-version v2-alpha-tpuv6e --spot --valid-until-duration 6h --project p\n"
    )
    assert "--spot" not in dry("tpu_queued_resource.sh", *POD, "--type", "v6e-64", "--on-demand", "--dry-run")
    out = dry("tpu_queued_resource.sh", *POD, "--delete", "--dry-run")
    assert "queued-resources delete pod-queue" in out and "--force" in out


def test_a_pod_run_copies_installs_and_starts_every_worker():
    out = dry(
        "tpu_pod_run.sh",
        *POD,
        "--env",
        "HF_TOKEN=a b",
        "--dry-run",
        "--",
        "--run.dir",
        "/mnt/runs/x",
        "--run.steps",
        "3",
    )
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == ["tar", "gcloud", "gcloud", "gcloud"]
    assert all("--worker=all" in line for line in lines[1:])
    assert "pip" in lines[2] and "tpu" in lines[2]
    assert "pspo_jax.train" in lines[3] and "/mnt/runs/x" in lines[3]
    assert "HF_TOKEN" in lines[3] and "a b" not in out  # its name, and nowhere its value


def test_what_git_ignores_is_not_copied_to_the_workers():
    """Above all runs and weights, which may be many gigabytes."""
    out = dry("tpu_pod_run.sh", *POD, "--dry-run", "--", "--run.dir", "gs://b/r")
    tar = next(line for line in out.splitlines() if " tar " in line)
    left_out = {word.removeprefix("--exclude=").removeprefix("./") for word in shlex.split(tar)[2:]}
    ignored = {line.strip("/") for line in (REPO / ".gitignore").read_text().splitlines()}
    assert ignored <= left_out


def test_processes_of_one_machine_find_each_other():
    words = ["--dry-run", "--", "--run.steps", "2"]
    assert dry("multi_gpu.sh", *words) == "+ python3 -m pspo_jax.train --run.steps 2\n"
    lines = dry("multi_gpu.sh", "--processes", "2", *words).splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert f"CUDA_VISIBLE_DEVICES={number} " in line and f"--distributed.process {number}" in line
        assert "--distributed.coordinator 127.0.0.1:9876 --distributed.processes 2" in line


def test_slurm_starts_one_process_a_task():
    out = dry("slurm.sbatch", "--dry-run", "--run.dir", "/shared/x")
    assert out == "+ srun --kill-on-bad-exit=1 python3 -m pspo_jax.train --run.dir /shared/x\n"
    text = (SCRIPTS / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=TERM@120" in text


def test_the_jobset_has_a_process_a_host():
    job = yaml.safe_load((SCRIPTS / "gke_jobset.yaml").read_text())
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    container = spec["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "pspo_jax.train"]
    topology = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert chips == spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert container["args"][-1] == str(chips)


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("tpu_vm_create.sh", ["--zone", "z"], "--name is missing"),
        ("tpu_vm_create.sh", [*POD, "--type", "v9-8"], "give --version too"),
        ("tpu_vm_create.sh", ["--speed", "9"], "--speed: no such option"),
        ("tpu_queued_resource.sh", POD, "--type is missing"),
        ("tpu_pod_run.sh", [*POD, "--", "--run.steps", "3"], "--run.dir behind --"),
        ("tpu_pod_run.sh", [*POD, "--recreate", "--", "--run.dir", "x"], "--recreate needs --type"),
        ("multi_gpu.sh", ["--run.steps", "3"], "stand behind --"),
    ],
)
def test_what_is_missing_is_said_in_a_line(script, words, says):
    error = dry(script, *words, code=2)
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.sh")))
def test_help_is_the_header(script):
    if script != "launch.sh":
        out = dry(script, "--help")
        assert f"scripts/{script}" in out and "#" not in out


def test_shellcheck_passes():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    files = [*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch"]
    done = subprocess.run([program, "-x", *map(str, files)], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_slurms_variables_are_enough(child_env, tmp_path):
    """Two local processes that look like SLURM's: JAX finds the coordinator and the places by itself."""
    folder = tmp_path / "slurm"
    job = free_port() - (65535 - 2**12 + 1)  # JAX derives its port from the job's number
    started = []
    for number in range(2):
        slurm = {
            "SLURM_JOB_ID": str(job % 2**12),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number),
            "SLURM_STEP_NUM_NODES": "1",
        }
        words = flags(folder, run__steps=2, sft__steps=0, mesh__data=2)
        with Path(f"{folder}.{number}.log").open("w") as log:
            env = child_env | slurm | {"XLA_FLAGS": xla.flags()}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pspo_jax.train", *words], env=env, stdout=log, stderr=subprocess.STDOUT
                )
            )
    finish_all(folder, started)
    assert "held-out greedy" in output(folder, 0) and "held-out" not in output(folder, 1)
