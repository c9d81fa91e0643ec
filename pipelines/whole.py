"""Two whole pipelines of one kind: how near they are, and one pipeline for both."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cmlora.adapters.analysis.merging import Barrier, barrier, between, score
from cmlora.adapters.compression.heal import Call
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.models import MergedModels, merge_models
from cmlora.adapters.merging.rebasin import check_states, match, straight_through
from cmlora.adapters.merging.units import units_of
from cmlora.adapters.objective import answer
from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS
from cmlora.pipelines.calibrate import parts

STEPS = 2


@dataclass(frozen=True)
class Way:
    """Two denoisers before or after their units were brought into step.

    Args:
        distance: norm of the difference of the weights over their mean norm.
        score: R, the mean over all matrices; see `cmlora.adapters.analysis.merging.score`.
        barrier: of the straight line between them; losses are mean squared errors over the
            answers of either model to its own questions, relative to those answers.
    """

    distance: float
    score: float
    barrier: Barrier


@dataclass(frozen=True)
class Aligned:
    """What is known of two models of one kind.

    Args:
        before: as they are.
        after: with the second one in the order of the first.
        moved: by block, the share of units that changed places.
    """

    before: Way
    after: Way
    moved: dict[str, float]


def align(
    one: Any,
    other: Any,
    prompts: Sequence[str],
    *,
    steps: int = STEPS,
    points: int = 11,
    follow: int = 0,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Aligned:
    """Match the units of two denoisers, and measure the way between them before and after.

    Args:
        one: a diffusers pipeline; its denoiser's units keep their order.
        other: one of the same kind.
        prompts: that both are asked.
        steps: denoising steps, each of which is a question.
        points: of the way, both ends included.
        follow: steps of the matching that follows the loss of the midpoint; 0 uses weights alone.
        seed: of the noise and of the matching.
        on_step: called after every step of following.

    Raises:
        CmloraError: if the models are of different kinds, or there is no prompt.
    """
    denoiser, twin = _denoiser(one), _denoiser(other)
    first, second = dict(denoiser.state_dict()), dict(twin.state_dict())
    check_states(first, second, _names(one, other, next(n for n in parts(one) if n in DENOISERS)))
    if not prompts:
        raise CmloraError("say what the models are asked: give a prompt")
    questions = []
    for pipe, model in ((one, denoiser), (other, twin)):
        with asked(model) as calls:
            _draw(pipe, prompts, steps, seed)
        with torch.no_grad():
            questions += [(call, answer(model, call)) for call in calls]

    def loss(state: Mapping[str, Tensor]) -> Tensor:
        errors = []
        for call, wanted in questions:
            found = functional_call(denoiser, dict(state), (), dict(_fresh(call)))
            gap = (found[0] if isinstance(found, tuple) else found.sample).float() - wanted
            errors.append(gap.square().mean() / wanted.square().mean().clamp(min=1e-12))
        return torch.stack(errors).mean()

    def way(state: dict[str, Tensor]) -> Way:
        with torch.no_grad():
            hill = barrier(lambda t: float(loss(between(first, state, t))), points)
        return Way(_distance(first, state), _score(first, state), hill)

    units = units_of(denoiser)
    if follow:
        found = straight_through(first, second, units, loss, steps=follow, on_step=on_step)
    else:
        found = match(first, second, units, seed)
    moved = {}
    for own in units:
        order = found.orders[own.name]
        places = torch.cat([order.flat(k) for k in range(len(own.kinds))])
        still = torch.cat([torch.arange(own.count * kind.size) for kind in own.kinds])
        moved[own.name] = float((places != still).double().mean())
    return Aligned(way(second), way(found.state), moved)


def merge_pipelines(
    one: Any,
    other: Any,
    *,
    prompts: Sequence[str] = (),
    steps: int = STEPS,
    separate: float = 0.0,
    budget: float | None = None,
    matching: bool = True,
    ridge: float = 1e-6,
    seed: int = 0,
) -> dict[str, MergedModels]:
    """Every denoiser and text encoder of two pipelines as one; the first pipeline gets them.

    Args:
        one: a diffusers pipeline; changed in place. Its autoencoder and scheduler stay.
        other: one of the same kind.
        prompts: what the least squares are made of; without any, weights are averaged.
        steps: denoising steps per prompt.
        separate: share of the units that either model keeps for itself.
        budget: size of the result over that of one model, in place of the share.
        matching: bring units into step first.
        ridge: for these see `cmlora.adapters.merging.models.merge_models`.
        seed: of the noise and of the matching.

    Raises:
        CmloraError: if the pipelines are of different kinds.
    """
    models, twins = parts(one), parts(other)
    if models.keys() != twins.keys():
        raise CmloraError("these models are of different kinds: they have different parts")
    for name in models:
        states = models[name].state_dict(), twins[name].state_dict()
        check_states(*states, _names(one, other, name))
    gathered: dict[str, list[Call]] = {name: [] for name in models}
    for pipe, own in ((one, models), (other, twins)) if prompts else ():
        with ExitStack() as stack:
            watched = {name: stack.enter_context(asked(model)) for name, model in own.items()}
            _draw(pipe, prompts, steps, seed)
        for name, calls in watched.items():
            gathered[name] += [_call(call) for call in calls]
    found = {}
    for name, model in models.items():
        merged = merge_models(
            model,
            twins[name],
            gathered[name],
            separate=separate,
            budget=budget,
            matching=matching,
            ridge=ridge,
            seed=seed,
        )
        found[name] = merged
        setattr(one, name, merged.model)
    return found


def stored_dtype(folder: Path, component: str) -> torch.dtype:
    """The precision in which a diffusers folder keeps a component; single if it cannot be told."""
    from safetensors import safe_open

    for path in sorted((folder / component).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it has no other way to iterate
                dtype: torch.dtype = file.get_tensor(key).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


@contextmanager
def asked(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every call of a model, by name."""
    calls: list[dict[str, Any]] = []
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        call = dict(zip(names, given, strict=False)) | named
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()})

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _call(arguments: dict[str, Any]) -> Call:
    return lambda model: model(**_fresh(arguments))


