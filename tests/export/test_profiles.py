"""Profiles as a person writes them become ranges of the sizes that a graph leaves open, or one line of why not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ppcl_fx.errors import PpclError
from ppcl_fx.export.store.manifest import Port
from ppcl_fx.export.tensorrt.profiles import (
    Profile,
    Range,
    Roles,
    Spec,
    default_profile,
    parse_range,
    resolve,
    roles,
    shapes_of,
)

# As exported from small FLUX and SD3 models.
TOKENS = [
    Port(name="hidden_states", dtype="float", shape=["batch", "hidden_states_1", 16]),
    Port(name="encoder_hidden_states", dtype="float", shape=["batch", "encoder_hidden_states_1", 24]),
    Port(name="timestep", dtype="float", shape=["batch"]),
    Port(name="img_ids", dtype="float", shape=["hidden_states_1", 3]),
    Port(name="txt_ids", dtype="float", shape=["encoder_hidden_states_1", 3]),
]
TOKENS_OUT = [Port(name="sample", dtype="float", shape=["batch", "hidden_states_1", 16])]
LATENTS = [
    Port(name="hidden_states", dtype="float", shape=["batch", 4, "hidden_states_2", "hidden_states_3"]),
    Port(name="encoder_hidden_states", dtype="float", shape=["batch", "encoder_hidden_states_1", 24]),
]
LATENTS_OUT = [Port(name="sample", dtype="float", shape=["batch", 4, "hidden_states_2", "hidden_states_3"])]
FIXED = [Port(name="hidden_states", dtype="float", shape=[1, 256, 16])]


def sizes(profile: Profile) -> dict[str, tuple[int, int, int]]:
    return {name: (size.min, size.opt, size.max) for name, size in profile.sizes.items()}


def test_roles_follow_from_what_comes_out_again() -> None:
    assert roles(TOKENS, TOKENS_OUT) == Roles("batch", ("hidden_states_1",), ("encoder_hidden_states_1",))
    assert roles(LATENTS, LATENTS_OUT).image == ("hidden_states_2", "hidden_states_3")
    assert roles(FIXED, FIXED) == Roles(None, (), ())


@pytest.mark.parametrize(
    ("text", "expected"), [("4", (4, 4, 4)), ("1-4", (1, 4, 4)), (" 1-2-4 ", (1, 2, 4)), ("7-7", (7, 7, 7))]
)
def test_ranges(text: str, expected: tuple[int, int, int]) -> None:
    found = parse_range("--batch", text)
    assert (found.min, found.opt, found.max) == expected


@pytest.mark.parametrize("text", ["", "-", "1-", "a", "1.5", "1-2-3-4", "-1", "1e3", "٣"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(PpclError, match="not a range"):
        parse_range("--batch", text)


def test_each_resolution_is_a_profile() -> None:
    spec = Spec(shapes="1024x1024,1328x1328", batch="1-4", text="1-512", pixels=16)
    first, second = resolve(spec, TOKENS, TOKENS_OUT, "f")
    assert (first.name, second.name) == ("1024x1024", "1328x1328")
    shared = {"batch": (1, 4, 4), "encoder_hidden_states_1": (1, 512, 512)}
    assert sizes(first) == {**shared, "hidden_states_1": (4096, 4096, 4096)}
    assert sizes(second) == {**shared, "hidden_states_1": (6889, 6889, 6889)}
    assert shapes_of(TOKENS[3], second)["opt"] == (6889, 3)


def test_a_range_of_resolutions_is_one_profile() -> None:
    spec = Spec(shapes="512x512-1024x768-1024x1024", batch="2", text="8", pixels=16)
    (one,) = resolve(spec, TOKENS, TOKENS_OUT, "f")
    assert sizes(one)["hidden_states_1"] == (1024, 3072, 4096)


def test_latents_have_a_height_and_a_width() -> None:
    spec = Spec(shapes="1024x512", batch="2", text="8", pixels=8)
    (one,) = resolve(spec, LATENTS, LATENTS_OUT, "f")
    assert sizes(one)["hidden_states_2"] == (64, 64, 64)
    assert sizes(one)["hidden_states_3"] == (128, 128, 128)
    named = Spec(sizes={"hidden_states_2": "64", "hidden_states_3": "64-128"}, batch="2", text="8")
    (one,) = resolve(named, LATENTS, LATENTS_OUT, "f")
    assert one.name == "" and sizes(one)["hidden_states_3"] == (64, 128, 128)


def test_tokens_say_what_pixels_cannot() -> None:
    profiles = resolve(Spec(tokens="4096,1024-6889", batch="1", text="77"), TOKENS, TOKENS_OUT, "f")
    assert [sizes(profile)["hidden_states_1"] for profile in profiles] == [(4096, 4096, 4096), (1024, 6889, 6889)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec(shapes="1024x1024"), "how many pixels make a token is not known; give --pixels-per-token 16.*--tokens"),
        (Spec(shapes="1024x1024", tokens="5", pixels=16), "give one of them"),
        (Spec(shapes="1000x1024", pixels=16), "1000 pixels is not a multiple of 16"),
        (Spec(shapes="0x1024", pixels=16), "0 pixels is not a multiple"),
        (Spec(shapes="1024", pixels=16), "not WIDTHxHEIGHT"),
        (Spec(shapes="1024x1024,", pixels=16), "not WIDTHxHEIGHT"),
        (Spec(shapes="1024x1024-512x512", pixels=16), "not in order"),
        (Spec(tokens="0-5"), "a size of 0"),
        (Spec(tokens="5"), "no range for the batch; give --batch"),
        (Spec(tokens="5", batch="1"), "'encoder_hidden_states_1'; give --text 1-512"),
        (Spec(batch="1", text="5"), "the picture .*; give --shapes 1024x1024 or --tokens 4096"),
        (Spec(tokens="5", batch="1", text="600", limits={"encoder_hidden_states_1": 512}), "up to 600 .* at most 512"),
        (Spec(sizes={"hidden_state_1": "5"}), "no open size 'hidden_state_1' .did you mean 'hidden_states_1'"),
    ],
)
def test_what_cannot_be_served_is_refused(spec: Spec, words: str) -> None:
    with pytest.raises(PpclError, match=words) as caught:
        resolve(spec, TOKENS, TOKENS_OUT, "f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec(batch="2"), "the batch is fixed in the file; leave --batch out"),
        (Spec(text="5"), "the size of the text is fixed in the file"),
        (Spec(tokens="5"), "the size of the picture is fixed in the file; leave --tokens out"),
        (Spec(sizes={"x": "5"}), "no open size 'x'; open are none, and every other size is fixed"),
    ],
)
def test_what_is_fixed_is_refused(spec: Spec, words: str) -> None:
    with pytest.raises(PpclError, match=words):
        resolve(spec, FIXED, FIXED, "f")


def test_a_graph_without_open_sizes_has_one_empty_profile() -> None:
    assert resolve(Spec(), FIXED, FIXED, "f") == [Profile()]


def test_latents_refuse_tokens() -> None:
    with pytest.raises(PpclError, match="takes latents with the sizes hidden_states_2, hidden_states_3, not tokens"):
        resolve(Spec(tokens="5"), LATENTS, LATENTS_OUT, "f")


def test_profile_ranges_are_ordered() -> None:
    with pytest.raises(ValidationError, match="min <= opt <= max"):
        Range(min=4, opt=2, max=8)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Range(min=0, opt=2, max=8)


def test_a_profile_around_an_example() -> None:
    profile = default_profile(TOKENS[:1], {"batch": 2, "hidden_states_1": 64, "unused": 5})
    assert sizes(profile) == {"batch": (1, 2, 4), "hidden_states_1": (1, 64, 256)}
    assert shapes_of(TOKENS[0], profile) == {"min": (1, 1, 16), "opt": (2, 64, 16), "max": (4, 256, 16)}


def test_profile_without_a_size_is_refused_by_name() -> None:
    wrong = Profile(sizes={"bathc": Range(min=1, opt=1, max=1), "hidden_states_1": Range(min=1, opt=1, max=1)})
    with pytest.raises(
        PpclError, match=r"no range for the size 'batch' of the input 'hidden_states' \(did you mean 'bathc'\?\)"
    ):
        shapes_of(TOKENS[0], wrong)
