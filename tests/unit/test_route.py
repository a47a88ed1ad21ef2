"""Which route is chosen, from facts alone: every combination of them."""

import itertools
import pickle

import pytest

import dmabuf
from dmabuf import Plan, Route, RouteUnavailable
from dmabuf.route import ALLOWED, Question, choose

FACTS = {
    "stream": "a pipe",
    "no_direct_io": "no O_DIRECT, fix A",
    "no_native": "no series, fix D",
    "no_native_middle": "no native middle",
    "some_without_native_middle": "some have none",
    "no_pinning": "no pinning, fix B",
    "no_mapping": "no mapping",
    "no_middle": "no middle, fix C",
    "some_without_middle": "some have none",
    "no_block": "no whole page",
    "cached": "hot",
}


def possible(facts: set[str], require: str) -> list[Route]:
    """The design's table, written down again."""
    routes = []
    native = not facts & {"stream", "no_direct_io", "cached", "no_native", "no_native_middle"}
    if native and not (require == "zero-copy" and "some_without_native_middle" in facts):
        routes.append(Route.NATIVE)
    past_the_cache = not facts & {"stream", "no_direct_io", "no_mapping", "no_block", "cached"}
    strict = require == "zero-copy" and "some_without_middle" in facts
    if past_the_cache and not facts & {"no_pinning", "no_middle"} and not strict:
        routes.append(Route.DIRECT)
    if past_the_cache:
        routes.append(Route.STAGED)
    if "no_mapping" not in facts:
        routes.append(Route.BUFFERED)
    return [route for route in routes if route in ALLOWED[require]]


def combinations():
    for count in range(len(FACTS) + 1):
        yield from map(set, itertools.combinations(FACTS, count))


@pytest.mark.parametrize("require", ["zero-copy", "uncached", "any"])
@pytest.mark.parametrize("direction", ["read", "write"])
def test_every_combination(direction, require):
    for facts in combinations():
        question = Question(direction, **{name: FACTS[name] for name in facts})
        for forced in (None, *Route):
            routes = [r for r in possible(facts, require) if forced in (None, r)]
            if not routes:
                with pytest.raises(RouteUnavailable) as caught:
                    choose(question, require=require, route=forced, path="the path")
                assert caught.value.filename == "the path"
                assert caught.value.route is forced
                continue
            plan = choose(question, require=require, route=forced)
            assert plan.route is routes[0], facts
            better = [] if forced else list(Route)[: list(Route).index(plan.route)]
            assert list(plan.rejected) == better
            assert all(plan.rejected.values()) and plan.reason


def test_the_error_names_cause_and_fix():
    question = Question("read", no_direct_io="no O_DIRECT: keep it on ext4")
    with pytest.raises(RouteUnavailable) as caught:
        choose(question, require="uncached", path="file")
    assert "require='uncached'" in caught.value.strerror
    assert "direct: no O_DIRECT: keep it on ext4" in caught.value.strerror
    assert "buffered: require='uncached' does not permit it" in caught.value.strerror
    with pytest.raises(RouteUnavailable, match="route='staged'"):
        choose(question, route="staged")


@pytest.mark.parametrize("how", [{"require": "fast"}, {"route": "native?"}, {"route": 3}])
def test_unknown_words(how):
    with pytest.raises(ValueError, match="one of"):
        choose(Question("read"), **how)


def test_a_plan_is_a_frozen_record():
    plan = choose(Question("read", no_direct_io="because"))
    with pytest.raises(AttributeError):
        plan.route = Route.DIRECT
    assert str(plan) == (
        "buffered: the kernel copies into the buffer's mapping\n"
        "  not native: because\n  not direct: because\n  not staged: because"
    )
    assert pickle.loads(pickle.dumps(plan)) == plan == Plan(plan.route, plan.reason, plan.rejected)
    assert hash(plan) == hash(pickle.loads(pickle.dumps(plan)))


def test_routes_are_their_names():
    assert [str(route) for route in dmabuf.Route] == ["native", "direct", "staged", "buffered"]
    assert dmabuf.Route("direct") == "direct"
