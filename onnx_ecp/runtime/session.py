"""ONNX Runtime sessions that can be interrupted, and the truth about execution providers.

``session.run`` cannot be interrupted by a signal, so it runs in a worker thread while the calling
thread waits: an exception there (Ctrl-C, SIGTERM, the end of ``deadline``) terminates the run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from onnx_ecp.errors import CalibrationError, OnnxEcpError, ProviderError, UsageError, did_you_mean
from onnx_ecp.runtime.limits import check_deadline

# By execution provider, the name of the memory that it computes in, where that is not the host's.
_DEVICES = {"CUDAExecutionProvider": "cuda"}
# An array, or one that lies in a session's memory: an OrtValue.
Value = Any
T = TypeVar("T")
# Words by which a Gather, and embeddings that are an operator of their own, refuse an index.
_INDEX_WORDS = ("out of data bounds", "index out of range")
# Where in its own source ONNX Runtime was, and in which function.
_PLACES = re.compile(r"\[ONNXRuntimeError\] : \d+ : |/onnxruntime_src/\S+ |\S*onnxruntime::.*?\) ")
# Tensors and nodes that are ours, with the name in the model that they are made for, if any.
_OWN_NAMES = re.compile(
    r"ecp/(?:seed|shift)/(?P<seed>[^\s)'\"]+)|(?P<raw>[^\s('\"]+)/ecp/\w+|ecp/(?:\w+/)*\w+"
)
# Words by which ONNX Runtime and the C++ library say that memory ran out.
_MEMORY_WORDS = ("bad_alloc", "allocate memory", "out of memory", "bad allocation")


# One thread waits for all sessions; only where a run was left behind is there another.
_WORKERS = ThreadPoolExecutor(256, thread_name_prefix="onnxruntime")
# Sessions with threads of their own that a walk holds open at a time.
OPEN = 16


class OutOfMemory(ProviderError):
    """A run needed more memory than there is; a smaller batch may help."""


def onnxruntime() -> Any:
    """The module onnxruntime; ProviderError with the two install commands when it is missing."""
    try:
        import onnxruntime as module
    except ImportError as error:
        raise ProviderError(
            "ONNX Runtime is not installed.",
            hint='Install it: pip install "onnx-ecp[cpu]", or for NVIDIA GPUs "onnx-ecp[gpu]".',
        ) from error
    if not hasattr(module, "InferenceSession"):
        raise ProviderError(
            "the installed ONNX Runtime is broken: it has no InferenceSession.",
            hint="Uninstall onnxruntime and onnxruntime-gpu, then install one of them.",
        )
    return module


def available_providers() -> list[str]:
    """What ONNX Runtime was built with; whether a device is there, only a session tells."""
    return list(onnxruntime().get_available_providers())


def provider_name(asked: str) -> str:
    """The full name of a provider given by a part of it, without regard to case.

    Raises:
        UsageError: no provider, or more than one of the available, has that part in its name.
        ProviderError: one has, but the installed ONNX Runtime is built without it.
    """
    names = available_providers()
    found = _named(asked, names)
    if len(found) == 1:
        return found[0]
    others = _named(asked, list(onnxruntime().get_all_providers()))
    if not found and len(others) == 1:
        raise ProviderError(
            f"the installed ONNX Runtime is built without {others[0]}.",
            hint='For NVIDIA GPUs uninstall onnxruntime, then pip install "onnx-ecp[gpu]".'
            if "CUDA" in others[0] or "Tensorrt" in others[0]
            else f"Install a build that has it; this one has {', '.join(names)}.",
        )
    short = [n.removesuffix("ExecutionProvider").lower() for n in names]
    what = "matches no" if not found else f"matches {', '.join(found)}: more than one"
    raise UsageError(
        f"provider {asked!r} {what} execution provider of the installed ONNX Runtime.",
        hint=did_you_mean(asked.lower(), short),
    )


def _named(asked: str, names: Sequence[str]) -> list[str]:
    """The names that a part of a name means: the one that is whole, else all that contain it."""
    exact = [n for n in names if n.lower() in (asked.lower(), f"{asked}ExecutionProvider".lower())]
    return exact or [n for n in names if asked.lower() in n.lower()]


class Session:
    """A loaded model. Not thread safe; arrays in, arrays out.

    Its memory is that of the device it computes on. What is placed there, or stays there after a
    run, may be fed to all sessions of the same provider.

    Args:
        model: a proto, its serialised bytes, or the path of a file.
        provider: execution provider, by any unique part of its name.
        threads: threads within an operator; None leaves it to ONNX Runtime.
        base: directory of the external data of a proto or bytes.
        packed: whether constant weights may be copied into the order that kernels like best; None:
            not those of external data, which else are mapped and take no memory of their own.
        profile: a folder for a profile of what runs; see ``end_profiling``.

    Raises:
        ProviderError: ONNX Runtime refuses the model, or does not use the provider.
    """

    def __init__(
        self,
        model: onnx.ModelProto | bytes | str | Path,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        base: Path | None = None,
        packed: bool | None = None,
        profile: Path | None = None,
    ) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "profile")
        if threads is not None:
            options.intra_op_num_threads = threads
        # Sessions live side by side with NumPy: a spinning pool would steal its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if packed is False or (packed is None and base is not None):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if base is not None and not isinstance(model, str | Path):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(base)
            )
        source: Any = model
        if isinstance(model, onnx.ModelProto):
            try:
                source = model.SerializeToString()
            except EncodeError as error:
                raise ProviderError(
                    "a model of more than 2 GB cannot be given to ONNX Runtime in memory.",
                    hint="Give the path of a file whose weights are external data; units can be "
                    "removed, and sparse or packed files written, below 2 GB only.",
                ) from error
        elif isinstance(model, Path):
            source = str(model)
        wanted = provider_name(provider)
        providers = [wanted] + (["CPUExecutionProvider"] if "CPU" not in wanted else [])
        self._session = self._created(
            lambda: ort.InferenceSession(source, options, providers=providers)
        )
        used = self._session.get_providers()
        if wanted not in used:
            raise ProviderError(
                f"{wanted} was asked for, but ONNX Runtime uses {', '.join(used)}.",
                hint="See what `onnx-ecp doctor` says of the driver, or use --provider cpu.",
            )
        self._ort = ort
        self._memory = _DEVICES.get(wanted, "cpu")
        self.inputs: tuple[str, ...] = tuple(i.name for i in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())

    def _created(self, create: Callable[[], Any]) -> Any:
        """The session; folding constants may take long, and cannot be ended, only left behind."""
        left = check_deadline()
        future = _WORKERS.submit(create)
        try:
            return future.result(timeout=left)
        except FutureTimeout:
            check_deadline()
            raise
        except OnnxEcpError:
            raise
        except Exception as error:
            raise _translated(error, "does not load the model") from error

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that the session really uses, first choice first."""
        return tuple(self._session.get_providers())

    @property
    def remote(self) -> bool:
        """Whether its memory is not the host's, so that every array fed is copied there."""
        return self._memory != "cpu"

    def placed(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Value]:
        """Arrays that will be fed again, in the session's memory; as they are in the host's."""
        if not self.remote:
            return dict(arrays)
        place = self._ort.OrtValue.ortvalue_from_numpy
        try:
            return {name: place(array, self._memory) for name, array in arrays.items()}
        except Exception as error:
            raise _translated(error, f"cannot use the memory of {self._memory}") from error

    def run(
        self, feeds: Mapping[str, Value], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: a value for every input.
            outputs: names wanted; None for all.

        Raises:
            OutOfMemory: there was not enough memory for this batch.
            CalibrationError: an index in the samples is none that the model knows.
            ProviderError: the run failed, or the deadline passed.
        """
        names = list(dict.fromkeys(self.outputs if outputs is None else outputs))
        if not names:
            return {}  # ONNX Runtime takes an empty list for all outputs
        if not all(isinstance(value, np.ndarray) for value in feeds.values()):
            return self.run_bound(feeds, names)
        values = self._watched(lambda options: self._session.run(names, dict(feeds), options))
        return dict(zip(names, values, strict=True))

    def seconds(self, feeds: Mapping[str, np.ndarray]) -> float:
        """Run once, and say how long ONNX Runtime took; raises what ``run`` does."""

        def timed(options: Any) -> float:  # without the way to the worker
            began = time.perf_counter()
            self._session.run(list(self.outputs), dict(feeds), options)
            return time.perf_counter() - began

        return self._watched(timed)

    def end_profiling(self) -> Path:
        """Write the profile that was asked for, and say where it is: a JSON list of events."""
        return Path(self._session.end_profiling())

    def run_bound(
        self, feeds: Mapping[str, Value], outputs: Sequence[str], stay: Collection[str] = ()
    ) -> dict[str, Any]:
        """Like ``run``; the outputs named in ``stay`` stay in the session's memory."""

        def bound(options: Any) -> Any:
            binding = self._session.io_binding()
            held = [self._value(value) for value in feeds.values()]
            for name, value in zip(feeds, held, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, self._memory if name in stay else "cpu")
            self._session.run_with_iobinding(binding, options)
            return binding.get_outputs()

        found = zip(outputs, self._watched(bound), strict=True)
        return {name: value if name in stay else value.numpy() for name, value in found}

    def _value(self, value: Value) -> Value:
        """An array as ONNX Runtime wants it bound; it copies it to where it is read."""
        if isinstance(value, np.ndarray):
            return self._ort.OrtValue.ortvalue_from_numpy(value)
        return value

    def _watched(self, run: Callable[[Any], T]) -> T:
        """What a run with these options gives; whatever ends the waiting ends the run."""
        options = self._ort.RunOptions()
        options.log_severity_level = 4
        left = check_deadline()
        future = _WORKERS.submit(run, options)
        try:
            return future.result(timeout=left)
        except FutureTimeout:
            options.terminate = True
            check_deadline()
            raise
        except (KeyboardInterrupt, SystemExit, OnnxEcpError):
            options.terminate = True
            raise
        except Exception as error:
            raise _translated(error, "failed to run the model") from error


class Openings:
    """Sessions that are opened when they are asked for, of which only the last few stay open.

    Every open session has threads of its own, and processes have a limit of these.

    Args:
        create: opens the session of a model.
        most: that stay open.
    """

    def __init__(self, create: Callable[[onnx.ModelProto], Session], most: int = OPEN) -> None:
        self._create, self._most = create, most
        self._open: dict[int, tuple[onnx.ModelProto, Session]] = {}

    def session(self, model: onnx.ModelProto) -> Session:
        """The session of a model, which is told by its identity."""
        found = self._open.pop(id(model), None)
        if found is None:
            while len(self._open) >= self._most:
                del self._open[next(iter(self._open))]
            found = (model, self._create(model))
        self._open[id(model)] = found
        return found[1]


def _translated(error: Exception, what: str) -> OnnxEcpError:
    """ONNX Runtime's exception as ours, cut to its first line."""
    text = _PLACES.sub("", " ".join(str(error).split()))[:300]
    if any(word in text.lower() for word in _MEMORY_WORDS):
        return OutOfMemory(
            f"ONNX Runtime ran out of memory: {text}", hint="Use a smaller --batch-size."
        )
    if any(word in text.lower() for word in _INDEX_WORDS):
        return CalibrationError(
            f"the samples hold an index that the model does not know: {text}",
            hint="Look for ids beyond the vocabulary, or negative ones, in the data.",
        )
    if _OWN_NAMES.search(text):
        text = _OWN_NAMES.sub(lambda found: found["seed"] or found["raw"] or "made here", text)
        return ProviderError(
            f"ONNX Runtime {what} with the operators that compute its sensitivities: {text}",
            hint="Use --gradients numeric, or a method without sensitivities, such as --method "
            "magnitude.",
        )
    hint = "Run it in ONNX Runtime alone; where it fails too, export it again."
    if "Could not find an implementation" in text:
        hint = (
            "It has no kernel for this operator in the element types of the model: convert the "
            "model to float32 first, or use a --provider that has one."
        )
    if "INVALID_ARGUMENT" in text and "run" in what:
        hint = "Check the data: ids beyond a vocabulary, or sizes that the model does not take."
    return ProviderError(f"ONNX Runtime {what}: {text}", hint=hint)
