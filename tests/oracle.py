"""The truth that every kernel is held against: extended precision, one literal formula per op, no library code."""

from __future__ import annotations

import numpy as np
import torch

WIDE = np.longdouble


def wide(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """The very numbers of a tensor, in extended precision."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().double().numpy().astype(WIDE)


def definition(kind: str, p: np.ndarray, q: np.ndarray, x: np.ndarray, t: np.ndarray, beta: WIDE) -> tuple:
    """Of each class f(r) and f'(r) as multiples of q and p, and f - r f' of q: r = p / q = exp(t), x = p - q."""
    zero, small = np.zeros_like(p), np.abs(t) < 1
    u, v = np.where(small, np.expm1(t), x / q), np.where(small, np.expm1(-t), -x / p)

    def times(mass: np.ndarray, factor: np.ndarray) -> np.ndarray:
        return np.where(mass == 0, 0, mass * factor)

    if kind == "symmetric_kl":
        return x * t, times(p, t) + x, times(q, -t) - x
    if kind == "kl":
        return np.where(small, times(q, u - t), x + times(q, -t)), x, times(q, -t)
    if kind == "reverse_kl":
        return np.where(small, times(p, v + t), times(p, t) - x), times(p, t), -x
    if kind == "js":
        log_q = np.where(t < 0, np.log1p((1 - beta) * u), np.log1p(beta * v) + t)  # log(m / q)
        log_p = np.where(t < 0, np.log1p((1 - beta) * u) - t, np.log1p(beta * v))  # log(m / p)
        log_q, log_p = np.where(small, np.log1p((1 - beta) * u), log_q), np.where(small, np.log1p(beta * v), log_p)
        of_q, of_p = (1 - beta) * x - times(q, log_q), -beta * x - times(p, log_p)
        return beta * of_q + (1 - beta) * of_p, -(1 - beta) * times(p, log_p), -beta * times(q, log_q)
    if kind == "hellinger":
        y = np.where(small, np.sqrt(q) * np.expm1(t / 2), np.sqrt(p) - np.sqrt(q))
        return y * y / 2, np.sqrt(p) * y / 2, -np.sqrt(q) * y / 2
    assert kind == "total_variation"
    return np.abs(x) / 2, p * np.sign(x) / 2, q * np.sign(-x) / 2 + zero


class Divergence:
    """Loss of each row (...) of logits a, b (..., C), and its gradients, in extended precision.

    The centred formula is exact to the dtype's last digits at any distance of a and b: with 64 bits of mantissa
    and differences of 1e-6 there remain 13 digits.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        kind: str = "symmetric_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        self.dtypes, self.kind = (a.dtype, b.dtype), kind
        a, b = wide(a), wide(b)
        self.factor = 1 / WIDE(temperature)
        with np.errstate(all="ignore"):
            absent = np.isneginf(a) & np.isneginf(b)
            top_a, top_b = a.max(-1, keepdims=True), b.max(-1, keepdims=True)
            p, q = np.exp((a - top_a) * self.factor), np.exp((b - top_b) * self.factor)
            sum_a, sum_b = p.sum(-1, keepdims=True), q.sum(-1, keepdims=True)
            p, q = p / sum_a, q / sum_b
            d = np.where(absent, 0, a - b)
            centre = np.take_along_axis(d, b.argmax(-1)[..., None], -1)
            centre = np.where(np.isfinite(centre), centre, top_a - top_b)
            d, centre, tops = d * self.factor, centre * self.factor, (top_a - top_b) * self.factor
            # One that is infinite is resolved; it leaves no less to the rounding of the probabilities than 1 does.
            self.distance = np.where(np.isfinite(d), np.abs(d), 1).max(-1)
            d = np.where(absent, 0, d - centre)
            s = np.where(
                np.abs(d).max(-1, keepdims=True) < 1,
                np.log1p((q * np.expm1(d)).sum(-1, keepdims=True)),
                np.log(sum_a / sum_b) + (tops - centre),
            )
            t = np.where(absent, 0, d - s)
            x = np.where(np.abs(t) < 1, q * np.expm1(t), p - q)
            self.undefined = ~np.isfinite(top_a[..., 0]) | ~np.isfinite(top_b[..., 0])
            self.undefined |= np.isnan(a).any(-1) | np.isnan(b).any(-1)
            without_p, without_q = ((np.isneginf(y) & ~absent).any(-1) for y in (a, b))
            infinite = np.zeros_like(self.undefined)
            if kind in ("symmetric_kl", "kl"):
                infinite = infinite | without_p
            if kind in ("symmetric_kl", "reverse_kl"):
                infinite = infinite | without_q
            term, *slopes = (np.where(absent, 0, y) for y in definition(kind, p, q, x, t, WIDE(beta)))
            self.loss = np.where(self.undefined, np.nan, np.where(infinite, np.inf, term.sum(-1)))
            means = [slope.sum(-1, keepdims=True) for slope in slopes]
            self.grads = tuple(
                (slope - mass * mean) * self.factor for slope, mass, mean in zip(slopes, (p, q), means, strict=True)
            )
            self.detached = x * self.factor, -x * self.factor
            reach = np.where(np.isfinite(t), np.abs(t), 0) + self.distance[..., None]
            means = [np.abs(mean) for mean in means]
            first_order = 0.5 if kind == "total_variation" else 0
            self.terms = tuple(
                (mass * (reach + mean + first_order) + np.abs(x)) * self.factor
                for mass, mean in zip((p, q), means, strict=True)
            )
            self.subnormal = 2.0**-126 * (reach + sum(means) + 1) * self.factor
            # Where p and q are equal but for the rounding of their logits, the sign of a total variation is open.
            self.open = np.where(np.abs(t) <= 2.0**-20 * self.distance[..., None], (p, q), 0).sum(-1) * self.factor
            if torch.float64 in self.dtypes or kind != "total_variation":
                self.open = self.open * 0

    def check_loss(self, loss: torch.Tensor) -> None:
        """Each row's loss within 1e-5 of it, plus what fp32 differences of the logits can resolve."""
        compare(wide(loss), self.loss, self.loss_bar(), "loss")
        assert (wide(loss)[~self.undefined] >= 0).all()

    def loss_bar(self) -> np.ndarray:
        """What the loss of each row may be off by."""
        relative, resolved = (1e-12, 1e-12) if torch.float64 in self.dtypes else (1e-5, 2.0**-21)
        with np.errstate(invalid="ignore"):
            order = 1 if self.kind == "total_variation" else np.sqrt(self.loss)  # a loss of first order in t
            return relative * self.loss + resolved * self.distance * order

    def check_grads(self, *grads: torch.Tensor, scale: float | np.ndarray = 1.0, detach_targets: bool = False) -> None:
        """Both gradients (an empty one is passed over) of the rows' losses times ``scale``, for all or for each."""
        truths = self.detached if detach_targets else self.grads
        sides = zip(("input", "target"), grads, truths, self.terms, self.open, self.dtypes, strict=True)
        defined = np.isfinite(self.loss)
        factor = np.broadcast_to(np.asarray(scale, WIDE), self.loss.shape)[defined]
        scale = np.abs(factor)
        for name, grad, truth, terms, open_, dtype in sides:
            if not grad.numel() and truth.size:
                continue
            assert grad.dtype == dtype
            error = np.abs(wide(grad)[defined] - truth[defined] * factor[..., None])
            if dtype in (torch.float32, torch.float64):
                relative, resolved = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 2.0**-20)
                norm = np.sqrt((truth[defined].astype(np.float64) ** 2).sum(-1))
                error = np.sqrt((error.astype(np.float64) ** 2).sum(-1))
                distance = self.distance[defined] * self.factor
                bar = scale * (relative * norm + resolved * distance + 2 * open_[defined])
            else:
                # One unit in the last place. Where the terms of the gradient cancel (it crosses zero somewhere in
                # any long row) fp32 arithmetic leaves a few of its own units of the terms: 2^-20 of them, the
                # logits' differences that enter them included. A probability that would be subnormal may be 0.
                fp32 = 2.0**-20 * terms[defined] + self.subnormal[defined] + 2 * open_[defined][..., None]
                bar = ulp(truth[defined] * scale[..., None], dtype) + scale[..., None] * fp32
            compare(error, np.zeros_like(error), bar, f"gradient of {name}")


