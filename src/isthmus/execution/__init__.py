"""The execution plane: runs models and turns text into tokens and back."""
