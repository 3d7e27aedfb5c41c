"""Speech for gendiff."""

from gendiff_speech.plugin import gendiff_modality

__all__ = ["gendiff_modality"]
