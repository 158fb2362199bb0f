"""Shapes from text, and the shapes of a plot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rwkv_jit.bench.cases import (
    Case,
    Shape,
    default_corner,
    default_dtypes,
    default_shapes,
    heads_of,
    lengths_in,
    lengths_of,
    sweep,
)


def test_a_shape_is_read_and_written_back() -> None:
    shape = Shape.parse("8, 4096,64,128")
    assert shape == Shape(8, 4096, 64, 128)
    assert str(shape) == "8,4096,64,128"
    case = Case(op="wkv7", shape=shape, dtype="bf16")
    assert str(case) == "wkv7 (8, 4096, 64, 128) bf16"
    assert str(replace(case, bounded=True)) == f"{case} bounded"
    assert str(replace(case, packed=True)) == f"{case} packed"


@pytest.mark.parametrize("text", ["", "8,4096,64", "1,2,3,4,5", "1,2,x,4", "1,0,3,4", "1,-2,3,4"])
def test_what_is_not_four_numbers_is_no_shape(text: str) -> None:
    with pytest.raises(ValueError, match="is not four whole numbers above 0"):
        Shape.parse(text)


def test_a_plot_varies_one_size_at_a_time_and_meets_in_its_corner() -> None:
    corner = Shape(2, 100, 6, 8)
    lengths, heads = lengths_of(corner), heads_of(corner)
    assert [shape.length for shape in lengths] == [3, 6, 12, 25, 50, 100]
    assert {shape.sequences_and_heads for shape in lengths} == {12}
    assert [shape.sequences_and_heads for shape in heads] == [2, 6, 12]
    assert {shape.length for shape in heads} == {100}
    assert sweep(corner).count(corner) == 1
    assert set(sweep(corner)) == {*lengths, *heads}


def test_packed_lengths_differ_widely_and_make_up_the_rectangle() -> None:
    lengths = lengths_in(Shape(64, 1875, 32, 64))
    assert (len(lengths), sum(lengths)) == (64, 120_000)
    assert (min(lengths), max(lengths)) == (17, 4000)
    assert lengths != sorted(lengths)
    assert lengths == lengths_in(Shape(64, 1875, 32, 64))
    for shape in (Shape(1, 8192, 1, 64), Shape(2, 1, 1, 8), Shape(2, 128, 2, 64)):
        assert sum(lengths_in(shape)) == shape.batch * shape.length
        assert min(lengths_in(shape)) >= 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_device_has_defaults(device: str) -> None:
    assert default_shapes(device)
    for entry in ("decode", "prefill"):
        assert default_shapes(device, entry)
    assert default_dtypes(device)
    assert default_corner(device).head_size == 64
