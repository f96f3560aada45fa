"""Experts in few bits: what is seen inside of them, and kernels near to others in their bits.

Oracles: NumPy computes units and shares from real numbers; brute force over all steps of a small
kernel; SciPy's least squares; ONNX Runtime runs what is written.
"""

from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
from scipy import linalg

import morphgraph as mg
from morphgraph.arrays import Array, Arrays, FloatArray
from morphgraph.onnx_io import runtime
from morphgraph.passes.calibration.curves import changed_kernels, order_of
from morphgraph.passes.calibration.few_bits import FewBits, Grid, without
from morphgraph.passes.calibration.fused import Fused, fused_mixtures
from morphgraph.passes.calibration.statistics import calibrate
from morphgraph.passes.refit.refit import refit
from morphgraph.passes.rewrite.resize import resize
from tests.passes import test_packed_experts as packed
from tests.passes.experts import changed, group_on
from tests.passes.test_packed_experts import (
    BLOCK,
    EXPERTS,
    FORMS,
    TAKEN,
    TOKENS,
    Form,
    arrays,
    network,
    real,
)

HIDDEN, UNITS = 32, 64

SEEN = {
    "rows": Form(4),
    "rows with zero points": Form(2, zeros=True),
    "blocks": Form(4, blocks=True),
    "blocks with zero points, gated": Form(4, True, True, fusion=1),
    "bytes": Form(8, zeros=True),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "HIDDEN", HIDDEN)
    monkeypatch.setattr(packed, "UNITS", UNITS)


def feeds(count: int, seed: int) -> list[Arrays]:
    shape = (count, TOKENS, 3)
    return [{"x": x} for x in np.random.default_rng(seed).normal(size=shape).astype(np.float32)]


def of(form: Form, held: Arrays) -> dict[str, Fused]:
    graph = mg.lift(network(form, held))
    return fused_mixtures(graph.model, graph.couplings.input_independent)


@pytest.mark.parametrize("name", [name for name in FORMS if "silu" in name])
def test_bits_are_read_as_real_numbers_and_written_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # zero points of 2 bits need more blocks
    form = FORMS[name]
    held = arrays(form)
    for key, each in zip(("w1", "w2"), of(form, held).values(), strict=True):
        store = each.store
        assert isinstance(store, FewBits)
        assert store.shape == (EXPERTS, *form.kernels[key])
        np.testing.assert_allclose(each.matrices(), real(form, held, key), rtol=1e-6)
        each.write(each.matrices().astype(np.float64))
        assert np.array_equal(store.value.const_value.numpy(), held[key])


def shares_of(held: Arrays, h: FloatArray) -> FloatArray:
    """``[tokens, experts]``; 0 where a token does not take one."""
    logits = h @ held["gate"].astype(np.float64)
    least = np.sort(logits, axis=1)[:, -TAKEN]
    taken = np.where(logits >= least[:, None], np.exp(logits - logits.max(axis=1)[:, None]), 0.0)
    shares: FloatArray = taken / taken.sum(axis=1)[:, None]
    return shares


def units_of(form: Form, held: Arrays, h: FloatArray, expert: int) -> FloatArray:
    """What the units of an expert give, ``[tokens, units]``."""
    given = h @ real(form, held, "w1")[expert].T + held["b1"][expert]
    if form.fusion == 0:
        silu: FloatArray = given / (1 + np.exp(-given))
        return silu
    gate, up = np.minimum(given[:, ::2], 1.5), np.clip(given[:, 1::2], -1.5, 1.5)
    gated: FloatArray = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return gated


@pytest.mark.parametrize("name", SEEN)
def test_a_mixture_in_few_bits_shows_its_units_and_its_tokens(name: str) -> None:
    form = SEEN[name]
    held = arrays(form)
    held["gate"] *= np.float32(0.05)  # no share is 0 by rounding
    h = np.concatenate([feed["x"] for feed in feeds(8, 1)]) @ held["inw"]
    shares = shares_of(held, h.astype(np.float64))
    first, last = of(form, held).values()
    for fused in (first, last):
        found = {e: seen for e, *seen in fused.shown().seen([h, h @ held["gate"]])}
        assert sorted(found) == np.flatnonzero(shares.any(axis=0)).tolist()
        for expert, (there, share, rows) in found.items():
            assert there.tolist() == np.flatnonzero(shares[:, expert]).tolist()
            np.testing.assert_allclose(share, shares[there, expert], rtol=1e-4)
            plain = h[there] if fused is first else units_of(form, held, h[there], expert)
            wanted = plain * share[:, None]
            np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def some_grid(bits: int, rows: int, columns: int, blocks: int) -> Grid:
    generator = np.random.default_rng(4)
    steps = generator.integers(0, 2**bits, (rows, columns))
    scales = generator.uniform(0.5, 1, (rows, blocks))
    return Grid(
        steps, scales, generator.integers(1, 3, (rows, blocks)).astype(np.float64), 2**bits - 1
    )


