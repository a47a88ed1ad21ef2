"""The simulation of benchmarks/scale.py: every reader gets all bytes, and no link is too fast."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    return scale


SMALL = {"hosts": 13, "workers": 2, "nodes": 3, "model": 1.03, "rack": 3, "uplink": 4.0}
CASES = [
    {},
    {"spread": False},
    {"disk_rate": 1.58},
    {"workers": 1, "fan_out": 1},
    {"workers": 1, "fan_out": 3},
    {"fan_out": 2, "whole": True},
    *(
        {"dies_at": 0.3} | case | {"dies": dies, "deadline": deadline}
        for deadline in (0.0, 0.5)
        for case, dies in (
            ({}, "node"),
            ({"spread": False}, "node"),
            ({"workers": 1, "fan_out": 2}, "reader"),
            ({"workers": 1, "fan_out": 2, "whole": True, "dies_at": 0.6}, "reader"),
            ({"workers": 1, "fan_out": 1}, "node"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_reader_gets_each_byte_once_and_no_link_is_too_fast(scale, case):
    settings = scale.Settings(**SMALL | case)
    simulation = scale.Simulation(settings)
    simulation.passages = []
    last = simulation.run()

    parts = list(range(len(simulation.sizes)))
    assert sum(simulation.sizes) == pytest.approx(settings.model)
    victim = {"node": simulation.nodes, "reader": simulation.readers}.get(settings.dies, [None])[0]
    living = [reader for reader in simulation.readers if reader is not victim]
    for reader in living:
        assert sorted(simulation.received[reader.number]) == parts
        assert simulation.finished[reader.number] <= last

    carried = defaultdict(list)
    for passage in simulation.passages:
        carried[passage.link.name].append(passage)
    for passages in carried.values():
        free_at = 0.0
        for one in sorted(passages, key=lambda passage: passage.begin):
            assert one.begin >= free_at
            assert one.end - one.begin == pytest.approx(one.size / one.link.rate)
            free_at = one.end
        assert sum(one.size for one in passages) == pytest.approx(passages[0].link.carried)
    if victim is not None:
        sent = [one for link in victim.out for one in carried[link.name]]
        assert sent and all(one.end <= settings.dies_at for one in sent)

    into_hosts = sum(reader.into[0].carried for reader in living[:: settings.workers])
    assert into_hosts >= len(living) * settings.model * (1 - 1e-9)
    if victim is None:
        assert into_hosts == pytest.approx(len(living) * settings.model)
    assert last >= settings.model * settings.workers / settings.host_rate


def test_a_fan_out_takes_the_load_off_the_nodes(scale):
    def sent(fan_out):
        simulation = scale.Simulation(scale.Settings(**SMALL | {"workers": 1, "fan_out": fan_out}))
        simulation.run()
        return sum(node.out[-1].carried for node in simulation.nodes)

    assert sent(0) == pytest.approx(SMALL["hosts"] * SMALL["model"])
    assert sent(1) == pytest.approx(SMALL["nodes"] * SMALL["model"])


def test_silence_costs_its_deadline(scale):
    def last(deadline):
        settings = scale.Settings(**SMALL, dies="node", dies_at=0.3)
        return scale.Simulation(replace(settings, deadline=deadline)).run()

    assert 30 < last(30.0) < 30 + last(0.0)
