"""Checkpoints that come with the package; `checkpoint/resolve.py` finds them."""
