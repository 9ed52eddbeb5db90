"""Damaged and hostile files against every loader of loraprobe: `python -m fuzz`.

See README.md here.
"""
