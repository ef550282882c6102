"""`onnx:DIR`, `openvino:DIR`, ...: exported towers behind the face of a ClipModel, to evaluate, measure and teach.

The folder is an export (manifest.json, see docs/deployment.md), or holds image.onnx, text.onnx and a model.json with
`image` (ImageSpec), `tokenizer` (Tokenizer.to_dict) and `logit_scale` (the multiplier): whoever has such graphs of a
model from another framework can use it here. The graphs cannot be trained.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipdistill.config import LARGEST_SCALE, build
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError, needing
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.known import EXPORT_MANIFEST as MANIFEST
from clipdistill.models.known import PHONES, SUFFIX, TOWERS
from clipdistill.models.tokenizers import HuggingFaceTokenizer, Tokenizer, tokenizer_from_dict
from clipdistill.registry import RUNTIMES
from clipdistill.runtime.files import read_json, sha256

DESCRIPTION = "model.json"
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""Number formats in which OpenVINO may compute a float32 graph."""

Runner = Callable[[np.ndarray], np.ndarray]


class ExportedTowers(nn.Module):
    """Two graphs called like a CLIP module. `weights_sha256` stands for its weights in fingerprints.

    runners: tower -> function on arrays; files: what they were read from; flops: per tower, from the manifest.
    reads_only_text: whether tokens may be cut to their text (the gate of the export has compared it); None: unknown.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        files: list[Path],
        logit_scale: float,
        flops: Mapping[str, int],
        reads_only_text: bool | None = None,
    ) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)), requires_grad=False)
        self.logit_bias = None
        self.origin: tuple[Path, str, str, str]
        self.runners = dict(runners)
        self.flops = dict(flops)
        self.reads_only_text = reads_only_text
        self.size_bytes = sum(path.stat().st_size for path in files)
        self.digests = {part_name(path): sha256(path) for path in files}
        self.weights_sha256 = hashlib.sha256(bytes.fromhex("".join(self.digests.values()))).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Of another process, or a copy: read from its folder again, since a running graph is of one process."""
        return _read_again, (self.weights_sha256, *self.origin)

    def encode_image(self, images: Tensor) -> Tensor:
        """float32 (B, 3, H, W) -> (B, D), as the graph gives them."""
        return self._run("image", images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) -> (B, D), as the graph gives them."""
        return self._run("text", tokens)

    def _run(self, tower: str, values: Tensor) -> Tensor:
        return torch.from_numpy(self.runners[tower](values.detach().cpu().numpy())).to(values.device)


def read_exported(folder: Path, name: str, runtime: str, precision: str = "float32") -> ClipModel:
    """The export in `folder`, run by `runtime`. Raises InputError for missing or unusable files."""
    graphs = {tower: _graph(folder, tower, runtime) for tower in TOWERS}
    values, spec, tokenizer, logit_scale = read_manifest(folder, name)
    files = [part for path in graphs.values() for part in graph_parts(path)]
    runners = {tower: load_graph(path, runtime, precision) for tower, path in graphs.items()}
    # one of this package was compared at several lengths; of others the text tower is asked
    cut = takes_any_length(runners["text"])
    known = cut if not cut or "tolerance" in values else None
    module = ExportedTowers(runners, files, logit_scale, dict(values.get("flops", {})), known)
    module.origin = folder.absolute(), name, runtime, precision
    _compare_digests(folder, values, {**module.digests, **_digest_of_tokenizer(folder)})
    width = module.encode_text(tokenizer(["a photo"])).shape[1]
    architecture = {"exported": runtime, "precision": precision, "weights_sha256": module.weights_sha256}
    counts = dict(values.get("parameters", {}))
    return ClipModel(name, module, spec, tokenizer, width, tokenizer.context_length, architecture, counts)


def _read_again(digest: str, folder: Path, *given: str) -> ExportedTowers:
    module: ExportedTowers = read_exported(folder, *given).module
    if module.weights_sha256 != digest:
        raise InputError(f"{folder}: its graphs are no longer those that were handed over: load the model again")
    return module


def read_manifest(folder: Path, name: str) -> tuple[dict[str, Any], ImageSpec, Tokenizer, float]:
    """What an export says of itself: everything, its images, its tokenizer, its logit scale. Raises InputError."""
    values = _description(folder, name)
    where = str(folder / (MANIFEST if (folder / MANIFEST).is_file() else DESCRIPTION))
    try:
        spec = build(ImageSpec, values["image"], f"{where}: image")
        tokenizer = (
            tokenizer_from_dict(values["tokenizer"])
            if isinstance(values["tokenizer"], Mapping)
            else _exported_tokenizer(folder / "tokenizer.json")
        )
        logit_scale = float(values.get("logit_scale", 100.0))
        if not 0 < logit_scale <= LARGEST_SCALE:
            raise InputError(
                f"{where}: logit_scale must be a positive number up to {LARGEST_SCALE:g} (the multiplier itself), "
                f"found {logit_scale}"
            )
        _ = dict(values.get("parameters", {})), dict(values.get("flops", {}))
        _compare_digests(folder, values, {})
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not a description of exported towers ({error!r})") from error
    return values, spec, tokenizer, logit_scale


def _graph(folder: Path, tower: str, runtime: str) -> Path:
    suffixes = dict.fromkeys((SUFFIX[runtime], SUFFIX[runtime if runtime in PHONES else "onnx"]))
    for suffix in suffixes:
        if (folder / f"{tower}{suffix}").exists():
            return folder / f"{tower}{suffix}"
    wanted = " or ".join(f"{tower}{suffix}" for suffix in suffixes)
    raise InputError(
        f"{folder / wanted}: no such file; '{runtime}:' needs a folder written by  clipdistill export --to {runtime}"
    )


def _description(folder: Path, name: str) -> dict[str, Any]:
    path = next((folder / file for file in (MANIFEST, DESCRIPTION) if (folder / file).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: has neither {MANIFEST} (of an export) nor {DESCRIPTION}, so '{name}' is no model")
    return read_json(path)


def _digest_of_tokenizer(folder: Path) -> dict[str, str]:
    path = folder / "tokenizer.json"
    return {path.name: sha256(path)} if path.is_file() else {}


def _compare_digests(folder: Path, values: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raises InputError for a file that is not as the manifest recorded it; what it does not name may be anything."""
    parts = [values, *dict(values.get("towers") or {}).values()]
    for name, recorded in [item for part in parts for item in dict(part.get("files") or {}).items()]:
        if name in found and found[name] != recorded:
            raise InputError(f"{folder / name}: not as {MANIFEST} recorded it: export again, or copy the folder again")


