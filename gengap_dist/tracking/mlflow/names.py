"""Names of metrics and parameters in MLflow, which takes 250 letters, digits and `_-./: `, and refuses all others.

Each segment of a name is changed on its own, so that a name has the same parts here and there. Whatever cannot be
undone from the changed segment alone is kept in a tag of the run, `name/<changed segment>`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping

MAX_NAME = 250
MAX_SEGMENT = 150  # longest segment of a layer; the other parts of a metric of a layer, and of its mean, take 80
TAG = "name/"
_REFUSED = re.compile(r"[^A-Za-z0-9_.\- ]|\A\.|\A\Z")  # a name is a path, too; `:` is what a `#` is sent as


def mlflow_name(name: str) -> str:
    """The name under which a metric or parameter is sent.

    `#` is sent as `:`. A segment that MLflow refuses for other characters or its length is shortened and gets a hash;
    so does a whole name that is too long. The result depends on nothing else, and is distinct for distinct names.

    >>> mlflow_name("near_rank_loss/relu#2/rel_1e-2"), mlflow_name("sb_lb_gap/a+b/mean")
    ('near_rank_loss/relu:2/rel_1e-2', 'sb_lb_gap/a_b-300273da/mean')
    """
    sent = "/".join(map(_sent_segment, name.split("/")))
    return sent if len(sent) <= MAX_NAME else _shortened(sent, name, MAX_NAME)


def own_name(sent: str, tags: Mapping[str, str]) -> str:
    """The name that `mlflow_name` was given, if the run has the tags of `name_tags`.

    >>> own_name("near_rank_loss/relu:2/rel_1e-2", {}), own_name("effective_rank/a_b-300273da", name_tags(["x/a+b"]))
    ('near_rank_loss/relu#2/rel_1e-2', 'effective_rank/a+b')
    """
    return "/".join(tags.get(f"{TAG}{segment}", segment.replace(":", "#")) for segment in sent.split("/"))


def name_tags(names: Iterable[str]) -> dict[str, str]:
    """The tags of a run that sends these names, see `own_name`.

    >>> name_tags(["near_rank_loss/relu#2/rel_1e-2"])
    {}
    """
    segments = {segment: _sent_segment(segment) for name in names for segment in name.split("/")}
    return {f"{TAG}{sent}": segment for segment, sent in segments.items() if sent.replace(":", "#") != segment}


def _sent_segment(segment: str) -> str:
    if len(segment) <= MAX_SEGMENT and not _REFUSED.search(segment.replace("#", "")):
        return segment.replace("#", ":")
    return _shortened(_REFUSED.sub("_", segment), segment, MAX_SEGMENT)


def _shortened(text: str, original: str, length: int) -> str:
    digest = hashlib.sha256(original.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{text[: length - 9]}-{digest}"
