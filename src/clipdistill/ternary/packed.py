"""A model folder with ternary weights in two bits each: `model.json` as in any, `ternary.safetensors` with the weights.

    write_packed(model, names, folder)      # beside the dense student, in a run's folder `packed`
    unpack(folder, out)                     # an ordinary model folder again, equal to the bit

Of a ternary weight `name` the file holds `name.codes` (uint8: four codes a byte, the first in the lowest bits, a code
being the weight's sign plus 1) and `name.scales` (one a row); its shape stands in the file's metadata. The rest is as
it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.save import DESCRIPTION, WEIGHTS, blaming_file, made_here, save_model
from clipdistill.runtime.files import new_folder, read_json, sha256, write_json
from clipdistill.ternary.weights import dense, parts

PACKED = "ternary.safetensors"


def pack(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 -> (ceil(n / 4),) uint8."""
    flat = torch.nn.functional.pad((codes.flatten() + 1).to(torch.uint8), (0, -codes.numel() % 4)).view(-1, 4)
    return flat[:, 0] | flat[:, 1] << 2 | flat[:, 2] << 4 | flat[:, 3] << 6


def unpack_codes(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The codes of `pack`, int8, in their shape."""
    size = torch.Size(shape)
    quarters = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()[: size.numel()]
    return (quarters.to(torch.int8) - 1).view(size)


def write_packed(model: ClipModel, names: Iterable[str], folder: Path) -> dict[str, Any]:
    """Write the folder; the model has its ternary weights. Returns the figures that `ternary.json` holds.

    ternary_share: of all parameters; sparsity: zeros among the ternary ones; bytes, bytes_float32, compression.
    """
    state, chosen, tensors, shapes = model.module.state_dict(), set(names), {}, {}
    zeros = count = 0
    for name, value in state.items():
        if name not in chosen:
            tensors[name] = value.detach().cpu().contiguous().clone()
            continue
        codes, scales = parts(value.detach().cpu())
        zeros, count = zeros + int((codes == 0).sum()), count + codes.numel()
        tensors[f"{name}.codes"], tensors[f"{name}.scales"] = pack(codes), scales
        shapes[name] = list(value.shape)
    save_model(model, folder)
    dense_bytes = (folder / WEIGHTS).stat().st_size
    save_file(tensors, folder / PACKED, metadata={"shapes": json.dumps(shapes)})
    (folder / WEIGHTS).unlink()
    size = (folder / PACKED).stat().st_size
    total = sum(parameter.numel() for parameter in model.module.parameters())
    figures = {
        "ternary_share": count / total,
        "sparsity": zeros / max(count, 1),
        "bytes": size,
        "bytes_float32": dense_bytes,
        "compression": dense_bytes / size,
    }
    write_json(folder / "ternary.json", figures)
    return figures


def unpack(folder: Path | str, out: Path | str) -> None:
    """An ordinary model folder of a packed one. Raises InputError for a folder that holds none or is damaged."""
    source, path = Path(folder), Path(folder) / PACKED
    if not path.is_file():
        raise InputError(f"{folder}: holds no {PACKED}; a run with train.ternary has it in its folder `packed`")
    with blaming_file(path), safe_open(path, framework="pt") as file:
        listed = (file.metadata() or {}).get("shapes", "")
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        shapes = json.loads(listed)
        for name, shape in shapes.items():
            stored[name] = dense(unpack_codes(stored.pop(f"{name}.codes"), shape), stored.pop(f"{name}.scales"))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not hold the weights that it lists ({error}): the file is damaged") from error
    description = read_json(source / DESCRIPTION)
    with new_folder(Path(out), lambda old: (old / DESCRIPTION).exists(), "model folder", made_here) as new:
        save_file(stored, new / WEIGHTS)
        if sha256(new / WEIGHTS) != description.get("weights_sha256"):
            raise InputError(f"{path}: its weights are not those that {DESCRIPTION} recorded: the file is damaged")
        write_json(new / DESCRIPTION, description, checked=True)
