# Polygraphy: its data loader in, its comparison and its look at 2:4 after. Needs: pip install polygraphy.
set -e
onnx-ecp optimize models/digits.onnx digits-2to4.onnx -c examples/polygraphy_loader.py -s 2:4 -q --force
polygraphy inspect sparsity digits-2to4.onnx
# The result by two levels of ONNX Runtime's optimization: the same outputs.
polygraphy run digits-2to4.onnx --onnxrt --onnxrt --data-loader-script examples/polygraphy_loader.py
