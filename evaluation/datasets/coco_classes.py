"""The 27 classes of unsupervised segmentation on COCO: groups of COCO's things and stuff.

They are COCO-Stuff's supercategories (arXiv 1612.03716) under COCO's names: 12 of things, 15 of
stuff. Their order is the benchmark's published one (PiCIE, arXiv 2103.17070): things, then stuff.
"""

import numpy as np

THINGS = {
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "outdoor": "traffic light, fire hydrant, (street sign), stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "(hat), backpack, umbrella, (shoe), (eye glasses), handbag, tie, suitcase",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,"
    " skateboard, surfboard, tennis racket",
    "kitchen": "bottle, (plate), wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, (mirror), dining table, (window), (desk),"
    " toilet, (door)",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator, (blender)",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush, (hair brush)",
}
"""Ids 1 to 91, in order. COCO dropped the 11 in brackets: they have an id but no pixels."""

STUFF = {
    "ceiling": "ceiling-other, ceiling-tile",
    "floor": "carpet, floor-marble, floor-other, floor-stone, floor-tile, floor-wood",
    "food-stuff": "food-other, fruit, salad, vegetable",
    "furniture-stuff": "cabinet, counter, cupboard, desk-stuff, door-stuff, furniture-other, light,"
    " mirror-stuff, shelf, stairs, table",
    "raw-material": "cardboard, metal, paper, plastic",
    "textile": "banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, textile-other,"
    " towel",
    "wall": "wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood",
    "window": "window-blind, window-other",
    "building": "bridge, building-other, house, roof, skyscraper, tent",
    "ground": "dirt, gravel, ground-other, mud, pavement, platform, playingfield, railroad, road,"
    " sand, snow",
    "plant": "branch, bush, flower, grass, leaves, moss, plant-other, straw, tree",
    "sky": "clouds, sky-other",
    "solid": "hill, mountain, rock, solid-other, stone, wood",
    "structural": "cage, fence, net, railing, structural-other",
    "water": "fog, river, sea, water-other, waterdrops",
}
"""Ids 92 to 182 are these names in alphabetical order."""

THING_ORDER = (
    "electronic", "appliance", "food", "furniture", "indoor", "kitchen", "accessory", "animal",
    "outdoor", "person", "sports", "vehicle",
)  # fmt: skip

CLASSES = [*THING_ORDER, *STUFF]
"""The 27 names by class id."""


THINGS_12, STUFF_15 = sorted(THINGS), sorted(STUFF)
"""COCO-Things and COCO-Stuff of Leopart and NeCo: half of the supercategories each, by name."""

PANOPTIC_MOVES = {
    "fog": "sky",
    "floor-stone": "ground",
    "napkin": "raw-material",
    "carpet": "textile",
}
"""Categories of COCO-Stuff that panoptic labels count to another of the 27."""
PANOPTIC_DROPS = (
    "furniture-other", "metal", "plastic", "solid-other", "structural-other", "waterdrops",
    "textile-other", "cloth", "clothes", "plant-other", "wood", "ground-other",
)  # fmt: skip
"""Categories of COCO-Stuff that panoptic labels leave void."""


def coarse_classes() -> dict[int, int]:
    """COCO id (80 things of 1 … 90, stuff 92 … 182) → class id 0 … 26."""
    things = [(name, group) for group, names in THINGS.items() for name in names.split(", ")]
    stuff = sorted((name, group) for group, names in STUFF.items() for name in names.split(", "))
    return {
        number: CLASSES.index(group)
        for number, (name, group) in enumerate(things + stuff, start=1)
        if not name.startswith("(")
    }


def stuff_15_table(unknown: int, less_one: bool) -> np.ndarray:
    """int64 [256]: class 0 … 14 of each id of stuff, 255 for things and for pixels without label.

    The ids are those of stuffthingmaps (`less_one`: 0 to 181, 255), or of COCO's own pixel maps of
    stuff (92 to 182, 0 for no label, 183 for things). Others become `unknown`.
    """
    table = np.full(256, unknown, np.int64)
    table[[*range(91), 255] if less_one else [0, 183]] = 255
    for number, group in coarse_classes().items():
        if CLASSES[group] in STUFF:
            table[number - less_one] = STUFF_15.index(CLASSES[group])
    return table


def stuff_map_table(unknown: int) -> np.ndarray:
    """int64 [256]: class of each value of a stuffthingmaps PNG, which stores COCO's id minus 1. 255
    stays 255. Values that COCO does not use become `unknown`.
    """
    table = np.full(256, unknown, np.int64)
    table[255] = 255
    for number, group in coarse_classes().items():
        table[number - 1] = group
    return table
