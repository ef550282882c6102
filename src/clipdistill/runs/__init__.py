"""The run folder: what lies in it, its one writer and its one reader."""
