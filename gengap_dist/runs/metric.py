"""The metric that runs are compared by: what it is called, how it is shown, which values are better."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class MetricDescription(BaseModel):
    """The metric that the runs of a study are compared by.

    >>> metric = MetricDescription(name="loss", unit="", higher_is_better=False)
    >>> metric.harm, metric.format(0.51234), metric.format_difference(0.25), metric.score(0.5)
    ('loss added', '0.5123', '+0.25', -0.5)
    """

    model_config = ConfigDict(frozen=True)

    name: str = Field(min_length=1)
    """A run has it as val/NAME in its history and as test/NAME in its result."""
    unit: str
    """`share`: between 0 and 1, shown in percent; else the unit to print after a number, or nothing."""
    higher_is_better: bool
    chance: float | None = None
    """Its value for a network that has learned nothing; null: not known."""

    @property
    def harm(self) -> str:
        """What an arm that is worse than the baseline has lost, or has too much of."""
        return f"{self.name} lost" if self.higher_is_better else f"{self.name} added"

    @property
    def scale(self) -> float:
        """Factor from values to the numbers that are shown."""
        return 100.0 if self.unit == "share" else 1.0

    @property
    def axis_label(self) -> str:
        """The name, with the unit of the numbers that are shown."""
        unit = "%" if self.unit == "share" else self.unit
        return f"{self.name}, {unit}" if unit else self.name

    @property
    def difference_unit(self) -> str:
        """Of the numbers that are shown of differences."""
        return "percentage points" if self.unit == "share" else self.unit

    def format(self, value: float, digits: int = 2) -> str:
        """A value with its unit; `digits` are those of a percentage.

        >>> ACCURACY.format(0.97345)
        '97.34%'
        """
        return f"{value:.{digits}%}" if self.unit == "share" else f"{value:.4g} {self.unit}".rstrip()

    def format_difference(self, value: float, *, signed: bool = True) -> str:
        """A difference of two values, without its unit.

        >>> ACCURACY.format_difference(0.0123)
        '+1.23'
        """
        text = f"{100 * value:+.2f}" if self.unit == "share" else f"{value:+.4g}"
        return text if signed else text.removeprefix("+")

    def score(self, value: float) -> float:
        """The value with the sign that makes larger ones better."""
        return value if self.higher_is_better else -value

    def is_better(self, value: float, than: float) -> bool:
        """Whether a value is better than another one."""
        return self.score(value) > self.score(than)


def metric_of(info: Mapping[str, Any]) -> MetricDescription:
    """The metric of a run by the content of its run.json; accuracy if it names none."""
    return MetricDescription.model_validate(info["metric"]) if info.get("metric") else ACCURACY


def value_on_test(info: Mapping[str, Any]) -> float | None:
    """The metric of a run on the test samples, by the content of its run.json; None if it has none."""
    value = (info.get("result") or {}).get(f"test/{metric_of(info).name}")
    return None if value is None else float(value)


def score_of(info: Mapping[str, Any]) -> float | None:
    """`MetricDescription.score` of `value_on_test`."""
    value = value_on_test(info)
    return None if value is None else metric_of(info).score(value)


ACCURACY = MetricDescription(name="accuracy", unit="share", higher_is_better=True)
"""The metric of runs that do not name theirs."""
