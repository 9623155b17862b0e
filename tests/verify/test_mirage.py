"""Published μGraphs: read as they are meant, equal to their programs, refused with an error in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

import mugraph as mg
from mugraph.cli import main
from mugraph.errors import GraphError, MugraphError, ParseError, ShapeError, UnsupportedOpError
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.mirage import bound_to, import_mirage, parse_mirage
from mugraph.verify.equivalence import verify
from tests.verify.mirage_files import DATA, PUBLISHED, SMALL, Graph, Writer, mlp_graph, mlp_program, rms_graph
from tests.verify.planted import PLANTS, planted


def imported(graph: Graph, program: Program) -> KernelGraph:
    found = import_mirage(graph, program)
    verify(program, found)
    return found


def published(file: str) -> tuple[Program, list[Graph]]:
    if not (DATA / file).is_file():
        pytest.skip(f"the published file {file} is not there")
    program, _ = PUBLISHED[file]
    return program, [list(map(dict, g)) for g in parse_mirage((DATA / file).read_text())]


@pytest.mark.parametrize("name", SMALL)
def test_a_graph_of_every_form_equals_its_program(name: str):
    program, graph = SMALL[name]
    imported(graph, program)


PLANTED = [(name, i, kind) for name, (_, g) in SMALL.items() for i, (kind, _) in enumerate(planted(g))]


def test_every_kind_of_error_is_planted():
    assert {kind for _, _, kind in PLANTED} == set(PLANTS)
    assert len(PLANTED) >= 100


def refusal(program: Program, graph: Graph) -> MugraphError:
    with pytest.raises(MugraphError) as refused:
        imported(graph, program)
    return refused.value


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.full)])
def test_planted_errors_are_refused(step: int):
    """With the place in the graph, or an element at which the two differ."""
    wrong = [(p, kind, other) for p, g in SMALL.values() for kind, other in planted(g)][::step]
    errors = [(kind, refusal(p, other)) for p, kind, other in wrong]
    for kind, error in errors:
        assert error.op or "differs" in error.message, f"{kind}: {error}"
    assert sum("differs" in e.message for _, e in errors) >= 30 // step


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_graphs_equal_their_program(file: str):
    program, graphs = published(file)
    assert len(graphs) == PUBLISHED[file][1]
    for graph in graphs[:2]:
        imported(graph, program)


@pytest.mark.full
@pytest.mark.parametrize("file", PUBLISHED)
def test_all_published_graphs_equal_their_program(file: str):
    program, graphs = published(file)
    for graph in graphs:
        imported(graph, program)


@pytest.mark.full
@pytest.mark.parametrize("file", PUBLISHED)
def test_an_error_in_a_published_graph_is_refused(file: str):
    """Each graph with one error, of the kinds in turn."""
    program, graphs = published(file)
    for i, graph in enumerate(graphs):
        errors = list(planted(graph))
        _, other = errors[7 * i % len(errors)]
        refusal(program, other)


# -- what is read


def test_without_a_program_inputs_have_names_of_their_own():
    graph = import_mirage(mlp_graph())
    assert [str(i.tensor) for i in graph.inputs] == [
        "I0: f16[i0_0, i0_1]",
        "I1: f16[i1_0, i1_1]",
        "I2: f16[i2_0, i2_1]",
    ]


def test_symbolic_sizes_are_bound_to_those_of_the_file():
    b = mg.Dim("B", 1, 64)

    @mg.program
    def mlp(X: mg.f16[b, 32], W1: mg.f16[32, 32], W2: mg.f16[32, 32]):
        return mg.silu(X @ W1) * (X @ W2)

    graph = mlp_graph()
    bound = bound_to(mlp, graph)
    assert bound.inputs[0].tensor.shape == (4, 32)
    verify(bound, import_mirage(graph, mlp))


def test_other_sizes_than_the_program_has():
    with pytest.raises(ShapeError, match=r"the graph takes \[4, 32\]"):
        import_mirage(mlp_graph(), mlp_program(b=8))


def kernel_level(*ops: tuple[str, tuple[int, ...]]) -> Graph:
    w = Writer()
    t = w.kernel_input(4, 6)
    for kind, shape in ops:
        t = w.op(kind, shape, t)
    return w.output(t)


def test_kernel_level_operators():
    @mg.program
    def normed(X: mg.f16[4, 6]):
        return mg.sum(mg.exp(X / mg.sqrt(mg.mean(mg.square(X), -1, True))), 0, True)

    imported(kernel_level(("rms_norm", (4, 6)), ("exp", (4, 6)), ("reduction_0", (1, 6))), normed)
    refusal(normed, kernel_level(("rms_norm", (4, 6)), ("square", (4, 6)), ("reduction_0", (1, 6))))
    with pytest.raises(UnsupportedOpError, match="to \\[2, 6\\]"):
        import_mirage(kernel_level(("reduction_0", (2, 6))))


def test_a_matrix_times_itself_and_its_broadcast_rows():
    """The two dimensions of one tensor meet each other, and a dimension of one entry meets any."""

    @mg.program
    def squared(X: mg.f16[6, 6], B: mg.f16[1, 6]):
        return (X @ X) * B

    w = Writer()
    x, row = w.kernel_input(6, 6), w.kernel_input(1, 6)
    b = w.block((1, 1, 1), 1)
    t, r = b.load(x, (6, 6), (-1, -1, -1)), b.load(row, (1, 6), (-1, -1, -1))
    y = b.op("mul", (6, 6), b.op("matmul", (6, 6), t, t), r)
    out = b.store(y, (6, 6), (-1, -1, -1))
    b.done()
    imported(w.output(out), squared)

    w = Writer()
    x, row = w.kernel_input(6, 6), w.kernel_input(1, 6)
    imported(w.output(w.op("mul", (6, 6), w.op("matmul", (6, 6), x, x), row)), squared)


def accumulated_copies(times: int) -> Graph:
    """A tile that every iteration sees whole is added in every iteration."""
    w = Writer()
    x = w.kernel_input(4, 6)
    b = w.block((2, 1, 1), times)
    y = b.store(b.op("accum_nored", (2, 6), b.load(x, (2, 6), (0, -1, -1))), (4, 6), (0, -1, -1))
    b.done()
    return w.output(y)


def test_a_loop_invariant_tile_is_added_in_every_iteration():
    @mg.program
    def tripled(X: mg.f16[4, 6]):
        return X * 3

    imported(accumulated_copies(3), tripled)
    error = refusal(tripled, accumulated_copies(4))
    assert "differs" in error.message


# -- what is refused, and how it is said


def edited(graph: Graph, **fields: object) -> Graph:
    """The fields of the first block operator that has them, changed."""
    other = copy.deepcopy(graph)
    for o in other[-2]["bgraph"]["operators"]:
        if set(fields) <= set(o):
            o.update(fields)
            return other
    raise LookupError(fields)


def test_a_race_is_shown_with_two_blocks():
    none = {"x": -1, "y": -1, "z": -1}
    with pytest.raises(GraphError, match="blocks x=0 and x=1 write the same elements") as refused:
        import_mirage(edited(rms_graph(), output_map=none))
    assert refused.value.op == "2.6 tb_output_op"


def test_a_tile_that_leaves_its_tensor_is_shown_with_the_entry():
    graph = rms_graph()
    graph[-2]["bgraph"]["grid_dim"]["x"] = 5
    with pytest.raises(GraphError, match="at x2=4 entry 24 is read"):
        import_mirage(graph)


def test_an_iteration_s_value_in_the_epilogue_is_refused():
    for graph in (rms_graph(), mlp_graph(fused=False)):
        for dropped in PLANTS["accumulator_dropped"](graph):
            with pytest.raises(GraphError, match="is not accumulated: iterations 0 and 1"):
                import_mirage(dropped)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[1]", "[[1]]", '[[{"op": 1}]]', '[[{"op_type": "kn_input_op"}]]'], ids=repr
)
def test_what_is_no_graph(text: str):
    with pytest.raises(ParseError):
        import_mirage(parse_mirage(text)[0])


def test_an_unknown_operator_names_its_place():
    graph = rms_graph()
    graph[-2]["bgraph"]["operators"][3]["op_type"] = "tb_conv_op"
    with pytest.raises(UnsupportedOpError, match="tb_conv_op"):
        import_mirage(graph)


# -- the command


PROGRAM = """\
import mugraph as mg


