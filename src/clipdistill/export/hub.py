"""To the Hugging Face hub: a folder with a model card that says how the model was made and how its numbers were."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError, first_line, needing
from clipdistill.export.folder import CARD, is_card
from clipdistill.export.tokenizer_json import FILE as TOKENIZER
from clipdistill.models.hub import offline, reachable
from clipdistill.models.known import EXPORT_MANIFEST as MANIFEST
from clipdistill.models.known import OPEN_CLIP_CONFIG
from clipdistill.runtime.files import read_json, write_json, write_text
from clipdistill.statistics.scores import BENCHMARKS, Scores

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHOWN = (
    "i2t_R@1",
    "i2t_R@5",
    "i2t_R@10",
    "t2i_R@1",
    "t2i_R@5",
    "t2i_R@10",
    "top1",
    "top5",
    "mean_per_class",
    *BENCHMARKS,
)


def check_push(repository: str) -> None:
    """Raise InputError for a name that is none, and where the network is forbidden or the hub cannot be reached."""
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"'{repository}' is not the name of a repository: expected  owner/name")
    if offline():
        raise InputError(f"the upload to {repository} needs the network, which HF_HUB_OFFLINE forbids here: unset it")
    if not reachable():
        raise InputError(f"the upload to {repository} needs the network, and the Hugging Face hub cannot be reached")


def push_to_hub(
    folder: Path, repository: str, *, source: Path | None = None, private: bool = False, licence: str | None = None
) -> str:
    """Upload an export or model folder to `owner/name`, with a card made from the run `source`; returns its address.

    A README.md that the user has written there is uploaded in the card's place.

    licence: of the weights, as the hub names it ("apache-2.0"). Credentials are huggingface_hub's own (`hf auth login`
    or HF_TOKEN). Raises InputError as `check_push`, and for whatever the hub refuses.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"{folder}: no such folder, or an empty one: export the model first")
    check_push(repository)
    with needing("huggingface_hub", "hf", "an upload to the hub"):
        from huggingface_hub import HfApi
    if not (folder / CARD).exists() or is_card(folder / CARD):
        write_text(folder / CARD, model_card(folder, repository, source, licence))
    _name_tokenizer(folder, repository)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload by clipdistill")
    except Exception as error:  # huggingface_hub and the HTTP library under it raise many kinds
        raise InputError(f"'{repository}': the hub did not take the upload ({first_line(error)})") from error
    return str(address)


def _name_tokenizer(folder: Path, repository: str) -> None:
    """Let an open_clip configuration name the repository as the place of its tokenizer, as open_clip expects there."""
    config = _json(folder / OPEN_CLIP_CONFIG)
    text = config.get("model_cfg", {}).get("text_cfg", {})
    if text.get("hf_tokenizer_name") == TOKENIZER:
        text["hf_tokenizer_name"] = repository
        write_json(folder / OPEN_CLIP_CONFIG, config)


def model_card(folder: Path, repository: str, source: Path | None = None, licence: str | None = None) -> str:
    """The README.md of a model: method, teacher, data, scores with their protocols, cost, use. Markdown with YAML.

    source: the run folder the model comes from; without one the card holds only what the folder itself says.
    licence: as the hub names it. The YAML is huggingface_hub's ModelCardData with the scores as model-index.
    """
    run = _json(source / "run.json") if source is not None else {}
    manifest = _json(folder / MANIFEST)
    sections = [
        _front(folder, repository, run, source, licence),
        f"# {repository.partition('/')[2]}",
        _summary(run, manifest),
    ]
    scores = _scores(source)
    if scores:
        sections += ["## Scores", scores]
    if manifest:
        sections += ["## This export", _export(manifest)]
    sections += ["## Use", _use(folder, repository)]
    cost = _cost(run, source)
    if cost:
        sections += ["## What it cost", cost]
    if run.get("command"):
        sections += ["## How to make it again", f"```\n{public_text(str(run['command']))}\n```"]
    return "\n\n".join(sections) + "\n"


