"""Measure a pre-trained backbone by detection, instance and semantic segmentation."""
