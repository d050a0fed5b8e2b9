"""ONNX Runtime and its limits: sessions, time, threads, memory."""
