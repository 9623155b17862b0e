"""JSON gives back the same graph, and refuses what is no graph."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings

from mugraph.errors import GraphError, Location, ParseError
from mugraph.ir.serialize import SCHEMA_VERSION, dumps, from_json, loads, to_json
from tests.graphs import ALL, attention_fused, rmsnorm_linear, rmsnorm_linear_fused
from tests.ir.random_graphs import programs

GRAPHS = [make() for pair in ALL.values() for make in pair] + [attention_fused(parts=4)]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{type(g).__name__}-{g.name}")
def test_json_gives_back_the_same_graph(graph):
    again = loads(dumps(graph))
    assert again == graph
    assert type(again) is type(graph)
    assert to_json(graph)["schema_version"] == SCHEMA_VERSION


@settings(max_examples=150)
@given(programs())
def test_json_of_a_random_graph_gives_it_back(graph):
    again = loads(dumps(graph))
    assert again == graph
    assert type(again) is type(graph)


def test_parts_of_a_graph_have_json_too():
    graph = rmsnorm_linear_fused()
    for part in (graph.equations[0].op.blocks[0], graph.inputs[0], graph.equations[0].target):
        assert loads(dumps(part)) == part


def test_the_users_line_is_kept():
    graph = rmsnorm_linear()
    first = replace(graph.equations[0], where=Location("model.py", 3, "y = x * x"))
    again = loads(dumps(replace(graph, equations=(first, *graph.equations[1:]))))
    assert again.equations[0].where == first.where


def broken(change):
    data = copy.deepcopy(to_json(rmsnorm_linear_fused()))
    change(data)
    return data


def block(data):
    return data["value"]["equations"][0]["op"]["blocks"][0]


WRONG = {
    "an unknown version": (lambda d: d.update(schema_version=99), "schema version 99, not 1"),
    "no version": (lambda d: d.pop("schema_version"), "without schema_version"),
    "an unknown type": (lambda d: d["value"].update(type="Programme"), 'no type "Programme", at value'),
    "a misplaced type": (lambda d: d["value"].update(inputs=[d["value"]]), "KernelGraph where Input belongs"),
    "a missing field": (lambda d: d["value"].pop("outputs"), "missing or unknown: outputs"),
    "an unknown field": (lambda d: d["value"].update(colour=1), "missing or unknown: colour"),
    "an unknown dtype": (lambda d: d["value"]["inputs"][0]["storage"].update(dtype="f17"), '"f17" is not one of f64'),
    "a string for a number": (lambda d: block(d)["grid"][0].__setitem__(1, "16"), 'expected int, found "16"'),
    "a bool for a number": (lambda d: block(d)["grid"][0].__setitem__(1, True), "expected int, found true"),
    "an object for an array": (lambda d: block(d).update(grid={}), "expected an array"),
    "a short array": (lambda d: block(d).update(grid=[["b"]]), "expected 2 entries, found 1"),
    "an unknown monoid": (lambda d: block(d)["passes"][0]["body"][1].update(monoid="xor"), '"xor" is not one of sum'),
    "no rational": (lambda d: block(d)["epilogue"][2]["op"].update(value={"rational": "1/0"}), "expected {"),
    "a size of no kind": (
        lambda d: d["value"]["inputs"][0]["tensor"]["dims"][0][0].update(size="B"),
        "expected int or",
    ),
    "other maps": (lambda d: block(d)["maps"]["stores"][0].update(omap=[["b", 1], ["n", 0]]), "the stored maps"),
    "another grid under the old maps": (lambda d: block(d)["grid"].reverse(), "the stored maps"),
    "an invalid tensor": (
        lambda d: d["value"]["inputs"][0]["tensor"].update(dims=d["value"]["inputs"][0]["tensor"]["dims"][:1] * 2),
        "axis b occurs twice",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_graph_is_refused(change, message):
    with pytest.raises(GraphError) as caught:
        from_json(broken(change))
    assert message in caught.value.message


def test_maps_may_be_left_out():
    assert from_json(broken(lambda d: block(d).pop("maps"))) == rmsnorm_linear_fused()


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ParseError, match="not JSON"):
        loads(dumps(rmsnorm_linear())[:-5])


def test_a_value_that_is_no_part_of_a_graph_is_refused():
    with pytest.raises(GraphError, match="object is no part of a graph"):
        dumps(object())


def test_json_is_plain():
    assert json.loads(dumps(rmsnorm_linear(), indent=1)) == to_json(rmsnorm_linear())