class LinearDivergence:
    """The divergence of the logits h W^T + c of two hidden states (N, H): losses of rows, and gradients of their sum.

    In the order of the arguments. `reach` is the largest |h_a - h_b| |W_j| of a row and a class.
    """

    def __init__(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor,
        target_head: torch.Tensor | None = None,
        target_bias: torch.Tensor | None = None,
        softcap: float | None = None,
        **options: object,
    ) -> None:
        h_a, h_b, w_a, c_a = map(wide, (input, target, head, bias))
        w_b, c_b = (w_a, c_a) if target_head is None else (wide(target_head), wide(target_bias))
        a, b = h_a @ w_a.T + c_a, h_b @ w_b.T + c_b
        slopes = np.ones_like(a), np.ones_like(b)
        if softcap is not None:
            a, b = np.tanh(a / softcap), np.tanh(b / softcap)
            slopes = 1 - a**2, 1 - b**2
            a, b = softcap * a, softcap * b
        truth = Divergence(a, b, **options)
        self.loss = truth.loss
        g_a, g_b = (slope * grad for slope, grad in zip(slopes, truth.grads, strict=True))
        heads = [g_a.T @ h_a, g_a.sum(0)], [g_b.T @ h_b, g_b.sum(0)]
        heads = [x + y for x, y in zip(*heads, strict=True)] if target_head is None else [*heads[0], *heads[1]]
        self.grads = g_a @ w_a, g_b @ w_b, *heads
        widths = np.sqrt((w_a**2).sum(1)).max()
        self.reach = np.sqrt(((h_a - h_b) ** 2).sum(1)).max() * widths if target_head is None else 0


