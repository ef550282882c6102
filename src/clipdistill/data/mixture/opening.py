"""Opens whatever a training or a cache can take: pairs, pictures without captions, texts, several of these."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from clipdistill.config import build
from clipdistill.data.mixture.mixed import MixedPairs, SetConfig, open_mixture, require_no_sets
from clipdistill.data.mixture.pictures import open_bare
from clipdistill.data.mixture.texts import open_texts
from clipdistill.data.open import check_data_name, open_pairs
from clipdistill.data.pairs import DataConfig, DerivedPairs, PairSource
from clipdistill.errors import InputError
from clipdistill.registry import TERMS

MISSING = {"text": "captions", "image": "pictures"}


def open_any(config: DataConfig) -> PairSource:
    """The set that `config` names, its training split where it has several. Raises InputError as `open_pairs`."""
    if config.sets:
        return open_mixture(config, open_any)
    try:
        return open_pairs(config, default_split="train")
    except InputError as error:
        found = _no_pairs(config, error)
        if found is None:
            raise
        found.lacks = str(error)
        return found


def _no_pairs(config: DataConfig, error: InputError) -> PairSource | None:
    """The pictures, or the texts, of what holds no pairs; None for what holds neither, or looks like a slip."""
    found = open_bare(config)
    if found is None and "did you mean" in str(error):
        return None
    if found is None and config.caption_column == DataConfig.model_fields["caption_column"].default:
        with contextlib.suppress(InputError):
            found = open_pairs(config.model_copy(update={"caption_column": None}), default_split="train")
    return open_texts(config) if found is None else found


def require_terms(terms: Mapping[str, Sequence[str]], source: PairSource) -> None:
    """Raise InputError, with the names of the terms, where no set has all that they read.

    terms: the terms of the mix with the modalities that each reads.
    """
    while isinstance(source, DerivedPairs):
        source = source.source
    sources = source.sets if isinstance(source, MixedPairs) else [source]
    has = [{"image": source.pictured, "text": source.captioned} for source in sources]
    # a bank is of the whole set, so there every set must have what it compares with
    enough = {term: all if TERMS.get(term).bank else any for term in terms}
    unserved = [term for term in terms if not enough[term](all(own[m] for m in terms[term]) for own in has)]
    if not unserved:
        return
    wanted = next(m for term in unserved for m in terms[term] if not all(own[m] for own in has))
    recipe = "images-only" if wanted == "text" else "text-only"
    one = len(unserved) == 1
    name = next(each.name for each, own in zip(sources, has) if not own[wanted]) if len(sources) > 1 else source.name
    why = next((f" ({own.lacks})" for own in sources if own.lacks), "")
    raise InputError(
        f"the term{'' if one else 's'} {', '.join(unserved)} need{'s' if one else ''} {MISSING[wanted]}, and "
        f"{name} has none{why}: take --recipe {recipe}, which does without, or data that have them"
    )


def check_any(config: DataConfig) -> None:
    """Raise InputError when nothing is known by the name of the data; only what must be looked at is opened."""
    if not config.sets and not config.path.strip():
        raise InputError("data: neither a path nor sets are named")
    for number, values in enumerate(config.sets):
        each = build(SetConfig, values, f"data.sets[{number}]")
        require_no_sets(each, number)
        check_any(each)
    try:
        if not config.sets:
            check_data_name(config.path)
    except InputError:
        if open_bare(config) is None:
            raise
