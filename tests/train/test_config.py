"""The config file: complete, read back to the same, later values over earlier ones, nothing misspelt."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ppcl_fx.cli.train import train as command
from ppcl_fx.errors import PpclError
from ppcl_fx.train import config
from ppcl_fx.train.config import TrainConfig, Weights

CHANGED: dict[str, Any] = {
    "stages": ("depth", "finetune"),
    "steps": (5, 2),
    "lr": 1e-05,
    "clip": None,
    "ema": 0.99,
    "warmup": 0,
    "optimizer": "adamw8bit",
    "betas": (0.8, 0.999),
    "autocast": True,
    "log": 'a "quoted" \\ folder\n',
    "weights": {"relative": 0.5, "text": 0.0},
}


@pytest.mark.parametrize("changed", [{}, CHANGED])
def test_what_is_written_is_read_back(changed: dict[str, Any], tmp_path: Path) -> None:
    options = config.resolve(**changed)
    config.save(options, tmp_path / "train.toml")
    assert config.resolve(tmp_path / "train.toml") == options
    found = tomllib.loads((tmp_path / "train.toml").read_text(encoding="utf-8"))
    assert found.keys() == set(TrainConfig.model_fields)
    assert found["weights"].keys() == set(Weights.model_fields)


def test_every_option_has_a_description_and_is_in_the_docs() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "training.md").read_text(encoding="utf-8")
    for model, prefix in ((TrainConfig, ""), (Weights, "weights.")):
        for name, field in model.model_fields.items():
            assert field.description
            if name != "weights":
                assert f"| `{prefix}{name}` |" in page


def test_the_example_in_the_docs_is_valid(tmp_path: Path) -> None:
    page = Path(__file__).parents[2].joinpath("docs", "training.md").read_text(encoding="utf-8")
    example = page.split("```toml\n")[1].split("```")[0]
    (tmp_path / "train.toml").write_text(example, encoding="utf-8")
    assert config.resolve(tmp_path / "train.toml") != TrainConfig()


def test_the_command_line_has_every_option() -> None:
    assert set(TrainConfig.model_fields) | {"config", "resume"} <= set(inspect.signature(command).parameters)


def test_later_values_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("lr = 1e-4\nclip = 'none'\nbatch = 7\n[weights]\nrelative = 1.0\ntext = 0.5\n", encoding="utf-8")
    options = config.resolve(file, lr=2e-4, weights={"text": 0.25})
    assert (options.lr, options.clip, options.batch) == (2e-4, None, 7)
    assert options.weights == Weights(relative=1.0, text=0.25)
    assert config.resolve(options, batch=1).batch == 1
    assert config.resolve(weights=Weights(relative=2.0)).weights == Weights(relative=2.0)
    assert config.resolve(lr="3e-4", ema="none").lr == 3e-4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rate = 1", r"unknown training option 'learning_rate'"),
        ("bacth = 1", r"unknown training option 'bacth' \(did you mean 'batch'\?\)"),
        ("[weights]\nimgae = 1", r"unknown training option 'weights.imgae' \(did you mean 'image'\?\)"),
        ("batch = 0", r"training option batch: input should be greater than 0, not 0"),
        ("lr = 'fast'", r"training option lr: input should be a valid number"),
        ("lr = nan", r"training option lr: "),
        ("sequential = 1", r"training option sequential: input should be a valid boolean"),
        ("optimizer = 'adam'", r"training option optimizer: input should be 'adamw' or 'adamw8bit'"),
        ("stages = ['dept']\nsteps = [1]", r"unknown stage 'dept'"),
        ("stages = 3", r"training option stages: "),
        ("steps = [1, 2]", r"3 stages but 2 numbers of steps"),
        ("batch = ", r"not valid TOML"),
    ],
)
def test_nonsense_in_the_file_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PpclError, match=reason) as caught:
        config.resolve(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PpclError, match=r"none\.toml: no such file"):
        config.resolve(tmp_path / "none.toml")


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(PpclError, match="did you mean 'evaluate_every'"):
        config.resolve(evaluate_evry=3)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"lr": 1e308}, "training option lr: .*less than or equal to 10, not 1e\\+308"),
        ({"steps": [10**20, 1, 1]}, "training option steps.0: .*1000000000"),
        ({"seed": -1}, "training option seed: .*greater than or equal to 0"),
        ({"compile_backend": "abc"}, "compile_backend 'abc' has no use without compile"),
        ({"weights": {"image": 0, "text": 0, "linear": 0}}, "weights: all of them are 0, so there is nothing to learn"),
        ({"log": ""}, "training option log: .*at least 1 character"),
        ({"clip": float("inf")}, "training option clip: .*finite"),
    ],
)
def test_options_out_of_their_range(option: dict[str, Any], reason: str) -> None:
    with pytest.raises(PpclError, match=reason):
        config.resolve(None, **option)
