"""Molecules for gendiff; importing this package imports no torch and no RDKit."""

from gendiff_molecule.plugin import MoleculeConfig, MoleculeModality, gendiff_modality

__all__ = ["MoleculeConfig", "MoleculeModality", "gendiff_modality"]
