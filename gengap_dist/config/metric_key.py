"""Names of the metrics that describe the representation or the loss, and may explain a generalization gap."""

import re

EXPLANATORY_METRICS = (
    r"near_rank_loss/.+/(?:rel|abs)_1e-2|effective_rank/.+|noise_scale|hessian/eigenvalue_1|hessian/trace"
    r"|keskar_sharpness|nc1"
)
"""Regular expression of their names."""
CONTROLS = re.compile(r"/(centred|weight|n\d+|own_batch)(/|$)")
"""Parts of the names of control matrices: all but the raw activations on the fixed probe set."""
