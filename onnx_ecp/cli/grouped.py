"""Help in groups: a page with what most people need, and everything with ``--help-all``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import click

# By title, the options of the one page and those that only --help-all shows, by their long flags.
# What no row names comes last in --help-all.
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "What": (
        ("calibration", "labels", "include", "exclude", "granularity", "target"),
        ("samples", "input-shapes", "eval", "calibration-labels"),
    ),
    "How much": (
        ("sparsity", "sparsities", "max-error", "max-accuracy-drop", "speedup"),
        ("layer-sparsity", "apply-masks", "unit-multiple", "units-and-zeros", "cost"),
    ),
    "How": (
        ("method", "methods", "effort", "time-budget", "quantize", "provider"),
        (
            "metric", "importance", "compensation", "support", "damping", "stages", "scope",
            "finetune-steps", "output-weights", "probes", "gradients", "positions", "statistics",
            "blocks", "cbs-select", "cbs-update", "permute", "cleanup", "unread-inputs",
            "batch-size", "seed", "threads", "max-memory", "cache", "cache-limit", "timeout",
        ),
    ),
    "Output": (
        (
            "output", "report", "measure", "json", "force", "dry-run", "quiet",
            "config",
        ),
        ("verbose", "format", "masks", "bound", "traceback", "help", "help-all"),
    ),
}  # fmt: skip
REST = "More"


class Grouped(click.Command):
    """A command whose help is one page of groups; ``--help-all`` shows every option in full."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters, and those that ask for help."""
        everything = click.Option(
            ["--help-all"], is_flag=True, is_eager=True, expose_value=False,
            callback=_show_all, help="Show all options, in full, and exit.",
        )  # fmt: skip
        return [*super().get_params(ctx), everything]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the page."""
        _write(ctx, formatter, groups(self.get_params(ctx), everything=False), _brief)
        formatter.write_paragraph()
        formatter.write_text(f"All options, in full: {ctx.command_path} --help-all")


def _show_all(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    formatter, command = ctx.make_formatter(), ctx.command
    command.format_usage(ctx, formatter)
    command.format_help_text(ctx, formatter)
    _write(ctx, formatter, groups(command.get_params(ctx), everything=True), lambda text: text)
    click.echo(formatter.getvalue().rstrip("\n"))
    ctx.exit()


def groups(
    params: Iterable[click.Parameter], *, everything: bool
) -> Iterator[tuple[str, list[click.Option]]]:
    """(title, options) of a command's help; an option is in one group.

    Args:
        params: of the command.
        everything: whether options that the one page leaves out are there too.
    """
    left = {
        p.opts[-1].removeprefix("--"): p
        for p in params
        if isinstance(p, click.Option) and not p.hidden
    }
    for title, (often, seldom) in GROUPS.items():
        names = [name for name in (*often, *(seldom * everything)) if name in left]
        if names:
            yield title, [left.pop(name) for name in names]
    if everything and left:
        yield REST, list(left.values())


def _write(
    ctx: click.Context,
    formatter: click.HelpFormatter,
    shown: Iterable[tuple[str, list[click.Option]]],
    words: Callable[[str], str],
) -> None:
    for title, options in shown:
        records = [record for x in options if (record := x.get_help_record(ctx)) is not None]
        with formatter.section(title):
            formatter.write_dl([(flags, words(text)) for flags, text in records])


def _brief(text: str) -> str:
    """The first clause of a help text, and its default.

    >>> _brief("Rank within each layer; slow. Or over all.  [default: all]")
    'Rank within each layer.  [default: all]'
    """
    words, default, value = text.partition("  [default:")
    first = re.split(r"[.;](?:\s|$)", words, maxsplit=1)[0]
    return f"{first}.{default}{value}"
