"""Singular values of activations: exact, over all ranks, and the measures of rank that follow from them."""
