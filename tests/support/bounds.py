"""How wrong an attention result may be: the error-ratio rule.

An operator is compared with the exact (fp64) result, and so is a naive implementation of the same
precision. The operator's error may be at most twice the naive one's plus two rounding steps of the
output type, for every token and head apart, so that a large row never excuses a small one. Here no
tolerance is written down; latent attention and logits have those of docs/numerics.md.
"""

from __future__ import annotations

import numpy as np

from fastattn.reference import numerics

#: Mantissa bits behind the leading one, and the exponent of the smallest step.
_FORMATS = {"float32": (23, -149), "bfloat16": (7, -133), "float16": (10, -24), "e4m3": (3, -9)}

#: Accuracy of an fp32 kernel's own exp and log, which the naive version takes from libm.
_FP32_SLACK = 1e-5


def rounding_step(values, dtype: str) -> np.ndarray:
    """Distance of neighbouring `dtype` numbers at |values|."""
    bits, smallest = _FORMATS[dtype]
    magnitude = np.maximum(np.abs(np.asarray(values, np.float64)), 2.0 ** (smallest + bits))
    return 2.0 ** np.maximum(np.floor(np.log2(magnitude)) - bits, smallest)


def _errors(actual, exact) -> np.ndarray:
    """|actual - exact|; 0 where both are the same NaN or infinity, inf where only one is."""
    actual, exact = (np.asarray(x).astype(np.float64) for x in (actual, exact))
    assert actual.shape == exact.shape, f"shape {actual.shape} != {exact.shape}"
    special = ~(np.isfinite(actual) & np.isfinite(exact))
    same = (np.isnan(actual) & np.isnan(exact)) | (actual == exact)
    with np.errstate(invalid="ignore"):
        return np.where(special, np.where(same, 0.0, np.inf), np.abs(actual - exact))


def _largest(values) -> np.ndarray:
    """Largest finite magnitude of each row (the last axis)."""
    values = np.abs(np.asarray(values, np.float64))
    return np.max(np.where(np.isfinite(values), values, 0.0), axis=-1, initial=0.0)


def _fail_at(what: str, excess, actual, exact, bound) -> None:
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
    got, expected, allowed = (
        float(np.broadcast_to(np.asarray(x), excess.shape)[worst]) for x in (actual, exact, bound)
    )
    raise AssertionError(
        f"{what}: {int((excess > 0).sum())} of {excess.size} elements out of bound; worst at "
        f"{worst}: got {got!r}, expected {expected!r} +- {allowed!r}"
    )


def assert_error_ratio(actual, exact, naive, dtype: str, what: str = "out") -> None:
    """Hold `actual` to the error-ratio rule, row by row (the last axis) and as a whole.

    Parameters
    ----------
    actual : array [..., D]
        The operator's result.
    exact : array of float64 [..., D]
    naive : array [..., D]
        A naive implementation of the same precision, not yet rounded to `dtype`.
    dtype : {"float32", "bfloat16", "float16"}
        Type of `actual`.
    """
    rounded = np.asarray(naive, np.float64)
    if dtype != "float32":
        rounded = rounded.astype(np.float32).astype(_numpy_type(dtype)).astype(np.float64)
    error, naive_error = _errors(actual, exact), _errors(rounded, exact)
    if not error.size:
        return
    step = rounding_step(_largest(exact), dtype)
    slack = _FP32_SLACK * _largest(exact)  # seen in fp32 outputs only
    bound = (2 * _largest(naive_error) + 2 * step + slack)[..., None]
    excess = error - bound
    if not (excess <= 0).all():
        _fail_at(what, excess, actual, exact, bound)
    # Noise averages out over many elements, a wrong factor does not.
    typical = np.sqrt(np.mean(error**2))
    allowed = 2 * np.sqrt(np.mean(_finite(naive_error) ** 2))
    allowed += np.sqrt(np.mean(step**2)) / 8 + np.sqrt(np.mean(slack**2))
    assert typical <= allowed, f"{what}: typical error {typical:.3g} > {allowed:.3g}"


def assert_within(actual, exact, bound, what: str) -> None:
    """|actual - exact| <= bound everywhere; NaN and infinities in the same places."""
    excess = _errors(actual, exact) - np.where(np.isfinite(bound), bound, np.inf)
    excess = np.where(np.isnan(excess), 0.0, excess)  # both NaN, where the bound is, too
    if excess.size and not (excess <= 0).all():
        _fail_at(what, excess, actual, exact, bound)


def _finite(x):
    return np.where(np.isfinite(x), x, 0.0)


def _numpy_type(dtype: str):
    return numerics.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def assert_lse(actual, exact, naive, what: str = "lse") -> None:
    """LSE [H, T]: twice the naive version's largest error, and fp32's own exp and log."""
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.dtype == np.float32, f"{what}: dtype {actual.dtype}"
    error, naive_error = _errors(actual, exact), _finite(_errors(naive, exact))
    if not error.size:
        return
    size = np.where(np.isfinite(exact), np.abs(exact), 0.0)
    bound = 2 * naive_error.max() + _FP32_SLACK + 2 * rounding_step(size, "float32")
    excess = error - bound
    if not (excess <= 0).all():
        _fail_at(what, excess, actual, exact, bound)


def assert_codes(codes, exact, naive, scale: float, what: str = "codes", extra=0.0) -> None:
    """e4m3 codes of ``exact / scale``: each is what some value within the arithmetic's error gives.

    The allowance is twice the naive version's error before rounding, so that a code may differ from
    the exact one only where the exact value lies at a rounding boundary. `extra` is added to it.
    """
    codes = np.asarray(codes)
    assert codes.dtype == np.uint8, f"{what}: dtype {codes.dtype}"
    exact = np.asarray(exact, np.float64)
    slack = 2 * _largest(_finite(_errors(naive, exact))) + _FP32_SLACK * _largest(exact)
    slack = slack[..., None] + np.nan_to_num(extra, posinf=0.0)
    low, high, actual = (
        numerics.from_codes(c, "e4m3").astype(np.float64)
        for c in (
            numerics.quantize(exact - slack, np.float32(scale), "e4m3"),
            numerics.quantize(exact + slack, np.float32(scale), "e4m3"),
            codes,
        )
    )
    with np.errstate(invalid="ignore"):
        fits = ((low <= actual) & (actual <= high)) | (np.isnan(exact) & np.isnan(actual))
    if not fits.all():
        _fail_at(what, (~fits).astype(int), actual * scale, exact, slack)
