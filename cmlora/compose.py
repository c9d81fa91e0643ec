"""`compose`: several LoRAs in one picture, with a pipeline that stays as it is."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from torch import nn

from cmlora.caching.policy import parse
from cmlora.caching.unet import Cut, UNetCache
from cmlora.engine import HOOK, CompositionHook, Report
from cmlora.errors import CmloraError
from cmlora.hooks import Attachment, forget_children, hook_of
from cmlora.plan import Member, Policy, Role, Strategy
from cmlora.strategies import METHODS, check_options
from cmlora.switching import AdapterSwitch
from cmlora.tracker import StepTracker

if TYPE_CHECKING:
    from cmlora.frequency.profile import Profile

TextEncoder = Literal["all", "none"]

_DENOISERS = ("unet", "transformer")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_BASE = "naive"  # the method that uses no LoRA


class Composition:
    """LoRAs composed in a pipeline, until `remove` or the end of the ``with`` block.

    Made by `compose`.
    """

    def __init__(self, hook: CompositionHook, attached: ExitStack) -> None:
        self._hook = hook
        self._attached = attached

    @property
    def report(self) -> Report:
        """Of the last run: passes, full and light, and seconds."""
        return self._hook.report

    def remove(self) -> None:
        """Put the pipeline back, bit for bit. A second call does nothing."""
        self._attached.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def compose(
    pipe: Any,
    loras: Sequence[str] | Mapping[str, float],
    *,
    method: str | Strategy = "cmlora",
    cache: str | Policy = "none",
    cut: Cut | tuple[int, int] | None = None,
    roles: Mapping[str, Role] | None = None,
    profiles: Mapping[str, Profile] | None = None,
    members: Sequence[Member] | None = None,
    text_encoder: TextEncoder = "all",
    **options: Any,
) -> Composition:
    """Compose LoRAs that are loaded in a diffusers pipeline.

    It takes effect at once. Use the result in a ``with`` statement: when the block ends, in
    whatever way, hooks, adapter state and outputs of the pipeline are those from before::

        with compose(pipe, {"alice": 1.0, "ink": 0.8}, cache="nonuniform") as composition:
            image = pipe("alice, ink drawing").images[0]
            print(composition.report)

    The pipeline keeps its call, its scheduler and its guidance. Call this after
    ``enable_model_cpu_offload``, ``enable_group_offload``, ``enable_cache`` and the like.

    Args:
        pipe: any diffusers pipeline with a ``unet`` or a ``transformer``.
        loras: adapter names, or adapter names with strengths. A strength multiplies what the
            LoRA's file says; without one it is 1.
        method: name of a composition method (`cmlora.METHODS`), or a strategy of your own.
        cache: when features are reused: "none", "uniform:3", "nonuniform", or a policy.
        cut: what stays live when features are reused; ``None`` is the outermost level with
            attention.
        roles: "high" or "low" frequency for LoRAs where you know better than the measurement.
        profiles: measured profiles of LoRAs.
        members: full descriptions of the same LoRAs, instead of strengths, roles and profiles.
        text_encoder: which LoRAs act while prompts are encoded: all of them, or none.
        options: options of the method.

    Raises:
        CmloraError: if something asked for does not exist or makes no sense; the message says
            what is there.
    """
    name, denoiser = _denoiser(pipe)
    if hook_of(denoiser, HOOK) is not None:
        raise CmloraError(
            f"LoRAs are already composed in this pipeline's {name}; "
            "leave the first composition before beginning another"
        )
    if text_encoder not in get_args(TextEncoder):
        raise CmloraError(f"text_encoder={text_encoder!r}: expected 'all' or 'none'")
    label, strategy, chosen = _strategy(method, options)
    policy = parse(cache)
    encoders = [getattr(pipe, n, None) for n in _TEXT_ENCODERS]
    switch = AdapterSwitch(denoiser)
    text_switches = [AdapterSwitch(e) for e in encoders if isinstance(e, nn.Module)]
    described = _members(loras, members, roles or {}, profiles or {})
    _check_loaded(described, [switch, *text_switches], needed=label != _BASE)
    weights = {member.name: member.weight for member in described}
    spoken = weights if text_encoder == "all" and label != _BASE else {}
    features = _cache(denoiser, name, policy, cut)

    def prepare() -> None:
        # pipelines scale the encoders' LoRAs up and down again, which costs bits in every run
        for text_switch in text_switches:
            text_switch.activate(spoken)

    tracker = StepTracker(pipe)
    hook = CompositionHook(
        strategy,
        described,
        policy,
        switch=switch,
        tracker=tracker,
        method=label,
        options=chosen,
        cache=features,
        prepare=prepare,
    )
    with ExitStack() as stack:
        for each in (switch, *text_switches):
            stack.callback(each.restore, each.snapshot())
            each.freeze()
        stack.callback(forget_children, denoiser)
        if features is not None:
            stack.callback(features.detach)
            features.attach()
        stack.callback(Attachment(denoiser, hook, HOOK).remove)
        forget_children(denoiser)
        prepare()
        attached = stack.pop_all()
    return Composition(hook, attached)


def _denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The model that is called at every denoising step, and its name in the pipeline."""
    for name in _DENOISERS:
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return name, model
    raise CmloraError(
        f"{type(pipe).__name__} has no {' or '.join(_DENOISERS)}; expected a diffusers pipeline"
    )


