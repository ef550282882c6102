"""Training: settings, the loop, checkpoints and exact resume, warnings of runs that are ill, stages."""