def _fresh(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, list) else v for name, v in arguments.items()}


def _draw(pipe: Any, prompts: Sequence[str], steps: int, seed: int) -> None:
    for text in prompts:
        with torch.no_grad():
            pipe(
                text,
                num_inference_steps=steps,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
            )


def _names(one: Any, other: Any, part: str) -> tuple[str, str]:
    """What a part of two pipelines is called in an error."""
    given = getattr(one, "name_or_path", None), getattr(other, "name_or_path", None)
    return f"{given[0] or 'the first model'}/{part}", f"{given[1] or 'the second model'}/{part}"


def _denoiser(pipe: Any) -> nn.Module:
    return next(model for name, model in parts(pipe).items() if name in DENOISERS)


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    gap = sum(float((t.double() - other[k].double()).square().sum()) for k, t in one.items())
    sizes = [sum(float(t.double().square().sum()) for t in side.values()) for side in (one, other)]
    return float(gap**0.5 / max((sizes[0] ** 0.5 + sizes[1] ** 0.5) / 2, 1e-300))


def _score(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The mean of R over all matrices; each is written as its own factor."""
    rows = []
    for key, tensor in one.items():
        if tensor.ndim < 2 or min(tensor.flatten(1).shape) < 2:
            continue
        pairs = [_dense(side[key].double().flatten(1)) for side in (one, other)]
        rows.append(score(pairs[0], pairs[1]))
    return sum(rows) / max(len(rows), 1)


def _dense(matrix: Tensor) -> Pair:
    rows, columns = matrix.shape
    if rows <= columns:
        return Pair(torch.eye(rows, dtype=torch.double), matrix)
    return Pair(matrix, torch.eye(columns, dtype=torch.double))
