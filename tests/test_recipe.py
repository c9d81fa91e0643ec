"""Recipes: through JSON and PNG and back, and everything that must be refused."""

import json
import string
import struct
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cmlora import recipe as module
from cmlora.errors import CmloraError
from cmlora.recipe import Ingredient, Recipe, image_seed

unhurried = settings(deadline=None)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
tables = st.dictionaries(text, json_values, max_size=3)
ingredients = st.builds(
    Ingredient,
    name=text.filter(bool),
    file=text.map(lambda t: t.replace("/", "").replace("\\", "")),
    sha256=st.just("") | st.text("0123456789abcdef", min_size=64, max_size=64),
    weight=finite,
    role=st.sampled_from([None, "high", "low"]),
    category=st.none() | text,
    frequency=st.none() | finite,
    window=st.none() | st.tuples(finite, finite),
    scope=st.sampled_from([None, "global", "local"]),
    relevance=st.none() | finite,
    importance=st.none() | st.lists(st.tuples(finite, finite), min_size=1, max_size=3).map(tuple),
)
recipes = st.builds(
    Recipe,
    model=text.filter(bool),
    prompt=text,
    seed=st.integers(0, 2**64 - 1),
    steps=st.integers(1, 1000),
    width=st.integers(1, 4096),
    height=st.integers(1, 4096),
    index=st.integers(0, 10**6),
    model_hash=text,
    loras=st.lists(ingredients, max_size=3, unique_by=lambda lora: lora.name),
    method=text.filter(bool),
    options=tables,
    cut=st.none() | st.tuples(st.integers(0, 9), st.integers(-1, 9)),
    text_encoder=st.sampled_from(["all", "none", "per_lora"]),
    schedule=text,
    uncond=st.sampled_from(["per_lora", "shared"]),
    execution=st.sampled_from(["sequential", "batched", "auto", "fused"]),
    threads=st.integers(0, 256),
    negative_prompt=text,
    guidance_scale=finite,
    scheduler=text,
    scheduler_config=tables,
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    versions=st.dictionaries(text, text, max_size=2),
)


@pytest.fixture
def simple() -> Recipe:
    return Recipe(
        model="/models/base.safetensors",
        prompt="a cat, sofa",
        negative_prompt="blurry",
        seed=5,
        steps=30,
        width=512,
        height=768,
        model_hash="0123456789abcdef",
        loras=(
            Ingredient("ink", "ink style.safetensors", "b" * 64, 0.5, "low", "style"),
            Ingredient("alice", "alice.safetensors", "a" * 64),
        ),
        method="composite",
        cache="uniform:3",
        scheduler="DPMSolverMultistepScheduler",
        scheduler_config={"use_karras_sigmas": True},
        versions={"cmlora": "0.1.0"},
    )


@unhurried
@given(recipes)
def test_json_round_trip(recipe: Recipe) -> None:
    written = recipe.to_json()
    assert written.isascii()
    assert "\n" not in written
    again = Recipe.from_json(written)
    assert again == recipe
    assert again.to_json() == written
    assert (again.digest(), hash(again)) == (recipe.digest(), hash(recipe))


