"""What makes a step of the same model cheaper: a layout, recomputed activations, compiled
convolutions.

None of them changes parameters, buffers or their names.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from model.slotcon import SlotCon

Forward = Callable[[Tensor], Tensor]

_GRAPHS = 64
"""Of one function, over student and teacher, encoder and projector and sizes of view."""


def prepare(
    model: SlotCon,
    *,
    channels_last: bool = False,
    checkpointing: bool = False,
    compile: bool = False,
    warn: Callable[[str], None] = print,
) -> None:
    """Change how `model` computes, in place, on the device that it will have.

    channels_last: weights, and so activations, lie in that layout; results differ by rounding.
    checkpointing: the student's residual blocks keep nothing for the backward but their input and
    compute the rest again; bit-equal on a CPU. compile: encoders and projectors go through
    torch.compile, at their first call; if that fails, `warn` is told in one line and they run as
    they are; results differ by rounding. A copy of a compiled model would run the original. Not
    the last two together: what is compiled chooses by itself what to keep, whatever a block asks
    for.

    On a GPU cuDNN is told to try its algorithms out: shapes stay the same from step to step.
    """
    torch.backends.cudnn.benchmark = True
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if checkpointing:
        _checkpoint_blocks(model.student.encoder)
    if compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        fallback = Fallback(warn)
        for branch in (model.student, model.teacher):
            for part in (branch.encoder, branch.projector):
                part.forward = fallback.compile(part.forward)  # type: ignore[method-assign]


class Fallback:
    """Functions that are compiled as long as every one of them can be."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn, self.works = warn, True

    def compile(self, forward: Forward) -> Forward:
        compiled: Forward = torch.compile(forward, dynamic=False)

        def compiled_or_not(inputs: Tensor) -> Tensor:
            if self.works:
                try:
                    # The backward too, now, or it would fail where nobody can step in.
                    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                        return compiled(inputs)
                except torch._dynamo.exc.TorchDynamoException as error:
                    self.works = False
                    cause = getattr(error, "inner_exception", error)
                    reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
                    self.warn(f"warning: torch.compile failed, going on without it: {reason}")
            return forward(inputs)

        return compiled_or_not


def _checkpoint_blocks(encoder: nn.Sequential) -> None:
    for stage in encoder.children():
        if isinstance(stage, nn.Sequential):
            for block in stage:
                block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Forward, inputs: Tensor) -> Tensor:
    """forward(inputs), of which the backward knows nothing but `inputs`."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    output: Tensor = checkpoint(
        forward, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return output


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second forward of the same batch must not enter the running statistics again."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
