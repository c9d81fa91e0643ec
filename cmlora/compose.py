"""`compose`: several LoRAs in one picture, with a pipeline that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from torch import nn

from cmlora import denoisers, relevance, shared
from cmlora.batching import Execution
from cmlora.branches import Uncond, share_uncond
from cmlora.caching.dit import DiTCache, Live
from cmlora.caching.foreign import ForeignCache, is_config, named
from cmlora.caching.policy import none, parse, uniform
from cmlora.caching.store import Store
from cmlora.caching.unet import Cut, UNetCache
from cmlora.engine import HOOK, CompositionHook
from cmlora.errors import CmloraError
from cmlora.hooks import Attachment, forget_children, hook_of
from cmlora.macs import MacCounter
from cmlora.members import check_loaded, described, unknown
from cmlora.plan import Member, Plan, Policy, Role, Scope, Step, Strategy
from cmlora.prompts import Prompts
from cmlora.run import Report, Run
from cmlora.schedules.apply import scheduled
from cmlora.schedules.parse import parse_schedule
from cmlora.schedules.schedule import Schedule
from cmlora.strategies import METHODS, check_options
from cmlora.strategies.auto import Choice, decide, knowing
from cmlora.strategies.klora import weighed
from cmlora.switching import AdapterSwitch
from cmlora.tracker import StepTracker
from cmlora.updates import updates

if TYPE_CHECKING:
    from cmlora.frequency.profile import Profile

TextEncoder = Literal["all", "none", "per_lora"]

_BASE = "naive"  # the method that uses no LoRA
_STEPS = 30  # what "auto" expects a run to have when it chooses a cache


class Composition:
    """LoRAs composed in a pipeline, until `remove` or the end of the ``with`` block.

    Made by `compose`.
    """

    def __init__(
        self, run: Run, attached: ExitStack, choice: Callable[[int], Choice] | None = None
    ) -> None:
        self._run = run
        self._attached = attached
        self._choice = choice

    @property
    def reason(self) -> str:
        """Why method "auto" chose what it chose, for the last run; empty for any other method."""
        return self._choice(self._run.expected or _STEPS).reason if self._choice else ""

    @property
    def report(self) -> Report:
        """Of the last run: passes, full and light, and seconds."""
        return self._run.report

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
    cache: str | Policy | Any | None = "none",
    cut: Cut | Live | tuple[int, int] | None = None,
    roles: Mapping[str, Role] | None = None,
    scopes: Mapping[str, Scope] | None = None,
    triggers: Mapping[str, Sequence[str]] | None = None,
    profiles: Mapping[str, Profile] | None = None,
    members: Sequence[Member] | None = None,
    text_encoder: TextEncoder = "all",
    text_weights: Mapping[str, float] | None = None,
    execution: Execution = "sequential",
    schedule: str | Schedule = "",
    uncond: Uncond = "per_lora",
    prompt: str | None = None,
    count_macs: bool = False,
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
        pipe: any diffusers pipeline with a ``unet`` or a ``transformer``; a ``transformer_2``
            takes part.
        loras: adapter names, or adapter names with strengths. A strength multiplies what the
            LoRA's file says; without one it is 1.
        method: name of a composition method (`cmlora.METHODS`), or a strategy of your own.
        cache: when features are reused: "none", which ``None`` is too, "uniform:3", "nonuniform",
            or a policy. Or the name or configuration of one of diffusers' caches, which then keeps
            one state per LoRA; see `cmlora.caching.foreign.FITTING` for those that a family has.
            Features hold while a LoRA acts at every step and its strength changes by no more than
            a tenth. At steps with a ControlNet, or anything else that enters between the blocks,
            policies reuse nothing.
        cut: what stays live when features are reused; ``None`` is the family's default. For UNets
            level and block, see `cmlora.caching.unet.Cut`; for transformers how many blocks at
            the beginning and at the end.
        roles: "high" or "low" frequency for LoRAs where you know better than the measurement.
        scopes: "global" for LoRAs that change the whole picture, such as styles, which `gate` and
            `select` then keep everywhere, or "local".
        triggers: trigger words of LoRAs, for methods that weigh LoRAs by the prompt.
        profiles: measured profiles of LoRAs.
        members: full descriptions of the same LoRAs, instead of strengths; labels win over them.
        text_encoder: which LoRAs act while prompts are encoded: all of them, or none; or
            "per_lora", where every pass gets the embeddings that its own LoRAs make.
        text_weights: strengths in the text encoders, where they differ from those of `loras`.
        execution: "sequential" runs the passes of a step one after the other, "batched" those
            with one LoRA each as one batch, "auto" as many in one batch as there is memory for;
            "fused" exchanges whole weights with the LoRAs added, which makes every pass as fast as
            the base model's and keeps a copy of the weights per combination of LoRAs that acts.
        schedule: curves that multiply the strengths in the course of the run, by block if you
            like, as text (see `cmlora.schedules.parse`) or as an object.
        uncond: whether every LoRA makes an unconditional prediction of its own, or all use the
            base model's ("shared"), which saves nearly half of a method with many passes; an error
            where nothing tells which branch is which.
        prompt: what is going to be drawn, for methods that weigh LoRAs by it.
        count_macs: count multiply-accumulates, attention included, for ``Report.macs``; slows the
            first pass of every kind down.
        options: options of the method.

    Raises:
        CmloraError: if something asked for does not exist or makes no sense; the message says
            what is there.
    """
    models = denoisers.find(pipe)
    for name, model in models.items():
        if hook_of(model, HOOK) is not None:
            raise CmloraError(
                f"LoRAs are already composed in this pipeline's {name}; "
                "leave the first composition before beginning another"
            )
    _check_choice("text_encoder", text_encoder, TextEncoder)
    _check_choice("execution", execution, Execution)
    _check_choice("uncond", uncond, Uncond)
    insisted = uncond == "shared"
    label, strategy, chosen = _strategy(method, options)
    cache = "none" if cache is None else cache
    foreign = cache if is_config(cache) else named(cache)
    policy = none() if foreign is not None else parse(cache)
    curves = parse_schedule(schedule) if isinstance(schedule, str) else schedule
    encoders = [getattr(pipe, n, None) for n in denoisers.TEXT_ENCODERS]
    fused = execution == "fused"
    switches = {name: AdapterSwitch(model, fused=fused) for name, model in models.items()}
    text_switches = [AdapterSwitch(e) for e in encoders if isinstance(e, nn.Module)]
    composed = described(loras, members, roles or {}, profiles or {}, scopes, triggers)
    everything = [*switches.values(), *text_switches]
    check_loaded(composed, everything, needed=label != _BASE)
    names = [member.name for member in composed]
    if policy.reuse or foreign is not None:
        _refuse_few_steps(pipe, names)
    curves.check(names)
    _check_blocks(curves, switches.values())
    if label == "klora":
        composed = weighed(models.values(), composed)
    if prompt is not None:
        composed = relevance.weighed(pipe, label, chosen, prompt, composed)
    relevance.warn_unless_weighed(label, chosen, composed)
    choice: Callable[[int], Choice] | None = None
    counting = [member for member in composed if member.weight != 0]
    if label == "auto" and counting:
        known = updates(models.values(), [member.name for member in counting])
        strategy = knowing(known, cached=cache != "none")
        cacheable = _cacheable(pipe, models.values(), names)
        choice = partial(decide, known, chosen, counting, cacheable=cacheable)
        guess = choice(_STEPS)
        if cache == "none":
            policy = parse(guess.cache)
        uncond = guess.uncond if uncond == "per_lora" else uncond
    weights = {m.name: m.weight for m in composed}
    for name, weight in (text_weights or {}).items():
        if name not in weights:
            raise CmloraError(f"text_weights: {unknown(name, weights, 'composed')}")
        weights[name] = float(weight)
    weights = {name: weight * curves.text_factor(name) for name, weight in weights.items()}
    spoken = {} if text_encoder == "none" or label == _BASE else weights
    prompts = None
    if text_encoder == "per_lora" and any(s.names for s in text_switches) and spoken:
        prompts = Prompts(pipe, text_switches, spoken)

    def prepare() -> None:
        # pipelines scale the encoders' LoRAs up and down again, which costs bits in every run
        for text_switch in text_switches:
            text_switch.activate(spoken)

    run = Run(
        _arranged(strategy, curves, uncond),
        composed,
        policy,
        tracker=StepTracker(pipe),
        method=label,
        options=chosen,
        prepare=prepare,
        counter=MacCounter() if count_macs else None,
    )
    caches = {name: _cache(model, policy, cut) for name, model in models.items()}
    acting = {lora for switch in switches.values() for lora in switch.names}
    # one that acts in text encoders alone has a pass of its own where it has embeddings of its own
    placed = acting if prompts is not None else {*names, *acting}
    with ExitStack() as stack:
        for each in everything:
            stack.callback(each.restore, each.snapshot())
            each.freeze()
        if prompts is not None:
            stack.callback(prompts.detach)
            prompts.attach()
        together = {} if label == _BASE else {m.name: m.weight for m in composed}
        stack.push(shared.attach(pipe, switches.values(), together))
        for name, model in models.items():
            stack.callback(forget_children, model)
            if foreign is not None:
                halved = uncond == "shared"
                theirs = ForeignCache(model, foreign, lambda: run.timestep, halved=halved)
                stack.callback(theirs.remove)
                run.join(begin=partial(_begin, theirs, run), end=lambda: None)
            features = caches[name]
            if features is not None:
                stack.callback(features.detach)
                features.attach()
            own = switches[name]
            hook = CompositionHook(
                run,
                switch=own,
                cache=features,
                prompts=prompts,
                execution=execution,
                shared=insisted,
                absent=placed - {*own.names},
            )
            stack.callback(Attachment(model, hook, HOOK).remove)
            forget_children(model)
        prepare()
        attached = stack.pop_all()
    return Composition(run, attached, choice)


