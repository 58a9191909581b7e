class VisionDataset:
    """Never made."""
