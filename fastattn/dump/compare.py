"""Whether results agree with the NumPy model, by the bounds of docs/debugging.md.

Each function returns a :class:`Verdict` and never raises for numbers. docs/numerics.md promises the
same bits for most operators, an error ratio for attention, and a table of bounds for latent
attention and logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastattn.dump.files import Array
from fastattn.reference import numerics


class Verdict(NamedTuple):
    """What a comparison found; `fits` is None where nothing could be compared."""

    fits: bool | None
    text: str


_FORMATS = {"float32": (23, -149), "bfloat16": (7, -133), "float16": (10, -24)}
#: An fp32 kernel's own exp and log, which NumPy takes from libm.
_FP32_SLACK = 1e-5


def _floats(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def same_bits(got: Array, want: Array) -> Verdict:
    """The same elements; any NaN is as good as another."""
    if got.shape != want.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(want.shape)}")
    if got.dtype.itemsize != want.dtype.itemsize:
        return Verdict(False, f"dtype {got.dtype}, expected {want.dtype}")
    raw = np.dtype(f"u{got.dtype.itemsize}")
    differ = np.ascontiguousarray(got).view(raw) != np.ascontiguousarray(want).view(raw)
    if got.dtype == want.dtype and (got.dtype.kind == "f" or "float" in got.dtype.name):
        differ &= ~(np.isnan(_floats(got)) & np.isnan(_floats(want)))
    if not differ.any():
        return Verdict(True, "the same bits")
    first = tuple(int(i) for i in np.argwhere(differ)[0])
    return Verdict(
        False,
        f"{int(differ.sum())} of {differ.size} elements differ, first at {list(first)}: "
        f"{got[first]} and {want[first]}",
    )


def _errors(got: Array, want: Array) -> Array:
    """|got - want|; 0 where both are the same NaN or infinity, inf where one alone is."""
    special = ~(np.isfinite(got) & np.isfinite(want))
    same = (np.isnan(got) & np.isnan(want)) | (got == want)
    with np.errstate(invalid="ignore"):
        return np.where(special, np.where(same, 0.0, np.inf), np.abs(got - want))


def within(got: Any, want: Any, bound: Any) -> Verdict:
    """|got - want| <= bound everywhere; NaN and infinities in the same places."""
    got, want = _floats(got), _floats(want)
    if got.shape != want.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(want.shape)}")
    if not got.size:
        return Verdict(True, "empty")
    errors = _errors(got, want)
    limit = np.broadcast_to(np.nan_to_num(bound, nan=0.0, posinf=0.0), got.shape)
    worst = np.unravel_index(int(np.argmax(errors - limit)), got.shape)
    at = [int(i) for i in worst]
    beyond = int((errors > limit).sum())
    text = f"worst at {at}: {got[worst]:.6g}, expected {want[worst]:.6g} +- {limit[worst]:.2g}"
    if beyond:
        text = f"{beyond} of {got.size} elements out of bound; {text}"
    return Verdict(beyond == 0, text)


def _step(values: Array, dtype: str) -> Array:
    """Distance of neighbouring numbers of a type."""
    bits, smallest = _FORMATS[dtype]
    size = np.maximum(np.abs(values), 2.0 ** (smallest + bits))
    return 2.0 ** np.maximum(np.floor(np.log2(size)) - bits, smallest)


def _largest(values: Array) -> Array:
    """Largest finite magnitude of each row [..., 1]."""
    return np.max(np.where(np.isfinite(values), np.abs(values), 0), -1, initial=0, keepdims=True)


def _root_mean_square(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def _and(first: Verdict, fits: bool, text: str) -> Verdict:
    """A second condition on top of one that holds."""
    return first if not first.fits or fits else Verdict(False, text)


def attention_output(got: Array, exact: Array, naive: Array, dtype: str) -> Verdict:
    """The error-ratio rule, for each token and head, and for all together.

    Parameters
    ----------
    got : array [T, H, D]
    exact, naive : array [T, H, D]
        The model in fp64, and in the precision of the kernel.
    dtype : str
        Of the result, which `naive` is rounded to.
    """
    got, exact = _floats(got), _floats(exact)
    rounded = _floats(naive)
    if dtype != "float32":
        kind = numerics.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        rounded = _floats(np.asarray(naive, np.float32).astype(kind))
    if got.shape != exact.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(exact.shape)}")
    naive_error = _errors(rounded, exact)
    size = _largest(exact)
    step, slack = _step(size, dtype), _FP32_SLACK * size
    row = within(got, exact, 2 * _largest(naive_error) + 2 * step + slack)
    # Roundings cancel over many elements, a wrong factor does not.
    typical = _root_mean_square(_errors(got, exact))
    allowed = 2 * _root_mean_square(naive_error)
    allowed += _root_mean_square(step) / 8 + _root_mean_square(slack)
    return _and(row, typical <= allowed, f"typical error {typical:.3g}, expected {allowed:.3g}")


def attention_codes(got: Array, exact: Array, naive: Array, scale: float, extra: Any) -> Verdict:
    """e4m3 codes of ``exact / scale``: each is what a value within the arithmetic's error gives."""
    exact = _floats(exact)
    slack = 2 * _largest(_errors(_floats(naive), exact)) + _FP32_SLACK * _largest(exact) + extra
    low, high, value = (
        _floats(numerics.from_codes(codes, "e4m3"))
        for codes in (
            numerics.quantize(exact - slack, np.float32(scale), "e4m3"),
            numerics.quantize(exact + slack, np.float32(scale), "e4m3"),
            np.asarray(got),
        )
    )
    with np.errstate(invalid="ignore"):
        fits = ((low <= value) & (value <= high)) | (np.isnan(exact) & np.isnan(value))
    wrong = int((~fits).sum())
    return Verdict(wrong == 0, f"{wrong} of {fits.size} codes out of bound")


