"""DCLIP's region teacher: boxes of a picture's parts, their embeddings, and the network that fuses them with a caption.

boxes       detectors, files -> Boxes of each image (boxes, box_file, detectors)
embeddings  crops through the frozen CLIP image tower, stored once per image (store)
network     bidirectional cross-attention and pooling (network), with its frozen CLIP (meta_teacher)
use         training it (task; the loop is in train/), as the teacher of a run (teacher), measuring its leak (measure)
"""
