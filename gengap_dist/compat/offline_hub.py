"""No use of the network by Hugging Face's packages while a network is built (transformers 5.24, huggingface_hub 2.4).

Some architectures look for compiled kernels on the hub when they are made; its offline mode is read from the
environment once, at the import. Warnings about what follows from the data are not shown.

Remove when transformers can be told so by an argument.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def offline_hub() -> Iterator[None]:
    """Context in which every request to the hub fails, and transformers logs errors only."""
    from huggingface_hub import constants
    from transformers import logging

    before, verbosity = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)
