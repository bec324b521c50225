"""The scripts that build the model shipped in ``isthmus/data/embedded``."""
