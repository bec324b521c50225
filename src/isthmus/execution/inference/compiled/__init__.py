"""Pointwise pieces compiled ahead of time (AOTInductor), behind the seam of models/pieces.py."""
