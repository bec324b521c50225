"""State beyond the device: what is loaded from the block store, and what is written behind to it."""