class PerturbationStep:
    """delta (B, ..., H) after a step along grad and the projection, in extended precision; mask (B, ...) or None."""

    def __init__(
        self,
        delta: torch.Tensor,
        grad: torch.Tensor,
        mask: torch.Tensor | None,
        step_size: float,
        epsilon: float,
        norm: str,
        scope: str,
        ascent: str,
    ) -> None:
        self.dtype, self.norm, self.epsilon = delta.dtype, norm, epsilon
        self.dims = dims = -1 if scope == "token" else tuple(range(1, delta.dim()))
        self.kept = kept = np.ones((*delta.shape[:-1], 1), bool) if mask is None else (wide(mask) != 0)[..., None]
        delta, g = np.where(kept, wide(delta), 0), np.where(kept, wide(grad), 0)
        finite = np.isfinite(g).all(dims, keepdims=True)
        self.skipped = int((~finite).sum())
        g = np.where(finite, g, 0)
        size = self._norm(g) if ascent == "normalized" else WIDE(1)
        step = step_size * (np.sign(g) if ascent == "sign" else g / np.where(size == 0, 1, size))
        v = delta + step
        if norm == "linf":
            self.result = np.clip(v, -WIDE(epsilon), WIDE(epsilon))
            # Where the result is within the ball, the step is no longer than |delta| + epsilon. Four roundings of
            # delta and of the step, and the ball's own radius in the dtype of delta.
            self.bar = 4 * self._eps() * (2 * np.abs(delta) + epsilon)
        else:
            size = self._norm(v)
            keep = np.where(size > epsilon, epsilon / np.where(size == 0, 1, size), 1)
            self.result = v * keep
            # Four roundings of both terms and, as the result's norm must not exceed epsilon, of their norms' sum.
            total = self._norm(delta) + self._norm(step)
            relative = np.where(size == 0, 0, total / np.where(size == 0, 1, size))
            terms = np.abs(delta) + np.abs(step) + np.abs(v) * relative
            self.bar = 4 * self._eps() * keep * terms
            if self.dtype == torch.float64:  # the sums' own error, here no longer far below the rest's
                self.bar = self.bar + 1e-12 * keep * terms * relative

    def check(self, out: torch.Tensor, skipped: torch.Tensor | None = None) -> None:
        """Close to the truth, exactly within the ball, exactly 0 where masked, as often skipped."""
        assert out.dtype == self.dtype
        value = wide(out)
        # A step's length may be subnormal: half of the smallest number off, times at most 2, and its product as much.
        smallest = torch.finfo(self.dtype).smallest_normal * self._eps()
        compare(value, self.result, self.bar + 2 * smallest, "delta")
        assert (value[np.broadcast_to(~self.kept, value.shape)] == 0).all()
        largest = np.abs(value).max(initial=0) if self.norm == "linf" else self._norm(value).max(initial=0)
        assert largest <= self.epsilon
        assert skipped is None or skipped.item() == self.skipped

    def _eps(self) -> float:
        return torch.finfo(self.dtype).eps

    def _norm(self, x: np.ndarray) -> np.ndarray:
        if self.norm == "linf":
            return np.abs(x).max(self.dims, keepdims=True, initial=0)
        return np.sqrt((x * x).sum(self.dims, keepdims=True))


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10 of 128-bit counters (..., 4) of 32-bit words, as Salmon et al. (2011) give it."""
    words = [counter[..., i].astype(np.uint64) for i in range(4)]
    low = np.uint64(0xFFFFFFFF)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        a, b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        words = [(b >> shift) ^ words[1] ^ key[0], b & low, (a >> shift) ^ words[3] ^ key[1], a & low]
        key = [key[0] + np.uint64(0x9E3779B9) & low, key[1] + np.uint64(0xBB67AE85) & low]
    return np.stack(words, -1).astype(np.uint32)


def normal(seed: int, numel: int) -> np.ndarray:
    """The first numbers of N(0, 1) of a seed: of 64 in a row, counter 16 i + j makes those at j + (0, 16, 32, 48)."""
    counter = np.zeros((-(-numel // 64) * 16, 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    words = philox(seed, counter)
    # The uniform numbers are those of fp32; all that follows is exact.
    uniform = (words[:, ::2] >> 1).astype(np.float32) * np.float32(2**-31) + np.float32(2**-32)
    radius = np.sqrt(-2 * np.log(uniform.astype(WIDE)))
    angle = words[:, 1::2].astype(WIDE) * (2 * np.pi / 2**32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)  # (counter, pair, number)
    return pairs.reshape(-1, 16, 4).transpose(0, 2, 1).reshape(-1)[:numel]


class Ema:
    """e + (1 - decay)(p - e) in extended precision, which leaves 2^-11 of a bit of float64."""

    def __init__(self, e: torch.Tensor, p: torch.Tensor, decay: float) -> None:
        self.dtype = e.dtype
        with np.errstate(invalid="ignore"):
            kept, gained = WIDE(decay) * wide(e), (1 - WIDE(decay)) * wide(p)
            self.result = np.where(np.isfinite(kept) & np.isfinite(gained), kept + gained, wide(e) + gained - wide(e))
            self.size = np.abs(kept) + np.abs(gained)

    def check(self, after: torch.Tensor) -> None:
        """Within one unit in the last place of the result, and of the smallest number where it is subnormal.

        Where both terms cancel, twice the precision of the arithmetic is what is left, 2^-44 of the terms for fp32, and
        of this class 2^-63. Parts of a number that are smaller than the smallest, four at most, are lost altogether.
        """
        info = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32)
        resolution = max(4 * WIDE(info.eps) ** 2, np.finfo(WIDE).eps)
        bar = ulp(self.result, self.dtype) + self.size * resolution + 4 * WIDE(info.smallest_normal) * info.eps
        compare(wide(after), self.result, bar, "shadow")


def compare(value: np.ndarray, truth: np.ndarray, bar: np.ndarray, what: str) -> None:
    """Equal where not finite, within the bar elsewhere; the worst place is named."""
    assert value.shape == truth.shape, what
    odd = ~np.isfinite(truth)
    if odd.any():
        np.testing.assert_array_equal(value[odd].astype(np.float64), truth[odd].astype(np.float64), err_msg=what)
    with np.errstate(invalid="ignore"):
        excess = np.where(odd, 0, np.abs(value - truth) - bar)
    if excess.size and not (excess <= 0).all():  # NaN is no agreement
        at = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        raise AssertionError(f"{what} at {at}: {value[at]!r}, truth {truth[at]!r}, allowed {bar[at]!r}")


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance of two neighbouring numbers of a dtype at |x|."""
    info = torch.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(x.astype(np.float64)), info.tiny)))
    return np.exp2(exponent) * info.eps