def _front(folder: Path, repository: str, run: dict[str, Any], source: Path | None, licence: str | None) -> str:
    """The YAML at the top of the card, by which the hub finds and sorts models."""
    with needing("huggingface_hub", "hf", "a model card"):
        from huggingface_hub import ModelCardData
    transformers = (folder / "preprocessor_config.json").is_file()
    graphs = {"onnx": "image.onnx", "openvino": "image.xml"}
    library = next((name for name, file in graphs.items() if (folder / file).is_file()), None)
    tags = ["clip", "knowledge-distillation", "clipdistill"]
    tags += ["sentence-transformers"] if (folder / "modules.json").is_file() else []
    tags += ["transformers.js", "onnx"] if (folder / "onnx").is_dir() else []
    teachers = [name for name in map(_hub_name, _listed(run.get("teacher"))) if name]
    data = list(dict.fromkeys(_data_name(text) for text in _listed(run.get("data"))))
    results = _results(source)
    card = ModelCardData(
        base_model=teachers[0] if len(teachers) == 1 else teachers or None,
        datasets=data or None,
        eval_results=results or None,
        library_name=library or ("transformers" if transformers else "open_clip"),
        license=licence,
        model_name=repository.partition("/")[2] if results else None,
        pipeline_tag="zero-shot-image-classification",
        tags=tags,
    )
    return f"---\n{card.to_yaml()}\n---"


def _listed(value: Any) -> list[str]:
    """A text, or a list of texts, as a list."""
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one]


def _hub_name(teacher: str) -> str | None:
    """owner/name on the hub of a teacher, or None for one that is not there."""
    kind, _, name = teacher.rpartition(":")
    if kind in ("hf", "hf-hub"):
        return name if _REPOSITORY.fullmatch(name) else None
    architecture, _, tag = teacher.partition("/")
    if kind or not tag or "/" in tag:
        return None
    from open_clip.pretrained import get_pretrained_cfg

    place = str(get_pretrained_cfg(architecture, tag).get("hf_hub") or "").rstrip("/")
    return place if _REPOSITORY.fullmatch(place) else None


def _data_name(text: str) -> str:
    """'flickr8k' of a path to dataset_flickr8k.json, 'scenes' of scenes/train."""
    name = Path(public_text(text)).with_suffix("")
    first = name.parts[-1] if text.startswith(("/", "~")) or name.suffix else name.parts[0]
    return first.partition(":")[0].removeprefix("dataset_")


_METRICS = {"i2t": "image to text", "t2i": "text to image", "top1": "top-1", "top5": "top-5"}
_TASKS = {
    "retrieval": "image-text-retrieval",
    "zero-shot": "zero-shot-image-classification",
    "matching": "image-text-matching",
}


def _results(source: Path | None) -> list[Any]:
    """Scores of the student and its latency as entries of model-index: each with protocol, interval and queries."""
    from huggingface_hub import EvalResult

    found: list[Any] = []
    scores = _read_scores(source)
    for score in scores or ():
        if score.model != "student" or score.metric not in _SHOWN:
            continue
        protocol = score.protocol
        direction, _, recall = score.metric.partition("_")
        facts: dict[str, Any] = {"protocol": protocol.label(), "queries": score.n}
        if score.low is not None and score.high is not None:
            facts["interval_95"] = [round(100 * score.low, 2), round(100 * score.high, 2)]
        found.append(
            EvalResult(
                task_type=_TASKS[protocol.task],
                dataset_type=protocol.dataset,
                dataset_name=protocol.dataset,
                dataset_split=protocol.split,
                metric_type="recall" if recall.startswith("R@") else "accuracy",
                metric_name=f"{_METRICS[direction]} {recall}".strip() if direction in _METRICS else score.metric,
                metric_value=round(100 * score.value, 2),
                metric_args=facts,
            )
        )
    bench = _json(source / "bench.json") if source is not None else {}
    names = {source.resolve().name, "student"} if source is not None else set()
    for row in _measured(bench):
        if str(row["model"]) in names:
            found.append(
                EvalResult(
                    task_type="image-feature-extraction" if row["tower"] == "image" else "feature-extraction",
                    dataset_type="latency",
                    dataset_name=f"{row['tower']} tower, batch 1",
                    metric_type="latency",
                    metric_name=f"milliseconds, {row['backend']}, {row['dtype']}",
                    metric_value=round(1000 / row["value"], 3),
                    metric_args={"device": bench.get("device", {}).get("label", "an unknown device")},
                )
            )
    return found


