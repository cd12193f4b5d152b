"""The command line, `ppcl-fx`: one file a command, and the work imported inside it, so that `--help` is quick."""

from __future__ import annotations
