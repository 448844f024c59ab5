"""The model card of exported weights."""

import re

from model.architectures import is_timm, timm_name
from model.timm_encoder import facts, idle_parts
from pipeline.errors import in_markdown
from train.weights import Backbone

CARD = """---
library_name: timm
{head}tags:
- image-feature-extraction
- timm
{tags}---
# {title}

{about}

## Use
```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)  # or hf-hub:OWNER/NAME
{use}
```
Images are RGB in 0..1, normalised by {statistics} mean and deviation (`config.json`). The weights
are meant to be fine-tuned, or probed, on dense tasks; nothing here classifies.{idle}

## How it was made
| | |
|---|---|
{facts}

Licence of the images that it was trained on: {license}.
"""
RESNET_USE = "features = model.forward_features(images)  # [B, C, H/32, W/32]"
TIMM_USE = """\
maps = model.forward_intermediates(images, norm={norm}, intermediates_only=True)
features = maps[-1]  # [B, {dim}, H/{stride}, W/{stride}]"""
IDLE = "\n\nThese parts follow the last map, and were not trained with it: {parts}."
TAGS = "- self-supervised\n- {method}\n"
OURS = """\
The {encoder} of a {method} model: a {arch} without classifier, pre-trained on images without
labels{by}{start}. """
ABOUT = {
    "SlotCon": """\
SlotCon groups the pixels of scenes under learnt prototypes and contrasts the
groups (Wen et al., *Self-Supervised Visual Representation Learning with Semantic Grouping*, NeurIPS
2022, [arXiv 2205.15288](https://arxiv.org/abs/2205.15288)).""",
    "SlotMIM": """\
SlotMIM groups the patches of scenes under learnt prototypes, also those that its
student does not see, and contrasts the groups (CVPR 2025,
[arXiv 2503.06960](https://arxiv.org/abs/2503.06960)).""",
}
"""What each method does."""
STARTED = ", starting from weights whose own training may have used labels (see the table)"
OTHER = "A {arch} without classifier. The table below holds all that is known of its training."
HUB_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "odbl", "odc-by", "pddl", "openrail", "unlicense",
    "wtfpl", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0",
}  # fmt: skip
"""Identifiers of licences on Hugging Face's hub, the usual ones for data, images and weights."""
TITLES = {
    "method": "Method",
    "arch": "Architecture",
    "branch": "Encoder",
    "run": "Run",
    "imported": "Imported from",
    "start": "Started from",
    "prefix": "Prefix of the weights there",
    "whitened": "Last map whitened by",
    "step": "Optimiser steps",
    "optimizer": "Optimiser",
    "epochs": "Epochs of the schedule",
    "batch_size": "Images a step",
    "prototypes": "Prototypes",
    "view_size": "Side of a view, pixels",
    "data": "Data",
    "data_images": "Images",
    "data_fingerprint": "Fingerprint of the data",
    "slotstream": "slotstream",
}


def model_card(backbone: Backbone) -> str:
    """The README.md of a model on Hugging Face's hub."""
    known = backbone.metadata
    rows = "\n".join(
        f"| {title} | {in_markdown(known[name])} |"
        for name, title in TITLES.items()
        if name in known
    )
    method = method_of(backbone)
    arch = timm_name(backbone.arch)
    title = f"{arch}, {in_markdown(known.get('run', 'weights'))}"
    return CARD.format(
        head=_yaml_licence(known.get("data_license", "")),
        tags=TAGS.format(method=method.lower()) if method else "",
        title=f"{method} {title}".lstrip(),
        about=(OURS + ABOUT[method] if method else OTHER).format(
            method=method,
            encoder=in_markdown(f"{known.get('branch', '')} encoder".strip()),
            arch=arch,
            by="" if "imported" in known else " by slotstream",
            start=STARTED if "start" in known else "",
        ),
        facts=rows,
        **_use(backbone),
        license=in_markdown(" ".join(known.get("data_license", "not stated").split())),
    )


def _use(backbone: Backbone) -> dict[str, str]:
    """How features are computed."""
    if not is_timm(backbone.arch):
        return {"use": RESNET_USE, "statistics": "ImageNet's", "idle": ""}
    known = facts(backbone.arch)
    code = TIMM_USE.format(norm=known.norm, dim=known.dims[4], stride=known.strides[4])
    parts = ", ".join(f"`{part}`" for part in idle_parts(backbone.arch))
    idle = IDLE.format(parts=parts) if parts else ""
    return {"use": code, "statistics": "the run's", "idle": idle}


def _yaml_licence(text: str) -> str:
    """The lines of the YAML head that state a licence: one that the hub knows by its identifier,
    or another by a name of letters, digits and points.
    """
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:100]
    if name in HUB_LICENCES:
        return f"license: {name}\n"
    # In quotes, since "1.0" and "no" are no text in YAML.
    return "license: other\n" * bool(text) + f'license_name: "{name}"\n' * bool(name)


def method_of(backbone: Backbone) -> str:
    """Which of our methods the metadata name; empty for others, which can be exported too."""
    stated = backbone.metadata.get("method", "")
    return next((method for method in ABOUT if stated.startswith(method)), "")
