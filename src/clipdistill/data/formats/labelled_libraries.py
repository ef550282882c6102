"""Classification sets read through other libraries: torchvision's (never downloaded), Hugging Face's."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipdistill.data.files import one_split, read_image_file, settings_of_name
from clipdistill.data.formats import Format, Place
from clipdistill.data.images import as_rgb, decode
from clipdistill.data.labelled import LabelledConfig, LabelledSource
from clipdistill.data.pairs import images_fingerprint
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError, nearest, needing

_log = logging.getLogger(__name__)
_TRAIN_OR_TEST: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def _splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


_Labels = Callable[[Any], Sequence[int]]
# name: (known set, constructor settings by split with the default split last, where the labels are)
TORCHVISION_SETS: dict[str, tuple[str | None, dict[str, dict[str, Any]], _Labels]] = {
    "CIFAR10": ("cifar10", _TRAIN_OR_TEST, lambda d: d.targets),
    "CIFAR100": ("cifar100", _TRAIN_OR_TEST, lambda d: d.targets),
    "EuroSAT": ("eurosat", {"all": {}}, lambda d: d.targets),
    "Food101": ("food101", _splits("train", "test"), lambda d: d._labels),
    "SUN397": ("sun397", {"all": {}}, lambda d: d._labels),
    "Caltech101": ("caltech101", {"all": {}}, lambda d: d.y),
    "ImageFolder": (None, {"all": {}}, lambda d: d.targets),
    "STL10": (None, _splits("train", "test"), lambda d: d.labels),
    "DTD": (None, _splits("train", "val", "test"), lambda d: d._labels),
    "OxfordIIITPet": (None, _splits("trainval", "test"), lambda d: d._labels),
    "FGVCAircraft": (None, _splits("train", "val", "trainval", "test"), lambda d: d._labels),
}


class TorchvisionLabels(LabelledSource):
    """A torchvision data set in the order of its keys: paths of its images if it keeps them, else split and index."""

    def __init__(self, dataset: Any, order: NDArray[np.int64], *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._dataset = dataset
        self._order = order
        files = _image_files(dataset)
        self._files = [str(files[i]) for i in order] if files else []

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        self._check(i)
        try:
            if self._files:
                return decode(read_image_file(self._files[i]), max_pixels=self.max_pixels, at_least=at_least)
            try:
                picture: Image.Image = self._dataset[int(self._order[i])][0]
            except Exception as error:
                raise BadSample(f"corrupt image: {error}") from error
            return as_rgb(picture, self.max_pixels)
        except BadSample as error:
            raise BadSample(error.reason, self.key(i)) from error

    def images_fingerprint(self, count: int = 8) -> str:
        """Of the pixels, whatever compresses them."""
        return images_fingerprint(len(self), count, lambda i: self.image(i).tobytes(), self.image)

    def _bytes(self, i: int) -> bytes:
        buffer = io.BytesIO()
        self.image(i).save(buffer, "PNG")
        return buffer.getvalue()


def open_torchvision(place: Place, config: LabelledConfig) -> TorchvisionLabels:
    """'CIFAR10@ROOT' or 'CIFAR10:train@ROOT': a torchvision set that lies in the folder ROOT.

    CIFAR's files are Python pickles; torchvision compares their checksums with the originals' before it loads them.
    """
    title, at, root = place.removeprefix("torchvision:").partition("@")
    name, _, named_split = title.partition(":")
    own_names, split = config.classes, one_split(config.split, named_split, str(place))
    if name not in TORCHVISION_SETS:
        raise InputError(f"torchvision:{name} is not read here{nearest(name, TORCHVISION_SETS)}")
    if not at or not root:
        raise InputError(f"torchvision:{name}: say in which folder it lies:  torchvision:{name}@FOLDER")
    known, settings, get_labels = TORCHVISION_SETS[name]
    split = split or list(settings)[-1]
    if split not in settings:
        raise InputError(f"torchvision:{name} has no split '{split}'{nearest(split, settings)}")
    if not Path(root).expanduser().is_dir():
        raise InputError(f"torchvision:{name}: the folder '{root}' does not exist (nothing is downloaded)")
    builder = getattr(importlib.import_module("torchvision.datasets"), name)
    offline = {} if name == "ImageFolder" else {"download": False}
    try:
        dataset = builder(Path(root).expanduser(), **settings[split], **offline)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"torchvision:{name}: not found in '{root}' as torchvision lays it out (nothing is downloaded): {error}"
        ) from error
    labels = np.asarray(get_labels(dataset), dtype=np.int64)
    names = own_names or getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not isinstance(names, list | tuple):
        raise InputError(f"torchvision:{name}: class names are needed as a list in label order: give classes=FILE")
    keys = _image_paths(dataset, Path(root).expanduser()) or [f"{split}/{i:06d}" for i in range(len(labels))]
    # some sets (SUN397) list their files in whatever order the file system has them
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return TorchvisionLabels(
        *(dataset, order, f"{name}/{split}", [keys[i] for i in order], labels[order], [str(text) for text in names]),
        **{**config.common, "known": known},
    )


def _image_files(dataset: Any) -> list[Any]:
    """Where the images lie, so that they are read within this package's limits; [] for sets held in arrays."""
    if type(dataset).__name__ == "Caltech101":
        folder = Path(dataset.root) / "101_ObjectCategories"
        numbered = zip(dataset.y, dataset.index, strict=True)
        return [folder / dataset.categories[label] / f"image_{number:04d}.jpg" for label, number in numbered]
    samples = getattr(dataset, "samples", None)
    kept = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
    return [path for path, _ in samples] if samples else list(kept or [])


