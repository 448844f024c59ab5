"""Semantic segmentation with an FCN on a dilated ResNet, as in the paper's tables."""
