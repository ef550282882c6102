"""The built-in image-caption set `scenes`: drawn on demand, any size, no files, no network."""