def _check_blocks(curves: Schedule, switches: Iterable[AdapterSwitch]) -> None:
    """See that every expression of a schedule is found in a denoiser that has the LoRA."""
    for track in curves.tracks:
        having = [switch for switch in switches if track.lora in switch.names]
        if track.blocks and having and not any(s.acts(track.lora, track.blocks) for s in having):
            having[0].check_blocks(track.lora, track.blocks)


def _begin(cache: ForeignCache, run: Run) -> None:
    """Tell a cache how long the run is that begins."""
    cache.begin(run.expected)


def _cacheable(pipe: Any, models: Iterable[nn.Module], loras: Iterable[str]) -> bool:
    """Whether features of all denoisers of a pipeline can be reused."""
    if denoisers.few_steps(pipe, loras) is not None:
        return False
    try:
        for model in models:
            _cache(model, uniform(2), None)
    except CmloraError:
        return False
    return True


def _arranged(strategy: Strategy, curves: Schedule, uncond: Uncond) -> Strategy:
    """The strategy with a schedule on it, and with one unconditional branch for all."""
    inner = scheduled(strategy, curves)
    if uncond == "per_lora":
        return inner

    def with_one(
        step: Step, members: Sequence[Member], policy: Policy, *args: Any, **options: Any
    ) -> Plan:
        return share_uncond(inner(step, members, policy, *args, **options))

    return with_one


