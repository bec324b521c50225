"""Attention over blocks behind one seam."""