def attention_lse(got: Array, exact: Array, naive: Array, extra: float = 0.0) -> Verdict:
    """LSE [H, T]: twice the naive model's largest error, and fp32's own exp and log."""
    exact = _floats(exact)
    errors = _errors(_floats(naive), exact)
    most = float(np.max(errors[np.isfinite(errors)], initial=0.0))
    size = np.where(np.isfinite(exact), exact, 0.0)
    return within(got, exact, 2 * most + _FP32_SLACK + 2 * _step(size, "float32") + extra)


def fp8_output(got: Array, exact: Array, magnitudes: Array, small: Array, dtype: str) -> Verdict:
    """Outputs of a GPU that rounds probabilities to e4m3.

    Parameters
    ----------
    got, exact : array [T, H, D]
    magnitudes : array
        The model over the magnitudes of V: a normal code of a probability is off by 2^-4 of it.
    small : array
        Bound of what probabilities below the smallest normal code add.
    dtype : str
    """
    got, exact = _floats(got), _floats(exact)
    bound = (2.0**-4 + 0.03) * magnitudes + small + _step(exact, dtype) + 1e-6
    each = within(got, exact, bound)
    typical = _root_mean_square(got - exact)
    allowed = 0.035 * _root_mean_square(exact) + 1e-6
    return _and(each, typical <= allowed, f"typical error {typical:.3g}, expected {allowed:.3g}")


def latent_output(got: Array, want: Array) -> Verdict:
    """Outputs of latent attention [T, H, 512]: the table of docs/numerics.md."""
    got, want = _floats(got), _floats(want)
    if got.shape != want.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(want.shape)}")
    if not np.array_equal(np.isnan(got), np.isnan(want)) or np.isinf(got).any():
        return Verdict(False, "NaN or infinities at other places")
    rows = ~np.isnan(want).any(-1)
    x, y = got[rows], want[rows]
    size = np.sqrt((y**2).sum(-1))
    if x[size == 0].any():
        return Verdict(False, "a query without a key has an output that is not 0")
    if not y.any():
        return Verdict(True, "all 0")
    whole = float(np.sqrt(((x - y) ** 2).sum() / (y**2).sum()))
    each = np.sqrt(((x - y) ** 2).sum(-1))[size > 0] / size[size > 0]
    apart, largest = np.abs(x - y), float(np.abs(y).max())
    wrong = apart > 2 / 128 * np.abs(y)
    far = wrong & (apart > 1e-3 * largest)
    text = f"relative RMS {whole:.2g}, of a row {each.max():.2g}, {int(far.sum())} elements far off"
    fits = whole <= 2.5e-3 and each.max() <= 1e-2 and (each > 5e-3).mean() <= 1e-2
    fits &= far.sum() <= max(2, 5e-3 * far.size) and not (wrong & (apart > 2**-8 * largest)).any()
    return Verdict(bool(fits), text)


def latent_lse(got: Array, want: Array, on_gpu: bool) -> Verdict:
    """LSE of latent attention; on a GPU keys may be rounded to 11 bits."""
    want = _floats(want)
    size = np.where(np.isfinite(want), np.abs(want), 0.0)
    rounded = 2.0**-9 * (1 + size) if on_gpu else 0.0
    return within(got, want, 5e-6 + 1e-6 * size + rounded)


def logits(got: Array, want: Array) -> Verdict:
    """Indexer logits: the same cells are -inf or NaN, the others agree together to 5e-6."""
    got, want = _floats(got), _floats(want)
    if got.shape != want.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(want.shape)}")
    if not (
        np.array_equal(np.isneginf(got), np.isneginf(want))
        and np.array_equal(np.isnan(got), np.isnan(want))
    ):
        return Verdict(False, "-inf or NaN in other cells")
    seen = np.isfinite(want)
    x, y = got[seen], want[seen]
    total = float((x * x + y * y).sum())
    apart = 1 - 2 * float((x * y).sum()) / total if total > 0 else 0.0
    return Verdict(apart < 5e-6, f"1 - 2 xy / (xx + yy) = {apart:.2g}, allowed 5e-6")


def selection(got: Array, scores: Array, want: Array, starts: Array | None) -> Verdict:
    """Top-k of logits that are computed on the way: whose logits differ by more than rounding.

    Parameters
    ----------
    got, want : array of int32, shape [rows, k]
        Indices relative to the row's first column, ascending, then -1.
    scores : array, shape [rows, columns]
        The model's logits.
    starts : array, shape [rows], optional
        First column of each row's range.
    """
    if got.shape != want.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(want.shape)}")
    swapped = 0
    for row, (ours, theirs) in enumerate(zip(got, want)):
        left, right = np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)
        if len(left) != len(right) or (left < 0).any() or (right < 0).any():
            return Verdict(False, f"row {row}: another number of indices")
        if not len(left):
            continue
        first = 0 if starts is None else int(starts[row])
        if int(left.max()) + first >= scores.shape[1]:
            return Verdict(False, f"row {row}: an index outside of the logits")
        finite = scores[row][np.isfinite(scores[row])]
        slack = 1e-4 * float(np.abs(finite).max(initial=0.0))
        gap = float(scores[row][right + first].max() - scores[row][left + first].min())
        if not gap <= slack:
            return Verdict(False, f"row {row}: a logit that is {gap:.3g} larger was left out")
        swapped += len(left)
    return Verdict(True, f"the same but for {swapped} whose logits are equal up to rounding")
