"""The terminal as rich prints on it: names are text, whatever they contain."""

from collections.abc import Iterable
from typing import Any, final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from gengap_dist.errors import visible


@final
class PlainConsole(Console):
    """A console without markup, emoji codes and highlighting, on which control characters of texts are visible."""

    def __init__(self, *, stderr: bool = False, width: int | None = None, **settings: Any) -> None:
        """`width`: of a file or pipe; a terminal has its own."""
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **settings)
        if width is not None and not self.is_terminal:
            self.width = width

    def render_str(self, text: str, **settings: Any) -> Text:
        """See Console: with the width of what is shown, for tables."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See Console: all that is printed passes here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def print_line(self, text: str | Text) -> None:
        """Print a text; the terminal may wrap it, a file does not."""
        self.print(text, soft_wrap=True)
