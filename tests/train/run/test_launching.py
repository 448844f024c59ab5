"""The start of runs: Accelerate's configurations, and the SLURM script with stand-ins for srun and
scontrol."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from tests import ROOT
from tests.helpers.training import run_dir, small_beton, small_run
from train import pretrain
from train.run import checkpoint
from train.run.launch import share_of_cores
from train.run.settings import to_yaml

SCRIPT = ROOT / "tools" / "slurm_pretrain.sh"
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:] if word != "--kill-on-bad-exit=0"]
def task(rank):
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    return subprocess.Popen(command, env=os.environ | place)
tasks = [task(rank) for rank in range(int(os.environ["SLURM_NTASKS"]))]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


def job(folder: Path, tasks: int, *arguments: str) -> "subprocess.Popen[str]":
    """The script as a job with so many tasks."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as probe:  # the script derives the port from the job's number
        probe.bind(("127.0.0.1", 0))
        number = 20000 + (probe.getsockname()[1] - 20000) % 20000
    slurm = {"SLURM_JOB_ID": str(number), "SLURM_NTASKS": str(tasks), "SLURM_CPUS_PER_TASK": "1"}
    others = {"SCONTROL_LOG": str(folder / "scontrol.log"), "PYTHON": sys.executable}
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        cwd=ROOT, env=os.environ | slurm | others | path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("1gpu", 1, 1), ("8gpu", 1, 8), ("2x8gpu", 2, 16)]
)
def test_accelerate_configs_are_what_they_say(name: str, machines: int, processes: int) -> None:
    """A key that Accelerate refuses, or a wrong count, would only show on the user's cluster. A
    precision or a compiler set there would contradict the run's configuration."""
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.distributed_type == ("MULTI_GPU" if processes > 1 else "NO")
    assert config.mixed_precision == "no" and not config.dynamo_config and not config.use_cpu


def test_job_that_runs_out_of_time_queues_again_and_finishes(tmp_path: Path) -> None:
    """A script that loses the exit code would end a run of days at its first time limit. A script
    that always requeues would repeat a mistake for ever.
    """
    config = small_run(small_beton(tmp_path), tmp_path, epochs=400)
    config = replace(config, log=replace(config.log, every=1, trackers=("tensorboard",)))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    first = job(tmp_path, 2, "--config", str(tmp_path / "run.yaml"))
    metrics = run_dir(config) / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and first.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=False
    )
    for child in children.stdout.split():  # srun receives the signal of the time limit
        os.kill(int(child), signal.SIGUSR1)
    _, errors = first.communicate(timeout=200)
    log = tmp_path / "scontrol.log"
    assert first.returncode == 0 and log.read_text().startswith("requeue "), errors
    saved = checkpoint.latest(run_dir(config))
    assert saved is not None
    step = checkpoint.step_of(saved)
    log.unlink()
    again = job(
        tmp_path, 1, "--config", str(tmp_path / "run.yaml"), "--train.max_steps", str(step + 1)
    )
    output, errors = again.communicate(timeout=200)
    assert again.returncode == 0 and f"step {step + 1}/{step + 1}" in output, errors
    assert not log.exists()


def test_mistake_ends_the_job(tmp_path: Path) -> None:
    """Otherwise the job would queue, start and fail again and again."""
    ended = job(tmp_path, 1, "--config", "nothing.yaml")
    _, errors = ended.communicate(timeout=100)
    assert ended.returncode == 2 and "nothing.yaml" in errors
    assert not (tmp_path / "scontrol.log").exists()


def test_a_process_lost_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The line names the run: many runs may write to one log."""

    def lost(*_: object) -> None:
        raise RuntimeError("[gloo] Connection closed by peer")

    def end(code: int) -> None:
        raise SystemExit(code)

    (tmp_path / "run.yaml").write_text(to_yaml(small_run(tmp_path / "x.beton", tmp_path, "mine")))
    monkeypatch.setattr("sys.argv", ["pretrain", "--config", str(tmp_path / "run.yaml")])
    monkeypatch.setattr("train.trainer.Trainer", lost)
    monkeypatch.setattr("os._exit", end)
    with pytest.raises(SystemExit) as ended:
        pretrain.main()
    assert ended.value.code == 1
    assert capfd.readouterr().err.startswith("error: mine: another process has ended")


def test_a_gpu_leaves_a_core_to_the_thread_that_feeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the decoding threads take turns with the thread that launches kernels."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert share_of_cores(torch.device("cpu")) == 8
    assert share_of_cores(torch.device("cuda")) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert share_of_cores(torch.device("cuda")) == 1
