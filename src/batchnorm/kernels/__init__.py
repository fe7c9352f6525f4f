"""Tensors in, tensors out: no modules, no autograd, no policy. The derivation is in README.md."""
