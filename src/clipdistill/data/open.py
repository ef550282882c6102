"""From the name of a data set to its reader: by what the files hold, never by a part of their path."""

from __future__ import annotations

import re
from pathlib import Path

from clipdistill.data.files import is_there, local_path
from clipdistill.data.formats.tar_headers import looks_like_tar
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.errors import InputError, nearest

_SCENES = re.compile(r"scenes(?:[:?].*)?$")
_REMOTE = re.compile(r"(?:[a-z][a-z0-9+.-]*://|pipe:)", re.IGNORECASE)
_WITH_SPLIT = re.compile(r"(?P<path>.+):(?P<split>\w[\w+]*)$")


def open_pairs(data: str | DataConfig, *, split: str | None = None, default_split: str | None = None) -> PairSource:
    """Open image-caption pairs by name.

    `split` overrides the configuration's; it is an error where the data has no splits. `default_split` is what to
    take when nobody named a split and the data has several. Raises InputError with what is wrong and what to do.
    """
    config = DataConfig(path=data) if isinstance(data, str) else data
    if split is not None:
        config = config.model_copy(update={"split": split})
    name = config.path
    if not name.strip() or "\0" in name:
        raise InputError(f"{name!r} is not the name of a data set")
    if name.startswith("hf:"):
        from clipdistill.data.formats.hub import open_hub

        return open_hub(name.removeprefix("hf:"), config, default_split)
    path = local_path(name)
    if is_there(path):
        return _open_path(path, config, default_split)
    if _SCENES.match(name):
        return _open_scenes(config, default_split)
    if _REMOTE.match(name):
        raise InputError(f"'{name}' is not on this machine: only local files are read; download it first")
    if "{" in name:
        from clipdistill.data.formats.tars import expand_braces, open_tars

        shards = [local_path(shard) for shard in expand_braces(name)]
        return open_tars(shards, Path(name).name if Path(name).parent == Path() else name, config)
    with_split = _WITH_SPLIT.match(name)
    if with_split and is_there(local_path(with_split["path"])):
        split = config.split or with_split["split"]
        return open_pairs(
            config.model_copy(update={"path": with_split["path"], "split": split}), default_split=default_split
        )
    raise InputError(f"data '{name}': no such file or folder{_near(path)}")


def _near(path: Path) -> str:
    """A file with a similar name, if there is one."""
    try:
        hint = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return f" (the folder '{path.parent}' does not exist)"
    return hint if "did you mean" in hint else ""


def _open_scenes(config: DataConfig, default_split: str | None) -> PairSource:
    from clipdistill.scenes.pairs import open_scenes, parse_scenes_name

    name = parse_scenes_name(config.path)
    assert name is not None
    size = config.size if name.size is None else name.size
    seed = config.seed if name.seed is None else name.seed
    return open_scenes(config.split or name.split or default_split or "train", size, seed, name.pixels)


def _open_path(path: Path, config: DataConfig, default_split: str | None) -> PairSource:
    if path.is_dir():
        return _open_folder(path, config, default_split)
    if not path.is_file():
        raise InputError(f"data '{path}' is neither a file nor a folder")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(f"data '{path}' cannot be read ({error.strerror})") from error
    if not head.strip():
        raise InputError(f"data '{path}' is empty")
    if head.startswith(b"PAR1"):
        from clipdistill.data.formats.parquet import open_parquet

        return open_parquet([path], path, config, default_split)
    if looks_like_tar(head):
        from clipdistill.data.formats.tars import open_tars

        return open_tars([path], path.stem, config)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise InputError(f"data '{path}' is compressed: unpack it first (samples are read in any order)")
    if path.suffix.lower() == ".tar":
        raise InputError(f"data '{path}' is not a tar archive: its first header is damaged")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")) or path.suffix.lower() == ".json":
        return _open_json(path, config, default_split)
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(
            f"data '{path}' is in no known format (Karpathy or COCO JSON, CSV, TSV, Parquet, tar, or a folder of these)"
        )
    from clipdistill.data.formats.table import open_table

    return open_table(path, config, default_split)


def _open_json(path: Path, config: DataConfig, default_split: str | None) -> PairSource:
    from clipdistill.data.files import read_json
    from clipdistill.data.formats.coco import is_coco, open_coco
    from clipdistill.data.formats.karpathy import is_karpathy, open_karpathy

    content = read_json(path)
    if is_karpathy(content):
        return open_karpathy(path, content, config, default_split)
    if is_coco(content):
        return open_coco(path, content, config)
    found = f"the keys {', '.join(sorted(content)[:6])}" if isinstance(content, dict) else f"a {type(content).__name__}"
    raise InputError(
        f"data '{path}' is JSON, but neither Karpathy's (images with sentences) nor COCO's captions (images and "
        f"annotations): it holds {found or 'nothing'}"
    )


def _open_folder(path: Path, config: DataConfig, default_split: str | None) -> PairSource:
    """A folder of tars, of Parquet files, of images with captions, or a saved Hugging Face data set."""
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    if shards:
        from clipdistill.data.formats.tars import open_tars

        return open_tars(shards, path.resolve().name, config)
    tables = [file for file in files if file.suffix.lower() in (".parquet", ".pq")]
    if tables:
        from clipdistill.data.formats.parquet import open_parquet

        return open_parquet(tables, path, config, default_split)
    if any(file.name in ("dataset_dict.json", "state.json") for file in files):
        from clipdistill.data.formats.hub import open_saved

        return open_saved(path, config, default_split)
    from clipdistill.data.formats.folder import list_images, open_folder

    images = list_images(path)
    if any((path / image).with_suffix(".txt").is_file() for image in images):
        return open_folder(path, images, config)
    candidates = [file.name for file in files if file.suffix.lower() in (".json", ".csv", ".tsv")]
    if candidates:
        raise InputError(
            f"the folder '{path}' holds several things: name the file, for example '{path / candidates[0]}'"
        )
    if images:
        raise InputError(
            f"the folder '{path}' holds {len(images)} images, but no .txt file with captions beside any of them"
        )
    raise InputError(f"the folder '{path}' holds neither tars, Parquet files nor images with .txt captions")
