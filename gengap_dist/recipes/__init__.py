"""What is added to plain training: other gradients, another objective, other weights to evaluate."""

from gengap_dist.config import RunConfig
from gengap_dist.data.order import Order
from gengap_dist.data.resident import Batches
from gengap_dist.recipes.averaging import Averaging
from gengap_dist.recipes.course import Course
from gengap_dist.recipes.workers import Local
from gengap_dist.strategies import Strategy


def course_of(config: RunConfig, strategy: Strategy, batches: Batches, order: Order, num_steps: int) -> Course:
    """The course that `config.recipe` asks for, of a strategy that is set up."""
    recipe = config.recipe
    if recipe.average:
        first = 0 if recipe.average == "ema" else round(recipe.average_start * num_steps)
        return Averaging(config, strategy, batches, order, first)
    if recipe.local:
        return Local(config, strategy, batches, order, round(recipe.local_start * num_steps))
    return Course(config, strategy, batches, order)
