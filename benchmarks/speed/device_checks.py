"""Checks of every kernel on a device against the definition in fp64.

Forward and backward, in fp32 and bf16, for even, odd and single-channel widths, strided and empty
input: the RMS error may be 1.25 times that of the definition in the same dtype, plus one rounding
of the result. Two runs must agree bit for bit, a NaN must stay in its row, and the compiler must
produce a single graph.
"""

import traceback

import torch
from benchmarks.speed import op_cases

from inl_core import ops, reference

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
"""Relative error of one rounding as an RMS over many numbers; that of a single one may be twice."""
ARITHMETIC = 2.0**-21
"""Absolute error of fp32 arithmetic on numbers of order one that may cancel: eight half-ulps. On an
H200, one of 1152 products summed in another order than the library's took 4.1 of them."""
SUM = 1e-5
"""Relative error of a gradient that is a sum over rows, in fp32 and any order."""


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def results(case, function):
    """Outputs, then the gradient of every leaf, for fixed random cotangents."""
    outputs = case.run(function)
    random = torch.Generator(outputs[0].device).manual_seed(1)
    downs = [
        torch.randn(y.shape, generator=random, device=y.device).bfloat16().to(y.dtype)
        for y in outputs
    ]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, case.leaves(), downs))


def assert_close(a, b, rtol):
    """Compare sums of the same numbers in another order, relative to their size."""
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5 * max(1.0, rms(b)))


def kernel(case):
    return op_cases.chosen(case.op, "triton")


def as_good_as_eager(case, stores):
    """The largest error / bound over outputs and gradients."""
    # The definition of the routed MLP rounds once, products in bf16 round three times.
    eager = op_cases.mask_loop if case.op == "routed_mlp" else getattr(reference, case.op)
    exact = results(case.changed(torch.Tensor.double), getattr(reference, case.op))
    worst = 0.0
    for got, want, truth in zip(
        results(case, kernel(case)), results(case, eager), exact, strict=True
    ):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        slack = stores * ROUNDING[got.dtype] * (2 if truth.numel() < 100 else 1)
        if truth.numel() < case.shape[0] * case.shape[1]:
            # a sum of terms that may come from values stored in the dtype of the rows
            slack += SUM + stores * ROUNDING[case.arguments[0].dtype]
        bound = 1.25 * rms(want.double() - truth) + slack * rms(truth) + ARITHMETIC
        error = rms(got.double() - truth)
        assert error <= bound, f"error {error:.3g} is above the bound {bound:.3g}"  # NaN is, too
        worst = max(worst, error / bound)
    return worst


def deterministic(case):
    for a, b in zip(results(case, kernel(case)), results(case, kernel(case)), strict=True):
        assert torch.equal(a, b), "two runs differ"


def nan_stays(case):
    """A NaN in the first token of the first argument appears in that token of the output only."""
    broken = case.changed(lambda x: x.clone())
    rows = broken.arguments[0].data.flatten(0, -2)
    rows[0, 0] = torch.nan
    first = broken.run(kernel(case))[0].flatten(0, -2).isnan().any(-1)
    assert first.nonzero().flatten().tolist() == [0], "NaN is lost or spreads"


def strided(case):
    """A view of half of the columns of a wider tensor gives the same result."""

    def widened(x):
        return torch.cat([x, x], -1)[..., x.shape[-1] :] if x.ndim > 1 else x.clone()

    if case.op == "routed_mlp":
        changed = case.changed(torch.clone)
        changed.arguments[0] = widened(case.arguments[0].detach()).requires_grad_()
    else:
        changed = case.changed(widened)
    for a, b in zip(results(changed, kernel(case)), results(case, kernel(case)), strict=True):
        assert_close(a, b, rtol=1e-5)


def one_graph(case):
    torch.compiler.reset()
    compiled = torch.compile(kernel(case), fullgraph=True)
    for a, b in zip(results(case, compiled), results(case, kernel(case)), strict=True):
        assert_close(a, b, rtol=1.6e-2 if a.dtype == torch.bfloat16 else 1.3e-6)


def empty(case):
    for y in case.run(kernel(case)):
        assert y.numel() == 0
    for gradient in torch.autograd.grad([y.sum() for y in case.run(kernel(case))], case.leaves()):
        assert not gradient.any()


def cases(device, quick):
    """(case, names of the checks): every operation at a few sizes."""
    samples, tokens = (2, 19) if quick else (4, 300)
    widths = (64, 66, 33, 1) if quick else (768, 1152, 66, 1001, 1)
    for dtype in (torch.float32, torch.bfloat16):
        for width in widths:
            checks = ["as_good_as_eager"]
            if width == widths[0]:
                checks += ["deterministic", "nan_stays", "strided"]
                # The interpreter does not compile, and inductor takes a minute without a GPU.
                checks += [] if torch.device(device).type == "cpu" else ["one_graph"]
            for case in op_cases.bandwidth_cases(samples, tokens, width, dtype, device):
                yield case, dtype, checks
            routed = (samples * tokens, width, 96 if width > 1 else 3, 5)
            yield op_cases.routed_case(*routed, dtype, device), dtype, checks
        for case in op_cases.bandwidth_cases(0, tokens, widths[0], dtype, device):
            yield case, dtype, ["empty"]
        yield op_cases.routed_case(0, widths[0], 96, 5, dtype, device), dtype, ["empty"]


def run(device, quick, deadline, write):
    """Run all checks and return the number of failures; `write` gets one row per error check."""
    # The interpreter truncates where a GPU rounds, and the routed MLP stores four times in a row.
    truncates = torch.device(device).type == "cpu"
    failures, done, left = 0, 0, 0
    without = set(ops.AUTO)
    for case, dtype, checks in cases(device, quick):
        without.discard(case.op)
        for name in checks:
            if deadline.passed():
                left += 1
                continue
            about = f"{name} {case.name} {tuple(case.shape)} {dtype}"
            try:
                if name == "as_good_as_eager":
                    stores = 4 if case.op == "routed_mlp" else 1
                    worst = as_good_as_eager(case, stores * (2 if truncates else 1))
                    write({
                        "case": case.name, "shape": "x".join(map(str, case.shape)),
                        "dtype": str(dtype).removeprefix("torch."), "backend": "triton",
                        "metric": "error of its bound", "value": worst, "unit": "",
                    })  # fmt: skip
                else:
                    globals()[name](case)
            except Exception:
                failures += 1
                print(f"FAILED {about}\n{traceback.format_exc()}", flush=True)
            else:
                done += 1
                print(f"ok {about}", flush=True)
    print(f"{done} checks passed, {failures} failed, {left} not run, the time is over", flush=True)
    if without:
        failures += 1
        print(f"FAILED: no case for {sorted(without)}: add it to op_cases.py", flush=True)
    return failures
