"""The kinds of divergences in Triton: of each one function, as in `reference.py`, and the mathematics that they need.

Each gets p, q, x = p - q and t = log(p / q) of some classes, and returns what `reference.Parts` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smart_kernels import reference

_SMALL = tl.constexpr(reference.SMALL)


@triton.jit
def tanh_half(t):
    """tanh(t / 2) for |t| <= 0.5: to 3e-9 of it by a minimax polynomial, in fp64 to 1e-16 by a continued fraction."""
    u = t * t
    if t.dtype == tl.float64:
        u *= 0.25
        return 0.5 * t / (1 + u / (3 + u / (5 + u / (7 + u / (9 + u / 11)))))
    return t * (0.5 + u * (-0.04166655011 + u * (0.004163823945 - u * 0.0004017970926)))


@triton.jit
def symmetric_kl(p, q, x, t, DETACH: tl.constexpr):
    """KL(p||q) + KL(q||p), with the target distribution of each of the two as a constant or not."""
    return (x * t, x, -x) if DETACH else (x * t, p * t + x, -q * t - x)


@triton.jit
def kl(p, q, x, t):
    """KL(q||p)."""
    return _excess(q, x, t), x, -_mass_times(q, t)


@triton.jit
def reverse_kl(p, q, x, t):
    """KL(p||q)."""
    return _excess(p, -x, -t), -_mass_times(p, -t), -x


@triton.jit
def js(p, q, x, t, beta):
    """The sum beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p."""
    rest = 1 - beta
    m = beta * q + rest * p
    log_mq, log_mp = _log_ratio(q, m, rest * x), _log_ratio(p, m, -beta * x)
    of_q, of_p = _excess(q, rest * x, log_mq), _excess(p, -beta * x, log_mp)
    return beta * of_q + rest * of_p, -rest * p * log_mp, -beta * q * log_mq


@triton.jit
def hellinger(p, q, x, t):
    """1/2 Σ (sqrt p - sqrt q)^2."""
    root_p, root_q = tl.sqrt(p), tl.sqrt(q)
    y = tl.where(x == 0, 0, x / (root_p + root_q))
    return 0.5 * y * y, 0.5 * root_p * y, -0.5 * root_q * y


@triton.jit
def total_variation(p, q, x, t):
    """1/2 Σ |p - q|; f' and g but for a constant, so that each sum is that of a side's smaller part (`centred`)."""
    sign = tl.where(x > 0, 0.5, tl.where(x < 0, -0.5, 0))
    return 0.5 * tl.abs(x), p * (sign - 0.5), -q * (sign + 0.5)


@triton.jit
def parts(p, q, x, t, beta, KIND: tl.constexpr, DETACH: tl.constexpr):
    """Those of a kind: of the symmetric KL, its target detached or not, where the logits' difference is given."""
    if KIND == "symmetric_kl":
        return symmetric_kl(p, q, x, t, DETACH)
    elif KIND == "kl":  # noqa: RET505 - what stands behind a return is compiled, too
        return kl(p, q, x, t)
    elif KIND == "reverse_kl":
        return reverse_kl(p, q, x, t)
    elif KIND == "js":
        return js(p, q, x, t, beta)
    elif KIND == "hellinger":
        return hellinger(p, q, x, t)
    else:
        tl.static_assert(KIND == "total_variation")
        return total_variation(p, q, x, t)


@triton.jit
def centred(p, slope, mean, other_mean, loss, KIND: tl.constexpr):
    """A side's p (f' - Σ p f'), given the sums of both sides; see `reference.centred`."""
    if KIND == "total_variation":
        other = loss - other_mean
        return -p * tl.where(slope == -0.5 * p, 0.5 * (mean + other), tl.where(slope == 0, mean, other))
    else:  # noqa: RET505 - as above
        return slope - p * mean


@triton.jit
def of_both(q, x, term, mean, loss, KIND: tl.constexpr):
    """The sum of both sides' gradients; see `reference.of_both`."""
    return term - q * loss - x * (mean + 0.5 if KIND == "total_variation" else mean)


@triton.jit
def _mass_times(q, log):
    """Of q log(p / q), 0 where q is masked. Where p is, alone, 0 inf or -inf: no number that a loss could have."""
    return tl.where(log == float("inf"), 0, q * log)


@triton.jit
def _excess(q, x, log):
    """The difference x - q log((q + x) / q) >= 0, given the logarithm: a series for q (expm1(log) - log) if small."""
    if q.dtype == tl.float64:
        series = tl.full(q.shape, 1, q.dtype)
        for k in tl.static_range(16, 2, -1):
            series = 1 + series * log / k
        series *= 0.5
    else:  # minimax, to 8e-8 of it
        series = 8.3335790166981994e-3 + log * (1.3996176313225246e-3 + log * 1.9849814572305420e-4)
        series = 0.50000003853157625 + log * (0.16666663985703641 + log * (4.1665358598777233e-2 + log * series))
    near = (tl.abs(log) <= _SMALL) & (q != 0)
    return tl.where(near, q * (log * log * series), x - _mass_times(q, log))


@triton.jit
def _log_ratio(q, m, x):
    """log(m / q) of a mixture m = q + x > 0; 0 where q is. Near 1, 2 atanh(x / (m + q)) by its series."""
    z = x / (m + q)
    u = z * z
    if q.dtype == tl.float64:
        series = tl.full(q.shape, 1 / 27, q.dtype)
        for k in tl.static_range(12, -1, -1):
            series = series * u + 1 / (2 * k + 1)
    else:
        series = 1 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11)))))
    far = tl.log(tl.minimum(m / q, 3e38))
    return tl.where(q == 0, 0, tl.where(tl.abs(z) <= 0.25, 2 * z * series, far))
