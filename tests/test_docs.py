"""Docs and code say the same; ``python tests/test_docs.py`` renews the generated tables."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_ecp
from onnx_ecp.cli import commands
from onnx_ecp.data.calibration import SOURCES
from onnx_ecp.graph import ENCODINGS
from onnx_ecp.layers import MATCHES
from onnx_ecp.methods import COMPENSATIONS, METHODS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").glob("*.md")]
)
METHODS_PAGE = ROOT / "docs" / "methods" / "README.md"
TABLE = re.compile(r"(?<=<!-- methods -->\n)(\|.*\n)*")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)")


def methods_table() -> str:
    """The table of all methods, from what each of them says of itself."""
    rows = ["| method | importance of a weight | what compensates | stages |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        compensation = COMPENSATIONS[method.compensation].summary
        rows.append(
            f"| [{name}]({name}.md) | {linked(method.summary)} | {compensation} | {method.stages} |"
        )
    return "\n".join(rows) + "\n"


def linked(text: str) -> str:
    """Papers as links, bars as what Markdown tables take."""
    text = text.replace("|", "\\|")
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def test_the_table_of_methods_is_what_the_methods_say():
    found = TABLE.search(METHODS_PAGE.read_text())
    assert found is not None
    assert found[0] == methods_table()


def test_every_method_and_compensation_is_described_once():
    for kind in (METHODS, COMPENSATIONS):
        summaries = [value.summary for value in kind.values()]
        assert all(summaries)
        assert len(set(summaries)) == len(summaries)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_and_is_in_the_help(name):
    assert (METHODS_PAGE.parent / f"{name}.md").exists()
    options = {p.name: p for p in commands.main.commands["optimize"].params}
    assert re.search(rf"\b{name}\b", options["method"].help or "")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_scripts_and_modules_that_are_named_exist(page):
    text = page.read_text()
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script
    if page.name == "architecture.md":
        folders = "|".join(p.name for p in (ROOT / "onnx_ecp").iterdir() if p.is_dir())
        for module in re.findall(rf"`((?:{folders})/[\w/]*\.py)`", text):
            assert (ROOT / "onnx_ecp" / module).exists(), module


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)


@pytest.fixture
def contributed():
    """The worked examples of CONTRIBUTING.md stand in their tables while a test runs."""
    tables = (METHODS, SOURCES, ENCODINGS, MATCHES)
    before = [dict(table) for table in tables]
    for example in EXAMPLES:
        exec(example, {})
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def test_the_layer_of_contributing_is_one_everywhere(contributed, rng):
    net = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> net (float[n,5,6] x) => (float[n,5,3] y) {
        h = Einsum<equation = "...i,oi->...o">(x, W)  b = Add(h, c)  r = Relu(b)
        y = Einsum<equation = "...i,oi->...o">(r, V) }"""
    )
    for name, shape in {"W": (8, 6), "c": (8,), "V": (3, 8)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        net.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    x = rng.normal(1, 1, (60, 5, 6)).astype(np.float32)
    found = [
        onnx_ecp.optimize(net, {"x": x}, method="ecp", sparsity=0.5, statistics=where)
        for where in ("graph", "host")
    ]
    assert [row.name for row in found[0].report.layers] == ["h", "y"]
    for name, keep in found[1].masks.items():
        np.testing.assert_array_equal(found[0].masks[name], keep)
    smaller = onnx_ecp.optimize(net, {"x": x}, granularity="unit", sparsity=0.5).model
    shapes = {t.name: tuple(t.dims) for t in smaller.graph.initializer}
    assert (shapes["W"], shapes["c"], shapes["V"]) == ((4, 6), (4,), (3, 4))


def test_the_worked_examples_of_contributing_work(contributed, tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    np.savetxt(tmp_path / "in.tsv", x, delimiter="\t")
    given = onnx.load(ROOT / "models" / "digits.onnx")
    outcome = onnx_ecp.optimize(
        given,
        str(tmp_path / "in.tsv"),
        method="wanda-squared",
        sparsity=0.5,
        format="documented",
        output=tmp_path / "out.onnx",
    )
    assert onnx.load(tmp_path / "out.onnx").doc_string.startswith("pruned: ")
    kept = outcome.masks["layers.0.weight"]
    squares = np.square(given_weight(given, "layers.0.weight") * np.sqrt((x**2).mean(axis=0)))
    assert kept.mean() < 1
    assert squares[kept].mean() > squares[~kept].mean()


def given_weight(model, name):
    [tensor] = [t for t in model.graph.initializer if t.name == name]
    return onnx.numpy_helper.to_array(tensor)


if __name__ == "__main__":
    METHODS_PAGE.write_text(TABLE.sub(lambda _: methods_table(), METHODS_PAGE.read_text()))
