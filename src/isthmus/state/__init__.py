"""The state plane: keeps things."""
