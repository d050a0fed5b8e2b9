"""The command line: read, call, write, print.

Only click is imported at the top: ``onnx-ecp --help`` must not wait for numpy, onnx or rich. What
an option's value may be, the library decides; here is only what is peculiar to a command line.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TypeVar

import click

from onnx_ecp.cli.grouped import Grouped
from onnx_ecp.cli.progress import bars
from onnx_ecp.errors import (
    Interrupted,
    OnnxEcpError,
    OutputError,
    UsageError,
    did_you_mean,
    named_as_options,
)
from onnx_ecp.runtime.supervision import supervised, written

F = TypeVar("F", bound=Callable[..., Any])


class Pair(click.ParamType):
    """NAME, a separator, VALUE: the last separator counts, so names may contain it.

    Args:
        separator: one character.
        value: what VALUE is converted with; ValueError if it cannot be.
        example: for the hint.
    """

    name = "pair"

    def __init__(self, separator: str, value: Callable[[str], Any], example: str) -> None:
        self.separator, self.value, self.example = separator, value, example

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """(name, converted value)."""
        if isinstance(value, tuple):
            return value
        name, _, text = str(value).rpartition(self.separator)
        try:
            if not name:
                raise ValueError
            return name, self.value(text)
        except ValueError:
            raise UsageError(
                f"{param.opts[0]}: cannot read {value!r}.", hint=f"Write it like {self.example}."
            ) from None


# Where the context of a command keeps the path that --config has read.
CONFIG_READ = "onnx_ecp.config"


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",")) if text else ()


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Make the values of a TOML file the defaults of this command's options."""
    if path is None:
        return
    ctx.meta[CONFIG_READ] = path
    import tomllib

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, ValueError) as error:  # TOML and UTF-8 errors are ValueErrors
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: cannot be read: {why}.",
            hint='Name a TOML file of options by their long names: sparsity = 0.8, method = "ecp".',
        ) from error
    options = {
        option.opts[-1].removeprefix("--"): option
        for option in ctx.command.params
        if isinstance(option, click.Option) and option is not param
    }
    defaults = {}
    for key, value in values.items():
        option = options.get(key.replace("_", "-"))
        if option is None:
            raise UsageError(f"{path}: no option {key!r}.", hint=did_you_mean(key, options))
        assert option.name, "click names every option"
        defaults[option.name] = _config_value(f"{path}: {key}", option, value)
    ctx.default_map = defaults


def _spare_config(results: Sequence[tuple[str, str | None]]) -> None:
    """Refuse to write over the file that --config has read."""
    config = click.get_current_context().meta.get(CONFIG_READ)
    if config is not None:
        from onnx_ecp.api.output_paths import check_output_paths

        named = [(what, path) for what, path in results if path is not None]
        check_output_paths(named, [("the settings (--config)", config)])


def _config_value(where: str, option: click.Option, value: Any) -> Any:
    """A TOML value in the form in which click takes defaults."""
    if isinstance(option.type, Pair) and isinstance(value, dict):
        texts = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in value.items()}
        return [f"{name}{option.type.separator}{text}" for name, text in texts.items()]
    if option.multiple and not isinstance(value, dict):
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    plain = isinstance(value, str | int | float) and isinstance(value, bool) == option.is_flag
    if isinstance(option.type, click.types.IntParamType) and isinstance(value, float):
        plain = value.is_integer()
    if not plain:
        shown = repr(value) if isinstance(value, str) else value
        raise UsageError(f"{where} cannot be {shown}.", hint="See --help of the command.")
    return value


BATCH_SIZE = click.option(
    "--batch-size", type=int, metavar="N", help="Samples per run.  [default: what fits]"
)
PROVIDER = click.option(
    "--provider", metavar="NAME", default="cpu", show_default=True,
    help="Execution provider, by a part of its name: cpu, cuda, ...",
)  # fmt: skip
THREADS = click.option(
    "--threads", type=int, metavar="N",
    help="Threads of ONNX Runtime and NumPy.  [default: their own choice]",
)  # fmt: skip
TIMEOUT = click.option("--timeout", type=float, metavar="S", help="Give up after S seconds.")
TRACEBACK = click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
JSON = click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print only the last line.")
FORCE = click.option("--force", is_flag=True, help="Overwrite files that are there.")
VERBOSE = click.option("-v", "--verbose", is_flag=True, help="All layers, however many.")


