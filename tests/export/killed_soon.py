"""Importing this exports once: blocks are translated then, and what is forked from here begins at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ppcl_fx.export import ExportConfig, export
from ppcl_fx.model.student_folder import StudentFolder
from tests.export.killed import KNOWN, save_student

with tempfile.TemporaryDirectory() as place:
    opened = StudentFolder.open(save_student(Path(place, "student")))
    export(opened, Path(place, "out"), ExportConfig(keep=(1.0, 0.75), memory_limit=1), known=KNOWN)