def _exported_tokenizer(path: Path) -> HuggingFaceTokenizer:
    """The export's own tokenizer.json, so that what is measured is what was shipped."""
    definition = read_json(path)
    try:
        length, padding = definition["truncation"]["max_length"], definition["padding"]["pad_id"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not the tokenizer of an export ({error})") from error
    return HuggingFaceTokenizer(definition, length, padding)


def graph_parts(path: Path) -> list[Path]:
    """A graph's files: large ONNX graphs keep weights in a file beside them, OpenVINO's always, Core ML in a folder."""
    if path.is_dir():
        return sorted(part for part in path.rglob("*") if part.is_file())
    beside = [p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}.") or p == path.with_suffix(".bin")]
    return sorted([path, *(p for p in beside if p.is_file())])


def part_name(path: Path) -> str:
    """What a manifest calls a graph's file: its name, of a package's file with the package in front."""
    names = [path.name, *(above.name for above in path.parents)]
    package = next((i for i, name in enumerate(names) if name.endswith(SUFFIX["coreml"])), 0)
    return "/".join(reversed(names[: package + 1]))


def load_graph(path: Path, runtime: str, precision: str = "float32") -> Runner:
    """A graph with one input and one output as a function on arrays; threads as torch has them now."""
    if runtime in PHONES:
        return RUNTIMES.get(runtime)(path)
    return _load_onnx(path) if runtime == "onnx" else _load_openvino(path, precision)


def takes_any_length(runner: Runner) -> bool:
    """Whether a loaded graph takes tokens (B, L) of any L up to the context: its second axis has a name, no size."""
    return bool(getattr(runner, "any_length", False))


# Rows that a thread takes at a time from a batch large enough for all: without threads that wait for each other, and
# with activations that stay in its cache, a batch of 32 is a twelfth faster (benchmarks/deploy.py).
_PIECE = 4


def _load_onnx(path: Path) -> Runner:
    with needing("onnxruntime", "export", f"'{path.name}'"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own exception types share no base class
        raise InputError(f"{path}: onnxruntime cannot load it ({str(error).splitlines()[0][:200]})") from error
    given = session.get_inputs()[0]
    kind = {"tensor(int32)": np.int32, "tensor(float16)": np.float16}.get(given.type)

    def run(values: np.ndarray) -> np.ndarray:
        array = values if kind is None else values.astype(kind)
        result: np.ndarray = session.run(None, {given.name: array})[0]
        return result.astype(np.float32, copy=False)

    run.any_length = len(given.shape) == 2 and not isinstance(given.shape[1], int)  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Within, OpenVINO may be loaded: the thread keeps the stack for signals that it had before.

    The CPU plug-in of each Core gives the thread that loads it one of its own, and takes the memory back when it goes,
    from whatever thread; the next signal (a data worker's or a subprocess's end) would kill the process without a word.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    kept = ctypes.create_string_buffer(64)  # a stack_t: 24 bytes
    if library is not None:
        library.sigaltstack(None, kept)
    try:
        yield
    finally:
        if library is not None:
            library.sigaltstack(kept, None)


@functools.cache
def openvino_core() -> Any:
    """The one Core of the process, which never ends. Weights are read: mapped ones would change, or end the process,
    when a file is copied over theirs."""
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    return core


def _load_openvino(path: Path, precision: str) -> Runner:
    with needing("openvino", "openvino", f"'{path.name}'"):
        import openvino  # noqa: F401
    threads = torch.get_num_threads()
    # on processors with bfloat16 it would round silently
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": PRECISIONS[precision]}

    core = openvino_core()

    def compiled(**more: object) -> Any:
        return core.compile_model(model, "CPU", {**settings, **more})

    try:
        model = core.read_model(str(path))  # once: the file may be gone when the requests below are made
        one = compiled(PERFORMANCE_HINT="LATENCY")
    except Exception as error:  # openvino raises RuntimeError and its own kinds
        raise InputError(f"{path}: openvino cannot load it ({str(error).strip().splitlines()[0][:200]})") from error
    shape = one.input(0).partial_shape
    any_length = len(shape) == 2 and shape[1].is_dynamic
    busy = threading.Lock()

    @functools.cache  # made when first needed: it holds the weights once more
    def requests() -> list[Any]:
        shared = compiled(NUM_STREAMS=threads)
        return [shared.create_infer_request() for _ in range(threads)]

    def run(values: np.ndarray) -> np.ndarray:
        # a request reuses its output memory, so a copy is handed out
        # captions of any length run one batch at a time: several requests of one such graph gave wrong rows, once
        if threads == 1 or any_length or len(values) < 2 * threads * _PIECE:
            with busy:  # one request serves all callers, whatever thread they are on
                return np.array(one(values)[0], dtype=np.float32)
        pieces = np.array_split(values, -(-len(values) // _PIECE))
        found = []
        with busy:
            # one request a thread, in turns; the last ones are only waited for
            for number in range(len(pieces) + threads):
                request = requests()[number % threads]
                if number >= threads:
                    request.wait()
                    found.append(np.array(request.get_output_tensor(0).data, dtype=np.float32))
                if number < len(pieces):
                    request.start_async({0: pieces[number]})
        return np.concatenate(found)

    run.any_length = any_length  # type: ignore[attr-defined]
    return run
