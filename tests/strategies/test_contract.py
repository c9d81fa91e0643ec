"""What every composition method promises, whatever it does."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cmlora.caching.policy as caching
from cmlora.branches import share_uncond
from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Plan, Step
from cmlora.strategies import METHODS, check_options, schedule

FOLDER = Path(caching.__file__).parent.parent / "strategies"

MODULES = [f"down_blocks.{i}.attn.to_q" for i in range(6)]


def known(name: str, weight: float, frequency: float, seed: int, **more: Any) -> Member:
    """A LoRA of which everything is known that a method may ask for."""
    chance = random.Random(seed)
    return Member(
        name,
        weight,
        frequency=frequency,
        relevance=chance.uniform(0.2, 1.0),
        importance=tuple((i / 8, chance.uniform(0.1, 1.0)) for i in range(8)),
        mass={module: (chance.uniform(1, 2), chance.uniform(8, 9)) for module in MODULES},
        **more,
    )


SET = (
    known("nezuko", 0.8, 0.80, 1),
    known("uniform", 0.9, 0.78, 2, category="style"),
    known("bamboo", 1.0, 0.30, 3),
    known("toast", 1.1, 0.82, 4),
)
COEFFICIENTS = (0.5, -0.2, 1.0, 0.3)

CASES: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS if method != "lorahub"),
    ("lorahub", {"coefficients": COEFFICIENTS}),
    ("cmlora", {"partition": "async"}),
    ("cmlora", {"partition": "online"}),
    ("cmlora", {"dominant_full": "always", "max_age": None}),
    ("select", {"bands": "low_first", "scale": "rms", "patch": 2, "prior": 1.0}),
    ("select", {"keep": "measured", "sharpness_end": 1.0, "guidance": "before"}),
    ("select", {"keep": "none", "bands": "apart", "scale": "joint"}),
    ("delta", {"rule": "composite", "every": 5}),
    ("loratorio", {"top": 2, "temperature": 0.1}),
    ("multlfg", {"levels": 2, "top": 2}),
    ("klora", {"curve": "wrapped"}),
    ("gate", {"keep": "none", "strength": 1.5}),
    ("auto", {"budget": 6.0, "plain": False}),
    ("auto", {"budget": 1.0, "plain": False}),
]

every_case = pytest.mark.parametrize(
    ("method", "options"), CASES, ids=["-".join([m, *map(str, o.values())]) for m, o in CASES]
)
policies = pytest.mark.parametrize("policy", ["none", "uniform:3", "nonuniform", "steps:0,7"])


def carried_out(plan: Plan, outputs: torch.Tensor) -> torch.Tensor:
    """What the engine makes of a plan's outputs, in the simplest way."""
    if plan.compare is not None:
        return plan.compare(outputs, None)
    if not isinstance(plan.combine, tuple):
        return plan.combine(outputs)
    result = torch.zeros_like(outputs[0])
    for share, output in zip(plan.combine, outputs, strict=True):
        result += share * output
    return result


def outputs_for(plan: Plan, seed: int = 0) -> torch.Tensor:
    """Outputs that depend on the pass alone, so that the same pass has the same output."""
    rows = []
    for item in plan.passes:
        number = sum(ord(letter) * (i + 1) for i, letter in enumerate(item.key)) + seed
        rows.append(torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(number)))
    return torch.stack(rows)


@every_case
@policies
def test_the_combination_is_affine_in_the_outputs(
    method: str, options: Mapping[str, Any], policy: str
) -> None:
    """Shares that sum to one: what is added to every output is added to the result."""
    if method == "loratorio":
        pytest.skip("weighs by angles, which a common addition changes")
    for plan in schedule(method, SET, 40, policy, **options):
        outputs = outputs_for(plan)
        moved = carried_out(plan, outputs + 3.0)
        torch.testing.assert_close(moved, carried_out(plan, outputs) + 3.0, rtol=1e-4, atol=1e-4)


@every_case
def test_equal_outputs_stay_what_they_are(method: str, options: Mapping[str, Any]) -> None:
    """LoRAs that change nothing give the base model's picture."""
    for plan in schedule(method, SET, 20, "uniform:3", **options):
        one = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
        same = carried_out(plan, one.expand(len(plan.passes), -1, -1, -1, -1))
        assert same.isfinite().all()
        torch.testing.assert_close(same, one)