def _image_paths(dataset: Any, root: Path) -> list[str]:
    """Paths of the images below the root, where the data set keeps them."""
    samples = getattr(dataset, "samples", None)
    paths = [path for path, _ in samples] if samples else getattr(dataset, "_image_files", None) or []
    base = root.resolve()
    return [Path(path).resolve().relative_to(base).as_posix() for path in paths]


class HubLabels(LabelledSource):
    """A Hugging Face data set with a column of images and one of class labels."""

    def __init__(self, rows: Any, column: str, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._rows = rows
        self._column = column

    def _bytes(self, i: int) -> bytes:
        value = self._rows[i][self._column] or {}
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        if value.get("path"):
            return read_image_file(value["path"])
        raise BadSample("missing image", self.key(i))


def open_hub_labelled(place: Place, config: LabelledConfig) -> HubLabels:
    """'owner/name?split=test&image=img&label=fine_label&config=...': a hub data set, or a saved one's folder.

    Columns are found by their types (one image, one class label) unless named. Needs the extra `hf`; fetching from the
    hub needs the network, which is said before.
    """
    text = place.removeprefix("hf:")
    with needing("datasets", "hf", f"hf:{text}"):
        import datasets
    name, _, query = text.partition("?")
    settings = settings_of_name(query, ("split", "image", "label", "config"), f"hf:{text}")
    split = one_split(config.split, settings.get("split"), str(place)) or "test"
    rows = _load(datasets, name, settings.get("config"), split)
    image = _column(rows, settings.get("image"), datasets.Image, name, "image")
    label = _column(rows, settings.get("label"), datasets.ClassLabel, name, "label")
    feature = rows.features[label]
    names = config.classes or list(getattr(feature, "names", None) or [])
    if isinstance(names, dict):
        raise InputError(f"hf:{name}: class names are a list in label order, not a mapping of folders")
    values = rows[label][:]
    wrong = next((row for row, value in enumerate(values) if type(value) is not int), None)
    if wrong is not None:
        raise InputError(f"hf:{name}: row {wrong} of '{label}' is no class number, but {values[wrong]!r:.50}")
    labels = np.asarray(values, dtype=np.int64)
    try:
        rows = rows.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # any type of arrow's or the library's own
        raise InputError(f"hf:{name}: the column '{image}' holds no images ({str(error)[:100]})") from error
    return HubLabels(
        *(rows, image, f"{name}/{split}", [f"{split}/{i:07d}" for i in range(len(labels))], labels, names),
        **config.common,
    )


def _load(datasets: Any, name: str, config: str | None, split: str) -> Any:
    """The rows of one split, from a folder written by save_to_disk, or by name (cache first, then the hub)."""
    try:
        if Path(name).is_dir() and any((Path(name) / f).is_file() for f in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        elif Path(name).is_dir():
            return datasets.load_dataset(name, config, split=split)
        else:
            _log.warning("hf:%s: asking the Hugging Face hub, which needs the network unless it is cached here", name)
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many types for "not there" and "no network"
        raise InputError(f"hf:{name} (split {split}) cannot be opened: {' '.join(str(error).split())[:200]}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise InputError(f"hf:{name} has no split '{split}'{nearest(split, loaded)}")
        return loaded[split]
    return loaded


def _column(rows: Any, asked: str | None, kind: type, name: str, what: str) -> str:
    """The asked column, or the only one of its type."""
    features = rows.features
    if asked is not None:
        if asked not in features:
            raise InputError(f"hf:{name} has no column '{asked}'{nearest(asked, features)}")
        return asked
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        listing = ", ".join(found or features)
        raise InputError(f"hf:{name}: which column holds the {what}? Name it with ?{what}=NAME (candidates: {listing})")
    return found[0]


TORCHVISION = Format(lambda place: place.startswith("torchvision:"), open_torchvision)
HUB = Format(
    lambda place: place.startswith("hf:") and not place.startswith("hf://"),
    open_hub_labelled,
    surely=lambda place: "label=" in place,
)
