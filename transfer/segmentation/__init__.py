"""Semantic segmentation with an FCN on a dilated ResNet, as the seeds' tables measure it."""
