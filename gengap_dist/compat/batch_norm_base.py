"""The common base class of torch's batch norm layers, which torch exports under a private name only.

Remove when torch gives it a public name.
"""

from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase

__all__ = ["BatchNormBase"]
