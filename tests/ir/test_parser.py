"""Program text reads back to the same graph, and anything else is refused on its line."""

import re

import pytest
from hypothesis import given, settings

from mugraph.errors import ParseError
from mugraph.ir.parser import parse_program
from mugraph.ir.printer import canonical_text
from tests.graphs import ALL, attention_fused, rmsnorm_linear, rmsnorm_linear_fused
from tests.ir.random_graphs import programs

GRAPHS = [make() for pair in ALL.values() for make in pair] + [attention_fused(parts=4)]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{type(g).__name__}-{g.name}")
def test_text_reads_back_to_the_same_graph(graph):
    again = parse_program(str(graph))
    assert again == graph
    assert type(again) is type(graph)


@settings(max_examples=150)
@given(programs())
def test_the_text_of_a_random_graph_reads_back(graph):
    text = str(graph)
    again = parse_program(text)
    assert again == graph
    assert type(again) is type(graph)
    assert str(again) == text


def test_a_changed_text_reads_back_to_another_graph():
    graph = rmsnorm_linear_fused()
    assert parse_program(str(graph).replace("n: 64", "n: 32")) != graph
    assert parse_program(str(graph).replace("1/1000000", "1/100000")) != graph
    assert parse_program(str(graph).replace("mugraph", "program")) != graph


def test_maps_comments_and_blank_lines_may_be_left_out():
    graph = attention_fused(parts=4)
    text = re.sub(r" [iof]map\{.*?\}", "", str(graph)).replace("    block", "\n    # the only one\n    block  # here")
    assert parse_program(text) == graph


def test_a_name_that_is_a_word_of_the_language_is_a_name():
    text = "program input\n  axes axes = 4\n  input load: f16[axes]\n  output: f16[axes] = exp(load)\n  output output"
    program = parse_program(text)
    assert [e.target.name for e in program.equations] == ["output"]
    assert str(program) == text


def test_canonical_text_is_text_of_the_language():
    assert canonical_text(parse_program(canonical_text(GRAPHS[-1]))) == canonical_text(GRAPHS[-1])


WRONG = [
    ("square(X)", "square(X", "expected ','"),
    ("square(X)", "sqare(X)", "there is no operator 'sqare'"),
    ("square(X)", "square(X) Y", "unexpected 'Y'"),
    ("square(X)", "square[k](X)", "expected '='"),
    ("square(X)", "select[k](X)", "takes no attributes"),
    ("square(X)", "slice[k -> b, begin=1](X)", "expected 'start'"),
    ("x2: f16[b, k]", "x2: f17[b, k]", "there is no dtype 'f17'"),
    ("x2: f16[b, k]", "x2: f16[b, q]", "there is no axis q"),
    ("x2: f16[b, k]", "x2: f16[b, b]", "axis b occurs twice"),
    ("b = B", "b = C", "there is no symbolic size C"),
    ("1..4096", "9..4", "empty or invalid range"),
    ("dim B: 1..4096", "dim B: 1..4096\n  dim B", "declared twice"),
    ("  output Y", "  outputs Y", "unexpected 'outputs'"),
    ("  output Y", "  output Q", "no value of that name"),
    ("  output Y", "  output Y storage(f16, colour 3)", "there is no fact of storage 'colour'"),
    ("  output Y", "   output Y", "nothing can be nested here"),
    ("  output Y", " output Y", "indentation matches no line"),
    ("  output Y", "  output Y\nprogram again", "a second program"),
    ("  output Y", "  output Y ;", "unreadable at ';'"),
    ("input G: f16[k]", "input G: f16[k] assume positive", "expected string"),
    ("program", "prgram", "there is no kind of graph 'prgram'"),
    ("x2: f16[b, k] = square(X)", "x2: f16[b, k] = square(X)\n    nested: f16[] = 1", "nothing can be nested"),
    ("square(X)", 'library["mm"](X)', "a library call has its meaning below it"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_a_wrong_line_is_refused_and_underlined(old, new, message):
    text = str(rmsnorm_linear())
    assert old in text
    with pytest.raises(ParseError, match=re.escape(message)) as caught:
        parse_program(text.replace(old, new, 1))
    lines = caught.value.message.splitlines()
    marks = next(i for i, line in enumerate(lines) if line.strip() and set(line.strip()) == {"^"})
    assert len(lines[marks].strip()) == len(lines[marks - 1].strip())
    assert any(word in lines[marks - 1] for word in new.split())


WRONG_BLOCKS = [
    ("omap{b: 0, n: 1}", "omap{b: 1, n: 0}", "the omap is {b: 0, n: 1}, not {b: 1, n: 0}"),
    ("fmap{k: 1}", "fmap{k: 0}", "the fmap is {k: 1}"),
    ("imap{b: 0, n: -}", "imap{b: -, n: 0}", "the imap is {b: 0, n: -}"),
    ("+=", "3", "expected sign or name"),
    ("+=", "max", "expected an assignment"),
    ("loop k: 128", "lop k: 128", "unexpected 'lop' in a block"),
    ("store y", "store whole y", "there is no kind of store 'whole'"),
    ("xg: f32[b, k] = mul(x, g)", "xg", "unexpected 'xg'"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG_BLOCKS, ids=[w[1] for w in WRONG_BLOCKS])
def test_a_wrong_line_of_a_block_is_refused(old, new, message):
    text = str(rmsnorm_linear_fused())
    assert old in text
    with pytest.raises(ParseError, match=re.escape(message)):
        parse_program(text.replace(old, new, 1))


def test_an_empty_text_is_refused():
    with pytest.raises(ParseError, match="no program"):
        parse_program("\n  # nothing\n")