@unhurried
@given(recipes)
def test_png_round_trip(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("png") / "x.png"
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    module.save_png(image, path, recipe)
    assert module.from_png(path) == recipe
    with Image.open(path) as read:
        assert read.convert("RGB").tobytes() == image.tobytes()
        assert read.info["parameters"] == module.infotext(recipe)


def test_the_digest_is_the_same_on_every_machine(simple: Recipe) -> None:
    minimal = Recipe(model="m", prompt="p", seed=1, steps=2, width=3, height=4)
    assert minimal.digest() == "5513cd23f618ec20152482055612a83241d7348fb31079a3df4fae45ccd6cbf8"
    assert replace(simple, loras=simple.loras[::-1]).digest() == simple.digest()


@pytest.mark.parametrize("name", [f for f in asdict(Recipe("m", "p", 1, 2, 3, 4))])
def test_every_field_is_in_the_digest(name: str, simple: Recipe) -> None:
    others = {
        int: 7,
        str: "other",
        float: 1.25,
        tuple: (Ingredient("other"),),
        dict: {"other": "1"},
        type(None): (1, 1),
    }
    other: Any = others[type(getattr(simple, name))]
    other = {
        "text_encoder": "none",
        "dtype": "float16",
        "uncond": "shared",
        "execution": "batched",
        "order": ("ink", "alice"),
    }.get(name, other)
    assert replace(simple, **{name: other}).digest() != simple.digest()


def test_numbers_that_are_equal_are_written_alike() -> None:
    one = Recipe("m", "p", 1, 2, 3, 4, guidance_scale=4)
    assert one.digest() == Recipe("m", "p", 1, 2, 3, 4, guidance_scale=4.0).digest()
    zero = Recipe("m", "p", 1, 2, 3, 4, guidance_scale=-0.0)
    assert zero.digest() == replace(zero, guidance_scale=0).digest()


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", -1, "not between 0"),
        ("seed", 2**64, "not between 0"),
        ("seed", True, "not a whole number"),
        ("seed", 1.0, "not a whole number"),
        ("steps", 0, "not between 1"),
        ("width", "512", "not a whole number"),
        ("prompt", None, "not a text"),
        ("prompt", "\ud800", "half a character"),
        ("model", "", "not a non-empty text"),
        ("guidance_scale", float("nan"), "not a finite number"),
        ("guidance_scale", 10**400, "not a finite number"),
        ("guidance_scale", "7", "not a number"),
        ("dtype", "float8", "not one of float32"),
        ("text_encoder", "some", "not one of all"),
        ("options", [1], "not a table"),
        ("options", {1: 2}, "cannot be stored as JSON"),
        ("options", {"a": float("inf")}, "cannot be stored as JSON"),
        ("options", {"a": object()}, "cannot be stored as JSON"),
        ("versions", {"torch": 2}, "versions.torch"),
        ("cut", (1,), "not (layer, block)"),
        ("cut", (1, -2), "cut is -2"),
        ("cut", (-1, 0), "cut is -1"),
        ("loras", "alice", "not a sequence of Ingredient"),
        ("loras", ("alice",), "not an Ingredient"),
        ("loras", (Ingredient("a"), Ingredient("a")), "two LoRAs are called 'a'"),
        ("order", ("ink",), "its LoRAs are alice, ink"),
        ("order", ("ink", "ink"), "its LoRAs are alice, ink"),
        ("order", (1, 2), "its LoRAs are alice, ink"),
        ("order", "ink", "its LoRAs are alice, ink"),
        ("order", None, "its LoRAs are alice, ink"),
    ],
)
def test_wrong_values_are_named(simple: Recipe, name: str, value: Any, words: str) -> None:
    with pytest.raises(CmloraError) as caught:
        replace(simple, **{name: value})
    assert name.partition(".")[0].removesuffix("s") in str(caught.value).lower()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""),
        ("file", "/home/me/a.safetensors"),
        ("file", "..\\a.safetensors"),
        ("sha256", "abc"),
        ("sha256", "G" * 64),
        ("weight", None),
        ("weight", float("inf")),
        ("role", "middle"),
        ("category", 3),
        ("frequency", "high"),
        ("window", 0.5),
        ("window", (0.0, float("nan"))),
    ],
)
def test_wrong_values_of_a_lora_are_named(name: str, value: Any) -> None:
    with pytest.raises(CmloraError, match=f"LoRA .* of the recipe: {name} is"):
        replace(Ingredient("a"), **{name: value})


def changed(recipe: Recipe, **changes: Any) -> str:
    return json.dumps({**json.loads(recipe.to_json()), **changes})


def test_json_of_another_kind_is_refused(simple: Recipe) -> None:
    for wrong in (
        "",
        "nonsense",
        "[]",
        "3",
        "{}",
        '{"prompt": "x"}',
        "[" * 10**5,
        '{"cmlora": NaN}',
    ):
        with pytest.raises(CmloraError, match=r"not a recipe|cmlora is"):
            Recipe.from_json(wrong)
    with pytest.raises(CmloraError, match=r"unknown key 'promt'; did you mean prompt\?"):
        Recipe.from_json(changed(simple, promt="x"))
    with pytest.raises(CmloraError, match="unknown key 'strength'"):
        Recipe.from_json(changed(simple, loras=[{"name": "a", "strength": 1}]))
    with pytest.raises(CmloraError, match=r"format 2 .* reads up to 1; upgrade cmlora"):
        Recipe.from_json(changed(simple, cmlora=2, something="new"))
    with pytest.raises(CmloraError, match="loras is not a list of tables"):
        Recipe.from_json(changed(simple, loras=["a"]))
    with pytest.raises(CmloraError, match="seed is missing"):
        Recipe.from_json('{"cmlora": 1, "model": "m", "prompt": "p"}')
    with pytest.raises(CmloraError, match="name is missing"):
        Recipe.from_json(changed(simple, loras=[{}]))


@unhurried
@given(
    st.dictionaries(st.sampled_from([*asdict(Recipe("m", "p", 1, 2, 3, 4)), "cmlora"]), json_values)
)
def test_any_json_is_a_recipe_or_an_error_of_the_user(table: dict[str, Any]) -> None:
    base = json.loads(Recipe("m", "p", 1, 2, 3, 4).to_json())
    try:
        recipe = Recipe.from_json(json.dumps(base | table))
    except CmloraError:
        return
    assert Recipe.from_json(recipe.to_json()) == recipe


