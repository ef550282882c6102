"""A folder of images with a text file of the same name beside each, one caption a line."""

from __future__ import annotations

import os

from clipdistill.data.captions import MISSING, clean_all
from clipdistill.data.files import collect, is_url, read_image_file, refuse_split
from clipdistill.data.formats import Place
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import BadSample, Problems
from clipdistill.runtime.files import decoded, lines_of


def open_folder(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """Pairs in the order of their paths, which are the keys."""
    folder, problems, entries = place.path, Problems(), []
    refuse_split(config.split, folder)
    place.count_passed_over(problems)
    for table in place.with_ending(".csv", ".tsv", ".parquet", ".pq", ".jsonl"):
        problems.add("table beside the images", table.name)
    stems = {name: os.path.splitext(name)[0] for name in place.images}  # noqa: PTH122
    for stem in sorted(place.texts.keys() - set(stems.values())):
        problems.add("text file without image", place.texts[stem])
    if is_url(folder):
        folder.begin_to_read(place.texts[stem] for stem in stems.values() if stem in place.texts)  # type: ignore[attr-defined]
    for name, stem in stems.items():
        try:
            if stem not in place.texts:
                raise BadSample(MISSING)
            text = read_image_file(folder / place.texts[stem])
            lines = lines_of(decoded(text))
        except BadSample:
            problems.add(MISSING, name)
            lines = []
        # blank lines separate captions, they are not captions
        entries.append((name, clean_all([line for line in lines if line.strip()], name, problems)))
    return collect(folder.resolve().name, entries, folder, problems, config.max_pixels, folder)
