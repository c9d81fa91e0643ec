"""Original names of the families that have fewer LoRAs; see `cmlora.originals` for the notation.

HiDream needs none: diffusers kept its names.
"""

from __future__ import annotations

CHROMA = """
distilled_guidance_layer.in_proj = distilled_guidance_layer.in_proj
distilled_guidance_layer.out_proj = distilled_guidance_layer.out_proj
distilled_guidance_layer.layers.#.in_layer = distilled_guidance_layer.layers.#.linear_1
distilled_guidance_layer.layers.#.out_layer = distilled_guidance_layer.layers.#.linear_2
distilled_guidance_layer.norms.# = distilled_guidance_layer.norms.#
"""

LUMINA2 = """
cap_embedder.0 = time_caption_embed.caption_embedder.0
cap_embedder.1 = time_caption_embed.caption_embedder.1
t_embedder.mlp.0 = time_caption_embed.timestep_embedder.linear_1
t_embedder.mlp.2 = time_caption_embed.timestep_embedder.linear_2
final_layer.linear = norm_out.linear_2
final_layer.adaLN_modulation.1 = norm_out.linear_1
context_refiner.#.attention_norm1 = context_refiner.#.norm1
""" + "".join(
    f"""
{stack}.#.attention.qkv = {stack}.#.attn.to_q + to_k + to_v
{stack}.#.attention.out = {stack}.#.attn.to_out.0
{stack}.#.attention.q_norm = {stack}.#.attn.norm_q
{stack}.#.attention.k_norm = {stack}.#.attn.norm_k
{stack}.#.attention_norm1 = {stack}.#.norm1.norm
{stack}.#.attention_norm2 = {stack}.#.norm2
{stack}.#.feed_forward.w1 = {stack}.#.feed_forward.linear_1
{stack}.#.feed_forward.w2 = {stack}.#.feed_forward.linear_2
{stack}.#.feed_forward.w3 = {stack}.#.feed_forward.linear_3
{stack}.#.adaLN_modulation.1 = {stack}.#.norm1.linear
"""
    for stack in ("layers", "noise_refiner", "context_refiner")
)

LTX = """
patchify_proj = proj_in
adaln_single.emb.timestep_embedder.linear_1 = time_embed.emb.timestep_embedder.linear_1
adaln_single.emb.timestep_embedder.linear_2 = time_embed.emb.timestep_embedder.linear_2
adaln_single.linear = time_embed.linear
transformer_blocks.#.attn1.q_norm = transformer_blocks.#.attn1.norm_q
transformer_blocks.#.attn1.k_norm = transformer_blocks.#.attn1.norm_k
transformer_blocks.#.attn2.q_norm = transformer_blocks.#.attn2.norm_q
transformer_blocks.#.attn2.k_norm = transformer_blocks.#.attn2.norm_k
"""

AURA_FLOW = """
init_x_linear = pos_embed.proj
cond_seq_linear = context_embedder
t_embedder.mlp.0 = time_step_proj.linear_1
t_embedder.mlp.2 = time_step_proj.linear_2
double_layers.#.mlpX.c_fc1 = joint_transformer_blocks.#.ff.linear_1
double_layers.#.mlpX.c_fc2 = joint_transformer_blocks.#.ff.linear_2
double_layers.#.mlpX.c_proj = joint_transformer_blocks.#.ff.out_projection
double_layers.#.mlpC.c_fc1 = joint_transformer_blocks.#.ff_context.linear_1
double_layers.#.mlpC.c_fc2 = joint_transformer_blocks.#.ff_context.linear_2
double_layers.#.mlpC.c_proj = joint_transformer_blocks.#.ff_context.out_projection
double_layers.#.modX.1 = joint_transformer_blocks.#.norm1.linear
double_layers.#.modC.1 = joint_transformer_blocks.#.norm1_context.linear
double_layers.#.attn.w2q = joint_transformer_blocks.#.attn.to_q
double_layers.#.attn.w2k = joint_transformer_blocks.#.attn.to_k
double_layers.#.attn.w2v = joint_transformer_blocks.#.attn.to_v
double_layers.#.attn.w2o = joint_transformer_blocks.#.attn.to_out.0
double_layers.#.attn.w1q = joint_transformer_blocks.#.attn.add_q_proj
double_layers.#.attn.w1k = joint_transformer_blocks.#.attn.add_k_proj
double_layers.#.attn.w1v = joint_transformer_blocks.#.attn.add_v_proj
double_layers.#.attn.w1o = joint_transformer_blocks.#.attn.to_add_out
single_layers.#.mlp.c_fc1 = single_transformer_blocks.#.ff.linear_1
single_layers.#.mlp.c_fc2 = single_transformer_blocks.#.ff.linear_2
single_layers.#.mlp.c_proj = single_transformer_blocks.#.ff.out_projection
single_layers.#.modCX.1 = single_transformer_blocks.#.norm1.linear
single_layers.#.attn.w1q = single_transformer_blocks.#.attn.to_q
single_layers.#.attn.w1k = single_transformer_blocks.#.attn.to_k
single_layers.#.attn.w1v = single_transformer_blocks.#.attn.to_v
single_layers.#.attn.w1o = single_transformer_blocks.#.attn.to_out.0
final_linear = proj_out
modF.1 = ~norm_out.linear
"""

PIXART = """
x_embedder.proj = pos_embed.proj
ar_embedder.mlp.0 = adaln_single.emb.aspect_ratio_embedder.linear_1
ar_embedder.mlp.2 = adaln_single.emb.aspect_ratio_embedder.linear_2
csize_embedder.mlp.0 = adaln_single.emb.resolution_embedder.linear_1
csize_embedder.mlp.2 = adaln_single.emb.resolution_embedder.linear_2
t_embedder.mlp.0 = adaln_single.emb.timestep_embedder.linear_1
t_embedder.mlp.2 = adaln_single.emb.timestep_embedder.linear_2
t_block.1 = adaln_single.linear
y_embedder.y_proj.fc1 = caption_projection.linear_1
y_embedder.y_proj.fc2 = caption_projection.linear_2
blocks.#.attn.qkv = transformer_blocks.#.attn1.to_q + to_k + to_v
blocks.#.attn.proj = transformer_blocks.#.attn1.to_out.0
blocks.#.cross_attn.q_linear = transformer_blocks.#.attn2.to_q
blocks.#.cross_attn.kv_linear = transformer_blocks.#.attn2.to_k + to_v
blocks.#.cross_attn.proj = transformer_blocks.#.attn2.to_out.0
blocks.#.mlp.fc1 = transformer_blocks.#.ff.net.0.proj
blocks.#.mlp.fc2 = transformer_blocks.#.ff.net.2
final_layer.linear = proj_out
"""
