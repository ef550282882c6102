"""Our model folders, damaged in every way that was thought of: one sentence that names the file, never a traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.models import ClipModel, load_model, save_model
from clipdistill.models.exported import read_exported
from clipdistill.runtime.files import read_json

Make = Callable[..., ClipModel]


@pytest.fixture
def folder(make_tiny: Make, tmp_path: Path) -> Path:
    save_model(make_tiny(), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path) -> str:
    """The sentence with which the folder is refused."""
    with pytest.raises(InputError) as caught:
        load_model(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert str(folder) in said, said
    return said


CONTENTS = {
    "empty": b"",
    "NUL bytes": b"\0" * 4096,
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "text": b'"model"',
    "an empty object": b"{}",
    "torn": b'{"format": 1, "name": "x", "archit',
    "not UTF-8": b'{"format": 1, "name": "\xff\xfe"}',
    "nested too deeply": b"[" * 200_000,
    "a number of 5000 digits": b'{"format": ' + b"9" * 5000 + b"}",
    "a web page": b"<html>not found</html>",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_file_that_is_something_else(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refused(folder)


def test_weights_cut_anywhere_or_with_a_bit_flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (1, 7, 8, 9, header // 2, header, header + 5, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(folder)
    for place in (0, 3, 8, 20, header // 3, header - 1, header + 1, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        refused(folder)
    path.write_bytes(whole)
    load_model(folder)
    path.unlink()
    refused(folder)


def test_weights_of_other_shapes_names_and_kinds(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = "positional_embedding"
    for change in (
        {first: tensors[first].flatten()},
        {first: tensors[first][:0]},
        {"another": torch.zeros(2)},
        {first: torch.zeros(())},
    ):
        save_file({**tensors, **change}, path)
        assert "the weights are not those of the architecture" in refused(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    assert f"{first} is absent instead of" in refused(folder)


VALUES: list[Any] = [None, True, -1, 0, 10**30, 1.5, math.nan, math.inf, "", "x" * 10_000, "\0", [], [[]], {}, {"": 0}]


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in nested JSON there are values, lists by their first two entries."""
    if path:
        yield path
    items = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@pytest.mark.slow
def test_every_value_of_the_description_replaced_by_every_other(folder: Path) -> None:
    path = folder / "model.json"
    whole = read_json(path)  # without its checksum, as older versions wrote it
    free = {"parameters", "versions", "dtype"}  # for readers; nothing is built from them
    survived = []
    for place in places(whole):
        for value in VALUES:
            changed = json.loads(json.dumps(whole))
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            path.write_text(json.dumps(changed))
            try:
                load_model(folder)
            except InputError as error:
                said = str(error).replace(str(folder), "")
                if "\n" in said or len(said) > 1500:
                    pytest.fail(f"{place}, {str(value)[:20]}: {said[:200]}")
            except Exception as error:
                pytest.fail(f"{place}, {str(value)[:20]}: {type(error).__name__} {str(error)[:200]}")
            else:
                survived.append((place, value))
    unexpected = [(place, value) for place, value in survived if place[0] not in free | {"architecture", "name"}]
    # what is as good as what stood there: a word of the vocabulary, a value equal to the one replaced
    assert {place[0] for place, _ in unexpected} <= {"tokenizer", "image", "format", "activation"}, unexpected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 800.0])
def test_a_logit_scale_that_is_no_number(make_tiny: Make, tmp_path: Path, value: float) -> None:
    model = make_tiny()
    model.module.logit_scale.data.fill_(value)
    save_model(model, tmp_path / "model")
    for use in (
        lambda: load_model(tmp_path / "model"),
        lambda: cd.evaluate(tmp_path / "model", "scenes:val?size=4"),
        lambda: cd.evaluate(model, "scenes:val?size=4"),
    ):
        with pytest.raises(InputError, match=r"its logit scale is .* must be the logarithm of a positive number"):
            use()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, [1], "x", None])
def test_an_export_with_an_impossible_logit_scale(make_tiny: Make, tmp_path: Path, value: Any) -> None:
    model = make_tiny()
    for name in ("image.onnx", "text.onnx"):
        (tmp_path / name).write_bytes(b"")
    description = {"image": model.image.model_dump(), "tokenizer": model.tokenizer.to_dict(), "logit_scale": value}
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"logit_scale|not a description"):
        read_exported(tmp_path, "onnx:x", "onnx")


READING = {
    "eval": "eval {} --data scenes:val",
    "eval, as the teacher": "eval scenes-teacher --data scenes:val --teacher {}",
    "export": "export {} --to onnx --out out",
    "export to transformers": "export {} --to hf --out out",
    "bench": "bench {}",
    "probe": "probe {} --train scenes:zeroshot --test scenes:zeroshot",
    "embed": "embed {} --data scenes:val --out rows.npy",
    "cache": "cache --teacher {} --data scenes:val --out store",
    "train, as the teacher": "train --teacher {} --recipe clip-kd --size debug --out run",
    "train, as the start": "train --student-weights {} --recipe clip-kd --size debug --out run",
    "train, as a part": "train --student towers:image=clip:{},text=clip:{} --recipe clip-kd --size debug --out run",
    "search": "search pictures --model {} --query red",
}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("command", READING)
def test_weights_that_are_no_numbers_are_refused_by_every_command(
    make_tiny: Make, tmp_path: Path, command: str, value: float, capsys: Any, monkeypatch: Any
) -> None:
    """A training that had failed may have written them, with a checksum that fits."""
    monkeypatch.chdir(tmp_path)
    model = make_tiny()
    with torch.no_grad():
        next(p for p in model.module.parameters() if p.ndim > 1).flatten()[7] = value
    save_model(model, tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "pictures" / "a.png")
    assert main(READING[command].format(*["model"] * 2).split()) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "tensors hold NaN or infinity" in said
