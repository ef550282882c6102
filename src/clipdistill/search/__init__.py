"""Search in a folder of photographs by text or image, the student beside its teacher (`clipdistill search`)."""
