"""The names of the layouts of labelled data sets. They stand apart from the code that reads them,
since settings need them where no image can be decoded.
"""

KINDS = (
    "folder",
    "coco-stuff",
    "coco-stuff-182",
    "coco-panoptic",
    "coco-things-12",
    "coco-stuff-15",
    "camvid",
    "cityscapes",
    "cityscapes-27",
    "voc",
    "voc-aug",
    "ade20k",
    "ade20k-151",
    "pascal-context",
    "pascal-context-60",
)
