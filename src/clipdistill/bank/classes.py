"""A teacher with its class vectors, made once by its text tower, or read from a file of `clipdistill embed`."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipdistill.data.loader import Batch
from clipdistill.data.open import open_labelled
from clipdistill.embed.classes import choose_templates, class_weights
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.objective import Embeddings
from clipdistill.runtime.files import digest_of
from clipdistill.vectors.files import SUFFIXES, read_embeddings


class ClassTeacher:
    """`teacher` (train.teacher.Teacher), whose embeddings come with class vectors (C, D) of length 1.

    classes: a classification set, whose names are embedded in the templates that fit it by the teacher's text tower, or
    a file of vectors. Raises InputError for several teachers, and where a cached teacher's model is not at hand.
    """

    def __init__(self, teacher: Any, classes: str) -> None:
        if len(teacher.blocks) > 1:
            raise InputError(f"class vectors are those of one teacher, {teacher.name} are {len(teacher.blocks)}")
        self._teacher = teacher
        if Path(classes).suffix in SUFFIXES:
            rows = torch.from_numpy(read_embeddings(classes)[0]).float()
            self.classes, said = normalize(rows, dim=1), f"read from {classes}"
        else:
            self.classes, said = _embedded(teacher, classes)
        if len(self.classes) < 2:
            raise InputError(f"train.classes={classes}: one class is no choice: name a set with two classes or more")
        self.notes = [*teacher.notes, f"class vectors of {len(self.classes)} classes: {said}"]

    def __getattr__(self, name: str) -> Any:
        if name == "_teacher":
            raise AttributeError(name)
        return getattr(self._teacher, name)

    @cached_property
    def fingerprint(self) -> str:
        return digest_of({"teacher": self._teacher.fingerprint, "classes": self.classes.double().tolist()})

    def __call__(self, batch: Batch) -> Embeddings:
        """The teacher's embeddings of the batch, and the class vectors."""
        found: Embeddings = self._teacher(batch)
        if self.classes.device != found.any.device:
            self.classes = self.classes.to(found.any.device)
        return replace(found, classes=self.classes)


def _embedded(teacher: Any, classes: str) -> tuple[Tensor, str]:
    """(vectors, how they were made) of a classification set's classes."""
    labelled = open_labelled(classes)
    model = teacher.model
    if model is None:
        try:
            model = load_model(teacher.name, teacher=True)
        except InputError as error:
            raise InputError(
                f"train.classes={classes}: the teacher is stored, and its class vectors take its text tower ({error}): "
                "give a file of them, made by  clipdistill embed MODEL --classes SET --out FILE.npy"
            ) from error
    if not hasattr(model.module, "encode_text"):
        raise InputError(f"train.classes={classes}: {model.name} has no text tower to make class vectors with")
    name, lines = choose_templates(labelled.templates)
    encoder = Encoder(model, batch_size=64, device=teacher.device, progress=False)
    vectors = class_weights(encoder, labelled.class_names, lines)
    return vectors, f"{labelled.name}, templates {name}"
