"""Pictures that several tests of training share."""

from __future__ import annotations

import pytest

from clipdistill.scenes.pairs import open_scenes
from tests.train.support import COUNT


@pytest.fixture(scope="package")
def photographs(tmp_path_factory):
    """A folder of pictures, nothing else."""
    folder = tmp_path_factory.mktemp("photographs")
    source = open_scenes("train", COUNT)
    for i in range(COUNT):
        source.image(i).save(folder / f"{i:03d}.png")
    return folder
