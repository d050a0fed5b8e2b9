"""A short sample of ``benchmarks/fuzz.py``: whatever is changed in a file, commands end well."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from onnx_ecp.graph import load

PATH = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


def harness():
    spec = importlib.util.spec_from_file_location("fuzz", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = harness()


def test_the_models_that_are_mutated_are_valid_and_end_well(tmp_path):
    for index, model in enumerate(fuzz.seeds()):
        load(model)
        given = fuzz.Case(index, model.SerializeToString(), b"", ".npz", "inspect")
        assert fuzz.run(given, tmp_path) == (0, "")


def test_a_case_is_the_same_whatever_ran_before():
    assert fuzz.case(3, 5) == fuzz.case(3, 5)
    assert fuzz.case(3, 5) != fuzz.case(3, 6)


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_nothing_escapes(first, tmp_path):
    for number in range(first, first + 20):
        _, escaped = fuzz.run(fuzz.case(2024, number), tmp_path)
        assert escaped == "", f"case {number}"


def test_what_is_not_in_order_is_noticed():
    lines = "error: a\nhint: b\n"
    assert fuzz.escaped(3, lines, False) == ""
    assert "exit code 1" in fuzz.escaped(1, lines, False)
    assert "output" in fuzz.escaped(3, lines, True)
    assert "no error and hint" in fuzz.escaped(3, "error: a\n", False)
    assert "our own" in fuzz.escaped(3, "error: ecp/const_1\nhint: b\n", False)
