"""Feature cache for UNets: the shallow branch runs live, the deep part is reused.

The mechanism of DeepCache (arXiv:2312.00858), as hooks on the blocks of an unmodified model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook

from cmlora.caching.store import Store
from cmlora.errors import CmloraError
from cmlora.hooks import Attachment, forget_children

if TYPE_CHECKING:
    from torch import nn

HOOK = "cmlora_cache"
"""Name of the hooks in the blocks' registries."""

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclass(frozen=True, order=True)
class Cut:
    """Where a UNet is cut into a shallow branch, which always runs, and a deep part.

    With L levels and n_l ResNet (and attention) pairs in ``down_blocks[l]``, a light pass runs

    - the time embedding and ``conv_in``;
    - ``down_blocks[0 .. layer - 1]`` whole, and of ``down_blocks[layer]`` the pairs 0 .. block;
    - the last ``block + 2`` of the n + 1 pairs of ``up_blocks[L - 1 - layer]`` (they consume the
      skips of those pairs and of the block's input), its upsampler, all later up blocks, and
      ``conv_out``.

    Everything between is skipped. The cached feature is the hidden state that enters the first
    live pair of the up block. In Stable Diffusion 1.5, ``Cut(0, 1)`` keeps the whole outermost
    level: the feature is what enters ``up_blocks[3]``.

    Args:
        layer: the level of the cut, 0 is the outermost one.
        block: the last pair of that level that a light pass runs; -1 is none, the shallowest.
    """

    layer: int = 0
    block: int = 1


def cuts(unet: nn.Module) -> list[Cut]:
    """Every possible cut of a UNet, from the shallowest light pass to the deepest.

    Raises:
        CmloraError: if the model is no UNet of ResNet and attention pairs.
    """
    depths = _depths(unet)
    possible = [Cut(layer, block) for layer, n in enumerate(depths) for block in range(-1, n)]
    if _mid(unet) is None:  # at the bottom, after its last pair, only the mid block is left to skip
        possible.pop()
    return possible


def default_cut(unet: nn.Module) -> Cut:
    """The cut that keeps the outermost level with attention live.

    A LoRA acts live only where a light pass runs, and most LoRAs adapt attention alone: level 0
    in Stable Diffusion 1.5, level 1 in SDXL.
    """
    depths = _depths(unet)
    blocks: Any = unet.down_blocks
    attends = [layer for layer, block in enumerate(blocks) if hasattr(block, "attentions")]
    layer = attends[0] if attends else 0
    return Cut(layer, depths[layer] - 1)


class UNetCache:
    """Records the feature at a cut in full passes and replays it in light ones.

    Args:
        unet: a `UNet2DConditionModel`, or anything with its blocks.
        cut: where; ``None`` is `default_cut`.
        store: where features are kept.

    Raises:
        CmloraError: if the UNet cannot be cut there; lists the possible cuts.
    """

    def __init__(self, unet: nn.Module, cut: Cut | None = None, store: Store | None = None) -> None:
        possible = cuts(unet)
        self.cut = default_cut(unet) if cut is None else cut
        if self.cut not in possible:
            names = ", ".join(f"({c.layer}, {c.block})" for c in possible)
            raise CmloraError(
                f"cannot cut this {type(unet).__name__} at layer {self.cut.layer}, "
                f"block {self.cut.block}; possible (layer, block): {names}"
            )
        self.store = Store() if store is None else store
        self._unet = unet
        self._attached = ExitStack()
        self._pass: _Pass | None = None

    def attach(self) -> None:
        """Put the hooks on the blocks. Nothing changes outside of `run`."""
        boundary, skipped = _parts(self._unet, self.cut)
        with ExitStack() as stack:
            stack.callback(forget_children, self._unet)
            for module in skipped:
                stack.callback(Attachment(module, _Skip(self), HOOK).remove)
            stack.callback(Attachment(boundary, _Boundary(self), HOOK).remove)
            forget_children(self._unet)
            self._attached = stack.pop_all()

    def detach(self) -> None:
        """Take the hooks off and free all slots; the UNet is as before `attach`."""
        self._attached.close()
        self.store.clear()

    def holds(self, key: Hashable) -> bool:
        """Whether a pass with this slot can be light."""
        return key in self.store

    @contextmanager
    def run(self, *keys: Hashable, reuse: bool, record: bool = True, at: int = 0) -> Iterator[bool]:
        """A context for one forward of the UNet.

        Args:
            keys: the slot; or the slots of the passes that run as one batch, in its order.
            reuse: make a light pass if all the slots hold a feature.
            record: keep the features of a full pass in the slots.
            at: the step, for a store that extrapolates.

        Yields:
            whether the pass is light.
        """
        light = reuse and all(self.holds(key) for key in keys)
        self._pass = _Pass(keys, light, record, at) if light or record else None
        try:
            yield light
        finally:
            self._pass = None

    def discard(self, key: Hashable) -> None:
        """Free a slot."""
        self.store.discard(key)

    def clear(self) -> None:
        """Free all slots."""
        self.store.clear()

    @property
    def current(self) -> _Pass | None:
        """The pass under way, if the hooks have anything to do in it."""
        return self._pass


