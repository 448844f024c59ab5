"""What a pre-trained backbone is worth: detection, instance and semantic segmentation."""
