"""`cd.evaluate`: models on data sets, under a named protocol, with intervals, teacher and student side by side.

scores = clipdistill.evaluate("runs/rd", ["flickr8k.json", "cifar10_test.npz"], teacher="ViT-B-16/laion400m_e32")
scores.print()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clipdistill.arguments import checked
from clipdistill.data.files import refuse_split
from clipdistill.data.labelled import LabelledSource
from clipdistill.data.open import is_labelled_name, open_labelled, open_pairs, parts_of
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.embed.encode import EncodedPairs, Encoder, open_encoder
from clipdistill.errors import InputError
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models.clip_model import ClipModel, require_usable
from clipdistill.models.load import as_model
from clipdistill.models.tokenizers import unknown_texts
from clipdistill.registry import OTHER_SETS
from clipdistill.statistics.bootstrap import bootstrap
from clipdistill.statistics.protocol import (
    KNOWN_PAIRS,
    Protocol,
    captions_rule,
    check_known_pairs,
    check_retrieval_protocol,
    describe_transform,
    digest,
    known_name,
    retrieval_scoring,
)
from clipdistill.statistics.scores import Queries, Score, Scores

SAMPLED = 64
"""Pictures whose bytes tell whether two measurements were on the same ones."""
REPLICATES = 1000
"""Bootstrap replicates of the intervals in tables."""

Data = str | Path | DataConfig | PairSource | LabelledSource | Sequence[Any]


@checked
def evaluate(
    model: str | Path | nn.Module | ClipModel,
    data: Data | Sequence[Data],
    *,
    protocol: str = "standard",
    teacher: str | Path | nn.Module | ClipModel | None = None,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 256,
    device: str | torch.device | None = None,
    workers: int | None = 0,
    templates: str | Sequence[str] | None = None,
    classes: str | Path | None = None,
    split: str | None = None,
    progress: bool = True,
    intervals: bool = True,
    dtype: str = "float32",
    captions: str | None = None,
    strict_counts: bool = False,
    distributed: bool = False,
    embeddings: dict[tuple[str, str], EncodedPairs] | None = None,
    encoded_pairs: Mapping[tuple[str, str], EncodedPairs] | None = None,
    engine: str = "torch",
    score: str | None = None,
) -> Scores:
    """Measure a model, and its teacher where given, on image-caption pairs (retrieval) and labelled sets (zero-shot).

    model, teacher: names (see load_model), loaded models, or any nn.Module with encode_image and encode_text.
    data: one set or several: names (one may stand for several, docs/benchmarks.md), opened sources, or any objects
    that data.objects.as_pairs takes.
    protocol: "standard" (all captions, any of an image's captions is a hit) or "first-caption" (the released CLIP-KD
    and CLIP-RD: one caption an image, one positive both ways); only retrieval is concerned.
    ks: K of R@K. templates, classes: prompt templates and class-name file of labelled sets (None: the set's own).
    split: of data sets that have splits (None: test, else val). intervals: 95 % bootstrap intervals, clustered by
    image. dtype: "float32", "bfloat16" or "float16". batch_size: images or captions a forward pass; workers: processes
    that decode (None: measured); engine: what runs the towers ("auto", "torch", "compile", "onnx", "openvino"; noted
    in the scores where it is not torch), or "ray", "ray:onnx", ... on a Ray cluster; progress: a bar on the error
    stream. captions: overrides the protocol's rule ("all", "first", "first 5"). device: None is where a loaded model
    is, and for names a GPU where there is one, else the CPU. strict_counts: a published set with other than its
    published counts is an error, not a note.
    distributed: share the work between the ranks of torch.distributed; every rank must call and gets everything.
    embeddings: filled with what was encoded, by (model, name of the pair set), for evaluate.geometry.
    encoded_pairs: of these models, by the same names, what is encoded already under this protocol's caption rule.
    score: "bsap" or "bsap:FILE" ranks retrieval by scores balanced by auxiliary prompts, under a protocol of its own.

    Returns Scores: models "student" and "teacher" (or only the model's own scores, as "student", without a teacher),
    per-query results kept for paired tests. Raises InputError for what cannot be scored.
    """
    check_retrieval_protocol(protocol)
    scoring = None if score is None else retrieval_scoring(score)
    if captions is not None and (captions in ("first", "first 1")) != (protocol == "first-caption"):
        raise InputError(f"captions='{captions}' contradicts the protocol '{protocol}': one caption is 'first-caption'")
    captions = "first" if captions == "first 1" else captions
    sources = [source for item in _listed(data) for source in opened_all(item, split, classes)]
    if strict_counts and not any(_has_known_counts(source) for source in sources):
        named = ", ".join(source.name for source in sources)
        raise InputError(f"strict counts: no published counts are known of {named}, so nothing would be checked")
    models: dict[str, ClipModel] = {"student": loaded_model(model, device)}
    if teacher is not None:
        models["teacher"] = loaded_model(teacher, device)
    result = Scores()
    measured: dict[str, Scores] = {}
    for name, one in models.items():
        encoder = open_encoder(
            one,
            batch_size=batch_size,
            device=device,
            workers=workers,
            progress=progress,
            dtype=dtype,
            distributed=distributed,
            engine=engine,
        )
        fingerprint = one.fingerprint()
        own = measured[name] = Scores()
        for source in sources:
            if isinstance(source, PairSource):
                rule = captions or captions_rule(protocol, source.name)
                encoded = (encoded_pairs or {}).get((name, source.name)) or encoder.pairs(source, rule)
                if embeddings is not None:
                    embeddings[name, source.name] = encoded
                own.add(
                    _retrieval_scores(
                        encoder,
                        source,
                        encoded,
                        protocol,
                        rule,
                        name,
                        fingerprint,
                        ks,
                        intervals,
                        strict_counts,
                        scoring,
                    )
                )
            elif not isinstance(source, LabelledSource):
                own.add(source.measure(encoder, name, fingerprint, intervals))
            else:
                if strict_counts and source.deviation():
                    raise InputError(f"{source.name}: {source.deviation()}")
                own.add(_zero_shot_scores(encoder, source, templates, name, fingerprint, intervals))
        own.notes += encoder.notes(name)
    for own in measured.values():
        result.add(own)
    opened = [source.problems.sentence(source.name) for source in sources]
    result.notes = list(dict.fromkeys([*filter(None, opened), *result.notes]))
    return result


def _has_known_counts(source: Any) -> bool:
    if isinstance(source, LabelledSource):
        return source.known is not None or source.deviation() is not None
    name, split = known_name(source.name)
    return (name, split or "") in KNOWN_PAIRS


def _without_meaning(image: torch.Tensor, text: torch.Tensor, ks: Sequence[int], about: str) -> list[str]:
    """What keeps retrieval scores of these embeddings from meaning anything, in sentences."""
    said = []
    for what, rows in (("images", image), ("captions", text)):
        if len(rows) > 1 and float((rows - rows[:1]).abs().max()) < 1e-6:
            said.append(f"{about}: the embeddings of all {len(rows)} {what} are the same: the scores say nothing")
    for metric, count, what in (("t2i", len(image), "images"), ("i2t", len(text), "captions")):
        if trivial := [k for k in ks if k >= count]:
            names = ", ".join(f"{metric}_R@{k}" for k in trivial)
            said.append(f"{about}: with {count} {what} to find among, {names} is 100 % for any model")
    return said


def _retrieval_scores(
    encoder: Encoder,
    source: PairSource,
    encoded: EncodedPairs,
    protocol_name: str,
    rule: str,
    model: str,
    fingerprint: str,
    ks: Sequence[int],
    intervals: bool,
    strict: bool,
    scoring: Any,
) -> Scores:
    dataset, split = known_name(source.name)
    prompts = None
    if scoring is not None:
        encoded, other, prompts = scoring(encoder, encoded)
        protocol_name = f"{protocol_name}, {other}"
    deviation = check_known_pairs(source.name, len(encoded.keys), len(encoded.captions), rule, strict=strict)
    protocol = Protocol(
        name=protocol_name,
        task="retrieval",
        dataset=dataset,
        split=split,
        images=len(encoded.keys),
        captions=len(encoded.captions),
        captions_per_image=rule,
        positives="one to one" if rule == "first" else "any caption of the image",
        prompts_sha256=prompts,
        transform=describe_transform(encoder.model.image),
        dtype=encoder.dtype,
        keys_sha256=digest([*encoded.keys, *encoded.captions, *encoded.text_to_image.tolist()]),
        model_fingerprint=fingerprint,
        deviation=deviation,
        pictures_sha256=source.images_fingerprint(SAMPLED),
    )
    found = retrieval(
        encoded.image.to(encoder.device),
        encoded.text.to(encoder.device),
        encoded.text_to_image,
        ks=ks,
        per_query=True,
        distributed=encoder.world > 1,
    )
    queries: dict[str, np.ndarray] = found.pop("per_query")
    owner = encoded.text_to_image.numpy()
    clusters = {name: owner for name in queries if name.startswith("t2i")}
    scores = Scores(with_intervals(found, queries, clusters, protocol, model, intervals))
    scores.queries[model, protocol.question()] = Queries(queries, clusters)
    scores.notes += _without_meaning(encoded.image, encoded.text, ks, source.name)
    scores.notes += _left_out(source, encoded.problems)
    if encoded.truncated:
        scores.notes.append(
            f"{source.name}: {encoded.truncated} of {len(encoded.captions)} captions are longer than the"
            f" {encoder.model.context_length} tokens of the {model} and were cut"
        )
    if unknown := unknown_texts(encoder.model.tokenizer, encoded.captions):
        scores.notes.append(
            f"{source.name}: {len(unknown)} captions hold no word that the tokenizer of the {model} knows, so nothing "
            f"can be found by them (first: {unknown[0]!r:.80})"
        )
    if deviation:
        scores.notes.append(f"{dataset}/{split}: {deviation}; not comparable with published numbers")
    return scores


def _zero_shot_scores(
    encoder: Encoder,
    source: LabelledSource,
    prompts: str | Sequence[str] | None,
    model: str,
    fingerprint: str,
    intervals: bool,
) -> Scores:
    from clipdistill.evaluate.zero_shot import zero_shot

    found = zero_shot(encoder, source, prompts)
    protocol = Protocol(
        name="zero-shot",
        task="zero-shot",
        dataset=source.name,
        images=len(found.labels),
        classes=len(found.class_names),
        templates=found.template_name,
        prompts_sha256=digest([*found.template_list, "classes", *found.class_names]),
        transform=describe_transform(encoder.model.image),
        dtype=encoder.dtype,
        keys_sha256=digest([*found.keys, *found.labels.tolist()]),
        model_fingerprint=fingerprint,
        deviation=source.deviation(),
        pictures_sha256=source.images_fingerprint(SAMPLED),
    )
    queries = found.queries()
    scores = Scores(with_intervals(found.scores(), queries, {}, protocol, model, intervals))
    scores.queries[model, protocol.question()] = Queries(queries, {})
    scores.notes += _left_out(source, found.problems)
    if found.indistinct:
        name, other = found.indistinct[0]
        scores.notes.append(
            f"{source.name}: {len(found.indistinct)} of {len(found.class_names)} classes are to the tokenizer of the "
            f"{model} the same as another, so their images cannot be told apart (first: '{name}' and '{other}')"
        )
    if protocol.deviation:
        scores.notes.append(f"{source.name}: {protocol.deviation}; not comparable with published numbers")
    return scores


def _left_out(source: PairSource | LabelledSource, problems: Sequence[tuple[str, str]]) -> list[str]:
    if not problems:
        return []
    few = f"{len(problems)} of {len(source)} images could not be read and were left out"
    return [f"{source.name}: {few} (first: {problems[0][0]}, {problems[0][1]})"]


def with_intervals(
    values: dict[str, Any],
    queries: dict[str, np.ndarray],
    clusters: dict[str, np.ndarray],
    protocol: Protocol,
    model: str,
    intervals: bool,
) -> list[Score]:
    scores = []
    for metric, value in values.items():
        low = high = None
        n = len(queries[metric]) if metric in queries else sum(len(v) for k, v in queries.items() if k.endswith("_MRR"))
        if intervals and metric in queries:
            interval = bootstrap(
                queries[metric],
                clusters.get(metric),
                statistic="median" if metric.endswith("median_rank") else "mean",
                replicates=REPLICATES,
            )
            low, high = interval.low, interval.high
            if not metric.endswith("median_rank"):  # a share, whose gains may add up to more than there is
                low, high = max(low, 0.0), min(high, 1.0)
        scores.append(Score(metric, float(value), n, protocol, low, high, model))
    return scores


def _listed(data: Data | Sequence[Data]) -> list[Data]:
    items: list[Any] = [data]
    if isinstance(data, list | tuple) and not (data and isinstance(data[0], tuple | list | dict)):
        items = list(data)  # but a list of (image, caption) is one set
    if not items:
        raise InputError("no data to evaluate on: name at least one set of pairs or labelled images")
    return items


def opened_all(item: Data, split: str | None, classes: str | Path | None) -> list[Any]:
    """The sets that an item of `data` names: one, the languages of captions in several, the files of SugarCrepe."""
    if not isinstance(item, str | Path):
        return [opened_data(item, split, classes)]
    for kind in OTHER_SETS.names():
        if (found := OTHER_SETS.get(kind)(str(item))) is not None:
            refuse_split(split, str(item))
            return list(found)
    return [opened_data(name, part, classes) for name, part in parts_of(str(item), split)]


def opened_data(item: Any, split: str | None, classes: str | Path | None) -> Any:
    """What `evaluate` takes as data, opened: the test split, else val, where none is named."""
    if isinstance(item, PairSource | LabelledSource) or hasattr(item, "measure"):
        return item
    if not isinstance(item, str | Path | DataConfig):
        from clipdistill.data.objects import as_pairs

        return as_pairs(item)
    if isinstance(item, str | Path) and is_labelled_name(str(item)):
        return open_labelled(item, classes=classes, split=split)
    config = item if isinstance(item, DataConfig) else DataConfig(path=str(item))
    try:
        return open_pairs(config, split=split, default_split="test")
    except InputError:
        # the set may have no test split; if that was not it, the same error comes again
        return open_pairs(config, split=split, default_split="val")


def loaded_model(model: str | Path | nn.Module | ClipModel, device: str | torch.device | None) -> ClipModel:
    """What `evaluate` takes as a model, loaded, ready to embed."""
    loaded = as_model(model, device)
    if not isinstance(model, str | Path):
        require_usable(loaded)
    return loaded