def moments(columns: int) -> FloatArray:
    rows = np.random.default_rng(5).normal(size=(40, columns)) @ np.random.default_rng(6).normal(
        size=(columns, columns)
    )
    found: FloatArray = rows.T @ rows / len(rows)
    return found


def errors(kernel: FloatArray, wanted: FloatArray, seen: FloatArray) -> FloatArray:
    found: FloatArray = np.einsum("ri,ij,rj->r", kernel - wanted, seen, kernel - wanted)
    return found


def test_steps_are_chosen_by_what_the_others_leave() -> None:
    """Brute force tries all; the nearest step of every weight by itself is far worse."""
    grid, seen = some_grid(2, 20, 5, 1), moments(5)
    wanted = grid.array() + np.random.default_rng(7).normal(size=grid.steps.shape)
    best = np.full(20, np.inf)
    for steps in product(range(4), repeat=5):
        each = Grid(np.tile(steps, (20, 1)), grid.scales, grid.zeros, grid.most)
        best = np.minimum(best, errors(each.array(), wanted, seen))
    found = errors(grid.stepped(wanted, seen).array(), wanted, seen)
    nearest = errors(grid.nearest(wanted).array(), wanted, seen)
    assert (found >= best - 1e-9).all()
    assert found.sum() < 1.5 * best.sum()
    assert nearest.sum() > 2 * found.sum()


@pytest.mark.parametrize("columns", [12, 150])
def test_steps_stay_where_the_kernel_is_in_the_bits_already(columns: int) -> None:
    """More columns than are gone through at a time among them."""
    grid = some_grid(4, 6, columns, 3)
    found = grid.stepped(grid.array(), moments(columns) + np.eye(columns))
    np.testing.assert_array_equal(found.steps, grid.steps)


def test_scales_are_the_least_squares_of_given_steps() -> None:
    grid, seen = some_grid(4, 6, 12, 3), moments(12)
    factors = np.random.default_rng(8).uniform(0.8, 1.3, grid.scales.shape)
    wanted = Grid(grid.steps, grid.scales * factors, grid.zeros, grid.most).array()
    wanted += 0.1 * np.random.default_rng(9).normal(size=wanted.shape)
    root = linalg.sqrtm(seen).real
    plain = grid.steps - grid.by_column(grid.zeros)
    for row, found in enumerate(grid.scaled(wanted, seen).scales):
        columns = np.stack(
            [root[:, b * 4 : b * 4 + 4] @ plain[row, b * 4 : b * 4 + 4] for b in range(3)], 1
        )
        best = linalg.lstsq(columns, root @ wanted[row])[0]
        np.testing.assert_allclose(found, best, rtol=1e-3)


def test_what_is_left_of_a_kernel_makes_up_for_what_went() -> None:
    """Never worse than the slice; in its own steps and scales; what went counts nothing."""
    grid, seen = some_grid(4, 5, 12, 3), moments(12)
    seen[np.diag_indices(12)] += 0.01 * np.trace(seen) / 12
    whole, stay = grid.array(), np.arange(8)
    wanted = np.zeros_like(whole)
    wanted[:, stay] = linalg.solve(seen[:8, :8], seen[:8] @ whole.T, assume_a="pos").T
    found = without(grid, wanted, seen)
    assert not found[:, 8:].any()
    np.testing.assert_allclose(grid.nearest(found).array()[:, stay], found[:, stay], atol=1e-12)
    sliced = np.where(np.arange(12) < 8, whole, 0.0)
    left, slices, best = (errors(kernel, whole, seen).sum() for kernel in (found, sliced, wanted))
    assert best <= left < 0.9 * slices
    np.testing.assert_array_equal(without(grid, whole, seen), whole)


@pytest.mark.parametrize("name", ["rows", "blocks"])
def test_widths_are_measured_with_steps_that_make_up_for_what_went(name: str) -> None:
    """Of every measured width the kernels are in their bits, and lose less than slices."""
    form = SEEN[name]
    held = arrays(form)
    graph = mg.lift(network(form, held))
    units = group_on(graph, "w2", 2)
    width = units.width // 2
    found = calibrate(graph, feeds(20, 1), stops=lambda group: [width])
    (stack,) = found.groups[units.index].stacks
    kernels, _ = changed_kernels(found, units.index, width)[stack]
    blocks = found.groups[units.index].stacks[stack]
    gone = blocks[order_of(found, units.index)[: units.width - width]].ravel()
    assert not kernels[:, :, gone].any()
    store = found.stacks[stack].store
    assert isinstance(store, FewBits)
    stay = np.setdiff1d(np.arange(UNITS), gone)
    for grid, kernel in zip(store.grids(), kernels, strict=True):
        near = grid.nearest(kernel).array()
        np.testing.assert_allclose(near[:, stay], kernel[:, stay], atol=1e-6)
    assert any((k != g.array())[:, stay].any() for k, g in zip(kernels, store.grids(), strict=True))


