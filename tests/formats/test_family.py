"""Which family a file is for, and files of one family in a pipeline of another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmlora import denoisers, family, files
from cmlora.dropped import dropped
from cmlora.errors import CmloraError
from tests import families, tiny, trainers

SIDES = ("to_q", "to_k", "to_v", "to_out.0")
BOTH = (*SIDES, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ARCHITECTURE = "modelspec.architecture"


def attention(
    width: int, blocks: Iterable[int], layers: Iterable[str] = BOTH, name: str = "attn"
) -> dict[str, Tensor]:
    """A file for attention layers alone, with diffusers' names."""
    found = {}
    for block in blocks:
        for layer in layers:
            stem = f"transformer.transformer_blocks.{block}.{name}.{layer}"
            found[f"{stem}.lora_A.weight"] = torch.ones(1, width)
            found[f"{stem}.lora_B.weight"] = torch.ones(width, 1)
    return found


def crossed(width: int, blocks: int) -> dict[str, Tensor]:
    """A file for attention to itself and to the text."""
    both = (attention(width, range(blocks), SIDES, name) for name in ("attn1", "attn2"))
    return {key: tensor for each in both for key, tensor in each.items()}


@pytest.mark.parametrize(
    ("stored", "title", "pipeline"),
    [
        (attention(3072, range(60)), "Qwen-Image", "QwenImagePipeline"),
        (attention(3072, range(19)), "FLUX.1", "FluxPipeline"),
        (attention(1536, range(24)), "Stable Diffusion 3", "StableDiffusion3Pipeline"),
        (attention(2432, (3, 7), SIDES), "Stable Diffusion 3", "StableDiffusion3Pipeline"),
        (attention(6144, range(8)), "FLUX.2", "Flux2Pipeline"),
        (crossed(2240, 20), "Sana", "SanaPipeline"),
        (attention(3072, range(5)), family.TRANSFORMER, None),
        (crossed(1152, 28), family.TRANSFORMER, None),
    ],
)
def test_sizes_tell_families_whose_layers_have_the_same_names(
    stored: dict[str, Tensor], title: str, pipeline: str | None, tmp_path: Path
) -> None:
    path = trainers.save(stored, tmp_path / "x.safetensors")
    assert files.describe(path)["family"] == title
    found = dropped(path, title)
    assert found["pipeline"] == pipeline
    assert pipeline is None or (found["loads"], found["dropped"]) == (True, [])


@pytest.mark.parametrize(
    ("architecture", "version", "title"),
    [
        ("Qwen-Image/lora", "qwen_image", "Qwen-Image"),
        ("Qwen-Image-Edit-2511/lora", "", "Qwen-Image"),
        ("flux-1-dev/lora", "flux1", "FLUX.1"),
        ("Flux.1-dev", "", "FLUX.1"),
        ("FluxTransformer2DModel/lora", "", "FLUX.1"),
        ("Flux.2-klein-4b/lora", "", "FLUX.2"),
        ("", "flux2_klein_9b", "FLUX.2"),
        ("chroma/lora", "", "Chroma"),
        ("flux-1-chroma", "", "Chroma"),
        ("stable-diffusion-3-5-large/lora", "sd3.5-large", "Stable Diffusion 3"),
        ("wan2.1/lora", "", "Wan"),
        ("WanTransformer3DModel/lora", "", "Wan"),
        ("Z-Image/lora", "zimage", "Z-Image"),
        ("", "sana_1600m", "Sana"),
        ("", "pixart_sigma", "PixArt"),
        ("lumina-2/lora", "lumina2", "Lumina 2"),
        ("hunyuan-video-1.5", "", "HunyuanVideo 1.5"),
        ("", "ltx2", "LTX-2"),
        ("HiDream-O1-Image/lora", "hidream_o1_image", "HiDream-O1"),
        ("anima-preview/lora", "anima", "Anima"),
        ("Krea-2/lora", "krea2", "Krea 2"),
        ("Ideogram-4/lora", "ideogram4", "Ideogram 4"),
        ("flux-1-krea-dev/lora", "animagine", "FLUX.1"),
        ("flux-1-dev", "qwen_image", family.TRANSFORMER),
        ("sdxl", "", family.TRANSFORMER),
        ("something/lora", "taiwan swan", family.TRANSFORMER),
    ],
)
def test_headers_name_the_family(
    architecture: str, version: str, title: str, tmp_path: Path
) -> None:
    said = {ARCHITECTURE: architecture, "ss_base_model_version": version}
    path = trainers.save(attention(64, range(2)), tmp_path / "x.safetensors", **said)
    assert files.describe(path)["family"] == title


