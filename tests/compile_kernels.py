"""Compile the Triton kernels ahead of time, without a GPU, and print the resources they need:

    python -m tests.compile_kernels

One line per kernel and architecture: registers per thread; spilled registers, in bytes of stack and
local memory per thread; shared memory in bytes per program, requested at launch and static;
instructions of the machine code; millions of instructions that all warps execute for two views of
512 images of COCO's sizes.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.augment.kernels.blur import blur
from pipeline.augment.kernels.colour import colour
from pipeline.augment.kernels.resize import resize_across, resize_down, weigh
from pipeline.augment.triton import ACROSS, BLUR, COLOUR, DOWN, EXACT, WEIGH
from tests.helpers.kernel_work import Runs, coco, runs
from tests.helpers.sass import executed, parse

ARCHITECTURES = (80, 90)
SIZE, IMAGES = 224, 512
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    "canvas": "*u8",
    "pixels": "*u8",
    "scratch": "*u8",
    "lines": "*u8",
    "weights": "*i32",
    "words": "*i32",
    "sums": "*i64",
    "image_stride": "i64",
}  # the others are int32
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "weigh": (weigh, WEIGH),
    "resize_across": (resize_across, ACROSS),
    "resize_down": (resize_down, DOWN),
    "colour before contrast": (colour, COLOUR | {"BEFORE_CONTRAST": True}),
    "colour": (colour, COLOUR | {"BEFORE_CONTRAST": False}),
    "blur": (blur, BLUR),
}


class Resources(NamedTuple):
    kernel: str
    arch: int
    dtype: str
    registers: int
    spilled: int
    static_shared: int
    shared: int
    instructions: int
    code: str
    """The disassembly."""


def compile_kernel(name: str, arch: int, dtype: str = "bf16", size: int = SIZE) -> Resources:
    """Compile one kernel. Raises the exceptions of Triton and ptxas."""
    kernel, launch = KERNELS[name]
    constants = {k: v for k, v in launch.items() if k not in _OPTIONS} | {"S": size}
    if name == "weigh":
        constants["BLOCK"] = triton.next_power_of_2(size)
    types = _TYPES | {"out": f"*{dtype}"}
    signature = {
        arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names
    }
    options = {k: v for k, v in (launch | EXACT).items() if k in _OPTIONS}
    # What a launch finds out by itself: PyTorch's memory begins at multiples of 16 bytes.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
    usage = dict(
        re.findall(r"\b([A-Z]+):(\d+)", _dump(cubin, "cuobjdump", "--dump-resource-usage"))
    )
    registers, stack, local, static = (int(usage[k]) for k in ("REG", "STACK", "LOCAL", "SHARED"))
    code = _dump(cubin, "nvdisasm", "-g", "-c")
    count = len(parse(code)[0])
    return Resources(name, arch, dtype, registers, stack + local, static, shared, count, code)


def _dump(cubin: bytes, tool: str, *options: str) -> str:
    """What one of NVIDIA's tools, which Triton brings, prints about compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def executed_millions(used: Resources, work: dict[str, Runs]) -> float | None:
    """Millions of warp instructions for a batch; None for a kernel that does not see it."""
    if used.kernel not in work:
        return None
    programs, trips, shares = work[used.kernel]
    warps = programs * KERNELS[used.kernel][1]["num_warps"]
    return warps * executed(used.code, trips, shares) / 1e6


def table() -> Iterator[Resources]:
    for name in KERNELS:
        for arch in ARCHITECTURES:
            yield compile_kernel(name, arch)


def main() -> None:
    print(f"Triton {triton.__version__}, output bf16, S = {SIZE}, executed for {IMAGES} images")
    columns = "{:24}{:>7}{:>11}{:>11}{:>10}{:>10}{:>14}{:>13}"
    print(columns.format("kernel", "arch", "registers", "spilled B", "shared B", "static B",
                         "instructions", "executed, M"))  # fmt: skip
    work, total = runs(coco(IMAGES, SIZE), SIZE), dict.fromkeys(ARCHITECTURES, 0.0)
    for used in table():
        millions = executed_millions(used, work)
        total[used.arch] += millions or 0
        shown = "" if millions is None else f"{millions:.0f}"
        numbers = (used.registers, used.spilled, used.shared, used.static_shared)
        row = (used.kernel, f"sm_{used.arch}", *numbers, used.instructions, shown)
        print(columns.format(*row), flush=True)
    for arch, millions in total.items():
        print(f"all, sm_{arch}: {millions:.0f} million")


if __name__ == "__main__":
    main()
