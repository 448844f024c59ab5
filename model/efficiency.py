"""Ways to make a training step cheaper: channels-last layout, recomputed activations, compilation.

None of them changes parameters, buffers or their names.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from model.encoder import AnyEncoder, Encoder
from model.slotcon import SlotCon

Forward = Callable[..., Any]

_GRAPHS = 64
"""Graphs that torch.compile may keep for one function: for student and teacher, encoder and
projector, and each view size."""


def prepare(
    model: SlotCon,
    *,
    channels_last: bool = False,
    checkpointing: bool = False,
    compile: bool = False,
    warn: Callable[[str], None] = print,
) -> None:
    """Change how `model` computes, in place. Call it when the model is on its device.

    channels_last: weights, and so activations, have this layout. Results differ by rounding.

    checkpointing: the student's residual blocks keep only their input for the backward pass and
    compute the rest again. Results are bit-equal on a CPU. Networks of timm do it in their own way.

    compile: encoders and projectors go through torch.compile at their first call. If that fails,
    `warn` gets one line and they run uncompiled. Results differ by rounding. A copy of a compiled
    model would run the original.

    Don't combine checkpointing and compile: compiled code decides itself which activations it
    keeps, and ignores the blocks' checkpointing.

    On a GPU, cuDNN benchmarks its algorithms: shapes are the same in every step.
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
            encoder: Any = branch.encoder
            encoder.maps = fallback.compile(encoder.maps)
            for head in (branch, *branch.heads.values()):
                projector: Any = head.projector
                projector.forward = fallback.compile(projector.forward)


class Fallback:
    """Compiles functions until the compilation of one fails; from then on none is compiled."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn, self.works = warn, True

    def compile(self, forward: Forward) -> Forward:
        compiled: Forward = torch.compile(forward, dynamic=False)

        def compiled_or_not(*inputs: Any) -> Any:
            if self.works:
                try:
                    # Compile the backward pass now too: later, its failure could not be caught.
                    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                        return compiled(*inputs)
                except torch._dynamo.exc.TorchDynamoException as error:
                    self.works = False
                    cause = getattr(error, "inner_exception", error)
                    reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
                    self.warn(f"warning: torch.compile failed, continuing without it: {reason}")
            return forward(*inputs)

        return compiled_or_not


def _checkpoint_blocks(encoder: AnyEncoder) -> None:
    if not isinstance(encoder, Encoder):
        encoder.net.set_grad_checkpointing()
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.forward = partial(_counted_once, module, module.forward)  # type: ignore[method-assign]
        return
    for stage in encoder.children():
        if isinstance(stage, nn.Sequential):
            for block in stage:
                block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Forward, inputs: Tensor) -> Tensor:
    """forward(inputs), which keeps only `inputs` for the backward pass."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    output: Tensor = checkpoint(
        forward, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return output


def _counted_once(norm: _BatchNorm, forward: Forward, images: Tensor) -> Tensor:
    """forward(images); within a backward pass it is a second one."""
    with _statistics_kept(norm) if torch._C._current_graph_task_id() != -1 else nullcontext():
        output: Tensor = forward(images)
    return output


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics: the second forward pass must not count the batch again."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        assert norm.num_batches_tracked is not None
        # SyncBatchNorm needs a counter, so it counts in a copy.
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
