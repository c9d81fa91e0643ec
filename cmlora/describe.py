"""What is in a LoRA file, in words and numbers a person can use; nothing is applied."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmlora import container, forms, peft_config
from cmlora.listing import natural
from cmlora.lora import TEXT_ENCODERS
from cmlora.source import Source, open_file

PathLike = str | os.PathLike[str]

_MUSUBI_MODULE = re.compile(
    r"\.lora_(flux_2|framepack|hidream_o1|hv_1_5|ideogram4|kandinsky|krea2|qwen_image|wan|zimage)$"
)
"""Network modules that sd-scripts has not; both have ``networks.lora`` and some others."""
_MUSUBI_MODEL = re.compile(
    r"(hunyuan_video|wan|framepack|flux_kontext|flux_2|qwen_image|kandinsky5|z_image"
    r"|hidream_o1|ideogram4|krea2)(_|$)"
)
"""What musubi calls the models it trains for; sd-scripts has other names for its own."""


def describe(path: PathLike) -> dict[str, Any]:
    """Everything worth knowing about a LoRA file, as JSON types; never applies it.

    Keys: file, bytes, name, naming (of the keys), trainer, family, base, category, triggers, tags
    (the ten most frequent captions' tags with counts), forms (titles of the parametrisations),
    modules (count per component), text_encoder, rank and alpha (smallest and largest), blocks
    (modules, rank and alpha of each part of the models), dtypes, leftover (what strict reading
    refuses, reason by key), use (what loading does with the file), sha256, autov2, autov3.

    Raises:
        CmloraError: if the file cannot be read at all, or holds no LoRA in any form.
    """
    source = open_file(path)
    if not source.layout.modules and not source.layout.forms:
        source.settle(strict=False)
    head, digest = source.header, source.sha256 or container.sha256(path)
    lora = source.lora
    rows = _rows(source)
    ranks = [row["rank"] for row in rows if row["rank"]]
    alphas = [row["alpha"] for row in rows if row["alpha"] is not None]
    components: dict[str, int] = {}
    for row in rows:
        components[row["component"]] = components.get(row["component"], 0) + row["modules"]
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "name": lora.name,
        "naming": source.layout.naming,
        "trainer": trainer(head.metadata, list(head.shapes)),
        "family": source.remainder.family,
        "base": lora.metadata.get("cmlora.base") or lora.metadata.get("ss_sd_model_name"),
        "category": lora.category,
        "triggers": list(lora.triggers),
        "tags": _tags(head.metadata),
        "forms": list(source.layout.forms),
        "modules": dict(sorted(components.items())),
        "text_encoder": any(component in TEXT_ENCODERS for component in components),
        "rank": [min(ranks), max(ranks)] if ranks else None,
        "alpha": [min(alphas), max(alphas)] if alphas else None,
        "blocks": _blocks(rows),
        "dtypes": sorted({row["dtype"] for row in rows}),
        "leftover": dict(sorted(source.layout.leftover.items())),
        "use": _use(source),
        "sha256": digest,
        "autov2": digest[:10],
        "autov3": container.sha256(path, head.start)[:12],
    }


def trainer(metadata: Mapping[str, str], keys: list[str]) -> str:
    """Who wrote a file, by its header, otherwise by the way its keys are built."""
    for key, name in (
        ("cmlora.name", "cmlora"),
        ("ot_config", "OneTrainer"),
        ("ot_branch", "OneTrainer"),
    ):
        if key in metadata:
            return name
    if "ss_network_module" in metadata:
        module = metadata["ss_network_module"]
        version = metadata.get("ss_base_model_version", "")
        told = "musubi" in metadata.get("ss_training_comment", "")
        if told or _MUSUBI_MODULE.search(module) or _MUSUBI_MODEL.match(version):
            return f"musubi ({module})"
        return f"kohya ({module})"
    software = metadata.get("software", "")
    if "ai-toolkit" in software:
        return "ai-toolkit"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    text = "\n".join(keys)
    for pattern, name in (
        (r"\.processor\.(qkv|proj)_lora\d?\.", "XLabs"),
        (r"(query|key)_norm\.scale$", "Black Forest Labs"),
        (r"^lora_transformer_|^bundle_emb\.", "OneTrainer"),
        (r"^lycoris_", "LyCORIS"),
        (r"\.(hada_|lokr_|oft_blocks|on_input|w_norm)", "LyCORIS"),
        (r"^lora_unet_|^lora_te\d?_", "kohya"),
        (r"^diffusion_model\.", "ComfyUI names, as ai-toolkit and others write them"),
        (r"\.lora_[AB]\.", "diffusers or PEFT"),
    ):
        if re.search(pattern, text, re.MULTILINE):
            return name
    return "unknown"


def _rows(source: Source) -> list[dict[str, Any]]:
    """One row per layer of the file: where it is, its rank, alpha and precision."""
    rows = []
    updates = source.lora.updates
    for name, roles in source.layout.modules.items():
        shapes = {role: source.header.shapes[key] for role, key in roles.items()}
        first = source.layout.targets[name].modules[0]
        rank, alpha = forms.rank(shapes), None
        if first in updates:
            update = updates[first]
            # A share of a fused layer may have dropped unused ranks, so the file's rank is said.
            alpha = peft_config.alpha(update.scale, rank or update.rank)
        elif rank and name in source.alphas:
            alpha = source.alphas[name]
        component, _, rest = first.partition(".")
        rows.append(
            {
                "component": component,
                "block": _block(component, rest),
                "modules": len(source.layout.targets[name].modules),
                "rank": rank,
                "alpha": alpha,
                "dtype": source.dtypes[name],
            }
        )
    return rows


def _block(component: str, module: str) -> str:
    """The block a layer is in: the name up to its last number but one, or what comes first."""
    match = re.match(r"([a-z_]+?blocks?\.\d+(\.attentions\.\d+|\.resnets\.\d+)?)", module)
    if match is None:
        match = re.match(r"(text_model\.encoder\.layers\.\d+|layers\.\d+|mid_block)", module)
    if match is None:
        match = re.match(r"(encoder\.block\.\d+)", module)
    return f"{component}.{match[1] if match else module.split('.')[0]}"


def _blocks(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Modules, ranks and alphas by block."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        block = found.setdefault(row["block"], {"modules": 0, "rank": set(), "alpha": set()})
        block["modules"] += row["modules"]
        for key in ("rank", "alpha"):
            if row[key] is not None:
                block[key].add(row[key])
    return {
        name: {key: sorted(v) if isinstance(v, set) else v for key, v in block.items()}
        for name, block in sorted(found.items(), key=lambda item: natural(item[0]))
    }


def _use(source: Source) -> dict[str, Any]:
    """What `cmlora.files.load` makes of the layers: exact updates, or worked out with the model."""
    counts = {"low_rank": 0, "whole": 0, "with_model": 0}
    dependent = {target.name: change for target, change in source.remainder.changes}
    for name in source.layout.modules:
        change = dependent.get(name)
        if change is None:
            counts["low_rank"] += 1
        elif change.base:
            counts["with_model"] += 1
        else:
            counts["whole"] += 1
    words = {
        "low_rank": "loaded as exact low-rank updates",
        "whole": "loaded as exact whole updates",
        "with_model": "worked out with the model's weights, exactly at strength 1",
    }
    said = [f"{counts[key]} {text}" for key, text in words.items() if counts[key]]
    if source.layout.leftover:
        said.append(f"{len(source.layout.leftover)} keys refused")
    return {**counts, "refused": len(source.layout.leftover), "words": "; ".join(said)}


def _tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """The most frequent tags of the training captions, from kohya's header; empty if damaged."""
    counts: dict[str, int] = {}
    try:
        for folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            for tag, count in folder.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:10])