@dataclass(frozen=True)
class _Pass:
    """The pass under way."""

    keys: tuple[Hashable, ...]
    light: bool
    record: bool
    at: int


class _Boundary(ModelHook):  # type: ignore[misc]
    """On the module whose output is the cached feature."""

    def __init__(self, cache: UNetCache) -> None:
        super().__init__()
        self._cache = cache

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replay the feature, or compute and record it."""
        current = self._cache.current
        if current is not None and current.light:
            # FreeU writes into what it gets
            feature = self._cache.store.recall(current.keys, current.at)
            return (feature,) if _answers_in_a_tuple(module) else feature
        output = self.fn_ref.original_forward(*args, **kwargs)
        if current is not None and current.record:
            feature = output[0] if isinstance(output, tuple) else output
            self._cache.store.record(current.keys, feature, current.at)
        return output


class _Skip(ModelHook):  # type: ignore[misc]
    """On a module that a light pass leaves out."""

    def __init__(self, cache: UNetCache) -> None:
        super().__init__()
        self._cache = cache

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Hand on one channel in place of the output: nobody reads it before the boundary."""
        current = self._cache.current
        if current is None or not current.light:
            return self.fn_ref.original_forward(*args, **kwargs)
        hidden: torch.Tensor = (args[0] if args else kwargs["hidden_states"])[:, :1]
        if _answers_in_a_tuple(module):
            return (hidden,)
        if type(module).__name__ in _DOWN:
            blocks: Any = module
            return hidden, (hidden,) * (len(blocks.resnets) + len(blocks.downsamplers or ()))
        return hidden


def _answers_in_a_tuple(module: nn.Module) -> bool:
    """Attention is called with ``return_dict=False``, everything else answers with a tensor."""
    return type(module).__name__ in ("Transformer2DModel", "DualTransformer2DModel")


def _mid(unet: Any) -> nn.Module | None:
    """The mid block; some UNets have none."""
    mid: nn.Module | None = getattr(unet, "mid_block", None)
    return mid


def _depths(unet: Any) -> list[int]:
    """The number of pairs of every level, after checking that it is a UNet this works for."""
    downs = list(getattr(unet, "down_blocks", ()))
    ups = list(getattr(unet, "up_blocks", ()))
    odd = [type(b).__name__ for b in downs if type(b).__name__ not in _DOWN]
    odd += [type(b).__name__ for b in ups if type(b).__name__ not in _UP]
    if odd or not downs or len(downs) != len(ups):
        found = f"it has {', '.join(sorted(set(odd)))}" if odd else "it has no such blocks"
        raise CmloraError(
            f"{type(unet).__name__} cannot be cached: expected a UNet of {', '.join(_DOWN + _UP)}, "
            f"{found}; use cache='none'"
        )
    depths = [len(block.resnets) for block in downs]
    if [depth + 1 for depth in depths] != [len(block.resnets) for block in reversed(ups)]:
        raise CmloraError(
            f"{type(unet).__name__} cannot be cached: its up blocks do not mirror its down blocks; "
            "use cache='none'"
        )
    return depths


def _parts(unet: Any, cut: Cut) -> tuple[nn.Module, list[nn.Module]]:
    """The module whose output is the cached feature, and the modules a light pass skips."""
    down = unet.down_blocks[cut.layer]
    position = len(unet.up_blocks) - 1 - cut.layer
    up = unet.up_blocks[position]
    skipped: list[nn.Module] = []
    for pair in _pairs(down)[cut.block + 1 :]:
        skipped += pair
    skipped += down.downsamplers or ()
    skipped += unet.down_blocks[cut.layer + 1 :]
    if _mid(unet) is not None:
        skipped.append(unet.mid_block)
    skipped += unet.up_blocks[:position]
    for pair in _pairs(up)[: len(down.resnets) - 1 - cut.block]:
        skipped += pair
    return skipped.pop(), skipped


def _pairs(block: Any) -> list[list[nn.Module]]:
    """ResNets, each with its attention if the block has attention."""
    attentions = getattr(block, "attentions", None)
    if attentions is None:
        return [[resnet] for resnet in block.resnets]
    return [list(pair) for pair in zip(block.resnets, attentions, strict=True)]
