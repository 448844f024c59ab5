"""SGD over the trainable weights of a model."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD

from transfer.config import OptimConfig

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> SGD:
    """SGD over all weights that need gradients; norms may have another weight decay. The trainer
    sets the learning rate at each step.
    """
    norms = {
        id(weight)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for weight in module.parameters(recurse=False)
    }
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    decay, norm_decay = optim.weight_decay, optim.norm_weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [w for w in learning if id(w) not in norms]},
        {
            "params": [w for w in learning if id(w) in norms],
            "weight_decay": decay if norm_decay is None else norm_decay,
        },
    ]
    groups = [group for group in groups if group["params"]]
    return SGD(groups, lr=optim.lr, momentum=optim.momentum, weight_decay=decay)
