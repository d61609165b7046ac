"""One class for each sample: cross-entropy, and accuracy."""

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gengap_dist.data.data_spec import DataSpec
from gengap_dist.errors import UsageError
from gengap_dist.runs.metric import MetricDescription
from gengap_dist.training.tasks.base import Task


@final
class Classification(Task):
    """Outputs are logits [n, K], targets are classes [n] of 0 to K - 1, or of mixed images shares of classes [n, K].

    The cross-entropy of a mixed image is the mean over its classes, weighted by their shares, and so is its accuracy: a
    prediction counts as much as the share of its class.
    """

    def __init__(self, spec: DataSpec, label_smoothing: float = 0.0) -> None:
        """In training, the fraction `label_smoothing` of each target is spread over all classes.

        Raises:
            UsageError: if targets are not classes.
        """
        super().__init__(spec)
        if spec.num_classes is None or spec.target_shape:
            kind, remedy = ("tokens", "set task.name=language_modeling") if spec.token else ("real numbers", "")
            raise UsageError(
                "task.name (classification) needs one class for each sample, and the data set has targets of shape "
                f"{list(spec.target_shape)} that are {kind}: "
                + (remedy or "choose a data set with classes, or your own module.path:Class")
            )
        self.label_smoothing, self.num_classes = label_smoothing, spec.num_classes

    @property
    def metric(self) -> MetricDescription:
        """Accuracy."""
        return MetricDescription(name="accuracy", unit="share", higher_is_better=True, chance=1 / self.num_classes)

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, summed."""
        return cross_entropy(outputs, targets, reduction="sum")

    def training_loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with label smoothing, summed."""
        return cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing)

    @property
    def has_training_loss(self) -> bool:
        """With label smoothing."""
        return self.label_smoothing > 0

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The number of correct predictions; of mixed images, the sum of the shares of the predicted classes."""
        if targets.ndim == 2:
            return targets.gather(1, outputs.argmax(1, keepdim=True)).sum()
        return self.correct(outputs, targets).sum()

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the largest logit is that of the target."""
        return outputs.argmax(1) == targets

    def chance(self, targets: Tensor) -> float:
        """The share of the most frequent class.

        >>> Classification(DataSpec.images(3, 1, 8)).chance(torch.tensor([0, 2, 2, 1]))
        0.5
        """
        return int(torch.bincount(targets).max()) / len(targets)

    def metrics(self, loss: float, mean: float) -> dict[str, float]:
        """`loss` and `accuracy`."""
        return {"loss": loss, "accuracy": mean}
