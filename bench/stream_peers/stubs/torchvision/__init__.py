"""Stands in for torchvision, which mosaicml-streaming imports and this benchmark never calls (see of_mosaicml.py)."""