def _choice(flag: str, values: str, default: str | None, text: str) -> Callable[[F], F]:
    """An option with a few values; the library says which exist, and what to do about others."""
    return click.option(
        *flag.split(), metavar=values, default=default, show_default=default is not None, help=text
    )


CONFIG = click.option(
    "--config", metavar="FILE.toml", is_eager=True, expose_value=False, callback=_read_config,
    help="Options from a file, by their long names; the command line wins.",
)  # fmt: skip
CALIBRATION = click.option(
    "-c", "--calibration", metavar="PATH",
    help="Calibration inputs: .npz, .npy, a folder, SCRIPT.py[:function]; .npz has one array per "
    "input, first axis = sample. Folders of these, of images or .wav, of "
    "test_data_set_N/input_*.pb, .csv, .parquet, .txt, Polygraphy .json work too.  "
    "[default: MODEL.npz beside the model, else made-up inputs]",
)  # fmt: skip

INPUT_SHAPES = click.option(
    "--input-shapes", type=Pair(":", _sizes, "x:1,3,224,224"), metavar="NAME:D1,D2,...",
    multiple=True, help="Shape of an input with free dimensions (repeatable).",
)  # fmt: skip

TARGET = click.option(
    "--target", metavar="NAME",
    help="The runtime that the result is for: onnxruntime, deepsparse, openvino, tensorrt, xnnpack "
    "or coreml. It sets what is pruned and how, and the report says which layers gain.",
)  # fmt: skip

OUTPUT_WEIGHTS = click.option(
    "--output-weights", type=Pair("=", float, "y=2 or y:0=2"), metavar="NAME[:COLUMN]=W",
    multiple=True,
    help="Let an output, or a column of one, count W times, 0 for not at all (repeatable).",
)  # fmt: skip

