"""Class vectors in a file: a row a class under its name, by which pictures are classified without a text tower."""

from __future__ import annotations

import time
from pathlib import Path

from clipdistill.data.open import open_labelled
from clipdistill.embed.classes import choose_templates, class_weights
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.runtime.files import json_text, new_file, require_place, with_checksum
from clipdistill.vectors.files import require_room, write_embeddings
from clipdistill.vectors.job import EmbedReport


def classes_to_file(encoder: Encoder, classes: str, templates: str | None, out: Path) -> EmbedReport:
    """Write the vectors of the classes of a classification set; OUT.json says of which model, set and templates.

    templates: a set's name or a file; None: what fits the set. Raises InputError for unusable names and templates.
    """
    began, description = time.perf_counter(), out.with_name(f"{out.name}.json")
    if out.exists() and not description.is_file():
        raise InputError(f"{out}: is there already, and not from clipdistill embed: choose another place")
    require_room(out)
    require_place(description, "embeddings", (b'"identity"',))
    labelled = open_labelled(classes)
    name, lines = choose_templates(labelled.templates if templates is None else templates)
    rows = class_weights(encoder, labelled.class_names, lines).numpy()
    model = encoder.model
    identity = {"what": "classes", "model": model.fingerprint(), "templates": list(lines)}
    details = {"identity": identity, "model": model.name, "data": labelled.name, "templates": name}
    with new_file(description) as temporary:  # on the disk before the vectors take their name
        temporary.write_text(
            json_text(with_checksum({**details, "rows": len(rows), "width": rows.shape[1]})), encoding="utf-8"
        )
        write_embeddings(out, len(rows), rows.shape[1], [(rows, [{"key": label} for label in labelled.class_names])])
    return EmbedReport(out, len(rows), rows.shape[1], seconds=time.perf_counter() - began)
