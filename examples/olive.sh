# Olive: prune as one of its passes. Needs: pip install olive-ai; run from the top of a clone.
set -e
python -m onnx_ecp.integrations.olive olive-package.json
OLIVE_DISABLE_TELEMETRY=1 olive run --config examples/olive_prune.json --package-config olive-package.json