def outputs(model: ir.Model, given: list[Arrays]) -> Array:
    return np.stack([next(iter(runtime.run(model, feed).values())) for feed in given])


@pytest.mark.parametrize("name", ["rows", "blocks with zero points, gated"])
def test_the_fit_of_what_is_left_stays_in_the_bits(name: str) -> None:
    """Steps and scales are fitted, zero points and the other operands are slices."""
    form = SEEN[name]
    graph = mg.lift(network(form, arrays(form)))
    units, x = group_on(graph, "w2", 2), feeds(12, 3)
    keep = {units.index: np.arange(units.width // 2)}
    sliced, made = resize(graph, keep), refit(graph, keep, feeds(60, 1), feeds(20, 2))
    (layer,) = (each for each in made.layers if each.name == "moe")
    assert layer.after < 0.2 * layer.before
    assert layer.inputs == UNITS // 2
    y = outputs(graph.model, x)
    before, after = (float(np.square(outputs(m, x) - y).sum()) for m in (sliced, made.model))
    assert after < 0.2 * before
    for key, value in sliced.graph.initializers.items():
        array, other = (m.graph.initializers[key].const_value for m in (sliced, made.model))
        assert array is not None
        assert other is not None
        assert (array.dtype, list(array.shape)) == (other.dtype, list(other.shape))
        if key in ("w1", "w1_scales", "b1", "w2_zeros", "b2"):
            np.testing.assert_array_equal(array.numpy(), other.numpy(), err_msg=str(value.name))


@pytest.mark.parametrize("name", ["rows"])
def test_first_kernels_in_few_bits_make_up_for_hidden_width(name: str) -> None:
    """Half of the features are the others, times a number."""
    form = SEEN[name]
    held = arrays(form)
    held["inw"][:, HIDDEN // 2 :] = held["inw"][:, : HIDDEN // 2] * np.float32(0.5)
    graph = mg.lift(network(form, held))
    hidden = group_on(graph, "h", 1)
    made = refit(graph, {hidden.index: np.arange(hidden.width // 2)}, feeds(60, 1), feeds(20, 2))
    (layer,) = (each for each in made.layers if each.name == "moe (first kernels)")
    assert layer.after < 0.2 * layer.before


@pytest.mark.parametrize("name", ["rows", "blocks"])
def test_experts_and_units_in_few_bits_go_by_what_they_add(name: str) -> None:
    """The original in ONNX Runtime without an expert, whose scales are 0; units by their energy."""
    form = SEEN[name]
    held = arrays(form)
    factors = np.array([1, 0.3, 2, 1, 0.7], np.float32).reshape(-1, *[1] * (2 + form.blocks - 1))
    head = np.eye(HIDDEN, dtype=np.float32)[:, :4]
    proto = changed(network(form, held), w2_scales=held["w2_scales"] * factors, head=head)
    graph, given = mg.lift(proto), feeds(10, 1)
    found = calibrate(graph, given, stops=lambda group: [])
    energies = []
    for expert in range(EXPERTS):
        without = {k: v.copy() for k, v in held.items() if k in ("b2", "w2_scales")}
        without["w2_scales"] *= factors
        for array in without.values():
            array[expert] = 0
        other = mg.lift(changed(proto, **without))
        one, two = (mixture_of(m, given) for m in (graph.model, other.model))
        energies.append(float(np.square(one - two).sum()))
    experts, units = group_on(graph, "b2", 0), group_on(graph, "w2", 2)
    expected = np.array(energies) / sum(energies)
    np.testing.assert_allclose(found.chosen[experts.index], expected, rtol=1e-3)
    assert order_of(found, experts.index).tolist() == np.argsort(energies).tolist()
    assert found.groups[units.index].complete
    (blocks,) = found.groups[units.index].stacks.values()
    size = BLOCK if form.blocks else 2
    np.testing.assert_array_equal(blocks, np.arange(UNITS).reshape(-1, size))


def mixture_of(model: ir.Model, given: list[Arrays]) -> FloatArray:
    """What the mixture gives."""
    model = model.clone()
    (node,) = (each for each in model.graph if each.op_type == "QMoE")
    model.graph.outputs[:] = node.outputs
    return outputs(model, given).astype(np.float64)
