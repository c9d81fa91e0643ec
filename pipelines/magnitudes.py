"""The table that MagCache needs of a model, measured in one run of its pipeline."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from diffusers.hooks import MagCacheConfig, ModelHook
from torch import nn

from cmlora import denoisers
from cmlora.caching.mag import Mag
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.hooks import stateful_hooks

_NEVER = 2**31  # longer than any run: diffusers prints the table at the end and forgets it


def measure(pipe: Any, call: Callable[[], Any], *, threshold: float = Mag.threshold) -> str:
    """Run a pipeline once, without LoRAs, and write down how its residuals change.

    Args:
        pipe: a diffusers pipeline with a transformer whose blocks diffusers' caches know.
        call: calls the pipeline as it is going to be called, such as
            ``lambda: pipe("a cat", num_inference_steps=30)``; other numbers of steps take the same
            table stretched.
        threshold: of the text.

    Returns:
        the text of a cache, such as ``mag:0.06:1.0,1.21,1.12``. Branches of guidance are averaged;
        several denoisers follow each other as in the run.

    Raises:
        CmloraError: if the cache does not go on this model, or the call did not call it.
    """
    config = MagCacheConfig(calibrate=True, num_inference_steps=_NEVER)
    models = denoisers.find(pipe).values()
    seen: list[dict[str, list[float]]] = [{} for _ in models]
    with ExitStack() as stack:
        stack.enter_context(compose(pipe, [], method="naive", cache=config))
        for model, found in zip(models, seen, strict=True):
            stack.callback(model.register_forward_hook(partial(_note, found)).remove)
        call()
    ratios: list[float] = []
    for found in seen:
        ratios += [sum(step) / len(step) for step in zip(*found.values(), strict=True)]
    if not ratios:
        raise CmloraError(f"the call did not run the denoiser of this {type(pipe).__name__}")
    return Mag(threshold, tuple(ratios)).text


def _note(found: dict[str, list[float]], model: nn.Module, args: Any, output: Any) -> None:
    """Keep the table so far of every branch: pipelines have it forgotten when they end."""
    for hook, _ in stateful_hooks(model, besides=ModelHook()):
        states = getattr(getattr(hook, "state_manager", None), "_state_cache", {})
        for context, state in states.items():
            found[context] = list(state.calibration_ratios)
