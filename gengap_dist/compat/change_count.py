"""How often a tensor was changed in place: torch counts it for autograd, under a private name.

Remove when torch gives Tensor._version a public name.
"""

from torch import Tensor


def change_count(tensor: Tensor) -> int:
    """The number of changes in place of a tensor and its views.

    >>> import torch
    >>> tensor = torch.zeros(2)
    >>> change_count(tensor), change_count(tensor.add_(1)), change_count(tensor[:1].mul_(2))
    (0, 1, 2)
    """
    return tensor._version
