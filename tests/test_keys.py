"""Key names: translated module by module, checked against the models' own structure."""

from typing import Any

import pytest

from cmlora import keys
from tests import tiny, trainers


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return getattr(tiny, request.param)(**tiny.WHOLE)


def test_every_module_survives_kohyas_flattening(pipe: Any) -> None:
    lora = trainers.lora(pipe)
    found = keys.layout(trainers.kohya(lora))
    assert not found.leftover
    assert set(found.modules) == set(lora.updates)
    assert found.naming == "kohya"


def test_every_module_is_found_under_its_ldm_name(pipe: Any) -> None:
    lora = trainers.lora(pipe)
    rename = trainers.ldm_names(pipe.unet)
    assert {m for m in lora.parts["unet"] if m not in rename} == set()
    found = keys.layout(trainers.kohya(lora, rename))
    assert not found.leftover
    assert set(found.modules) == set(lora.updates)


def test_dotted_ldm_names_are_the_same_modules(pipe: Any) -> None:
    lora = trainers.lora(pipe, wanted=lambda m: m.startswith("unet."))
    rename = trainers.ldm_names(pipe.unet)
    dotted = [
        f"diffusion_model.{rename[module]}.lora_{side}.weight"
        for module in lora.parts["unet"]
        for side in "AB"
    ]
    assert set(keys.layout(dotted).modules) == set(lora.updates)


def test_ldm_numbers_follow_the_layers_per_block() -> None:
    pipe = tiny.sd15(layers_per_block=1)
    lora = trainers.lora(pipe)
    written = trainers.kohya(lora, trainers.ldm_names(pipe.unet))
    assert set(keys.layout(written, layers_per_block=1).modules) == set(lora.updates)
    assert set(keys.layout(written, layers_per_block=2).modules) != set(lora.updates)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("unet.a.b.lora_A.weight", "unet.a.b"),
        ("unet.a.b.lora_A.default.weight", "unet.a.b"),
        ("base_model.model.down_blocks.0.x.lora_A.weight", "unet.down_blocks.0.x"),
        ("up_blocks.1.attn1.processor.to_out_lora.down.weight", "unet.up_blocks.1.attn1.to_out.0"),
        ("unet.x.attn1.to_out.0.lora.down.weight", "unet.x.attn1.to_out.0"),
        ("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight", "text_encoder.text_model.encoder"),
        ("text_encoder_3.encoder.block.0.q.lora_A.weight", "text_encoder_3.encoder.block.0.q"),
        ("transformer.blocks.0.to_q.lora_A.weight", "transformer.blocks.0.to_q"),
        ("lora_unet_double_blocks_3_txt_attn_proj.lora_down.weight", "transformer.transformer_bl"),
        (
            "lycoris_transformer_blocks_0_attn_to_q.lora_down.weight",
            "transformer.transformer_blocks",
        ),
        ("diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight", "transformer.transformer"),
        (
            "text_encoders.clip_l.transformer.text_model.x.lora_A.weight",
            "text_encoder.text_model.x",
        ),
        ("lora_te2_text_projection.lora_down.weight", "text_encoder_2.text_projection"),
    ],
)
def test_variants_of_names(key: str, module: str) -> None:
    part = keys.part(key)
    assert part is not None
    assert part.role == "down"
    assert part.module.startswith(module)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_surprise.lora_down.weight",
        "lora_unet_mid_block_surprise.lora_down.weight",
        "lora_unet_mid_block.lora_sideways.weight",
        "something.lora_A.weight",
        "lora_unet_",
        ".lora_A.weight",
        "",
    ],
)
def test_names_that_are_not_understood(key: str) -> None:
    assert keys.part(key) is None
    assert keys.layout([key]).leftover


def test_half_a_module_is_left_over() -> None:
    found = keys.layout(["unet.x.lora_A.weight", "unet.y.lora_A.weight", "unet.y.lora_B.weight"])
    assert set(found.modules) == {"unet.y"}
    assert found.leftover == {"unet.x.lora_A.weight": "its module has no up"}


def test_a_module_given_twice_is_left_over() -> None:
    found = keys.layout([f"unet.x.lora_A.{name}.weight" for name in ("one", "two")])
    assert "second down of unet.x" in found.leftover.values()


@pytest.mark.parametrize(
    ("endings", "titles"),
    [
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"], ("LoHa",)),
        (["lokr_w1", "lokr_w2_a", "lokr_w2_b"], ("LoKr",)),
        (["lora_down.weight", "lora_up.weight", "dora_scale"], ("LoRA", "DoRA")),
        (["lora_down.weight", "lora_up.weight", "diff_b"], ("LoRA", "full difference")),
        (["lora_A.weight", "lora_B.weight", "lora_B.bias"], ("LoRA", "LoRA with bias")),
        (["weight", "on_input"], ("(IA)^3",)),
        (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], ("GLoRA",)),
        (["w_norm", "b_norm"], ("norm",)),
        (["oft_blocks", "rescale", "alpha"], ("OFT",)),
    ],
)
def test_every_form_is_told_by_its_keys(endings: list[str], titles: tuple[str, ...]) -> None:
    found = keys.layout([f"lora_unet_conv_in.{ending}" for ending in endings])
    assert set(found.modules) == {"unet.conv_in"}
    assert not found.leftover
    assert found.forms == titles


@pytest.mark.parametrize("ending", ["hada_w1_a", "lokr_w1", "dora_scale", "on_input", "a1.weight"])
def test_half_a_form_is_left_over_whole(ending: str) -> None:
    found = keys.layout([f"lora_unet_conv_in.{ending}", "lora_unet_conv_in.alpha"])
    assert not found.modules
    assert all(reason.startswith("its module has no") for reason in found.leftover.values())
