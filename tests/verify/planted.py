"""One error planted in a published graph: JSON in, JSON out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

Graph = list[dict[str, Any]]
Operators = list[dict[str, Any]]
Plant = Callable[[Graph], "Iterator[Graph]"]

OTHER = {
    "silu": "exp",
    "exp": "square",
    "mul": "add",
    "div": "mul",
    "accum_red_ld_rms": "accum_red_ld_sum",
    "accum_red_ld_sum": "accum_red_ld_rms",
}


def blocks(graph: Graph) -> Iterator[dict[str, Any]]:
    yield from (o["bgraph"] for o in graph if "bgraph" in o)


def sections(graph: Graph) -> Iterator[Operators]:
    """Lists of operators: the kernel level, and each block."""
    yield graph
    yield from (b["operators"] for b in blocks(graph))


def each(graph: Graph, change: Callable[[dict[str, Any]], bool]) -> Iterator[Graph]:
    """Copies of the graph with one operator changed, for each that can be."""
    for i, operators in enumerate(sections(graph)):
        for j in range(len(operators)):
            other = copy.deepcopy(graph)
            if change(list(sections(other))[i][j]):
                yield other


def other_function(graph: Graph) -> Iterator[Graph]:
    def change(o: dict[str, Any]) -> bool:
        level, _, name = o["op_type"].removesuffix("_op").partition("_")
        if name not in OTHER:
            return False
        o["op_type"] = f"{level}_{OTHER[name]}_op"
        return True

    yield from each(graph, change)


def operands_swapped(graph: Graph) -> Iterator[Graph]:
    """Of a division of equal shapes, or of a product of square matrices."""

    def change(o: dict[str, Any]) -> bool:
        kind = o["op_type"][3:]
        if kind not in ("div_op", "matmul_op") or len(o["input_tensors"]) != 2:
            return False
        o["input_tensors"] = o["input_tensors"][::-1]
        return True

    yield from each(graph, change)


def operand_repeated(graph: Graph) -> Iterator[Graph]:
    """Both operands are the first."""

    def change(o: dict[str, Any]) -> bool:
        if len(o["input_tensors"]) != 2 or o["op_type"] == "kn_customized_op":
            return False
        o["input_tensors"] = o["input_tensors"][:1] * 2
        return True

    yield from each(graph, change)


def grid_map_moved(graph: Graph) -> Iterator[Graph]:
    """A tensor's grid axis cuts another dimension, or none."""

    def move(key: str, axis: str, to: int) -> Callable[[dict[str, Any]], bool]:
        def change(o: dict[str, Any]) -> bool:
            if not o["op_type"].startswith("tb_") or key not in o or o[key][axis] in (-1, to):
                return False
            o[key][axis] = to
            return True

        return change

    for key in ("input_map", "output_map"):
        for axis in "xyz":
            for to in (-1, 0, 1, 2):
                yield from each(graph, move(key, axis, to))


def loop_moved(graph: Graph) -> Iterator[Graph]:
    def change(o: dict[str, Any]) -> bool:
        if o.get("forloop_dim", -1) < 0:
            return False
        o["forloop_dim"] = 1 - min(o["forloop_dim"], 1)
        return True

    yield from each(graph, change)


def transposed_loop_and_grid(graph: Graph) -> Iterator[Graph]:
    """A square weight is cut by the grid where the loop has to cut it, and the tile is as large as before."""

    def change(o: dict[str, Any]) -> bool:
        if o["op_type"] != "tb_input_op" or o["forloop_dim"] < 0 or o["input_map"]["x"] < 0:
            return False
        o["forloop_dim"], o["input_map"]["x"] = o["input_map"]["x"], o["forloop_dim"]
        t = o["output_tensors"][0]
        t["dim"] = [t["dim"][1], t["dim"][0], *t["dim"][2:]]
        return True

    yield from each(graph, change)


def accumulator_dropped(graph: Graph) -> Iterator[Graph]:
    """What read the sum over the loop reads one iteration's value."""
    for i, b in enumerate(blocks(graph)):
        for j, o in enumerate(b["operators"]):
            if o["op_type"] != "tb_accum_nored_op":
                continue
            other = copy.deepcopy(graph)
            operators = list(blocks(other))[i]["operators"]
            before, gone = o["input_tensors"][0], o["output_tensors"][0]["guid"]
            del operators[j]
            for reader in operators:
                tensors = reader["input_tensors"]
                reader["input_tensors"] = [before if t["guid"] == gone else t for t in tensors]
            yield other


def sources_swapped(graph: Graph) -> Iterator[Graph]:
    """Two loads of equal shape read each other's tensor."""
    for i, b in enumerate(blocks(graph)):
        loads = [(j, o) for j, o in enumerate(b["operators"]) if o["op_type"] == "tb_input_op"]
        for j, x in loads:
            for k, y in loads:
                if j < k and x["dtensor"]["dim"] == y["dtensor"]["dim"]:
                    other = copy.deepcopy(graph)
                    operators = list(blocks(other))[i]["operators"]
                    operators[j]["dtensor"], operators[k]["dtensor"] = y["dtensor"], x["dtensor"]
                    yield other


def fewer_iterations(graph: Graph) -> Iterator[Graph]:
    """The loop stops half way: tiles are as large as before."""
    for i, b in enumerate(blocks(graph)):
        if b["forloop_range"] > 1:
            other = copy.deepcopy(graph)
            list(blocks(other))[i]["forloop_range"] //= 2
            yield other


def other_stride(graph: Graph) -> Iterator[Graph]:
    for i, b in enumerate(blocks(graph)):
        if any("redtox" in o["op_type"] for o in b["operators"]):
            other = copy.deepcopy(graph)
            list(blocks(other))[i]["reduction_dimx"] //= 2
            yield other


def neighbours_added(graph: Graph) -> Iterator[Graph]:
    """The sum of parts adds adjacent entries instead of equal places: a reduction of the last dimension."""

    def change(o: dict[str, Any]) -> bool:
        if "accum_redtox" not in o["op_type"]:
            return False
        o["op_type"] = "tb_accum_red_ld_sum_op"
        o["output_tensors"][0]["dim"][2] = 1
        return True

    yield from each(graph, change)


PLANTS: dict[str, Plant] = {
    f.__name__: f
    for f in (
        other_function,
        operands_swapped,
        operand_repeated,
        grid_map_moved,
        loop_moved,
        transposed_loop_and_grid,
        accumulator_dropped,
        sources_swapped,
        fewer_iterations,
        other_stride,
        neighbours_added,
    )
}


def planted(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """The graph with one error, of every kind that it has room for."""
    for name, plant in PLANTS.items():
        yield from ((name, other) for other in plant(graph))
