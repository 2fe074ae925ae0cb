"""ONNX graphs, edited only by passes."""