def _strategy(
    method: str | Strategy, options: Mapping[str, Any]
) -> tuple[str, Strategy, dict[str, Any]]:
    """A method's name, function and checked options."""
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), method, dict(options)
    strategy = METHODS[method].object
    return method, strategy, check_options(method, options)


def _members(
    loras: Sequence[str] | Mapping[str, float],
    members: Sequence[Member] | None,
    roles: Mapping[str, Role],
    profiles: Mapping[str, Profile],
) -> tuple[Member, ...]:
    """The LoRAs as strategies see them, in the user's order."""
    if isinstance(loras, str):
        raise CmloraError(f"loras={loras!r}: expected a list of names, such as [{loras!r}]")
    names = list(loras)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CmloraError(f"{', '.join(twice)}: listed more than once")
    strengths = loras if isinstance(loras, Mapping) else dict.fromkeys(names, 1.0)
    if members is None:
        members = [Member(name, strengths[name]) for name in names]
    elif sorted(member.name for member in members) != sorted(names):
        described = ", ".join(member.name for member in members)
        raise CmloraError(f"members describe {described}, but loras are {', '.join(names)}")
    for what, given in (("roles", roles), ("profiles", profiles)):
        for name in given:
            if name not in names:
                raise CmloraError(f"{what}: {_unknown(name, names, 'composed')}")
    result: list[Member] = []
    for member in members:
        weight, role = member.weight, roles.get(member.name, member.role)
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise CmloraError(f"{member.name}: weight {weight!r} is not a number")
        if not math.isfinite(weight):
            raise CmloraError(f"{member.name}: weight {weight} is not finite")
        if role not in (None, *get_args(Role)):
            raise CmloraError(f"{member.name}: role {role!r}; expected 'high' or 'low'")
        profile = profiles.get(member.name)
        if profile is not None:
            member = replace(member, frequency=profile.frequency, window=profile.window)
        result.append(replace(member, weight=float(weight), role=role))
    return tuple(result)


def _check_loaded(
    members: Sequence[Member], switches: Sequence[AdapterSwitch], *, needed: bool
) -> None:
    """Every member is loaded, and there are some if the method needs any."""
    loaded = sorted({name for switch in switches for name in switch.names})
    if not members and needed:
        raise CmloraError(
            f"no LoRAs to compose; name some of those that are loaded: {', '.join(loaded)}"
            if loaded
            else "no LoRAs to compose, and none are loaded; call pipe.load_lora_weights first"
        )
    for member in members:
        if not loaded:
            raise CmloraError(
                f"unknown LoRA {member.name!r}: the pipeline has no LoRAs loaded; "
                "call pipe.load_lora_weights(..., adapter_name=...) first"
            )
        if member.name not in loaded:
            raise CmloraError(_unknown(member.name, loaded, "loaded"))


def _unknown(name: str, known: Iterable[str], state: str) -> str:
    """What to say about a LoRA that is not there."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown LoRA {name!r}; {hint}{state}: {', '.join(known)}"


def _cache(
    denoiser: nn.Module, name: str, policy: Policy, cut: Cut | tuple[int, int] | None
) -> UNetCache | None:
    """The feature cache of a denoiser, if the policy ever reuses anything."""
    if not policy.reuse:
        return None
    if name != "unet":
        raise CmloraError(
            f"cache={policy.name!r}: features of a {name} cannot be reused; use cache='none'"
        )
    return UNetCache(denoiser, Cut(*cut) if isinstance(cut, tuple) else cut)