# What commands that prune have in common: how a network is pruned, and what computes it.
PRUNING = (
    _choice(
        "--compensation", "NAME", None,
        "none, bias, refit, joint, sparsegpt, obc, woodfisher or cbs.  [default: the method's own]",
    ),
    click.option(
        "--effort", metavar="fast|balanced|best",
        help="ecp-refit: one stage and no joint refit, four stages, or sixteen.  "
        "[default: balanced]",
    ),
    _choice(
        "--support", "ranking|admm", None,
        "refit and joint: which weights of a layer stay, of as many as the ranking leaves it: "
        "those that rank highest, or those that ADMM finds.  [default: the method's own]",
    ),
    click.option(
        "--damping", type=float, metavar="X",
        help="Ridge of importance and compensation: a share of the mean variance of a layer's "
        "inputs (default 0.01); for woodfisher and cbs lambda itself (default 0.001).",
    ),
    _choice(
        "--blocks", "network|layer", "network",
        "woodfisher and cbs: couple all weights, or those within a layer, for large networks.",
    ),
    click.option(
        "--finetune-steps", type=int, metavar="N", default=0, show_default=True,
        help="Learn the original outputs for N batches at the end, N/10 between stages.",
    ),
    click.option("--stages", type=int, metavar="N", help="Stages.  [default: the method's own]"),
    _choice(
        "--scope", "global|layer", None,
        "Rank over all layers, or within each.  [default: layer for sparsegpt, obc]",
    ),
    _choice(
        "--metric", "l2|l2-raw|kl|loss", None,
        "Distance of outputs: l2 counts every column in units of its own spread, l2-raw as it is; "
        "kl takes outputs as logits, loss takes --labels too.  [default: l2; loss for woodfisher "
        "and cbs with --labels]",
    ),
    OUTPUT_WEIGHTS,
    click.option(
        "--probes", type=int, metavar="N",
        help="Random output directions per sample.  [default: exact for few outputs, else one]",
    ),
    _choice(
        "--gradients", "vjp|numeric", "vjp",
        "Reverse-mode graph, or finite differences (slow, any operator).",
    ),
    _choice("--positions", "expand|reduce", "expand", "Tokens as samples, or summed."),
    click.option(
        "--include", metavar="REGEX", multiple=True,
        help="Prune only layers whose name matches (repeatable).",
    ),
    click.option(
        "--exclude", metavar="REGEX", multiple=True,
        help="Leave layers whose name matches (repeatable).",
    ),
    click.option(
        "--layer-sparsity", type=Pair("=", str, "'fc1=0.9'"), metavar="REGEX=VALUE", multiple=True,
        help="Sparsity of the layers whose name matches (repeatable).",
    ),
)  # fmt: skip
RUNNING = (
    click.option("--samples", type=int, metavar="N", help="Use at most N calibration samples."),
    BATCH_SIZE,
    click.option(
        "--max-memory", metavar="SIZE",
        help="What statistics and activations may take, such as 8G; below it, more passes over "
        "the data and temporary files, and no joint refit where half of it is too little.  "
        "[default: half of what is free; 8G for what is left out]",
    ),
    click.option(
        "--cache", metavar="DIR",
        help="Keep statistics and stages in DIR: another sparsity or method then observes less, "
        "and a run that was ended goes on where it was.",
    ),
    click.option(
        "--cache-limit", metavar="SIZE",
        help="What DIR may take, such as 8G; the oldest entries go first.  [default: 10G]",
    ),
    click.option(
        "--workers", type=int, metavar="N",
        help="Look at parts of the data in N processes, each on --threads threads (one unless "
        "said); the same bytes for any N.",
    ),
    click.option(
        "--dask", metavar="ADDRESS",
        help="Let the workers of this Dask scheduler do that, such as tcp://host:8786; needs "
        "onnx-ecp[distributed].",
    ),
    click.option(
        "--seed", type=int, metavar="N", default=0, show_default=True,
        help="Seed of everything random.",
    ),
    PROVIDER,
    _choice(
        "--statistics", "auto|graph|host", "auto",
        "Sum statistics inside the ONNX graph, where the provider runs it, or in NumPy; auto: in "
        "the graph where the provider is cuda.",
    ),
    THREADS,
    TIMEOUT,
    INPUT_SHAPES,
)  # fmt: skip

