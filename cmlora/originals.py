"""Module names of the original model code, translated into those of diffusers.

A line is ``original = diffusers``; ``#`` is a number. Several diffusers modules joined by ``+``
were one matrix in the original, whose outputs are theirs one after the other; with ``.0``, ``.1``
and so on behind its name it is one of them, as OneTrainer's OMI files have it. ``~`` marks a layer
whose two halves of outputs change places, because diffusers has scale before shift.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from cmlora.originals_others import AURA_FLOW, CHROMA, LTX, LUMINA2, PIXART

_FLUX = """
img_in = x_embedder
img_in.proj = x_embedder
txt_in = context_embedder
time_in.in_layer = time_text_embed.timestep_embedder.linear_1
time_in.out_layer = time_text_embed.timestep_embedder.linear_2
time_in.mlp.0 = time_text_embed.timestep_embedder.linear_1
time_in.mlp.2 = time_text_embed.timestep_embedder.linear_2
vector_in.in_layer = time_text_embed.text_embedder.linear_1
vector_in.out_layer = time_text_embed.text_embedder.linear_2
guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
guidance_in.mlp.0 = time_text_embed.guidance_embedder.linear_1
guidance_in.mlp.2 = time_text_embed.guidance_embedder.linear_2
double_blocks.#.img_mod.lin = transformer_blocks.#.norm1.linear
double_blocks.#.txt_mod.lin = transformer_blocks.#.norm1_context.linear
double_blocks.#.img_mod.linear = transformer_blocks.#.norm1.linear
double_blocks.#.txt_mod.linear = transformer_blocks.#.norm1_context.linear
double_blocks.#.img_attn.qkv = transformer_blocks.#.attn.to_q + to_k + to_v
double_blocks.#.txt_attn.qkv = transformer_blocks.#.attn.add_q_proj + add_k_proj + add_v_proj
double_blocks.#.img_attn_qkv = transformer_blocks.#.attn.to_q + to_k + to_v
double_blocks.#.txt_attn_qkv = transformer_blocks.#.attn.add_q_proj + add_k_proj + add_v_proj
double_blocks.#.processor.qkv_lora1 = transformer_blocks.#.attn.to_q + to_k + to_v
double_blocks.#.processor.qkv_lora2 = \
transformer_blocks.#.attn.add_q_proj + add_k_proj + add_v_proj
double_blocks.#.img_attn.proj = transformer_blocks.#.attn.to_out.0
double_blocks.#.txt_attn.proj = transformer_blocks.#.attn.to_add_out
double_blocks.#.img_attn_proj = transformer_blocks.#.attn.to_out.0
double_blocks.#.txt_attn_proj = transformer_blocks.#.attn.to_add_out
double_blocks.#.processor.proj_lora1 = transformer_blocks.#.attn.to_out.0
double_blocks.#.processor.proj_lora2 = transformer_blocks.#.attn.to_add_out
double_blocks.#.img_attn.norm.query_norm = transformer_blocks.#.attn.norm_q
double_blocks.#.img_attn.norm.key_norm = transformer_blocks.#.attn.norm_k
double_blocks.#.txt_attn.norm.query_norm = transformer_blocks.#.attn.norm_added_q
double_blocks.#.txt_attn.norm.key_norm = transformer_blocks.#.attn.norm_added_k
double_blocks.#.img_attn_q_norm = transformer_blocks.#.attn.norm_q
double_blocks.#.img_attn_k_norm = transformer_blocks.#.attn.norm_k
double_blocks.#.txt_attn_q_norm = transformer_blocks.#.attn.norm_added_q
double_blocks.#.txt_attn_k_norm = transformer_blocks.#.attn.norm_added_k
double_blocks.#.img_mlp.0 = transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.2 = transformer_blocks.#.ff.net.2
double_blocks.#.txt_mlp.0 = transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.2 = transformer_blocks.#.ff_context.net.2
double_blocks.#.img_mlp.fc1 = transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.fc2 = transformer_blocks.#.ff.net.2
double_blocks.#.txt_mlp.fc1 = transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.fc2 = transformer_blocks.#.ff_context.net.2
single_blocks.#.linear1 = single_transformer_blocks.#.attn.to_q + to_k + to_v + ^proj_mlp
single_blocks.#.linear2 = single_transformer_blocks.#.proj_out
single_blocks.#.processor.qkv_lora = single_transformer_blocks.#.attn.to_q + to_k + to_v
single_blocks.#.processor.proj_lora = single_transformer_blocks.#.proj_out
single_blocks.#.modulation.lin = single_transformer_blocks.#.norm.linear
single_blocks.#.modulation.linear = single_transformer_blocks.#.norm.linear
single_blocks.#.norm.query_norm = single_transformer_blocks.#.attn.norm_q
single_blocks.#.norm.key_norm = single_transformer_blocks.#.attn.norm_k
single_blocks.#.q_norm = single_transformer_blocks.#.attn.norm_q
single_blocks.#.k_norm = single_transformer_blocks.#.attn.norm_k
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = ~norm_out.linear
"""

_HUNYUAN = """
img_in.proj = x_embedder.proj
txt_in.input_embedder = context_embedder.proj_in
txt_in.t_embedder.mlp.0 = context_embedder.time_text_embed.timestep_embedder.linear_1
txt_in.t_embedder.mlp.2 = context_embedder.time_text_embed.timestep_embedder.linear_2
txt_in.t_embedder.linear_1 = context_embedder.time_text_embed.timestep_embedder.linear_1
txt_in.t_embedder.linear_2 = context_embedder.time_text_embed.timestep_embedder.linear_2
txt_in.c_embedder.linear_1 = context_embedder.time_text_embed.text_embedder.linear_1
txt_in.c_embedder.linear_2 = context_embedder.time_text_embed.text_embedder.linear_2
txt_in.individual_token_refiner.blocks.#.self_attn_qkv = \
context_embedder.token_refiner.refiner_blocks.#.attn.to_q + to_k + to_v
txt_in.individual_token_refiner.blocks.#.self_attn_proj = \
context_embedder.token_refiner.refiner_blocks.#.attn.to_out.0
txt_in.individual_token_refiner.blocks.#.mlp.fc0 = \
context_embedder.token_refiner.refiner_blocks.#.ff.net.0.proj
txt_in.individual_token_refiner.blocks.#.mlp.fc1 = \
context_embedder.token_refiner.refiner_blocks.#.ff.net.0.proj
txt_in.individual_token_refiner.blocks.#.mlp.fc2 = \
context_embedder.token_refiner.refiner_blocks.#.ff.net.2
txt_in.individual_token_refiner.blocks.#.adaLN_modulation.1 = \
context_embedder.token_refiner.refiner_blocks.#.norm_out.linear
txt_in.individual_token_refiner.blocks.#.norm1 = \
context_embedder.token_refiner.refiner_blocks.#.norm1
txt_in.individual_token_refiner.blocks.#.norm2 = \
context_embedder.token_refiner.refiner_blocks.#.norm2
double_blocks.#.img_mlp.fc0 = transformer_blocks.#.ff.net.0.proj
double_blocks.#.txt_mlp.fc0 = transformer_blocks.#.ff_context.net.0.proj
"""

_FLUX2 = """
time_in.in_layer = time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer = time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer = time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer = time_guidance_embed.guidance_embedder.linear_2
double_stream_modulation_img.lin = double_stream_modulation_img.linear
double_stream_modulation_txt.lin = double_stream_modulation_txt.linear
single_stream_modulation.lin = single_stream_modulation.linear
double_blocks.#.img_mlp.0 = transformer_blocks.#.ff.linear_in
double_blocks.#.img_mlp.2 = transformer_blocks.#.ff.linear_out
double_blocks.#.txt_mlp.0 = transformer_blocks.#.ff_context.linear_in
double_blocks.#.txt_mlp.2 = transformer_blocks.#.ff_context.linear_out
single_blocks.#.linear1 = single_transformer_blocks.#.attn.to_qkv_mlp_proj
single_blocks.#.linear2 = single_transformer_blocks.#.attn.to_out
"""

_SD3 = """
x_embedder.proj = pos_embed.proj
context_embedder = context_embedder
t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
joint_blocks.#.x_block.attn.qkv = transformer_blocks.#.attn.to_q + to_k + to_v
joint_blocks.#.context_block.attn.qkv = \
transformer_blocks.#.attn.add_q_proj + add_k_proj + add_v_proj
joint_blocks.#.x_block.attn2.qkv = transformer_blocks.#.attn2.to_q + to_k + to_v
joint_blocks.#.x_block.attn.proj = transformer_blocks.#.attn.to_out.0
joint_blocks.#.context_block.attn.proj = transformer_blocks.#.attn.to_add_out
joint_blocks.#.x_block.attn2.proj = transformer_blocks.#.attn2.to_out.0
joint_blocks.#.x_block.attn.ln_q = transformer_blocks.#.attn.norm_q
joint_blocks.#.x_block.attn.ln_k = transformer_blocks.#.attn.norm_k
joint_blocks.#.context_block.attn.ln_q = transformer_blocks.#.attn.norm_added_q
joint_blocks.#.context_block.attn.ln_k = transformer_blocks.#.attn.norm_added_k
joint_blocks.#.x_block.attn2.ln_q = transformer_blocks.#.attn2.norm_q
joint_blocks.#.x_block.attn2.ln_k = transformer_blocks.#.attn2.norm_k
joint_blocks.#.x_block.adaLN_modulation.1 = transformer_blocks.#.norm1.linear
joint_blocks.#.context_block.adaLN_modulation.1 = ~transformer_blocks.#.norm1_context.linear
joint_blocks.#.x_block.mlp.fc1 = transformer_blocks.#.ff.net.0.proj
joint_blocks.#.x_block.mlp.fc2 = transformer_blocks.#.ff.net.2
joint_blocks.#.context_block.mlp.fc1 = transformer_blocks.#.ff_context.net.0.proj
joint_blocks.#.context_block.mlp.fc2 = transformer_blocks.#.ff_context.net.2
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = ~norm_out.linear
"""

_WAN = """
text_embedding.0 = condition_embedder.text_embedder.linear_1
text_embedding.2 = condition_embedder.text_embedder.linear_2
time_embedding.0 = condition_embedder.time_embedder.linear_1
time_embedding.2 = condition_embedder.time_embedder.linear_2
time_projection.1 = condition_embedder.time_proj
img_emb.proj.0 = condition_embedder.image_embedder.norm1
img_emb.proj.1 = condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3 = condition_embedder.image_embedder.ff.net.2
img_emb.proj.4 = condition_embedder.image_embedder.norm2
patch_embedding = patch_embedding
head.head = proj_out
blocks.#.self_attn.q = blocks.#.attn1.to_q
blocks.#.self_attn.k = blocks.#.attn1.to_k
blocks.#.self_attn.v = blocks.#.attn1.to_v
blocks.#.self_attn.o = blocks.#.attn1.to_out.0
blocks.#.self_attn.norm_q = blocks.#.attn1.norm_q
blocks.#.self_attn.norm_k = blocks.#.attn1.norm_k
blocks.#.cross_attn.q = blocks.#.attn2.to_q
blocks.#.cross_attn.k = blocks.#.attn2.to_k
blocks.#.cross_attn.v = blocks.#.attn2.to_v
blocks.#.cross_attn.o = blocks.#.attn2.to_out.0
blocks.#.cross_attn.k_img = blocks.#.attn2.add_k_proj
blocks.#.cross_attn.v_img = blocks.#.attn2.add_v_proj
blocks.#.cross_attn.norm_q = blocks.#.attn2.norm_q
blocks.#.cross_attn.norm_k = blocks.#.attn2.norm_k
blocks.#.cross_attn.norm_k_img = blocks.#.attn2.norm_added_k
blocks.#.norm3 = blocks.#.norm2
blocks.#.ffn.0 = blocks.#.ffn.net.0.proj
blocks.#.ffn.2 = blocks.#.ffn.net.2
"""

_Z_IMAGE = """
x_embedder = all_x_embedder.2-1
final_layer.linear = all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
layers.#.attention.qkv = layers.#.attention.to_q + to_k + to_v
layers.#.attention.out = layers.#.attention.to_out.0
layers.#.attention.q_norm = layers.#.attention.norm_q
layers.#.attention.k_norm = layers.#.attention.norm_k
noise_refiner.#.attention.qkv = noise_refiner.#.attention.to_q + to_k + to_v
noise_refiner.#.attention.out = noise_refiner.#.attention.to_out.0
context_refiner.#.attention.qkv = context_refiner.#.attention.to_q + to_k + to_v
context_refiner.#.attention.out = context_refiner.#.attention.to_out.0
"""

TABLES = {
    "aura_flow": AURA_FLOW,
    "chroma": CHROMA + _FLUX,
    "flux": _FLUX,
    "flux2": _FLUX2 + _FLUX,
    "hunyuan": _HUNYUAN + _FLUX,
    "ltx": LTX,
    "lumina2": LUMINA2,
    "pixart": PIXART,
    "sd3": _SD3,
    "wan": _WAN,
    "z_image": _Z_IMAGE,
}
"""Original names by family; most of those of HunyuanVideo and Chroma are those of FLUX."""

UNTRANSLATED = {
    "cosmos": "Cosmos or Anima",
    "hunyuan_split": "HunyuanImage or HunyuanVideo 1.5",
}
"""Families whose original names are known for theirs, but not what diffusers calls them."""

_MARKS = (
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._](q|k|v|output)_proj\.", "cosmos"),
    (r"(^|[._])blocks[._]\d+[._](adaln_modulation_(self|cross|mlp)|mlp[._]layer[12]\.)", "cosmos"),
    (r"double_blocks[._]\d+[._](img|txt)_attn[._][qkv]\.", "hunyuan_split"),
    (r"single_blocks[._]\d+[._]linear1[._](q|k|v|mlp)\.", "hunyuan_split"),
    (r"distilled_guidance_layer[._]", "chroma"),
    (r"(^|[._])(double|single)_layers[._]\d", "aura_flow"),
    (r"patchify_proj|transformer_blocks[._]\d+[._]attn[12][._][qk]_norm", "ltx"),
    (r"(single|double)_stream_modulation", "flux2"),
    (r"individual_token_refiner|_mod[._]linear|[._]modulation[._]linear", "hunyuan"),
    (r"_blocks[._]\d+[._](img|txt)_mlp[._]fc[012]", "hunyuan"),
    (r"\.(img|txt)_attn_(qkv|proj)", "hunyuan"),  # FLUX has a dot before the last word
    (r"(double|single)_blocks[._]\d", "flux"),
    (r"joint_blocks[._]\d", "sd3"),
    (r"(^|[._])blocks[._]\d+[._](attn[._]qkv|cross_attn[._]kv_linear)[._]\d", "pixart"),
    (r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._](norm_)?[qkvo](_img)?\.", "wan"),
    (r"(^|[._])blocks[._]\d+[._]ffn[._]\d", "wan"),
    (r"(^|[._])(layers|(noise|context)_refiner)[._]\d+[._]attention[._]", "z_image"),
)


@dataclass(frozen=True)
class Target:
    """Where a file's module is in diffusers' model.

    Args:
        modules: full names with the component in front; the outputs of the file's module are
            those of these one after the other.
        swapped: the two halves of the outputs change places.
    """

    modules: tuple[str, ...]
    swapped: bool = False

    @property
    def name(self) -> str:
        """The modules in one word."""
        return "+".join(self.modules)


def family(names: list[str]) -> str | None:
    """Whose original names these are, if any."""
    text = "\n".join(names)
    return next((found for mark, found in _MARKS if re.search(mark, text, re.MULTILINE)), None)


_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")


def translate(name: str, table: str) -> tuple[tuple[str, ...], bool] | None:
    """The diffusers modules of an original one, dotted or flattened, and whether halves swap.

    >>> translate("double_blocks_3_txt_attn_proj", "flux")
    (('transformer_blocks.3.attn.to_add_out',), False)
    """
    if table in UNTRANSLATED:
        return None
    lines = _table(table, "." not in name)
    if name in lines:
        return lines[name]
    number = _NUMBER.search(name)
    if number is None:
        return None
    found = lines.get(f"{name[: number.start()]}#{name[number.end() :]}")
    if found is None:
        return None
    return tuple(module.replace("#", number[0]) for module in found[0]), found[1]


def is_original(name: str, table: str) -> bool:
    """Whether a dotted name begins as only original ones do, whether or not the table has it.

    >>> is_original("double_blocks.3.surprise", "flux"), is_original("proj_out", "flux")
    (True, False)
    """
    if table in UNTRANSLATED:
        return True
    return not _heads(_NUMBER.sub("#", name, 1)).isdisjoint(_own_heads(table))


def _heads(name: str) -> set[str]:
    """``a.b.c`` to ``a``, ``a.b`` and ``a.b.c``."""
    parts = name.split(".")
    return {".".join(parts[:size]) for size in range(1, len(parts) + 1)}


@cache
def _own_heads(table: str) -> set[str]:
    """How original names of a table begin and none of diffusers' in it does."""
    lines = _table(table, False)
    theirs = {head for name in lines for head in _heads(name)}
    return theirs - {head for modules, _ in lines.values() for m in modules for head in _heads(m)}


@cache
def _table(name: str, flat: bool) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Lines of a table, the first of equal ones."""
    found: dict[str, tuple[tuple[str, ...], bool]] = {}
    for line in TABLES[name].strip().splitlines():
        original, _, ours = (part.strip() for part in line.partition(" = "))
        first, *others = (part.strip() for part in ours.split("+"))
        swapped, first = first.startswith("~"), first.removeprefix("~")
        parent = first.rpartition(".")[0]
        above = parent.rpartition(".")[0]
        modules = (
            first,
            *(f"{above}.{o[1:]}" if o.startswith("^") else f"{parent}.{o}" for o in others),
        )
        layers = {original: modules}
        if others:
            layers |= {f"{original}.{number}": (each,) for number, each in enumerate(modules)}
        for layer, each in layers.items():
            found.setdefault(layer.replace(".", "_") if flat else layer, (each, swapped))
    return found
