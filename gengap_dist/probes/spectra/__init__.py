"""Singular values of activations, exact over all ranks, and the rank measures computed from them."""
