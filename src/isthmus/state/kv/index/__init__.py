"""Where records lie: fingerprints of keys to locations, in memory."""
