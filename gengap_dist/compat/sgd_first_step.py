"""Momentum buffers for torch's fused SGD: uninitialized if its first step is skipped (torch 2.14 and 2.15).

A step is skipped when a gradient overflows float16. The next step then reads whatever the memory contained.

Remove when the first assertion of tests/compat/test_sgd_first_step.py fails.
"""

import torch


def init_momentum(optimizer: torch.optim.SGD) -> None:
    """Momentum buffers of zeros, as if the optimizer had done a step with gradients of zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
