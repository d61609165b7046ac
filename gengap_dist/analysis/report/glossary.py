"""What the words of a report mean: shown under the pointer, and in a section of the page. Longer: docs/glossary.md."""

import re

from markupsafe import Markup, escape

GLOSSARY = {
    "near-rank loss": "Share of the singular values of a layer's activations that are below 1% of the largest one.",
    "effective rank": "exp of the entropy of the normalized singular values: how many directions activations use.",
    "s1": "The largest singular value.",
    "centred": "With the mean of each unit subtracted.",
    "pooled": "Over the singular values of all layers together.",
    "probe set": "Fixed training samples on which activations are measured.",
    "baseline": "The arm that the others are compared with: the small batch, in its plain form.",
    "arm": "One setting of a study, run with several seeds.",
    "gap": "Result of the baseline minus that of the arm, paired by seed: above 0 the arm is worse.",
    "tolerance": "A smaller difference does not count: study.tolerance.",
    "equal training": "Compared where both have the same training loss, at the end or on the way.",
    "trained": "Whether an arm reaches the training result of the baseline: as well, less, or not at all.",
    "loss ratio": "Final training loss of the arm divided by that of the baseline: geometric mean over seeds.",
    "train-test gap": "Result on training samples minus that on test samples.",
    "95% t": "Student's 95% interval of the mean difference over seeds.",
    "95% bootstrap": "95% interval from resampling the seeds; too narrow with fewer than eight.",
    "Holm p": "p of the paired t test, corrected for all arms of the study (Holm 1979).",
    "CI half-width": "A difference smaller than this is not significant.",
    "detectable": "A true difference of this size is found with 80% power.",
    "matched": "What the arm has in common with the baseline: epochs, updates, or nothing.",
    "raised": "Trained with a penalty that raises the rank.",
    "lowered": "Trained with a penalty that lowers the rank.",
    "placebo": "A penalty of the same gradient norm that leaves the rank as it is.",
    "trace": "A second way to raise the rank, as a check of the first.",
    "critical batch": "Batch from which more samples per step hardly save updates (McCandlish et al. 2018).",
    "noise scale": "Variance of the gradient over its squared norm: predicts the critical batch.",
    "perfect scaling": "Twice the batch, half the updates.",
    "numerical floor": "Below it, singular values are lost in rounding.",
}
ONLY_HEADS = ("arm", "baseline", "trained", "matched", "detectable")  # in sentences they are said in other senses, too
_TERM = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, sorted(GLOSSARY, key=len, reverse=True)))})(?![\w-])", re.I)
_KEYS = {term.lower(): term for term in GLOSSARY}


def anchor(term: str) -> str:
    """The id of a term in the page.

    >>> anchor("95% t")
    'term-95--t'
    """
    return "term-" + re.sub(r"\W", "-", term)


def meaning(head: str) -> str:
    """What the head of a column means; empty if it does not begin with a term.

    >>> meaning("matched"), meaning("seeds")
    ('What the arm has in common with the baseline: epochs, updates, or nothing.', '')
    """
    match = _TERM.match(head)
    return GLOSSARY[_KEYS[match[0].lower()]] if match else ""


def with_terms(text: str) -> Markup:
    """The text as HTML in which the first of each of its terms is a link to its entry, which the pointer shows.

    >>> print(with_terms("s1 < 1 of s1"))
    <a class="term" href="#term-s1" title="The largest singular value.">s1</a> &lt; 1 of s1
    """
    out, end, seen = Markup(), 0, set[str]()
    for match in _TERM.finditer(text):
        term = _KEYS[match[0].lower()]
        if term not in seen and term not in ONLY_HEADS:
            seen.add(term)
            link = Markup('<a class="term" href="#{}" title="{}">{}</a>').format(anchor(term), GLOSSARY[term], match[0])
            out, end = out + escape(text[end : match.start()]) + link, match.end()
    return out + escape(text[end:])
