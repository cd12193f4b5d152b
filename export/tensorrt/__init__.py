"""TensorRT engines: built from ONNX files, described by a manifest, loaded and refitted."""
