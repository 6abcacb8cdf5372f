"""How `--help` looks: plain text of at most 80 columns, in which no option name is ever cut.

typer's own panels give the option names a column as wide as the terminal allows, and end a longer name with an ellipsis.
"""

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import typer
import typer.core

NAME_WIDTH = 24  # columns; a longer option stands on a line of its own, its text on the next


def _write_paragraphs(formatter: Any, text: str, indent: int) -> None:
    for paragraph in text.strip().split("\n\n"):
        formatter.write("\n")
        for line in _wrapped(paragraph, formatter.width - indent):
            formatter.write(" " * indent + line + "\n")


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text; a line break inside the text stays, a name with hyphens is never parted."""
    lines = []
    for line in text.replace("\b", "").split("\n"):
        lines += textwrap.wrap(line.strip(), width, break_on_hyphens=False, break_long_words=False) or [""]
    return lines


def _write_entries(formatter: Any, title: str, entries: Sequence[tuple[str, str]]) -> None:
    """One section of the help: names at the left, texts at the right or below."""
    formatter.write(f"\n{title}:\n")
    width = min(NAME_WIDTH, max(len(name) for name, _ in entries))
    for name, text in entries:
        lines = _wrapped(text, formatter.width - width - 4)
        if len(name) <= width:
            formatter.write(f"  {name:<{width}}  {lines[0]}\n")
            lines = lines[1:]
        else:
            formatter.write(f"  {name}\n")
        for line in lines:
            formatter.write(f"  {'':<{width}}  {line}\n")


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    """Arguments, required options, then each group of options in the order in which the command declares them."""
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Required": []}
    for parameter in command.get_params(ctx):
        entry = parameter.get_help_record(ctx)
        if entry is None:
            continue
        entry = (entry[0].replace(" range>", ">"), re.sub(r"x>=([^\]]+)\]", r"at least \1]", entry[1]))
        if parameter.param_type_name == "argument":
            title = "Arguments"
        elif parameter.required:
            title, entry = "Required", (entry[0], entry[1].removesuffix("  [required]"))
        else:
            title = parameter.rich_help_panel or ("Output" if parameter.name == "help" else "Options")
        sections.setdefault(title, []).append(entry)
    last = sections.pop("Output", [])
    if not any(name.startswith("--debug") for entries in sections.values() for name, _ in entries):
        last.append(("--debug", "Print the traceback of an error."))  # `main` takes the flag from any place
    for title, entries in [*sections.items(), ("Output", last)]:
        if entries:
            _write_entries(formatter, title, entries)


class Command(typer.core.TyperCommand):
    """A command with this module's help."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        _write_paragraphs(formatter, self.help or "", 2)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            _write_paragraphs(formatter, self.epilog, 0)


class Group(typer.core.TyperGroup):
    """A group of commands with this module's help: each command with the whole first paragraph of its own."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        _write_paragraphs(formatter, self.help or "", 2)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            text = " ".join((command.help or "").split("\n\n")[0].split())
            sections.setdefault(command.rich_help_panel or "Commands", []).append((name, text))
        for title, entries in sections.items():
            _write_entries(formatter, title, entries)
        _write_parameters(self, ctx, formatter)


class App(typer.Typer):
    """A typer application whose commands and groups all have this module's help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **{
                "cls": Group,
                "rich_markup_mode": None,
                "no_args_is_help": True,
                "add_completion": False,
                "pretty_exceptions_enable": False,
                "context_settings": {"help_option_names": ["-h", "--help"]},
                **settings,
            }
        )

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": Command, **settings})
