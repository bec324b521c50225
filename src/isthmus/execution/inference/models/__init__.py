"""Model families: each file says which tensors a family has; the decoder is shared."""
