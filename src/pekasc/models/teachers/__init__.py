"""Teachers: models that embed expression, as training targets of adapters."""

from __future__ import annotations

from pekasc.models.teachers._pca import PcaTeacher
from pekasc.models.teachers._registry import TEACHERS, Source, check_files
from pekasc.models.teachers._scfoundation import MAX_TOKENS
from pekasc.models.teachers._stored import StoredTeacher, check_finite, precomputed
from pekasc.models.teachers._teacher import Teacher, TeacherModel, resolve_teacher

__all__ = [
    "MAX_TOKENS",
    "PcaTeacher",
    "Source",
    "StoredTeacher",
    "TEACHERS",
    "Teacher",
    "TeacherModel",
    "check_files",
    "check_finite",
    "precomputed",
    "resolve_teacher",
]
