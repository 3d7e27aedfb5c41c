"""Images for gendiff."""

from gendiff_image.plugin import ImageConfig, ImageModality, gendiff_modality

__all__ = ["ImageConfig", "ImageModality", "gendiff_modality"]
