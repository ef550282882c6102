"""Published sets by name, in the layouts that they are given out in: `clipdistill fetch`, CLIP_benchmark's tars,
Crossmodal-3600, XTD."""
