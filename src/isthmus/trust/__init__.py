"""The trust plane: who may."""
