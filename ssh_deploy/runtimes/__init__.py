"""Run an exported model; own the adapters that are lent to onnxruntime."""
