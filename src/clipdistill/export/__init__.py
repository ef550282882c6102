"""Trained models out of this package: ONNX, OpenVINO, int8, open_clip and Hugging Face folders, the hub.

The package can be called: `clipdistill.export(...)` is the function in command.py.
"""

from clipdistill.registry import callable_package

callable_package(__name__, "clipdistill.export.command:export")
