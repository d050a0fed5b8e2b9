"""``python -m onnx_ecp`` is ``onnx-ecp``."""

from onnx_ecp.cli.commands import main

if __name__ == "__main__":
    main(prog_name="onnx-ecp")