# One row per option of `optimize`; its name is the keyword of `pipeline.optimize`.
OPTIONS = (
    CALIBRATION,
    click.option(
        "-m", "--method", metavar="NAME", default="ecp-refit", show_default=True,
        help="ecp-refit, ecp, obs, magnitude, random, nonlinear, gradient-magnitude, wanda, flap, "
        "obd, sparsegpt, obc, woodfisher or cbs.",
    ),
    click.option(
        "-s", "--sparsity", metavar="VALUE",
        help="Share of zeros, or N:M (N kept of every M along the reduction axis).  [default: 0.5, "
        "or what the target below allows]",
    ),
    click.option(
        "--time-budget", metavar="TIME",
        help="Choose the best effort that fits into a time, such as 90s, 10m or 2h, from a first "
        "stage; the report says what was left out.",
    ),
    click.option(
        "--max-error", type=float, metavar="E",
        help="Prune as far as the relative output error on held-out samples stays within E; with "
        "--sparsity or --speedup a gate: exit code 7 where it is missed.",
    ),
    click.option(
        "--max-accuracy-drop", type=float, metavar="P",
        help="Prune as far as top-1 accuracy on held-out --labels drops P points at most; a gate "
        "as --max-error is.",
    ),
    TARGET,
    click.option(
        "--granularity", metavar="weight|unit",
        help="unit: remove whole neurons, channels and heads, which makes a smaller dense model.  "
        "[default: weight, or unit with --speedup]",
    ),
    click.option(
        "--speedup", type=float, metavar="X",
        help="Instead of --sparsity, by whole units: 1/X of the layers' multiplications stay; "
        "with --cost latency the model is X times as fast on this machine, measured.",
    ),
    _choice(
        "--cost", "params|flops|latency", "params",
        "What a unit's importance is divided by; latency is timed on this machine.",
    ),
    click.option(
        "--unit-multiple", type=int, metavar="N",
        help="Keep units in multiples of N, such as 8 or 16.  [default: 1; with --speedup or "
        "--cost latency what kernels like: multiples of 8 rows and columns, or of 16 channels]",
    ),
    click.option(
        "--units-and-zeros", is_flag=True,
        help="Both --speedup and --sparsity: whole units until the one is met, then zeros in what "
        "stays until the other is, a share of all weights of the given model.",
    ),
    click.option(
        "--cleanup/--no-cleanup", default=None,
        help="Delete units that have no weights left; exact but for rounding.  [default: on, but "
        "off with N:M and --apply-masks]",
    ),
    _choice(
        "--unread-inputs", "faster|smaller", "faster",
        "Clean-up drops inputs that a layer no longer reads where that makes it faster, or "
        "wherever it makes the file smaller.",
    ),
    click.option(
        "--permute", is_flag=True,
        help="With N:M: reorder the inputs of layers, where another layer in the file makes them, "
        "so that the pattern loses less.",
    ),
    _choice("--importance", "NAME", None, "Rank weights as this method does.  [default: METHOD]"),
    click.option(
        "--cbs-select/--no-cbs-select", default=True, show_default=True,
        help="cbs: search the masks, or take those of magnitude.",
    ),
    click.option(
        "--cbs-update/--no-cbs-update", default=True, show_default=True,
        help="cbs: update the weights that stay, or leave them.",
    ),
    *PRUNING,
    click.option(
        "--quantize", metavar="int8",
        help="Then put layers into int8: zeros stay zeros, what rounding takes away is made good "
        "for, and layers that cost too much stay in floats.",
    ),
    _choice("--format", "dense|sparse|packed", "dense", "Storage of zeros; dense loads anywhere."),
    *RUNNING,
    click.option(
        "--labels", metavar="PATH",
        help="Labels of the calibration samples: adds accuracy to the report; woodfisher and cbs "
        "then take the curvature of the loss.",
    ),
    click.option(
        "--measure/--no-measure", default=None,
        help="Measure the latency of both models on the held-out samples, in turns, for a second.  "
        "[default: briefly; not where weights take more than 2 GB]",
    ),
    click.option(
        "--bound", is_flag=True,
        help="Add bounds on the output gap, from the held-out samples, at confidence 0.95.",
    ),
    click.option(
        "--masks", metavar="FILE.npz",
        help="Write the keep masks (True = stays), in the shapes of MODEL.",
    ),
    click.option(
        "--apply-masks", metavar="FILE.npz", help="Remove what these keep masks say, no more."
    ),
    FORCE,
    click.option("--dry-run", is_flag=True, help="Do everything but write OUTPUT."),
)  # fmt: skip

# Options that are given as pairs of a name and a value.
PAIRS = ("layer_sparsity", "output_weights", "input_shapes")

# Options that the library does not know.
PRESENTATION = (
    CONFIG,
    click.option(
        "--report", metavar="FILE.json|.html|.toml", multiple=True,
        help="Write a report; .toml: settings for --config (repeatable).",
    ),
    JSON,
    QUIET,
    VERBOSE,
    TRACEBACK,
)  # fmt: skip


