"""``python -m gendiff``."""

from gendiff.cli import main

main()
