"""The model card of exported weights."""

import re

from pipeline.errors import one_line
from train.weights import Backbone

CARD = """---
library_name: timm
tags:
- image-feature-extraction
- timm
{tags}---
# {title}

{about}

## Use
```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)  # or hf-hub:OWNER/NAME
features = model.forward_features(images)  # [B, C, H/32, W/32]
```
Images are RGB in 0..1, normalised by ImageNet's mean and deviation (`config.json`). The weights are
meant to be fine-tuned, or probed, on dense tasks; nothing here classifies.

## How it was made
| | |
|---|---|
{facts}

Licence of the images that it was trained on: {license}.
"""
SLOTCON_TAGS = "- self-supervised\n- slotcon\n"
SLOTCON = """\
The {encoder} of a SlotCon model: a {arch} without classifier, pre-trained on images without
labels{by}. SlotCon groups the pixels of scenes under learnt prototypes and contrasts the
groups (Wen et al., *Self-Supervised Visual Representation Learning with Semantic Grouping*, NeurIPS
2022, [arXiv 2205.15288](https://arxiv.org/abs/2205.15288))."""
OTHER = "A {arch} without classifier. The table below holds all that is known of its training."
TITLES = {
    "method": "Method",
    "arch": "Architecture",
    "branch": "Encoder",
    "run": "Run",
    "imported": "Imported from",
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
    facts = "\n".join(
        f"| {title} | {_text(known[name])} |" for name, title in TITLES.items() if name in known
    )
    ours = of_slotcon(backbone)
    title = f"{backbone.arch}, {_text(known.get('run', 'weights'))}"
    return CARD.format(
        tags=SLOTCON_TAGS if ours else "",
        title=f"SlotCon {title}" if ours else title,
        about=(SLOTCON if ours else OTHER).format(
            encoder=_text(f"{known.get('branch', '')} encoder".strip()),
            arch=backbone.arch,
            by="" if "imported" in known else " by slotstream",
        ),
        facts=facts,
        license=_text(" ".join(known.get("data_license", "not stated").split())),
    )


def of_slotcon(backbone: Backbone) -> bool:
    """Whether the metadata name SlotCon: weights of other methods can be exported too."""
    return backbone.metadata.get("method", "").startswith("SlotCon")


def _text(fact: str) -> str:
    """A fact as plain text: HTML, Markdown and line breaks of a file's metadata stay what they are
    to read, and do nothing on the page.
    """
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", one_line(fact))


_SPECIAL = re.compile(r"[\\`*\[\]<>|!~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown or HTML gives a meaning; an underscore has none inside a word."""
