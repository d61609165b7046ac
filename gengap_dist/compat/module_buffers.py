"""The buffers of a module, those that are None included, and the names of those that a state dict leaves out.

Remove when torch lists buffers that are None.
"""

from torch import Tensor, nn


class ModuleBuffers:
    """What the buffers of one module were."""

    def __init__(self, module: nn.Module) -> None:
        """Note them, with copies of their values."""
        self.module = module
        self.buffers: dict[str, Tensor | None] = dict(module._buffers)
        self.hidden = set(module._non_persistent_buffers_set)
        self.values = {name: buffer.detach().clone() for name, buffer in self.buffers.items() if buffer is not None}

    def restore(self) -> None:
        """The same buffers again, with the values they had.

        >>> module = nn.BatchNorm1d(1)
        >>> before = ModuleBuffers(module)
        >>> module.running_mean.data.add_(1), module.register_buffer("more", module.running_var)
        (tensor([1.]), None)
        >>> before.restore()
        >>> module.running_mean, [name for name, _ in module.named_buffers()]
        (tensor([0.]), ['running_mean', 'running_var', 'num_batches_tracked'])
        """
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        self.module._non_persistent_buffers_set.clear()
        self.module._non_persistent_buffers_set.update(self.hidden)
        for name, value in self.values.items():
            buffer = self.buffers[name]
            assert buffer is not None
            if buffer.shape != value.shape or value.is_sparse:
                buffer.data = value
            elif not buffer.is_inference():  # which no pass can change
                buffer.data.copy_(value)  # also what `.data` changed; to compare first would wait for a GPU