def _with(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several option decorators as one, in the order in which the help shows them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Program(click.Group):
    """The group of commands; every exception becomes one line, one hint and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **keywords: Any) -> Any:
        """Run and exit; see ``click.Group.main``."""
        _open_streams()
        own = args is None  # the process is the command's, not that of a program that calls it
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        if own and "--traceback" not in args:
            # Of numbers that overflow the report or the error tells; NumPy names lines of code.
            warnings.simplefilter("ignore", RuntimeWarning)
        keywords["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # not every terminal can show every name
                stream.reconfigure(errors="backslashreplace")
        run = super().main

        def work() -> int:
            with named_as_options(), _signals_raise() as arrived:
                try:
                    code = run(args, *rest, **keywords) or 0
                    sys.stdout.flush()
                    return code
                except SystemExit:  # click's answer to a broken pipe
                    return _failed(BrokenPipeError(errno.EPIPE, ""), with_traceback=False)
                except Exception as error:
                    # Whoever swallows what a signal raises fails otherwise, as imports do.
                    why = Interrupted(arrived[0]) if arrived else error
                    return _failed(why, with_traceback="--traceback" in args)

        def explain(error: OnnxEcpError) -> int:
            return _failed(error, with_traceback=False)

        with named_as_options():
            code = supervised(work, explain) if own else work()
        sys.exit(code)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or UsageError with the closest names."""
        command = super().get_command(ctx, cmd_name)
        if command is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            raise UsageError(f"no command {cmd_name!r}.", hint=did_you_mean(cmd_name, known))
        return command


def _open_streams() -> None:
    """Let closed standard streams lead nowhere, before a file that is opened gets their number."""
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) < 3:
            pass
        os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


class _Signal(KeyboardInterrupt):
    """SIGINT or SIGTERM as an exception that no ``except Exception`` swallows."""