def test_layers_of_one_family_alone_count_for_more_than_a_header(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.img_mlp.net.2"
    stored = {f"{stem}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
    path = trainers.save(stored, tmp_path / "x.safetensors", **{ARCHITECTURE: "flux-1-dev"})
    assert files.describe(path)["family"] == "Qwen-Image"
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    stored = {f"{stem}.lora_{s}.weight": torch.ones(2, 2) for s in ("down", "up")}
    path = trainers.save(stored, tmp_path / "y.safetensors", **{ARCHITECTURE: "chroma/lora"})
    assert files.describe(path)["family"] == "Chroma"


UNREAD = {
    "lora_unet_blocks_0_self_attn_q_proj": "Cosmos or Anima",
    "diffusion_model.blocks.0.cross_attn.output_proj": "Cosmos or Anima",
    "diffusion_model.blocks.3.adaln_modulation_mlp.1": "Cosmos or Anima",
    "lora_unet_double_blocks_0_img_attn_q": "HunyuanImage or HunyuanVideo 1.5",
    "lora_unet_single_blocks_0_linear1_mlp": "HunyuanImage or HunyuanVideo 1.5",
}
"""Original names of families that are read by the names of diffusers only."""


@pytest.mark.parametrize("stem", UNREAD)
def test_original_names_that_are_not_read_name_their_own_family(stem: str, tmp_path: Path) -> None:
    stored = {f"{stem}.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    path = trainers.save(stored, tmp_path / "x.safetensors")
    with pytest.raises(CmloraError, match=f"layers of {UNREAD[stem]} by original names; only"):
        files.describe(path)
    encoder = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    stored |= {f"{encoder}.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    found = files.describe(trainers.save(stored, tmp_path / "y.safetensors"))
    assert found["family"] == UNREAD[stem]
    assert set(found["leftover"]) == {key for key in stored if key.startswith(stem)}
    said = {ARCHITECTURE: "anima-preview" if "Anima" in UNREAD[stem] else "hunyuan-image-2.1/lora"}
    named = files.describe(trainers.save(stored, tmp_path / "z.safetensors", **said))
    assert named["family"] == ("Anima" if "Anima" in UNREAD[stem] else "HunyuanImage")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"ss_network_module": "networks.lora_qwen_image"}, "musubi (networks.lora_qwen_image)"),
        ({"ss_network_module": "networks.lora_zimage"}, "musubi (networks.lora_zimage)"),
        ({"ss_network_module": "networks.lora_flux_2"}, "musubi (networks.lora_flux_2)"),
        ({"ss_network_module": "networks.lora_framepack"}, "musubi (networks.lora_framepack)"),
        ({"ss_network_module": "networks.lora_hv_1_5"}, "musubi (networks.lora_hv_1_5)"),
        ({"ss_network_module": "networks.lora_kandinsky"}, "musubi (networks.lora_kandinsky)"),
        (
            {"ss_network_module": "networks.lora", "ss_base_model_version": "hunyuan_video"},
            "musubi (networks.lora)",
        ),
        (
            {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux_kontext"},
            "musubi (networks.lora_flux)",
        ),
        (
            {"ss_network_module": "networks.lokr", "ss_base_model_version": "flux_2_klein_4b"},
            "musubi (networks.lokr)",
        ),
        (
            {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"},
            "kohya (networks.lora_flux)",
        ),
        (
            {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"},
            "kohya (networks.lora)",
        ),
        ({"ss_network_module": "networks.lora_lumina"}, "kohya (networks.lora_lumina)"),
        ({"modelspec.implementation": "https://github.com/black-forest-labs/flux"}, "diffusers or"),
        ({"modelspec.implementation": "sgm", "ot_branch": "master"}, "OneTrainer"),
    ],
)
def test_trainers_are_told_from_each_other(said: dict[str, str], name: str, tmp_path: Path) -> None:
    path = trainers.save(attention(8, range(1)), tmp_path / "x.safetensors", **said)
    assert files.describe(path)["trainer"].startswith(name)


def test_plain_diffusers_refuses_what_it_has_no_loader_for(tmp_path: Path) -> None:
    path = trainers.save(crossed(8, 1), tmp_path / "x.safetensors")
    found = dropped(path, "PixArt")
    assert (found["pipeline"], found["loads"]) == ("PixArtSigmaPipeline", False)


def test_pipelines_are_called_by_their_family() -> None:
    for make, title in (
        (families.flux, "FLUX.1"),
        (families.qwen, "Qwen-Image"),
        (families.sana, "Sana"),
        (families.wan, "Wan"),
    ):
        pipe = make().pipe
        assert family.of_pipe(pipe) == title == denoisers.kind(pipe.transformer).family
    assert family.of_pipe(families.sd15().pipe) == "a UNet for text of width 16"
    assert family.of_pipe(SimpleNamespace()) == family.UNKNOWN
    assert family.of_pipe(SimpleNamespace(unet=torch.nn.Linear(1, 1))) == "Linear"
    chroma = type("ChromaTransformer2DModel", (torch.nn.Module,), {})()
    assert family.of_pipe(SimpleNamespace(transformer=chroma)) == "Chroma"
    other = type("NewTransformer2DModel", (torch.nn.Module,), {})()
    assert family.of_pipe(SimpleNamespace(transformer=other)) == "NewTransformer2DModel"


# ------------------------------------------------------------------ into another family's pipeline


def saved(path: Path, **said: str) -> Path:
    """A file that fits the tiny Qwen-Image."""
    return trainers.save(attention(32, range(4)), path, **said)


@pytest.mark.parametrize("said", ["flux-1-dev/lora", "wan2.1"])
def test_a_file_of_another_family_is_refused_although_it_fits(said: str, tmp_path: Path) -> None:
    pipe = families.qwen().pipe
    path = saved(tmp_path / "x.safetensors", **{ARCHITECTURE: said})
    names = [name for name, _ in pipe.transformer.named_modules()]
    with pytest.raises(CmloraError) as caught:
        files.load(pipe, path, "x")
    message = str(caught.value)
    title = "Wan" if said == "wan2.1" else "FLUX.1"
    assert f"{path} is for {title} and the pipeline is Qwen-Image" in message
    assert said in message
    assert "\n" not in message
    assert [name for name, _ in pipe.transformer.named_modules()] == names
    assert not hasattr(pipe.transformer, "peft_config")
    with pytest.warns(UserWarning, match=f"is for {title} and the pipeline is Qwen-Image"):
        assert files.load(pipe, path, "x", strict=False).modules == 32


@pytest.mark.parametrize(
    "said",
    [
        {},
        {ARCHITECTURE: "Qwen-Image-Edit/lora"},
        {ARCHITECTURE: "a model of my own"},
        {ARCHITECTURE: "stable-diffusion-xl-v1-base"},
        {ARCHITECTURE: "flux-1-dev", "ss_base_model_version": "qwen_image"},
        {"ss_sd_model_name": "flux1-dev.safetensors", "cmlora.base": "models/flux"},
    ],
)
def test_weak_or_agreeing_words_refuse_nothing(said: dict[str, str], tmp_path: Path) -> None:
    applied = files.load(families.qwen().pipe, saved(tmp_path / "x.safetensors", **said), "x")
    assert applied.modules == 32


def test_own_layers_overrule_a_wrong_header(tmp_path: Path) -> None:
    stored = attention(32, range(2))
    stem = "transformer.transformer_blocks.0.img_mlp.net.2"
    stored |= {f"{stem}.lora_A.weight": torch.ones(1, 128)}
    stored |= {f"{stem}.lora_B.weight": torch.ones(32, 1)}
    path = trainers.save(stored, tmp_path / "x.safetensors", **{ARCHITECTURE: "flux-1-dev"})
    assert files.load(families.qwen().pipe, path, "x").modules == len(stored) // 2


def wide(width: int) -> Any:
    """A tiny pipeline with the text width of a real family."""
    pipe = families.sd15().pipe
    config = {**pipe.unet.config, "cross_attention_dim": width}
    pipe.unet = type(pipe.unet).from_config(config)
    return pipe


def test_sd1_files_without_text_layers_do_not_go_into_sd2(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    stored = {
        f"{stem}.lora_down.weight": torch.ones(1, 8),
        f"{stem}.lora_up.weight": torch.ones(8, 1),
    }
    said = {"ss_base_model_version": "sd_v1"}
    path = trainers.save(stored, tmp_path / "x.safetensors", **said)
    match = r"is for Stable Diffusion 1\.x and the pipeline is Stable Diffusion 2\.x"
    with pytest.raises(CmloraError, match=match):
        files.load(wide(1024), path, "x")
    files.load(wide(768), path, "x")
    files.load(tiny.sd15(), path, "x")  # of no family that is known
    two = trainers.save(stored, tmp_path / "y.safetensors", ss_base_model_version="sd_v1 or sd_v2")
    files.load(wide(1024), two, "x")


def test_families_that_share_loras() -> None:
    assert family.distinct(["Chroma", "FLUX.1"]) == ["Chroma"]
    assert family.distinct(["FLUX.1", "FLUX.2", "Wan"]) == ["FLUX.1", "FLUX.2", "Wan"]
    assert family.distinct([family.TRANSFORMER, "Stable Diffusion XL"]) != ["Stable Diffusion XL"]
