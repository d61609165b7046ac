"""Where the flat vectors of DeepSpeed's ZeRO stages 1 and 2 hold a parameter (DeepSpeed 0.19).

DeepSpeed's public functions return the whole parameter or its whole optimizer state, with a collective for each, and
cannot load a state.

Remove when DeepSpeed has a public name for the mapping of a parameter to its fragment.
"""

from typing import Any, NamedTuple


class Fragment(NamedTuple):
    """Elements `start` .. `start + size` of a parameter are `offset` .. `offset + size` of the vector of its group."""

    group: int
    offset: int
    start: int
    size: int


def fragment(parameter: Any) -> Fragment | None:
    """The fragment of a parameter that this rank holds; None if it holds none."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(mapping.param_group_index, in_flat.start, in_parameter.start, in_parameter.numel)
