"""What other libraries raise becomes one line; what this package raises by mistake stays loud."""

from __future__ import annotations

import pytest
import torch

from ppcl_fx.errors import PpclError, foreign
from ppcl_fx.io.fingerprint import tensor_digest
from ppcl_fx.tracing import trace
from tests import models


def test_what_a_library_raises_is_one_line() -> None:
    for raised in (RuntimeError("one\ntwo"), KeyError("gone"), Exception("a library's"), AssertionError()):
        with (
            pytest.raises(PpclError, match="^file: cannot be read [(].*[)]; mend it$") as caught,
            foreign("file: cannot be read", "mend it"),
        ):
            raise raised
        assert "\n" not in str(caught.value) and caught.value.__cause__ is raised


def test_our_own_faults_and_refusals_pass() -> None:
    with pytest.raises(AttributeError), foreign("file: cannot be read", "mend it"):
        tensor_digest("no tensor")  # type: ignore[arg-type]
    with pytest.raises(PpclError, match="^as it is$"), foreign("file", "mend it"):
        raise PpclError("as it is")
    with pytest.raises(KeyboardInterrupt), foreign("file", "mend it"):
        raise KeyboardInterrupt
    with foreign("file", "mend it"):
        torch.ones(1)


def test_what_a_model_asks_of_a_proxy_is_the_models_fault() -> None:
    model, kwargs = models.tiny_qwen(blocks=2)
    kwargs = {**kwargs, "attention_kwargs": torch.ones(2)}
    with pytest.raises(PpclError, match="does not take this call .*'Tensor' object has no attribute 'copy'"):
        trace(model, kwargs)
