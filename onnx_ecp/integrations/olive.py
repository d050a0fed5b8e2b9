"""A pass of Olive, ``OnnxEcp``, and the package configuration by which ``olive run`` finds it.

Write the configuration once, then name the pass like Olive's own:

    python -m onnx_ecp.integrations.olive olive-package.json
    olive run --config workflow.json --package-config olive-package.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from onnx_ecp.api.choices import Choices
from onnx_ecp.api.optimize import optimize
from onnx_ecp.errors import OnnxEcpError

# Olive decides itself what is written, and where.
_OLIVES_OWN = ("force", "dry_run")


class OnnxEcp(Pass):  # type: ignore[misc, unused-ignore]  # Olive has no types
    """Prune, compensate and verify.

    Its parameters are ``calibration`` and ``report``, two paths, and the options of
    ``onnx-ecp optimize`` by their names (``sparsity``, ``speedup``, ``quantize``, ...).

    Example:
        ``{"type": "OnnxEcp", "calibration": "inputs.npz", "sparsity": 0.8}``
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        names = [name for name in Choices.__annotations__ if name not in _OLIVES_OWN]
        options = {
            name: PassConfigParam(
                type_=Any,
                default_value=None,
                description=f"As of `onnx-ecp optimize`: --{name.replace('_', '-')}.",
            )
            for name in names
        }
        paths = {"calibration": "Calibration inputs.", "report": "Where a report goes."}
        texts = {
            name: PassConfigParam(type_=str | None, default_value=None, description=text)
            for name, text in paths.items()
        }
        return texts | options

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        given = {name: x for name, x in config.model_dump().items() if x is not None}
        calibration, report = given.pop("calibration", None), given.pop("report", None)
        known = {name: x for name, x in given.items() if name in Choices.__annotations__}
        path = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            optimize(
                model.model_path,
                calibration,
                output=path,
                report=() if report is None else report,
                **known,
                force=True,
            )
        except OnnxEcpError as error:
            error.args = (f"{error.message} {error.hint}".strip(),)  # Olive logs nothing else
            raise
        return ONNXModelHandler(model_path=str(path.parent), onnx_file_name=path.name)


def package_config() -> dict[str, Any]:
    """Olive's own package configuration with a row for this pass."""
    config = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    config["passes"][OnnxEcp.__name__] = {
        "module_path": "onnx_ecp.integrations.olive.OnnxEcp",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    }
    return config


def main(arguments: Sequence[str] = sys.argv[1:]) -> None:
    """Write the package configuration to the path that is given, or to stdout."""
    text = json.dumps(package_config(), indent=2)
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
