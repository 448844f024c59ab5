"""Compile the Triton kernels ahead of time, without a GPU, and print the resources they need:

    python -m tests.compile_kernels

One line per kernel and architecture: registers per thread; spilled registers, in bytes of stack and
local memory per thread; shared memory in bytes per program, requested at launch and static.
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

ARCHITECTURES = (80, 90)
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


def compile_kernel(name: str, arch: int, dtype: str = "bf16", size: int = 224) -> Resources:
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
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, local, static = _usage(compiled.asm["cubin"])
    return Resources(name, arch, dtype, registers, stack + local, static, compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers, stack, local memory and static shared memory, by Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b([A-Z]+):(\d+)", text))
    return tuple(int(numbers[key]) for key in ("REG", "STACK", "LOCAL", "SHARED"))


def table() -> Iterator[Resources]:
    for name in KERNELS:
        for arch in ARCHITECTURES:
            yield compile_kernel(name, arch)


def main() -> None:
    print(f"Triton {triton.__version__}, output bf16, S = 224")
    head = ("kernel", "arch", "registers", "spilled B", "shared B", "static B")
    print("{:24}{:>7}{:>11}{:>11}{:>10}{:>10}".format(*head))
    for r in table():
        row = (r.kernel, f"sm_{r.arch}", r.registers, r.spilled, r.shared, r.static_shared)
        print("{:24}{:>7}{:>11}{:>11}{:>10}{:>10}".format(*row), flush=True)


if __name__ == "__main__":
    main()