@mg.program
def mlp(X: mg.f16[4, 32], W1: mg.f16[32, 32], W2: mg.f16[32, 32]):
    return mg.silu(X @ W1) * (X @ W2)
"""


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_the_command_judges_graph_by_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong = next(PLANTS["other_function"](mlp_graph()))
    (tmp_path / "graphs.json").write_text(json.dumps([mlp_graph(), wrong, mlp_graph(fused=False)]))
    (tmp_path / "model.py").write_text(PROGRAM)
    arguments = ("import", "mirage", str(tmp_path / "graphs.json"), "--program", f"{tmp_path / 'model.py'}:mlp")
    assert run(*arguments) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("graph 0: equal, error <= 2^-")
    assert lines[1].startswith("graph 1: refused: ")
    assert "differs" in lines[1]
    assert lines[-1] == "2 of 3 graphs equal mlp, 1 refused"
    assert run(*arguments, "--json") == 4
    data = json.loads(capsys.readouterr().out)
    assert [g["verdict"] for g in data["graphs"]] == ["equal", "refused", "equal"]
    assert (data["equal"], data["refused"]) == (2, 1)


def test_equal_graphs_are_lowered_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "graphs.json").write_text(json.dumps([mlp_graph()]))
    (tmp_path / "model.py").write_text(PROGRAM)
    arguments = ("import", "mirage", str(tmp_path / "graphs.json"), "--program", f"{tmp_path / 'model.py'}:mlp")
    assert run(*arguments, "-o", str(tmp_path / "out"), "--target", "torch") == 0
    assert run("verify", str(tmp_path / "out" / "graph_0")) == 0
    assert "is verified" in capsys.readouterr().out


def test_graphs_are_read_without_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "graphs.json").write_text(json.dumps(mlp_graph()))
    assert run("import", "mirage", str(tmp_path / "graphs.json")) == 0
    assert "kernel(" in capsys.readouterr().out
    assert run("import", "mirage", str(tmp_path / "absent.json")) == 2
