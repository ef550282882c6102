"""The teacher that fills a store, by name: any model, `onnx:DIR` and `openvino:DIR` included."""

from __future__ import annotations

from clipdistill.models import ClipModel, load_model


def load_fill_teacher(name: str) -> ClipModel:
    """The teacher called `name`, in evaluation mode and without gradients; see load_model."""
    return load_model(name, teacher=True)
