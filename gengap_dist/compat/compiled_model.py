"""The network inside torch.compile, and passes through it without compiled code.

torch names the inner network privately, and `torch.compiler.set_stance` imports the compiler, which takes 2 s, also
where nothing is compiled.

Remove `uncompiled` when torch has a public name for the inner network, `without_compiled_code` when
`torch.compiler.set_stance` no longer imports torch._dynamo.
"""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The network that was given to torch.compile; `model` itself if it is not compiled."""
    return getattr(model, "_orig_mod", model)


def without_compiled_code() -> AbstractContextManager[object]:
    """Context in which compiled functions run as they were written; it does not import the compiler."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
