"""Pre-training of SlotCon on scene images, built around its data path."""
