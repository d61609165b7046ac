"""The next token at every position of a sequence: cross-entropy."""

import math
from typing import final

from torch import Tensor
from torch.nn.functional import cross_entropy

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.training.tasks.base import Task

MAX_EXPONENT = 700.0  # exp of more is no float


@final
class LanguageModeling(Task):
    """Outputs are logits [n, T, V], targets are the next tokens [n, T]; one below 0 is not counted.

    The loss is in nats per counted token. Sequences differ in their number of counted tokens, and the mean of a step is
    over all of those of its global batch.
    """

    def __init__(self, spec: DataSpec) -> None:
        """A task on sequences of tokens.

        Raises:
            UsageError: if inputs are no tokens.
        """
        super().__init__(spec)
        if spec.token is None:
            raise UsageError(
                "task.name (language_modeling) needs sequences of tokens, and the data set has inputs of shape "
                f"{list(spec.input_shape)} that are {'images' if spec.is_image else 'real numbers'}: set "
                "data.name=stdlib, or text or tokens with data.root"
            )

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, summed over the tokens that count."""
        tokens = targets.flatten().long().clamp(min=-1)
        return cross_entropy(outputs.flatten(0, 1), tokens, reduction="sum", ignore_index=-1)

    def num_targets(self, targets: Tensor) -> Tensor:
        """The number of tokens that count in each sequence: [n] int64.

        >>> import torch
        >>> LanguageModeling(DataSpec.tokens(8, 3)).num_targets(torch.tensor([[5, ~5, 0], [~7, ~7, ~7]])).tolist()
        [2, 0]
        """
        return (targets >= 0).sum(1)

    def metrics(self, loss: float, mean: float) -> dict[str, float]:
        """`loss`, `perplexity` = exp(loss), and for bytes `bits_per_byte` = loss / ln 2, the end of a document as one.

        >>> LanguageModeling(DataSpec.tokens(257, 8, "byte")).metrics(math.log(4), 0.0)
        {'loss': 1.3862943611198906, 'perplexity': 4.0, 'bits_per_byte': 2.0}
        """
        bits = {"bits_per_byte": loss / math.log(2)} if self.spec.token == "byte" else {}
        return {"loss": loss, "perplexity": math.exp(min(loss, MAX_EXPONENT)), **bits}
