"""Tensors with shapes and no values, which torch keeps in a private package.

Remove when torch exports FakeTensorMode from a public one.
"""

from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["FakeTensorMode"]
