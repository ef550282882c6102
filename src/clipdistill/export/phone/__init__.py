"""`--to litert`, `--to executorch`, `--to coreml`: both towers for a phone, one picture or one caption a call."""
