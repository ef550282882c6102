"""Trained models out of this package: ONNX, OpenVINO, int8, open_clip and Hugging Face folders, the hub."""