@every_case
@policies
def test_every_lora_takes_part_within_a_run(
    method: str, options: Mapping[str, Any], policy: str
) -> None:
    active = {
        name
        for plan in schedule(method, SET, 40, policy, **options)
        for item in plan.passes
        for name in item.weights
    }
    assert active == (set() if method == "naive" else {member.name for member in SET})


@every_case
@policies
def test_the_same_input_gives_the_same_plan(
    method: str, options: Mapping[str, Any], policy: str
) -> None:
    first = schedule(method, SET, 30, policy, **options)
    again = schedule(method, list(SET), 30, caching.parse(policy), **options)
    for one, other in zip(first, again, strict=True):
        assert one.passes == other.passes
        outputs = outputs_for(one)
        assert torch.equal(carried_out(one, outputs), carried_out(other, outputs))


@every_case
def test_with_profiles_the_order_of_the_loras_makes_no_difference(
    method: str, options: Mapping[str, Any]
) -> None:
    if method in ("switch", "w_switch"):
        pytest.skip("the order of the turns is the user's")
    expected = schedule(method, SET, 30, "nonuniform", **options)
    for members in itertools.islice(itertools.permutations(SET), 1, None, 5):
        for one, other in zip(
            expected, schedule(method, members, 30, "nonuniform", **options), strict=True
        ):
            assert one.passes == other.passes
            assert [list(p.weights) for p in one.passes] == [list(p.weights) for p in other.passes]
            outputs = outputs_for(one)
            assert torch.equal(carried_out(one, outputs), carried_out(other, outputs))


@pytest.mark.parametrize("policy", ["none", "nonuniform"])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "naive"])
def test_one_lora_is_run_plainly(method: str, policy: str) -> None:
    refreshes = caching.parse(policy).refreshes(30)
    for index, plan in enumerate(schedule(method, [Member("only", 0.7)], 30, policy)):
        assert plan.passes == (Pass({"only": 0.7}, may_reuse=index not in refreshes),)
        assert plan.combine == (1.0,)
        assert plan.observe is None


@every_case
@pytest.mark.parametrize("policy", ["none", "uniform:1"])
def test_without_reuse_every_pass_is_full(
    method: str, options: Mapping[str, Any], policy: str
) -> None:
    plans = schedule(method, SET, 30, policy, **options)
    assert not any(item.may_reuse for plan in plans for item in plan.passes)


@every_case
@pytest.mark.parametrize("policy", ["uniform:2", "nonuniform"])
def test_with_reuse_some_passes_are_light_and_the_first_step_is_full(
    method: str, options: Mapping[str, Any], policy: str
) -> None:
    plans = schedule(method, SET, 30, policy, **options)
    assert not any(item.may_reuse for item in plans[0].passes)
    assert sum(caching.tally(plans).light.values()) > 0


@every_case
def test_slots_are_never_shared_between_passes_of_a_step(
    method: str, options: Mapping[str, Any]
) -> None:
    for plan in schedule(method, SET, 30, "nonuniform", **options):
        keys = [item.key for item in plan.passes]
        assert len(set(keys)) == len(keys)


@every_case
def test_passes_keep_the_users_weights(method: str, options: Mapping[str, Any]) -> None:
    weights = {member.name: member.weight for member in SET}
    if method == "lorahub":
        scale = dict(zip(sorted(weights), COEFFICIENTS, strict=True))
        weights = {name: scale[name] * weight for name, weight in weights.items()}
    gates = method == "gate" or (method == "auto" and options.get("plain", True))
    if gates and "keep" not in options:  # which makes styles weaker
        weights |= {m.name: 0.7 * m.weight for m in SET if m.category == "style"}
    for plan in schedule(method, SET, 30, **options):
        for item in plan.passes:
            for name, strength in item.weights.items():
                parts = strength if isinstance(strength, tuple) else (("", strength),)
                assert all(factor == weights[name] for _, factor in parts)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_is_answered_with_the_known_ones(method: str) -> None:
    with pytest.raises(CmloraError, match=f"{method} has no option 'colour'"):
        check_options(method, {"colour": 1})