@contextmanager
def _signals_raise() -> Iterator[list[int]]:
    """Make both signals exceptions, so that nothing half-written stays behind; those that came."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: Any) -> None:
        arrived.append(number)
        if len(arrived) == 1:  # one is enough; a second would disturb the cleaning up
            raise _Signal(number)

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failed(error: Exception, with_traceback: bool) -> int:
    """Say on stderr what went wrong and what to do; the exit code."""
    message, hint, code = _explained(error)
    with suppress(OSError):  # where stderr is full, the code must do
        if with_traceback:
            import traceback

            click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
        click.echo(f"error: {_one_line(message)}", err=True)
        if hint := hint or _ADVICE.get(code, ""):
            click.echo(f"hint: {_one_line(hint)}", err=True)
    return code


# By exit code, what helps where an error has no hint of its own.
_ADVICE = {
    2: "See --help of the command.",
    3: "Export or download the model again, and try `onnx-ecp inspect` on it.",
    4: "See what --calibration takes: `onnx-ecp optimize --help`, or docs/calibration.md.",
    5: "`onnx-ecp inspect MODEL` lists every candidate with its reason.",
    6: "`onnx-ecp doctor` checks the installation.",
    7: "Ask for less with --sparsity, or allow more.",
    8: "Choose another output.",
}


def _explained(error: Exception) -> tuple[str, str, int]:
    """(message, hint, exit code) of an exception."""
    match error:
        case click.Abort(__cause__=_Signal(args=(number,))):
            return _explained(Interrupted(number))
        case click.Abort():
            return _explained(Interrupted(signal.SIGINT))
        case OnnxEcpError():
            return error.message, error.hint, error.exit_code
        case click.NoSuchOption(ctx=ctx, option_name=name):
            options = ctx.command.params if ctx is not None else []
            known = [flag for option in options for flag in option.opts if flag.startswith("--")]
            return f"no option {name}.", did_you_mean(name, known), UsageError.exit_code
        case click.ClickException():
            ctx = getattr(error, "ctx", None)
            command = ctx.info_name if ctx is not None and ctx.parent is not None else ""
            hint = f"See {' '.join(filter(None, ('onnx-ecp', command)))} --help."
            return error.format_message(), hint, error.exit_code
        case MemoryError():
            return "out of memory.", "Use a smaller --batch-size or fewer --samples.", 6
        case FileNotFoundError(filename=None):
            where = "the working directory does not exist any more."
            return where, "Change into one that does, or give whole paths.", OutputError.exit_code
        case OSError(filename=None, errno=errno.EPIPE | errno.ENOSPC | errno.EIO | errno.EBADF):
            # Files have names, and errors of their own. Python flushes stdout once more at its end.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            hint = f"Written: {', '.join(written)}." if written else "Nothing was written."
            if error.errno == errno.EPIPE:
                return "nobody reads the output.", hint, OutputError.exit_code
            return f"stdout: {error.strerror}.", hint, OutputError.exit_code
    what = f"{type(error).__name__}: {error} (a bug in onnx-ecp)"
    return what, "Run it again with --traceback and report what it prints.", 1


# Longer messages hold a name, or a list of them, that nobody reads.
_LONGEST = 1500


def _one_line(text: str) -> str:
    """Text with line breaks and terminal escapes made harmless, and of bounded length."""
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.splitlines()))


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        import onnx_ecp

        click.echo(f"onnx-ecp {onnx_ecp.__version__}")
        ctx.exit()


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
    help="Show the version.",
)  # fmt: skip
def main() -> None:
    """Prune trained ONNX models: no labels, no training, no framework.

    \b
    onnx-ecp optimize in.onnx out.onnx -c calibration.npz -s 0.8
    """  # noqa: D301 - the \b is for click


@main.command(cls=Grouped, short_help="Prune MODEL, repair what stays, write OUTPUT, compare both.")
@click.argument("model")
@click.argument("output", required=False)
@_with(*OPTIONS, *PRESENTATION)
def optimize(
    model: str,
    output: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    traceback: bool,
    **options: Any,
) -> None:
    """Prune MODEL, repair what stays, write OUTPUT (or not: --dry-run), compare both."""
    if output is None and not options["dry_run"]:
        raise UsageError("OUTPUT is missing.", hint="Name the file to write, or add --dry-run.")
    reports = [("--report", path) for path in options["report"]]
    _spare_config([("OUTPUT", output), ("--masks", options["masks"]), *reports])
    from onnx_ecp.api import optimize as pipeline
    from onnx_ecp.report import text

    options |= {name: dict(options[name]) for name in PAIRS}
    calibration = options.pop("calibration")
    with bars(quiet) as progress, _stdout_for_json(as_json):
        result = pipeline.optimize(model, calibration, output=output, progress=progress, **options)
    if as_json:
        _print_json(result.report)
        return
    if quiet:
        _warn(result.report.warnings)
    else:
        text.show(text.report_tables(result.report, verbose=verbose))
    click.echo(text.ok_line(result.report))


@main.command()
@click.argument("model")
@_with(CALIBRATION, INPUT_SHAPES, TIMEOUT, TARGET, JSON, VERBOSE, TRACEBACK)
def inspect(
    model: str,
    calibration: str | None,
    target: str | None,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    timeout: float | None,
    as_json: bool,
    verbose: bool,
    traceback: bool,
) -> None:
    """Show what of MODEL is prunable, what is not, and why."""
    with _within(timeout):
        from onnx_ecp.api import inspect as inspection

        shapes = dict(input_shapes)
        with _stdout_for_json(as_json):
            found = inspection.inspect(model, calibration, input_shapes=shapes, target=target)
    if as_json:
        _print_json(found)
        return
    from onnx_ecp.report import text

    text.show(text.inspection_tables(found, verbose=verbose))


@main.command()
@click.argument("model_a")
@click.argument("model_b")
@click.option("-d", "--data", metavar="PATH", required=True, help="Inputs, as of optimize -c.")
@click.option("--labels", metavar="PATH", help="Labels of the inputs: .npy, or .npz with y.")
@click.option("--measure", is_flag=True, help="Measure latency too, the models in turns.")
@click.option(
    "--runtime", metavar="NAME",
    help="Measure latency in onnxruntime, openvino or deepsparse, where it is installed, and check "
    "that outputs are equal.",
)  # fmt: skip
@_with(OUTPUT_WEIGHTS, BATCH_SIZE, PROVIDER, THREADS, TIMEOUT, JSON, TRACEBACK)
def compare(
    model_a: str,
    model_b: str,
    data: str,
    timeout: float | None,
    as_json: bool,
    traceback: bool,
    **options: Any,
) -> None:
    """Compare the outputs of MODEL_B with those of MODEL_A."""
    options["output_weights"] = dict(options["output_weights"])
    with _stdout_for_json(as_json), _within(timeout):
        from onnx_ecp.evaluation import compare as evaluate

        comparison = evaluate.compare(model_a, model_b, data, **options)
    if as_json:
        _print_json(comparison)
        return
    from onnx_ecp.report import text

    text.show(text.comparison_tables(comparison))


@main.command(short_help="Bound how far two models' outputs can be apart.")
@click.argument("model_a")
@click.argument("model_b", required=False)
@click.option("-d", "--data", metavar="PATH", help="Held-out inputs, as of optimize -c.")
@click.option(
    "--confidence", type=float, metavar="P", default=0.95, show_default=True,
    help="Of the probabilistic bounds; alpha = 1 - P.",
)  # fmt: skip
@click.option(
    "--eps", type=float, metavar="E",
    help="Bound the share of inputs with a larger gap; with --method, the relative gap allowed.",
)  # fmt: skip
@click.option(
    "--input-range", metavar="[NAME:]LOW,HIGH", multiple=True,
    help="Deterministic bound for all inputs in this range (repeatable).",
)  # fmt: skip
@click.option(
    "--method", metavar="random|magnitude",
    help="Without MODEL_B: what pruning MODEL_A that way costs at most, before doing it.",
)  # fmt: skip
@click.option(
    "--sparsity", type=float, metavar="S", help="Of --method.  [default: 0.1]",
)  # fmt: skip
@_choice(
    "--metric", "l2|l2-raw", "l2",
    "Gaps with every output column in units of its spread over the inputs, or as it is.",
)  # fmt: skip
@_with(OUTPUT_WEIGHTS, BATCH_SIZE, PROVIDER, THREADS, TIMEOUT, JSON, TRACEBACK)
def bound(
    model_a: str,
    model_b: str | None,
    data: str | None,
    confidence: float,
    eps: float | None,
    input_range: Sequence[str],
    method: str | None,
    sparsity: float | None,
    timeout: float | None,
    as_json: bool,
    traceback: bool,
    **options: Any,
) -> None:
    """Bound how far the outputs of MODEL_B can be from those of MODEL_A.

    The gap of an input is the distance of the outputs, every column in units of its own spread.

    \b
    onnx-ecp bound in.onnx out.onnx -d held-out.npz --confidence 0.95
    onnx-ecp bound in.onnx --method magnitude --sparsity 0.1 --eps 0.05
    """  # noqa: D301 - the \b is for click
    if (model_b is None) == (method is None):
        raise UsageError(
            "a bound is for MODEL_B or for a --method.", hint="Name exactly one of the two."
        )
    options["output_weights"] = dict(options["output_weights"])
    if method is not None and (data is not None or input_range or options["output_weights"]):
        raise UsageError(
            "--method bounds all inputs, from the weights alone.",
            hint="Leave out --data, --input-range and --output-weights, or prune first and name "
            "MODEL_B.",
        )
    if model_b is not None and sparsity is not None:
        raise UsageError(
            "--sparsity is for --method; MODEL_B has its own.", hint="Leave out --sparsity."
        )
    from onnx_ecp.evaluation import bounds
    from onnx_ecp.report import text

    if model_b is None:
        assert method is not None, "one of the two is given"
        share = 0.1 if sparsity is None else sparsity
        with _within(timeout):
            plan = bounds.plan(model_a, method, share, confidence=confidence, eps=eps)
        if as_json:
            _print_json(plan)
        else:
            text.show(text.planning_tables(plan))
        return
    ranges = dict(bounds.parse_range(text_of) for text_of in input_range)
    with _stdout_for_json(as_json), _within(timeout):
        found = bounds.bound(
            model_a, model_b, data, confidence=confidence, eps=eps, input_range=ranges, **options
        )
    if as_json:
        _print_json(found)
    else:
        text.show(text.bound_tables(found))


@main.command(cls=Grouped, short_help="Compare several methods and sparsities on MODEL.")
@click.argument("model")
@_with(CALIBRATION)
@click.option(
    "--methods",
    metavar="A,B,...",
    default="ecp-refit,ecp,wanda,magnitude",
    show_default=True,
    help="Methods, as of optimize --method.",
)
@click.option(
    "--sparsities",
    metavar="S,T,...",
    default="0.5,0.6,0.7,0.8,0.9,0.95",
    show_default=True,
    help="Sparsities, as of optimize --sparsity.",
)
@click.option(
    "--eval",
    "evaluation",
    metavar="PATH",
    help="Inputs to judge on, like --calibration.  [default: its held-out part]",
)
@click.option(
    "--labels", metavar="PATH", help="Labels of --eval, or of --calibration: adds accuracy."
)
@click.option(
    "--calibration-labels", metavar="PATH",
    help="Labels of --calibration beside --eval, for woodfisher and cbs.",
)  # fmt: skip
@click.option(
    "-o",
    "--output",
    metavar="FILE.csv|FILE.json|FILE.html",
    multiple=True,
    help="Write the points; .html has curves (repeatable).",
)
@_with(*PRUNING, *RUNNING, FORCE, CONFIG, JSON, QUIET, TRACEBACK)
def sweep(
    model: str,
    output: Sequence[str],
    as_json: bool,
    quiet: bool,
    force: bool,
    traceback: bool,
    **options: Any,
) -> None:
    """Prune MODEL with several methods to several sparsities, and compare.

    \b
    onnx-ecp sweep in.onnx -c in.npz --eval t.npz --labels t.npz -o sweep.html
    """  # noqa: D301 - the \b is for click
    from onnx_ecp.api import sweep as sweeping
    from onnx_ecp.report import sweeps, text

    _spare_config([("--output", path) for path in output])
    read = ("calibration", "evaluation", "labels", "calibration_labels")
    sweeping.check_outputs(model, {name: options[name] for name in read}, output)
    for path in output:
        sweeps.check_target(path, force=force)
    options |= {name: dict(options[name]) for name in PAIRS}
    calibration = options.pop("calibration")
    with bars(quiet) as progress, _stdout_for_json(as_json):
        swept = sweeping.sweep(model, calibration, progress=progress, **options)
    sweeps.write(swept, output)
    if as_json:
        click.echo(sweeps.as_json(swept), nl=False)
        return
    if quiet:
        _warn(swept.warnings)
    else:
        text.show(sweeps.tables(swept))
    click.echo(sweeps.ok_line(swept, output))


@main.command(short_help="List or clear what --cache keeps.")
@click.argument("action", metavar="list|clear")
@click.argument("folder", metavar="DIR")
@_with(JSON, TRACEBACK)
def cache(action: str, folder: str, as_json: bool, traceback: bool) -> None:
    """List what lies in the cache DIR, or clear it; files of others stay.

    \b
    onnx-ecp cache list DIR
    onnx-ecp cache clear DIR
    """  # noqa: D301 - the \b is for click
    from onnx_ecp.report import text
    from onnx_ecp.runtime import cache as kept

    actions = {"list": kept.contents, "clear": kept.clear}
    if action not in actions:
        raise UsageError(f"cache cannot {action!r}.", hint=did_you_mean(action, actions))
    found = actions[action](folder)
    if as_json:
        _print_json(found)
        return
    if action == "list":
        text.show(text.cache_tables(found))
    click.echo(text.cache_line(found))


@main.command(short_help="Check this installation.")
@_with(JSON, TRACEBACK)
def doctor(as_json: bool, traceback: bool) -> None:
    """Check this installation: versions, ONNX Runtime, execution providers."""
    from onnx_ecp.api.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        _print_json(diagnosis)
    else:
        from onnx_ecp.report import text

        text.show(text.diagnosis_tables(diagnosis))
    if not diagnosis.ok:
        raise click.exceptions.Exit(6)


@contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """Let everything inside end after so many seconds, what is imported included."""
    if seconds is not None and not seconds > 0:
        raise UsageError(f"--timeout is {seconds:g}.", hint="Give a number of seconds above 0.")
    from onnx_ecp.runtime.limits import deadline

    with deadline(seconds):
        yield


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        click.echo(f"warning: {_one_line(warning)}", err=True)


@contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[None]:
    """Send what others print meanwhile, such as a reader of inputs, to stderr."""
    if not wanted:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def _print_json(found: Any) -> None:
    from onnx_ecp.report.as_json import dumps, to_dict

    click.echo(dumps(to_dict(found)), nl=False)