def _check_choice(name: str, value: Any, choices: Any) -> None:
    """See that a value is one of a type's literals."""
    known = get_args(choices)
    if value not in known:
        listed = ", ".join(map(repr, known[:-1]))
        raise CmloraError(f"{name}={value!r}: expected {listed} or {known[-1]!r}")


def _refuse_few_steps(pipe: Any, loras: Iterable[str]) -> None:
    reason = denoisers.few_steps(pipe, loras)
    if reason is not None:
        raise CmloraError(
            f"features cannot be reused with what is made for few steps ({reason}): from one step "
            "to the next too much changes; use cache='none', or another name for a LoRA that is not"
        )


def _strategy(
    method: str | Strategy, options: Mapping[str, Any]
) -> tuple[str, Strategy, dict[str, Any]]:
    """A method's name, function and checked options."""
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), method, dict(options)
    strategy = METHODS[method].object
    return method, strategy, check_options(method, options)


def _cache(
    model: nn.Module, policy: Policy, cut: Cut | Live | tuple[int, int] | None
) -> DiTCache | UNetCache | None:
    """The feature cache of a denoiser, if the policy ever reuses anything."""
    if not policy.reuse:
        return None
    store = Store(order=getattr(policy, "forecast", 0))
    if denoisers.kind(model).stacks:
        live = Live(*cut) if isinstance(cut, tuple) else cut
        if isinstance(live, Cut):
            live = Live(live.layer, live.block)
        return DiTCache(model, live, store)
    level = Cut(*cut) if isinstance(cut, tuple) else cut
    if isinstance(level, Live):
        level = Cut(level.first, level.last)
    return UNetCache(model, level, store)
