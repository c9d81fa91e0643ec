"""What `cmlora compress` does with a whole denoiser: measure, shrink, train, write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlora.cli.console import err, quiet_libraries, status
from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from torch import nn

SPREADS = ("welore", "budget", "knapsack")


@dataclass(frozen=True)
class Training:
    """Steps of learning around a compression.

    Args:
        prune: towards low rank, before.
        heal: of the smaller model towards the original.
        nest: of the factors' order.
        lasso: what empties the last factors while they are sorted; emptied ones are dropped.
        excess: what holds the largest change of an entry down while the model is healed.
        cut: share of the rank that is left in the end.
    """

    prune: int = 0
    heal: int = 0
    nest: int = 0
    lasso: float = 0.0
    excess: float = 0.0
    cut: float = 1.0

    @property
    def any(self) -> bool:
        """Whether there is anything to learn."""
        return bool(self.prune or self.heal or self.nest)


def denoiser(
    folder: Path,
    target: Path,
    method: str,
    keep: float,
    *,
    prompts: Sequence[str],
    calib: Path | None,
    spread: str,
    training: Training,
) -> dict[str, Any]:
    """Make the denoiser of a diffusers folder smaller, and write it."""
    import copy

    import torch

    from cmlora.adapters.calibration import BASE, grams, load
    from cmlora.adapters.compression import COMPRESSIONS, RULES
    from cmlora.adapters.compression.heal import Call, blocks, heal
    from cmlora.adapters.compression.maestro import cut, drop, nest
    from cmlora.adapters.compression.model import compress, model_bytes, save
    from cmlora.adapters.compression.trp import steer
    from cmlora.adapters.finite import check_finite
    from cmlora.pipelines.models import open_pipeline
    from cmlora.pipelines.questions import away, questions
    from cmlora.pipelines.whole import stored_dtype

    shrinking = COMPRESSIONS[method].object
    if spread not in ("", *SPREADS):
        raise CmloraError(f"--spread {spread}: expected {', '.join(SPREADS)}")
    if min(training.prune, training.heal, training.nest) < 0:
        raise CmloraError("--prune, --heal and --nest count steps, 0 or more")
    if training.any and not prompts:
        raise CmloraError("learning needs something to draw: give a --prompt")
    if min(training.lasso, training.excess) < 0:
        raise CmloraError("--lasso and --excess are weights in a loss, 0 or more")
    if training.lasso and not training.nest:
        raise CmloraError("--lasso is for --nest")
    if training.excess and not training.heal:
        raise CmloraError("--excess is for --heal")
    if not 0 < training.cut <= 1:
        raise CmloraError(f"--cut {training.cut:g}: a share of the rank is above 0 and up to 1")
    if calib is not None and prompts and not training.any:
        raise CmloraError("--calib holds what --prompt would measure; give one of them")
    rule: Any = spread if spread == "knapsack" else RULES[spread].object if spread else None
    known = None if calib is None else load(calib)
    quiet_libraries()
    with status("loading"):
        pipe = open_pipeline(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    component = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    model = getattr(pipe, component)
    dtype = stored_dtype(folder, component)
    check_finite(model.state_dict(), folder / component)
    asked: list[Call] = []
    checked: list[Call] = []
    if prompts:
        with status("asking the model"):
            asked, checked = (questions(pipe, prompts, seed=seed) for seed in (0, 1))
    original = copy.deepcopy(model)
    answers: dict[str, float] = {}

    def check(stage: str) -> None:
        if checked:
            answers[stage] = away(model, original, checked)

    if training.prune:
        with status("pruning"):
            steer(model, original, asked, training.prune)
        check("pruned")
    with status("measuring inputs"):
        moments = {} if known is None else known.grams(BASE, component)
        if prompts and known is None:
            moments = grams(model, lambda: [call(model) for call in asked])
    with status("compressing"):
        done = compress(model, shrinking, keep, moments, rule=rule, dtype=dtype)
        check("compressed")
    if training.nest:
        with status("sorting factors"):
            nest(model, original, asked, training.nest, group=training.lasso)
            if training.lasso:
                drop(model)
        check("nested")
    if training.cut < 1:
        cut(model, training.cut)
        check("cut")
    if training.heal:
        with status("healing"):
            seen, limit = blocks(model), training.excess
            heal(model, original, asked, training.heal, features=seen, excess=limit)
        check("healed")
    if dtype != torch.float32:
        model.to(dtype)
        check_finite(model.state_dict(), f"the result in {str(dtype).removeprefix('torch.')}")
    save(model, target)
    before, sizes = model_bytes(original.to(dtype)), _sizes(model, dtype.itemsize)
    err.print(f"use it with cmlora.adapters.compression.model.load(denoiser, {str(target)!r})")
    return {
        "file": str(target),
        "method": method,
        "error": None,
        "answers": answers,
        "bytes_before": before,
        "bytes_after": model_bytes(model),
        "kept": list(done.kept),
        "modules": {
            name: {"before": sizes[name][0], "after": sizes[name][1], "error": saved.error}
            for name, saved in done.layers.items()
        },
    }


def _sizes(model: "nn.Module", each: int) -> dict[str, tuple[int, int]]:
    """By compact layer the bytes of its matrix as a whole, and those it takes now."""
    from cmlora.adapters.compression.form import nbytes
    from cmlora.adapters.compression.layers import CompactConv2d, CompactLinear, matrix_of

    return {
        name: (matrix_of(layer).numel() * each, nbytes(layer.form()))
        for name, layer in model.named_modules()
        if isinstance(layer, CompactLinear | CompactConv2d)
    }
