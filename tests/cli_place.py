"""The program, run in a folder as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppcl_fx.cli.app import main


class Place:
    """A folder with a model, prompts and a plan, and the program run in it."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str] | None = None) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.run, self.calls = folder / "run", folder / "run" / "calls"
        self.plan = folder / "plan.json"
        self.student = folder / "student"
        self.capture = capture

    def ok(self, *arguments: object) -> dict[str, Any]:
        """Run a command that must succeed, and return its JSON."""
        code, out, err = self.call(*arguments)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def refused(self, *arguments: object) -> str:
        """Run a command that must be refused, and return its line."""
        code, out, err = self.call(*arguments)
        assert code == 2, err
        line: str = json.loads(out)["error"]
        assert err.splitlines()[-1] == f"ppcl-fx: {line}"
        assert "Traceback" not in err
        return line

    def call(self, *arguments: object) -> tuple[int, str, str]:
        assert self.capture is not None
        self.capture.readouterr()
        code = main([*map(str, arguments), "--json"])
        return code, *self.capture.readouterr()
