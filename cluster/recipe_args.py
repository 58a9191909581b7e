"""`RECIPE+CHANGE [flags]` of a command line -> a config: recipe, flags, changes, and the flags again.

A change may look at what the flags say (`+crt` switches after four fifths of --train.epochs), and a flag that is given
has the last word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from micacl.config import RunConfig
from micacl.recipes import about, changed, listing, recipe
from pipeline.cli import Arguments, ArgumentsRefused, parse, say


def recipe_named(arguments: Arguments, prog: str, more: str = "", several: str = "") -> str:
    """The first argument, the name of a recipe. Raises ArgumentsRefused after the help was shown."""
    name = next(iter(arguments), "")
    if name in ("-h", "--help"):
        say(f"usage: {prog} RECIPE{several} {more}[flags]\n\n{listing()}\nflags: {prog} RECIPE --help")
        raise ArgumentsRefused(0, prog)
    return name


def parse_recipe(target: Any, name: str, prog: str, rest: Arguments, default: Callable[[RunConfig], Any]) -> Any:
    """The arguments after the name of a recipe, as `target`: RunConfig itself, or a dataclass with a field `config`.

    `default` makes the target's defaults of a config. Raises MicaclError for an unknown recipe or a bad value.
    """
    base, _, changes = name.partition("+")
    config, of = recipe(name), about(name)

    def once(config: RunConfig) -> Any:
        return parse(target, f"{prog} {name}", of, rest, default=default(config))

    if changes and not {"-h", "--help"} & set(rest):
        said = once(recipe(base))
        config = changed(said if isinstance(said, RunConfig) else said.config, changes)
    return once(config)