@pytest.mark.parametrize("method", [method for method in METHODS if method != "naive"])
def test_no_lora_and_a_doubled_lora_are_errors(method: str) -> None:
    with pytest.raises(CmloraError, match="given none"):
        schedule(method, [], 10)
    with pytest.raises(CmloraError, match="'twin' is listed twice"):
        schedule(method, [Member("twin"), Member("twin")], 10)


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_a_run_without_steps_is_an_error(count: Any) -> None:
    with pytest.raises(CmloraError, match="1 or more"):
        schedule("merge", SET, count)


def test_an_unknown_method_is_answered_with_near_names() -> None:
    with pytest.raises(CmloraError, match="did you mean switch"):
        schedule("swtich", SET, 10)


@every_case
@settings(deadline=None, max_examples=12)
@given(count=st.integers(1, 12))
def test_runs_of_any_length_have_plans(method: str, options: Mapping[str, Any], count: int) -> None:
    assert len(schedule(method, SET, count, "nonuniform", **options)) == count


@every_case
def test_a_latent_changes_nothing_unless_the_method_measures(
    method: str, options: Mapping[str, Any]
) -> None:
    if options.get("partition") == "online":
        pytest.skip("measures the latent")
    known = check_options(method, options)
    latent = torch.randn(1, 4, 8, 8)
    blind = METHODS[method].object(Step(3, 30), SET, caching.nonuniform(), **known)
    seeing = METHODS[method].object(
        Step(3, 30, 900.0, latent, ({"step": 0.0},)), SET, caching.nonuniform(), **known
    )
    assert blind.passes == seeing.passes


def test_every_file_of_the_folder_is_listed() -> None:
    """A method's file, function and row share one word; other files are the folder's own."""
    words = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "former", "options"}
    assert {word for word in words if not word.startswith("_")} == set(METHODS)
    for name, entry in METHODS.items():
        assert getattr(entry.object, "__name__", None) == name
        assert getattr(entry.object, "__module__", None) == f"cmlora.strategies.{name}"
        assert entry.sentence
        assert not entry.sentence.endswith(".")


def test_the_methods_are_listed_from_simple_to_full() -> None:
    assert list(METHODS) == [
        "naive",
        "merge",
        "switch",
        "composite",
        "switch_a",
        "w_switch",
        "w_composite",
        "freeswitch",
        "klora",
        "gate",
        "select",
        "delta",
        "loratorio",
        "multlfg",
        "lorahub",
        "cmlora",
        "auto",
    ]


@every_case
@pytest.mark.parametrize("policy", ["none", "uniform:2+turns", "threshold:0.2+age:0.3"])
def test_a_shared_unconditional_branch_changes_no_combination(
    method: str, options: Mapping[str, Any], policy: str
) -> None:
    """With the base's unconditional half in every output, sharing it gives the same result."""
    for plan in schedule(method, SET, 12, policy, **options):
        shared = share_uncond(plan)
        outputs = outputs_for(plan)
        base = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(3))
        if not plan.passes[0].weights:
            base = outputs[0].clone()
        outputs[:, :1] = base[:1]
        added = len(shared.passes) - len(plan.passes)
        assert added in (0, 1)
        recalling = any(item.recall for item in plan.passes)
        extra = torch.cat([base[:1], outputs[0, 1:]])[None]
        parts = [outputs, extra] if recalling else [extra, outputs]
        given = torch.cat(parts) if added else outputs
        torch.testing.assert_close(carried_out(shared, given), carried_out(plan, outputs))
        halves = sum(2 if p.branch == "both" else 1 for p in shared.passes)
        if len(plan.passes) > 1:
            assert halves <= len(plan.passes) + 1
            assert any(p.branch != "cond" and not p.recall for p in shared.passes)
            assert recalling or shared.passes[0].branch != "cond"


@every_case
def test_zero_strengths_leave_nothing_but_the_base(method: str, options: Mapping[str, Any]) -> None:
    """Every pass is then the base model, whatever the combination."""
    silent = [replace(member, weight=0.0) for member in SET]
    for plan in schedule(method, silent, 12, **options):
        for item in plan.passes:
            for strength in item.weights.values():
                parts = strength if isinstance(strength, tuple) else (("", strength),)
                assert all(factor == 0 for _, factor in parts)
