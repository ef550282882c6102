"""Opens whatever a training or a cache can take: pairs, pictures without captions, texts, several of these."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from clipdistill.config import build
from clipdistill.data.mixture.mixed import MixedPairs, SetConfig, open_mixture, require_no_sets
from clipdistill.data.mixture.pictures import open_bare
from clipdistill.data.mixture.texts import open_texts
from clipdistill.data.open import check_training, open_pairs, open_training
from clipdistill.data.pairs import DataConfig, DerivedPairs, PairSource
from clipdistill.errors import InputError
from clipdistill.registry import TERMS

MISSING = {"text": "captions", "image": "pictures"}


def open_sets(config: DataConfig) -> PairSource:
    """The sets of `config`, each opened as training data. Raises InputError as `open_training`."""
    return open_mixture(config, open_training)


def open_without_pairs(config: DataConfig, error: InputError) -> PairSource:
    """The pictures, or the texts, of what holds no pairs. Raises `error`, which said so, for what holds neither, or
    looks like a slip."""
    found = open_bare(config)
    if found is None and "did you mean" in str(error):
        raise error
    if found is None and config.caption_column == DataConfig.model_fields["caption_column"].default:
        with contextlib.suppress(InputError):
            found = open_pairs(config.model_copy(update={"caption_column": None}), default_split="train")
    found = open_texts(config) if found is None else found
    if found is None:
        raise error
    found.lacks = str(error)
    return found


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


def check_sets(config: DataConfig) -> None:
    """Raise InputError when nothing is known by the name of one of the sets; only what must be looked at is opened."""
    for number, values in enumerate(config.sets):
        each = build(SetConfig, values, f"data.sets[{number}]")
        require_no_sets(each, number)
        check_training(each)
