"""What launchers put into the environment: it agrees with the configuration, or is refused."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend

from pipeline.errors import UserError
from tests import ROOT
from tests.helpers.runs import in_this_process
from tests.helpers.training import small_beton, small_run
from train.run import environment
from train.run import launch as launching
from train.run.command import run_training
from train.run.environment import check_environment
from train.run.launch import launch
from train.run.settings import to_yaml
from train.run.signals import StopSignals

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
LAUNCHED = {  # of `accelerate launch` with one process
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment without what the tests themselves were started with."""
    for name in [*TORCHRUN, *LAUNCHED, *MPI]:
        monkeypatch.delenv(name, raising=False)


def refusal(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], on_gpu: bool = False
) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        check_environment("bf16", 2, on_gpu)
    except UserError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "is 4, a step of this run has 2: unset it"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "is 1, a step of this run has 2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x\ny", r"is 'x\ny', a step"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "is fp16, efficiency.precision is bf16: set both"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "is fp8, efficiency.precision is bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "is inductor: unset it"),
        ("ACCELERATE_DYNAMO_BACKEND", "magic", "is magic: unset it"),
        ("ACCELERATE_USE_CPU", "maybe", "must be true or false, not 'maybe'"),
        ("ACCELERATE_USE_CPU", "", "must be true or false, not ''"),
        ("ACCELERATE_DEBUG_MODE", "2", "must be true or false, not '2'"),
        ("ACCELERATE_CPU_AFFINITY", "all", "must be true or false, not 'all'"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1", "a run chooses its device"),
        ("ACCELERATE_FP8_BACKEND", "TE", "is 'TE': fp8 is not supported"),
        ("ACCELERATE_FP8_BACKEND", "", "is '': fp8 is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_FSDP", "1", "FSDP is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "Megatron-LM is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism config (tensor,"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "SageMaker is not supported"),
        ("LOCAL_RANK", "first", "must be a whole number, not 'first'"),
        ("MASTER_PORT", "http", "must be a whole number, not 'http'"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "1.5", "must be a whole number, not '1.5'"),
    ],
)
def test_what_contradicts_the_run_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    """Accelerate divides the loss by a number from the environment, or ends in a traceback.
    Without it the steps are a quarter as long, or a user reads a stack of a library."""
    message = refusal(monkeypatch, {name: value})
    assert message.startswith(name) and says in message and "\n" not in message


@pytest.mark.parametrize(
    "variables",
    [
        {},
        LAUNCHED,
        LAUNCHED | TORCHRUN,
        TORCHRUN,
        MPI,
        LAUNCHED | {"ACCELERATE_MIXED_PRECISION": "BF16", "ACCELERATE_USE_CPU": "true"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_DYNAMO_BACKEND": ""},
        {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "2", "ACCELERATE_DEBUG_MODE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
        {"MASTER_ADDR": "here", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "-1"},
    ],
    ids=str,
)
def test_what_launchers_set_is_accepted(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Without it a run that `accelerate launch`, torchrun or mpirun starts rightly is refused."""
    assert refusal(monkeypatch, variables) == ""


@pytest.mark.parametrize(
    ("variables", "on_gpu", "says"),
    [
        ({"WORLD_SIZE": "2"}, False, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, True, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set"),
        ({"LOCAL_RANK": "0"}, True, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not set"),
        (TORCHRUN | {"MASTER_ADDR": ""}, False, "MASTER_ADDR: not set"),
        (TORCHRUN | {"RANK": "2"}, False, "RANK is 2, and WORLD_SIZE is 2"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, False, "LOCAL_WORLD_SIZE is 2, WORLD_SIZE is 2 and LOCAL"),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False, "WORLD_SIZE is 1"),
        ({"LOCAL_WORLD_SIZE": "4"}, False, "LOCAL_WORLD_SIZE is 4, WORLD_SIZE is 1"),
        (MPI, True, "LOCAL_RANK, MASTER_ADDR"),
        (MPI | {"OMPI_COMM_WORLD_RANK": "5"}, False, "OMPI_COMM_WORLD_RANK is 5"),
        ({"PMI_RANK": "1"}, False, "PMI_RANK is 1, and WORLD_SIZE is not set"),
    ],
)
def test_processes_that_cannot_meet_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], on_gpu: bool, says: str
) -> None:
    """Without it each process trains the whole run alone, or waits for the others until the
    timeout."""
    assert says in refusal(monkeypatch, variables, on_gpu)


def test_accelerate_takes_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A number that agrees with the run must not divide its loss a second time."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "maybe")
    accelerator = launch(tmp_path, "no", (), 1, accumulation=4)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO


def test_one_process_instead_of_two_is_said(tmp_path: Path) -> None:
    """On CPUs `accelerate launch --num_processes 2` starts one. Without it its user believes that
    two are training."""
    (tmp_path / "run.yaml").write_text(to_yaml(small_run(small_beton(tmp_path), tmp_path)))
    command = f"{sys.executable} -m accelerate.commands.launch --num_processes 2 --cpu --quiet"
    ended = subprocess.run(
        [*command.split(), "-m", "train.pretrain", "--config", str(tmp_path / "run.yaml")],
        cwd=ROOT, env=os.environ, text=True, capture_output=True, check=False,
    )  # fmt: skip
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode and len(lines) == 1 and "torchrun --nproc_per_node" in lines[0]


@pytest.mark.parametrize("module", ["train.pretrain", "transfer.segmentation", "evaluation.slots"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_LOG_LEVEL", "loud"),
        ("ACCELERATE_LOG_LEVEL", ""),
        ("USE_TORCH_XLA", "maybe"),
        ("ACCELERATE_USE_MEGATRON_LM", "maybe"),
        ("ACCELERATE_ENABLE_RICH", "maybe"),  # if the package rich is installed
    ],
)
def test_what_accelerate_reads_when_it_is_imported(
    module: str, name: str, value: str, tmp_path: Path
) -> None:
    """Without it each command ends in a traceback, before it can look at the environment."""
    nothing = str(tmp_path / "none")
    arguments = {
        "evaluation.slots": ["--checkpoint", nothing, "--data", nothing],
        "transfer.segmentation": ["--evaluate", nothing],
    }.get(module, ["--config", "configs/scenes_cpu.yaml", "--data.path", nothing])
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=os.environ | {name: value}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {name} must be") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "prints"),
    [
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": ""}, True),
        ({"LOCAL_RANK": "first", "WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": "-1"}, True),
        ({"LOCAL_RANK": "1"}, True),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "two"}, True),
    ],
    ids=str,
)
def test_a_process_that_may_be_alone_says_why_it_ends(
    variables: dict[str, str],
    prints: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without it a run whose LOCAL_RANK is wrong ends without a word, whatever its mistake; or a
    mistake of all processes is printed once for each."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def prepare(signals: StopSignals) -> Callable[[], None]:
        raise UserError("name: unknown")

    with pytest.raises(SystemExit) as ended:
        run_training(prepare)
    assert ended.value.code == 2
    assert capsys.readouterr().err == ("error: name: unknown\n" if prints else "")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be 1 to"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be 1 to 65535"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "MASTER_ADDR: not set"),
        (TORCHRUN | {"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS must be a whole number"),
        ({"RANK": "1"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set"),
    ],
)
def test_numbers_that_launchers_give(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it Accelerate ends in a traceback, or one of several processes trains alone."""
    for name in (*environment._TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        check_environment("no", 1, on_gpu=False)


def alone(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """What torchrun sets for a group of one process."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_other_faults_of_the_start_are_not_those_of_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a fault of the device, say, names an address and a port that are right."""

    def broken(**options: Any) -> None:
        Accelerator(**options)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(launching, "Accelerator", broken)
    alone(monkeypatch, free_port())
    try:
        with pytest.raises(RuntimeError, match=r"^CUDA error: out of memory"):
            in_this_process(lambda: launch(tmp_path, "no", [], timeout_minutes=0.2))
    finally:
        torch.distributed.destroy_process_group()
        in_this_process(lambda: None)


@pytest.mark.parametrize("fault", ["port in use", "GLOO_SOCKET_IFNAME"])
def test_a_group_that_cannot_be_formed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs on one machine often get the same port. Without it the second ends in a traceback,
    which does not say which variable is wrong.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if fault == "port in use" else free_port()
        alone(monkeypatch, port)
        if fault != "port in use":
            monkeypatch.setenv(fault, "no_such_interface")
        with pytest.raises(UserError, match=rf"cannot form a group at 127.0.0.1:{port} \(MASTER"):
            in_this_process(lambda: launch(tmp_path, "no", [], timeout_minutes=0.2))
