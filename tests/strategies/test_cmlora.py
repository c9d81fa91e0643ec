"""CMLoRA as described: phases, rotation, shares, refreshes and what they cost."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.caching.policy import custom, nonuniform, tally, uniform
from cmlora.errors import CmloraError
from cmlora.frequency.order import phases
from cmlora.plan import Member, Plan, Policy, Role
from cmlora.strategies import schedule
from cmlora.strategies.cmlora import dominant_weight
from tests import references

FIVE = [
    Member("character", role="high"),
    Member("clothing", role="high"),
    Member("style", role="high"),
    Member("background", role="low"),
    Member("object", role="high"),
]


def dominant(plan: Plan) -> str:
    """The LoRA with the largest share; meaningful while c > 1."""
    assert isinstance(plan.combine, tuple)
    share, name = max(zip(plan.combine, (item.key for item in plan.passes), strict=True))
    assert plan.combine.count(share) == 1
    return name


def dominants(plans: tuple[Plan, ...]) -> list[str]:
    return [dominant(plan) for plan in plans]


def full(plan: Plan) -> set[str]:
    return {item.key for item in plan.passes if not item.may_reuse}


def run(
    members: list[Member], count: int, policy: str | Policy, **options: Any
) -> list[references.Happened]:
    """What a schedule makes happen, with weights that tell who is dominant at every step."""
    plans = schedule("cmlora", members, count, policy, decay=False, **options)
    return [references.Happened(dominant(plan), full(plan)) for plan in plans]


ROLES: list[Role] = ["high", "low"]
members_of_any_kind = st.lists(st.sampled_from(ROLES), min_size=2, max_size=6).map(
    lambda roles: [Member(f"lora{i}", role=role) for i, role in enumerate(roles)]
)
reusing = st.one_of(
    st.builds(uniform, st.integers(2, 9)),
    st.builds(nonuniform),
    st.builds(custom, st.lists(st.integers(1, 60), max_size=10)),
)


@settings(deadline=None)
@given(
    members_of_any_kind,
    st.integers(1, 80),
    reusing,
    st.sampled_from(["high_first", "low_first"]),
    st.sampled_from([0.0, 0.3, 0.6, 0.85, 1.0]),
    st.sampled_from([None, 0.05, 0.1, 0.2, 0.5]),
    st.sampled_from([None, 0.1, 0.25, 0.07]),
    st.booleans(),
)
def test_it_matches_the_simulation_step_by_step(
    members: list[Member],
    count: int,
    policy: Policy,
    order: Any,
    late: float,
    max_age: float | None,
    switch: float | None,
    always: bool,
) -> None:
    refreshes = policy.refreshes(count)
    switches = refreshes
    if switch is not None:
        switches = tuple({round(i * switch * count): 0 for i in range(200)})
    first, second = phases(members, order)
    age = None
    if max_age is not None:
        age = max(1, next(s for s in range(count + 1) if s >= max_age * count - 1e-9))
    expected = references.corrected_cmlora(
        count, first, second, refreshes, switches, late, age, always
    )
    happened = run(
        members,
        count,
        policy,
        order=order,
        late=late,
        max_age=max_age,
        switch=switch,
        dominant_full="always" if always else "refresh",
    )
    assert happened == expected


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [100, 200, 220])
def test_the_cost_is_the_closed_form(n: int, count: int) -> None:
    """Full calls N + |F| - 1 and light calls N T - N - |F| + 1."""
    plans = schedule("cmlora", FIVE[:n], count, "nonuniform", max_age=None)
    counted = tally(plans)
    refreshes = len(nonuniform().refreshes(count))
    assert sum(counted.full.values()) == n + refreshes - 1
    assert sum(counted.light.values()) == n * count - n - refreshes + 1


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("partition", ["offline", "online"])
def test_the_cost_with_a_dominant_that_is_always_full(n: int, partition: str) -> None:
    """Full calls T + N - 1 and light calls (N - 1) T - N + 1."""
    plans = schedule(
        "cmlora",
        FIVE[:n],
        200,
        "nonuniform",
        max_age=None,
        dominant_full="always",
        partition=partition,
    )
    counted = tally(plans)
    assert sum(counted.full.values()) == 200 + n - 1
    assert sum(counted.light.values()) == (n - 1) * 200 - n + 1


def test_the_mean_cost_per_step_is_the_published_share_of_a_full_pass() -> None:
    # light / full = 196 / 677 in convolutions and linear layers of Stable Diffusion 1.5 at 512^2
    ratios = []
    for n in (2, 3, 4, 5):
        counted = tally(schedule("cmlora", FIVE[:n], 200, "nonuniform", max_age=None))
        calls = sum(counted.full.values()) + 196 / 677 * sum(counted.light.values())
        ratios.append(calls / 200 / n)
    assert ratios == pytest.approx([0.44, 0.39, 0.37, 0.35], abs=0.005)


@pytest.mark.parametrize(
    ("n", "first", "limit"),
    [
        (2, (0.600, 0.400), (0.500, 0.500)),
        (3, (0.556, 0.222), (0.429, 0.286)),
        (4, (0.538, 0.154), (0.455, 0.182)),
        (5, (0.529, 0.118), (0.467, 0.133)),
    ],
)
def test_the_shares_at_the_start_and_at_the_end(
    n: int, first: tuple[float, float], limit: tuple[float, float]
) -> None:
    plans = schedule("cmlora", FIVE[:n], 200, "nonuniform")
    for plan, expected in ((plans[0], first), (plans[-1], limit)):
        assert isinstance(plan.combine, tuple)
        shares = sorted(plan.combine, reverse=True)
        assert shares == pytest.approx([expected[0]] + [expected[1]] * (n - 1), abs=0.0006)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_shares_decay_at_every_switch(n: int) -> None:
    refreshes = nonuniform().refreshes(40)
    for index, plan in enumerate(schedule("cmlora", FIVE[:n], 40, "nonuniform")):
        switches = sum(step <= index for step in refreshes) - 1
        c = references.dominant_weight(n, switches)
        assert isinstance(plan.combine, tuple)
        assert max(plan.combine) == pytest.approx(c / (c + n - 1))
        assert min(plan.combine) == pytest.approx(1 / (c + n - 1))
        assert sum(plan.combine) == pytest.approx(1)


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(0, 300), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_the_dominant_is_never_outweighed(n: int, switches: int, decay: float) -> None:
    c = dominant_weight(n, switches, decay=decay)
    assert 1 <= c <= n - 0.5
    assert c == pytest.approx(max(1, n - 0.5 - sum(decay**j for j in range(1, switches + 1))))


def test_decay_may_be_off_base_or_on() -> None:
    def largest(index: int, **options: Any) -> float:
        plan = schedule("cmlora", FIVE[:3], 40, "nonuniform", **options)[index]
        assert isinstance(plan.combine, tuple)
        return max(plan.combine)

    assert largest(39, decay=False) == largest(0)
    assert largest(39, decay=True) == largest(39)
    assert largest(2, decay=0.25) == pytest.approx(2.25 / 4.25)


def test_the_decay_clock_is_its_own() -> None:
    plans = schedule("cmlora", FIVE, 40, "uniform:2", decay_clock=0.25)
    largest = [max(plan.combine) for plan in plans if isinstance(plan.combine, tuple)]
    expected = [c / (c + 4) for c in (4.5, 4.0, 3.75, 3.625) for _ in range(10)]
    assert largest == pytest.approx(expected)


def test_weight_one_without_cache_is_composite() -> None:
    ours = schedule("cmlora", FIVE, 30, dominance=1.0)
    assert ours == schedule("composite", FIVE, 30)


@pytest.mark.parametrize("count", [5, 30, 100, 200, 220])
def test_high_loras_rotate_before_the_edge_and_low_ones_after(count: int) -> None:
    high, low = ["character", "clothing", "style", "object"], ["background"]
    refreshes = nonuniform().refreshes(count)
    seen = [happened.dominant for happened in run(FIVE, count, "nonuniform")]
    at_refreshes = [seen[step] for step in refreshes]
    early = [step for step in refreshes if step < 0.6 * count]
    assert at_refreshes[: len(early)] == list(itertools.islice(itertools.cycle(high), len(early)))
    assert at_refreshes[len(early) :] == low * (len(refreshes) - len(early))
    for step in range(count):
        last = max(refresh for refresh in refreshes if refresh <= step)
        assert seen[step] == seen[last]


def test_low_first_is_the_reverse() -> None:
    seen = [happened.dominant for happened in run(FIVE, 200, "nonuniform", order="low_first")]
    assert set(seen[:120]) == {"background"}
    assert set(seen[120:]) == {"character", "clothing", "style", "object"}


def test_two_loras_are_dominant_one_after_the_other() -> None:
    seen = [h.dominant for h in run([FIVE[3], FIVE[0]], 200, "nonuniform")]
    assert seen == ["character"] * 120 + ["background"] * 80


def test_a_single_phase_is_one_rotation_without_a_break() -> None:
    members = [Member(name) for name in "cab"]
    seen = [happened.dominant for happened in run(members, 40, "uniform:2")]
    assert seen == [name for name in "cab" * 7 for _ in range(2)][:40]
    for role in ROLES:
        alike = [Member(name, role=role) for name in "cab"]
        assert [h.dominant for h in run(alike, 40, "uniform:2")] == seen


def test_asynchronous_clocks() -> None:
    happened = run(FIVE, 200, "nonuniform", partition="async", max_age=None)
    order = ["character", "clothing", "style", "object", "background"]
    assert [h.dominant for h in happened] == [n for n in order * 2 for _ in range(20)]
    refreshes = nonuniform().refreshes(200)
    for index, (name, renewed) in enumerate(happened):
        if index == 0:
            assert renewed == set(order)
        elif index in refreshes or index % 20 == 0:
            assert renewed == {name}
        else:
            assert renewed == set()


def test_the_switch_clock_is_its_own() -> None:
    happened = run(FIVE[:3], 40, "uniform:4", switch=0.25, max_age=None)
    assert [h.dominant for h in happened] == [
        name for name in ("character", "clothing", "style", "character") for _ in range(10)
    ]
    renewed = {index for index, h in enumerate(happened) if h.full}
    assert renewed == {*range(0, 40, 4), 10, 30}


def test_no_slot_is_older_than_the_limit_and_a_refresh_away() -> None:
    count, limit, widest = 200, 40, 3
    plans = schedule("cmlora", FIVE, count, "nonuniform")
    for name in (member.name for member in FIVE):
        ran = [index for index, plan in enumerate(plans) if name in full(plan)]
        gaps = [b - a for a, b in itertools.pairwise([*ran, count])]
        assert max(gaps) < limit + widest
    without = schedule("cmlora", FIVE, count, "nonuniform", max_age=None)
    assert [i for i, plan in enumerate(without) if "background" in full(plan)][:2] == [0, 120]


@pytest.mark.parametrize("always", ["refresh", "always"])
@pytest.mark.parametrize("partition", ["offline", "async"])
@pytest.mark.parametrize("base", ["steps:0", "uniform:3", "nonuniform"])
def test_an_age_of_the_policy_holds_between_refreshes_too(
    base: str, partition: str, always: str
) -> None:
    count, limit = 60, 9
    options: dict[str, Any] = {"partition": partition, "dominant_full": always, "max_age": None}
    aged = schedule("cmlora", FIVE, count, f"{base}+age:0.15", **options)
    plain = schedule("cmlora", FIVE, count, base, **options)
    since = dict.fromkeys((member.name for member in FIVE), 0)
    for index, (plan, other) in enumerate(zip(aged, plain, strict=True)):
        assert plan.combine == other.combine
        due = {name for name, at in since.items() if index - at >= limit}
        assert full(plan) == full(other) | due
        since.update(dict.fromkeys(full(plan), index))


def test_an_age_is_no_maximum_age() -> None:
    """The method's own limit acts at refreshes, and all slots are new when the phase changes."""
    names = {member.name for member in FIVE}
    aged = schedule("cmlora", FIVE, 200, "nonuniform+age:0.9", max_age=None)
    assert full(aged[120]) == {"background"}
    assert full(schedule("cmlora", FIVE, 200, "nonuniform+age:0.9")[120]) == names


def test_everything_is_renewed_when_the_phase_changes() -> None:
    names = {member.name for member in FIVE}
    assert full(schedule("cmlora", FIVE, 200, "nonuniform")[120]) == names
    assert full(schedule("cmlora", FIVE, 200, "nonuniform", max_age=None)[120]) == {"background"}


def test_without_reuse_the_dominance_keeps_the_papers_pace() -> None:
    cached = schedule("cmlora", FIVE, 200, "nonuniform")
    plain = schedule("cmlora", FIVE, 200, "none")
    assert dominants(plain) == dominants(cached)
    assert [plan.combine for plan in plain] == [plan.combine for plan in cached]


def test_released_mode_takes_no_rules() -> None:
    with pytest.raises(CmloraError, match="has no late, floor: its rules are fixed"):
        schedule("cmlora", FIVE, 30, mode="released", floor=0.5, late=0.5)
