"""Linear layers behind one seam."""
