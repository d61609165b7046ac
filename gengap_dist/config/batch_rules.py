"""How settings of the optimizer follow the global batch: pure functions of k = global batch / optim.base_size.

The rules of optim.scaling:

    none         as given
    linear       lr k                                                       Goyal et al. 2017
    sqrt, legw   lr sqrt(k)                                                 Hoffer et al. 2017; You et al. 2019
    adam_sqrt    lr sqrt(k), betas 1 - k (1 - beta), eps / sqrt(k)          Malladi et al. 2022, arXiv 2205.10287

optim.beta2_scaling=half_life: beta2^k (Marek et al. 2025, arXiv 2507.07101). optim.weight_decay_scaling=linear: weight
decay times k (Bergsma et al. 2025, arXiv 2505.13738).
"""

import math


def lr_factor(scaling: str, k: float) -> float:
    """What optim.scaling multiplies the learning rate by.

    >>> [lr_factor(rule, 4.0) for rule in ("none", "linear", "sqrt", "legw", "adam_sqrt")]
    [1.0, 4.0, 2.0, 2.0, 2.0]
    """
    return {"linear": k, "sqrt": math.sqrt(k), "legw": math.sqrt(k), "adam_sqrt": math.sqrt(k)}.get(scaling, 1.0)


def scaled_betas(scaling: str, beta2_scaling: str, betas: tuple[float, float], k: float) -> tuple[float, float]:
    """The betas of Adam.

    With adam_sqrt the averages are over 1 / (k (1 - beta)) steps, which are as many samples as at the base batch. With
    half_life the weights in the average of squares halve after as many samples: (beta2^k)^(n / k) = beta2^n.

    >>> scaled_betas("adam_sqrt", "none", (0.9, 0.99), 4.0)
    (0.6, 0.96)
    >>> scaled_betas("sqrt", "half_life", (0.9, 0.99), 2.0)
    (0.9, 0.9801)
    """
    beta1, beta2 = betas
    if scaling == "adam_sqrt":
        return _exact(1 - k * (1 - beta1)), _exact(1 - k * (1 - beta2))
    return beta1, _exact(beta2**k) if beta2_scaling == "half_life" else beta2


def scaled_eps(scaling: str, eps: float, k: float) -> float:
    """The eps of Adam: of the size of the root of the averaged squared gradient, which the noise makes 1 / sqrt(k).

    >>> scaled_eps("adam_sqrt", 1e-8, 4.0), scaled_eps("sqrt", 1e-8, 4.0)
    (5e-09, 1e-08)
    """
    return eps / math.sqrt(k) if scaling == "adam_sqrt" else eps


def weight_decay_factor(weight_decay_scaling: str, k: float) -> float:
    """What optim.weight_decay_scaling multiplies the weight decay by.

    At a fixed rate, linear keeps the samples over which the weights average updates: B / (rate * decay).

    >>> weight_decay_factor("linear", 4.0), weight_decay_factor("none", 4.0)
    (4.0, 1.0)
    """
    return k if weight_decay_scaling == "linear" else 1.0


def _exact(beta: float) -> float:
    """Without the last digits that rounding adds, so that a beta that was set and one that was scaled are equal."""
    return round(beta, 15)
