"""Which metrics say something of the representation or of the loss, and may explain a gap."""

import re

MEASURED = (
    r"near_rank_loss/.+/(?:rel|abs)_1e-2|effective_rank/.+|noise_scale|hessian/eigenvalue_1|hessian/trace"
    r"|keskar_sharpness|nc1"
)
"""A pattern of their names."""
CONTROLS = re.compile(r"/(centred|weight|n\d+|own_batch)(/|$)")
"""What the names of matrices beside those of raw activations on the fixed probe set hold."""
