"""Linear probe: a linear classifier on frozen features.

Letters: B cells at once, D features, C classes.
"""

import torch
from torch import Tensor, nn

from evaluation.probes.memory import Memory

BATCH_CELLS = 1024


def pixel_cross_entropy(logits: Tensor, counts: Tensor) -> Tensor:
    """Logits [B, C] of cells, `counts` [B, C] of their pixels' labels → mean cross-entropy over all
    labelled pixels. Each pixel has the logits of its cell.
    """
    return -(counts * logits.log_softmax(dim=1)).sum() / counts.sum()


def fit_linear(
    memory: Memory,
    seed: int,
    *,
    steps: int = 1000,
    learning_rate: float = 0.01,
    weight_decay: float = 0.01,
) -> nn.Module:
    """A classifier of cells [B, D] → logits [B, C], in eval mode: BatchNorm without affine
    parameters and a linear layer. On a map they equal BatchNorm2d and a 1×1 convolution.

    Trained with AdamW, a cosine schedule to 0, and `steps` batches of 1,024 cells drawn with
    replacement. `seed` determines the initial weights and the batches. Raises ValueError for a
    memory of one cell, which has no variance.
    """
    (cells, dim), num_classes = memory.features.shape, memory.counts.shape[1]
    if cells < 2:
        raise ValueError("a linear probe needs at least two labelled cells")
    device = memory.features.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, num_classes))
    model = model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = torch.randint(cells, (min(BATCH_CELLS, cells),), generator=generator).to(device)
        loss = pixel_cross_entropy(model(memory.features[drawn]), memory.counts[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def fit_logistic(
    features: Tensor, counts: Tensor, *, strength: float | None = None, iterations: int = 1000
) -> nn.Linear:
    """Logistic regression on cells [M, D] with `counts` [M, C] of their pixels' labels: cells
    [Q, D] → logits [Q, C].

    Minimises `strength` times the summed cross-entropy plus half the squared weights, biases left
    out, as scikit-learn and cuML do with C = `strength`; None: without the second term. L-BFGS to
    convergence, or `iterations`.
    """
    model = nn.Linear(features.shape[1], counts.shape[1]).to(features.device)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimiser = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    decay = 0.0 if strength is None else 1 / (2 * strength * float(counts.sum()))

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = pixel_cross_entropy(model(features), counts) + decay * model.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return model.eval()
