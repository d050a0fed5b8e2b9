"""Other tools' ways in: a module each, which imports the tool; nothing else of onnx-ecp does."""