# ------------------------------------------------------------------ PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def test_a_png_without_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 3")
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    with pytest.raises(CmloraError, match=r"x\.png holds no recipe"):
        module.from_png(path)


def test_other_files_are_refused(tmp_path: Path, simple: Recipe) -> None:
    with pytest.raises(CmloraError, match="cannot read"):
        module.from_png(tmp_path / "missing.png")
    with pytest.raises(CmloraError, match="cannot read"):
        module.from_png(tmp_path)
    path = tmp_path / "x.png"
    path.write_bytes(b"GIF89a")
    with pytest.raises(CmloraError, match="is no PNG, WebP or JPEG"):
        module.from_png(path)
    with pytest.raises(CmloraError, match=r"should end in \.png"):
        module.save_png(Image.new("RGB", (4, 4)), tmp_path / "x.jpg", simple)


def test_no_pixel_is_decoded(tmp_path: Path, simple: Recipe) -> None:
    # A picture of 2**31 by 2**31 pixels, and a text that would unpack to a gigabyte.
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 16, 6, 0, 0, 0))
    bomb = zlib.compress(b"0" * 2**20)
    bombs = chunk(b"zTXt", b"cmlora\0\0" + bomb) + chunk(b"iTXt", b"cmlora\0\1\0\0\0" + bomb)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(size, bombs))
    with pytest.raises(CmloraError, match="holds no recipe"):
        module.from_png(path)
    path.write_bytes(png(size, bombs, chunk(b"tEXt", b"cmlora\0" + simple.to_json().encode())))
    assert module.from_png(path) == simple


def test_international_text_is_read_too(tmp_path: Path, simple: Recipe) -> None:
    path = tmp_path / "x.png"
    data = b"cmlora\0\0\0en\0cmlora\0" + simple.to_json().encode()
    path.write_bytes(png(chunk(b"iTXt", data)))
    assert module.from_png(path) == simple


def test_endless_or_huge_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(chunk(b"tEXt", b"cmlora\0" + b" " * 2**21)))
    with pytest.raises(CmloraError, match="holds no recipe"):
        module.from_png(path)
    path.write_bytes(png(*[chunk(b"tEXt", b"")] * 100_001))
    with pytest.raises(CmloraError, match="more than 100000 chunks"):
        module.from_png(path)


@unhurried
@given(st.data())
def test_a_damaged_png_is_never_another_recipe(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    recipe = Recipe("m", "p", 1, 2, 3, 4)
    path = tmp_path_factory.mktemp("png") / "x.png"
    module.save_png(Image.new("RGB", (4, 4)), path, recipe)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        assert module.from_png(path) == recipe
    except CmloraError as error:
        assert "x.png" in str(error)  # noqa: PT017


def test_infotext_is_what_web_uis_write(simple: Recipe) -> None:
    assert module.infotext(simple).split("\n") == [
        "a cat, sofa <lora:alice:1> <lora:ink style:0.5>",
        "Negative prompt: blurry",
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 5, "
        "Size: 512x768, Model hash: 0123456789, Model: base.safetensors, "
        'Lora hashes: "alice: aaaaaaaaaa, ink style: bbbbbbbbbb", '
        'LoRA method: composite, LoRA cache: "uniform:3", Version: cmlora 0.1.0',
    ]


def test_infotext_names_cannot_break_the_line(simple: Recipe) -> None:
    wild = replace(simple, model="a, b: <c>\n", loras=(Ingredient("x,y:z>", "", "c" * 64),))
    last = module.infotext(wild).split("\n")[-1]
    assert "Model: a_ b_ _c__" in last
    assert 'Lora hashes: "x_y_z_: cccccccccc"' in last


# ------------------------------------------------------------------ seeds


@given(st.integers(0, 2**64 - 1))
def test_the_first_picture_has_the_seed_itself(seed: int) -> None:
    assert image_seed(seed, 0) == seed


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6)), unique=True, max_size=50))
def test_other_pictures_have_seeds_of_their_own(pairs: list[tuple[int, int]]) -> None:
    seeds = [image_seed(seed, index) for seed, index in pairs]
    assert len(set(seeds)) == len(pairs)
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_seeds_are_the_same_on_every_machine(simple: Recipe) -> None:
    assert image_seed(42, 3) == int.from_bytes(_sha256("42:3")[:6], "big")
    assert replace(simple, index=3).image_seed() == image_seed(5, 3)
    assert f"Seed: {image_seed(5, 3)}" in module.infotext(replace(simple, index=3))


def _sha256(text: str) -> bytes:
    import hashlib

    return hashlib.sha256(text.encode()).digest()


def test_versions_are_of_the_installed_libraries() -> None:
    import torch

    versions = module.current_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(set(v) <= set(string.printable) for v in versions.values())
