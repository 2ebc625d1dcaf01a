"""A Griffe extension, which reads docstrings as this package lays them out: no blank line between sections."""

import re

from griffe import Extension, Object

SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Returns|Raises|Yields):\n)")


class Sections(Extension):
    """Puts a blank line before each section, without which Griffe reads it as text."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
