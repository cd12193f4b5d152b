"""Training data from pictures: folders and webdatasets with captions, encoded by the pipeline."""

from __future__ import annotations
