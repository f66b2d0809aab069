"""Out of torch: a Program as an artifact, and an artifact as one static ONNX network."""