def _measured(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of single pictures and captions that were not disturbed."""
    rows = bench.get("measurements", [])
    return [
        row
        for row in rows
        if row.get("tower") in ("image", "text") and row.get("batch") == 1 and not row.get("noisy") and row["value"] > 0
    ]


def _summary(run: dict[str, Any], manifest: dict[str, Any]) -> str:
    if not run:
        name = manifest.get("name")
        return f"A CLIP model ({name})." if name else "A CLIP model."
    parameters = run.get("parameters") or {}
    rows = [
        ("method", run.get("method") or run.get("recipe")),
        ("recipe", run.get("recipe")),
        ("teacher", public_text(str(run["teacher"])) if run.get("teacher") else None),
        ("student", public_text(str(run.get("student") or ""))),
        ("data", public_text(str(run.get("data") or ""))),
        ("parameters", f"{parameters['total']:,}" if isinstance(parameters.get("total"), int) else None),
        ("samples seen", f"{run['samples_seen']:,}" if isinstance(run.get("samples_seen"), int) else None),
        ("seed", run.get("seed")),
    ]
    table = "".join(f"| {key} | {value} |\n" for key, value in rows if value not in (None, ""))
    return "A CLIP student distilled with clipdistill.\n\n| | |\n|---|---|\n" + table.rstrip("\n")


def _read_scores(source: Path | None) -> Scores | None:
    path = None if source is None else source / "scores.json"
    if path is None or not path.is_file():
        return None
    return Scores.from_json(path.read_text(encoding="utf-8"), str(path))


def _scores(source: Path | None) -> str:
    scores = _read_scores(source)
    if scores is None:
        return ""
    return scores.to_markdown(_SHOWN).strip() + "\n\nPercent, with 95 % intervals in brackets."


def _export(manifest: dict[str, Any]) -> str:
    lines = []
    for tower, facts in manifest.get("towers", {}).items():
        parity = facts["float32_parity"]
        lines.append(
            f"- {tower} tower: {facts['precision']}, {facts['bytes'] / 1e6:.1f} MB; in float32 it differs from the "
            f"original by at most {parity['difference']:.1e} (unit-length embeddings, cosine {parity['cosine']:.6f})"
        )
    for name, values in manifest.get("scores", {}).items():
        lines.append(
            f"- R@1 {name.replace('_', ' ')}: {100 * values['i2t_R@1']:.1f} image to text, "
            f"{100 * values['t2i_R@1']:.1f} text to image ({values['protocol']})"
        )
    lines.append(f"- embeddings: {manifest.get('output')}, {manifest.get('embed_dim')} numbers")
    return "\n".join(lines)


def _use(folder: Path, repository: str) -> str:
    if (folder / "index.html").is_file():
        return "The folder is a page that searches pictures in the browser; any static host serves it."
    if (folder / MANIFEST).is_file():
        return (
            '`python example.py PICTURE "a caption" "another"` needs nothing of clipdistill; the file is some 20 lines.'
        )
    if (folder / "preprocessor_config.json").is_file():
        code = f'from transformers import CLIPModel\n\nmodel = CLIPModel.from_pretrained("{repository}")'
        if (folder / "modules.json").is_file():
            code += "\n\nfrom sentence_transformers import SentenceTransformer\n\n"
            code += f'embeddings = SentenceTransformer("{repository}").encode(["a photo of a dog"])'
        if (folder / "onnx").is_dir():
            script = (
                "import { CLIPTextModelWithProjection, CLIPVisionModelWithProjection } "
                'from "@huggingface/transformers";\n\n'
                f'const text = await CLIPTextModelWithProjection.from_pretrained("{repository}");\n'
                f'const vision = await CLIPVisionModelWithProjection.from_pretrained("{repository}");'
            )
            return f"```python\n{code}\n```\n\n```js\n{script}\n```"
    elif (folder / "open_clip_config.json").is_file():
        code = f'import open_clip\n\nmodel, _, transform = open_clip.create_model_and_transforms("hf-hub:{repository}")'
    else:
        code = f'import clipdistill\n\nmodel, transform, tokenizer = clipdistill.load_student("hf:{repository}")'
    return f"```python\n{code}\n```"


def _cost(run: dict[str, Any], source: Path | None) -> str:
    lines = []
    if isinstance(run.get("seconds"), int | float):
        lines.append(f"- training: {run['seconds'] / 3600:.2f} hours on {run.get('device', 'an unknown device')}")
    bench = _json(source / "bench.json") if source is not None else {}
    for row in _measured(bench):
        lines.append(
            f"- {public_text(str(row['model']))}, {row['tower']} tower, {row['backend']}, {row['dtype']}, batch 1: "
            f"{row['value']:.1f} per second"
        )
    if bench.get("measurements"):
        lines.append(f"- measured on: {bench.get('device', {}).get('label', 'an unknown device')}")
    return "\n".join(lines)


def public_text(text: str) -> str:
    """Text without the folders of this machine: the last part of every absolute path."""
    part = r"(?:(?!,\w+=)[^\s/'\"])+"
    return re.sub(rf"(?<![\w/])~?/(?!/)(?:{part}/)+({part})", r"\1", text)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model's folder or run, {} where there is none."""
    return read_json(path) if path.is_file() else {}
