"""A language model's head: the extra passes end in front of it, and the divergence takes its part, without logits.

What the head is to the logits is found where they are made: what is called behind it (a scale, a cap, a bias) stands in
their graph, and the first step compares the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels.ops.divergence import KIND, REDUCTION, check_weight
from smart_kernels.ops.linear_divergence import CPU_BUDGET, GPU_BUDGET, SIDE, multiplies_narrow, of_checked
from smart_kernels.reference import compute_dtype
from smart_kernels.smart.config import Logits
from smart_kernels.smart.divergence import Classes
from smart_kernels.smart.embedding import outermost_having
from smart_kernels.smart.parallel import bare, gathering

SAME = {"AliasBackward0", "CloneBackward0", "ToCopyBackward0", "UnsafeViewBackward0", "ViewBackward0"}
SAME |= {"_DDPSinkBackward"}
"""Nodes of a graph that leave each number as it is, to rounding."""
_ROWS, _CLASSES, _ROUNDINGS = 16, 8192, 16
"""How many rows are compared with the logits, so many classes at a time; what is allowed, in roundings of a product."""


@dataclass
class HeadCall:
    """A call of the head in the clean pass.

    Attributes:
        hidden: what it got, in its graph.
        output: what it gave.
        node: of the output's graph, before anything could change it in place.
        autocast: whether it was on, and to what.
    """

    hidden: Tensor
    output: Tensor
    node: Any
    autocast: tuple[bool, torch.dtype]


class _Reached(BaseException):
    """A pass has come to the head: it ends here, and no ``except Exception`` of a model's holds it up."""


class Head:
    """The output embedding of a model, as ``get_output_embeddings()`` names it.

    Args:
        model: the model, wrapped or not.
        module: the head.

    Attributes:
        gates: the modules around the head, and itself, that gather shards; the outermost first.
        calls: those of the clean pass, until it is settled whether the divergence takes the head's part.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.calls: list[HeadCall] = []
        self._model = bare(model)
        self._module = module
        # Shards are gathered by hooks: whatever is done with the head is done inside of these modules' calls.
        self.gates = [m for m in gathering(model) if any(part is module for part in m.modules())]
        self._seen: Logits | None = None
        self._keeps = False
        self._bias: tuple[nn.Module, str] | None = None
        self._equal: set[tuple[float, float | None, bool]] = set()  # ways from the head to the logits that were tried
        self.temperature: float = 1.0
        self.softcap: float | None = None
        self._autocast = False, torch.float32

    # ------------------------------------------------------------------------------------------ in passes

    @contextmanager
    def read(self) -> Iterator[None]:
        """Keep the calls of this pass in :attr:`calls`."""
        self.calls = []

        def keep(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else kwargs.get("input")
            if isinstance(hidden, Tensor) and isinstance(output, Tensor):
                kind = output.device.type
                known = torch.amp.is_autocast_available(kind)
                autocast = known and torch.is_autocast_enabled(kind)
                dtype = torch.get_autocast_dtype(kind) if autocast else output.dtype
                self.calls.append(HeadCall(hidden, output, output.grad_fn, (autocast, dtype)))

        handle = self._module.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def stopped(self, keeps: bool = False) -> Iterator[None]:
        """The pass inside ends in front of the head; what it came to is :attr:`seen`.

        Args:
            keeps: also keep the head that the pass found there, where it is trained: a teacher's.
        """
        self._seen, self._keeps = None, keeps
        with ExitStack() as stack:
            for module in [*(m for m in self.gates if m is not self._module), self._module]:
                forward = self._begin if module is self._module else self._until(module.forward)
                stack.enter_context(_forward_of(module, forward))
                if module in self.gates:
                    stack.callback(module.register_forward_hook(self._leave).remove)
            with suppress(_Reached):
                yield

    @property
    def seen(self) -> Logits:
        """The hidden states, and the head that :meth:`stopped` was asked to keep: its weight, and its bias if any."""
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError(
                f"fuse_head: an extra pass did not come to the head, a {type(self._module).__name__}, as the ordinary "
                "pass has; expected the same calls in each, or fuse_head=False"
            )
        return seen

    def _begin(self, input: Tensor) -> Tensor:
        """In place of the product."""
        own: Logits = ()
        if self._keeps and any(p.requires_grad for p in self._module.parameters(recurse=False)):
            weight, bias = self.parameters()
            own = tuple(x.detach() for x in (weight, bias) if x is not None)
            if self.gates:  # what was gathered is freed
                own = tuple(x.clone() for x in own)
        if self.gates and input._base is not None:  # such a module warns of a view that it is to give
            input = input.clone()
        self._seen = input, *own
        if self._module not in self.gates:  # hooks of the user's are for logits: none comes to see hidden states
            raise _Reached
        return input

    def _until(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except _Reached:
                assert self._seen is not None
                return self._seen[0]

        return run

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Behind all hooks of a module."""
        if self._seen is not None:
            self._seen = output, *self._seen[1:]
            raise _Reached

    def entered_in_pairs(self) -> nn.Module | None:
        """A module around the head whose hooks a pass that ends within would leave unequal, as those of a timer."""
        for module in self._model.modules():
            hooked = module._forward_pre_hooks and module._forward_hooks and module not in self.gates
            if hooked and any(part is self._module for part in module.modules()):
                return module
        return None

    def inside(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """What a function of tensors gives where the head's parameters are whole."""
        for module in reversed(self.gates):
            function = _called_with(module, function)
        return function(*tensors)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, as the head has them now."""
        weight: Any = self._module.weight
        bias: Any = self._module.bias
        if self._bias is not None:
            module, name = self._bias
            more: Any = module._buffers[name]
            bias = more.flatten() if bias is None else bias + more.flatten()
        return weight, bias

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """The autocast that the head was called in."""
        kind = next(self._module.parameters()).device.type
        enabled, dtype = self._autocast
        if not torch.amp.is_autocast_available(kind):
            yield
            return
        with torch.autocast(kind, dtype if enabled else None, enabled):
            yield

    # ------------------------------------------------------------------------------ from the head to the logits

    def settle(self, call: HeadCall, logits: Tensor) -> str | None:
        """Find what makes logits of what the head gives; why that is not known, or None where it is.

        It reads a few numbers from the device for each way that was not tried before.
        """
        module = self._module
        if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
            return f"the head is a {type(module).__name__}, not a plain torch.nn.Linear"
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return "the head's weight is no parameter"
        if call.hidden.shape[:-1] != logits.shape[:-1] or logits.shape != call.output.shape:
            return f"the logits have shape {tuple(logits.shape)} where the head gives {tuple(call.output.shape)}"
        reason, cap, temperature, added = self._way(call, logits)
        if reason is not None:
            return reason
        self.softcap, self.temperature, self._autocast = cap, temperature, call.autocast
        key = temperature, cap, added
        if key in self._equal:
            return None
        for constant in self._constants(logits.size(-1)) if added else (None,):
            self._bias = constant
            if bool(self.inside(self._compared, call.hidden.detach(), logits.detach())):
                self._equal.add(key)
                return None
        self._bias = None
        return "the head, applied to the hidden states in front of it, does not give the logits"

    def _way(self, call: HeadCall, logits: Tensor) -> tuple[str | None, float | None, float, bool]:
        """The cap, the temperature and whether a constant is added, read from the logits' graph, backwards."""
        cap: float | None = None
        temperature, added = 1.0, False
        node: Any = logits.grad_fn
        place = logits.output_nr
        if node is None:
            return None if logits is call.output else "the logits have no graph", cap, temperature, added
        while node is not call.node:
            name = type(node).__name__
            unknown = f"{name.partition('Backward')[0]} comes behind the head", cap, temperature, added
            inputs = [following for following in node.next_functions if following[0] is not None]
            factor: Any = getattr(node, "_saved_other", None)
            if name == "_DDPSinkBackward" and len(inputs) > place:
                inputs = [inputs[place]]
            if len(inputs) != 1 or (added and name not in SAME):
                return unknown
            if name in ("MulBackward0", "DivBackward0") and _is_number(factor):
                # logits = tanh(z / cap) / temperature, or z / temperature
                by = float(factor) if name == "DivBackward0" else 1 / float(factor or float("nan"))
                if cap is None:
                    temperature *= by
                else:
                    cap *= by
            elif name == "TanhBackward0" and cap is None:
                cap = 1.0
            elif name == "AddBackward0" and cap is None:
                added = True
            elif name not in SAME:
                return unknown
            node, place = inputs[0]
        if cap is not None:
            temperature *= cap
        if not 0 < temperature < float("inf") or not 0 < (1.0 if cap is None else cap) < float("inf"):
            return f"the logits are scaled by {1 / temperature if temperature else temperature:g}", cap, 1.0, added
        return None, cap, temperature, added

    def _constants(self, classes: int) -> Iterator[tuple[nn.Module, str]]:
        """The buffers that may be a bias of the logits."""
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.numel() == classes and buffer.is_floating_point():
                    yield module, name

    @torch.no_grad()
    def _compared(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Whether some rows of the logits are what the head makes of the hidden states, to rounding."""
        dtype = compute_dtype(logits)
        weight, bias = self.parameters()
        if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _DTYPES:
            return hidden.new_zeros(())
        resolution = max(torch.finfo(x.dtype).eps for x in (hidden, weight, logits))
        if self._autocast[0]:
            resolution = max(resolution, torch.finfo(self._autocast[1]).eps)
        if not hidden.is_cpu and dtype == torch.float32:
            resolution = max(resolution, 2.0**-10)  # of products in TF32
        h, expected = (x.flatten(0, -2) for x in (hidden, logits))
        every = max(1, len(h) // _ROWS)
        h, expected = h[::every].to(dtype), expected[::every].to(dtype)
        equal = torch.ones((), dtype=torch.bool, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, len(weight), _CLASSES):
                part = slice(i, i + _CLASSES)
                w, c = weight[part].to(dtype), None if bias is None else bias[part].to(dtype)
                size = nn.functional.linear(h.abs(), w.abs(), None if c is None else c.abs())
                z = self.logits_of(nn.functional.linear(h, w, c))
                off = (z - expected[:, part]).abs() * self.temperature
                equal &= ~(off > _ROUNDINGS * resolution * size).any()  # what is NaN in both may be
        return equal

    def logits_of(self, z: Tensor) -> Tensor:
        """The logits, of what the head gives."""
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1 else z / self.temperature


class BehindHead(Classes):
    """A divergence of classes, of hidden states in front of a head: a tuple of one tensor (..., H).

    A teacher's tuple has the head's weight, and its bias if any, behind the hidden states. Of hidden states that are
    constants, as those of a pass whose graph is gone, the part in the head's gradient is taken with the other pass.

    On a CPU only the rows that are counted are projected. On other devices all are, those that are not counted with a
    weight of 0, as their number is not known to the host: to ask for it is to wait for the device.

    Args:
        head: the head.
        like: the divergence of the logits.
        detach_clean: whether the clean pass is a constant, and with it its part in the head's gradient.
    """

    def __init__(self, head: Head, like: Classes, detach_clean: bool) -> None:
        super().__init__(like._kind, like._weight, None, like._num_items)
        self._head = head
        self._detach_clean = detach_clean
        gathered = self._weight is not None and is_on_host(self._weight)
        self._rows = self._weight.flatten().nonzero().flatten() if self._weight is not None and gathered else None
        self._row_weight = None if gathered or self._weight is None else self._weight.flatten()

    def __call__(self, input: Logits, target: Logits) -> Tensor:
        """The mean over what is counted; 0 where nothing is."""
        return self._mean(self._total(input[0], target, frozen=False), input)

    def cotangent(self, input: Logits, target: Logits) -> Logits:
        """The gradient with respect to the hidden states `input`."""
        hidden = input[0].detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self._total(hidden, target, frozen=True), (hidden,))

    def _total(self, input: Tensor, target: Logits, frozen: bool) -> Tensor:
        """The sum over what is counted."""
        frozen |= not input.requires_grad  # a pass whose part in the head's gradient has been taken

        def of_hidden(a: Tensor, b: Tensor) -> Tensor:
            weight, bias = self._head.parameters()
            if frozen:
                weight, bias = weight.detach(), None if bias is None else bias.detach()
            own = (*target[1:], None, None)[:2]
            detached = SIDE if self._detach_clean and not b.requires_grad else 0
            scales = self._head.temperature, self._head.softcap
            options = REDUCTION["sum"], detached, KIND[self._kind], BETA, *scales, None
            with self._head.surroundings():
                return of_checked(a, b, (weight, bias, *own), check_weight(self._row_weight, a), options)

        return self._head.inside(of_hidden, self._counted(input), self._counted(target[0]))

    def _counted(self, hidden: Tensor) -> Tensor:
        hidden = hidden.flatten(0, -2)
        return hidden if self._rows is None else hidden.index_select(0, self._rows)

    def _pull(self, logits: Logits, cotangent: Callable[[Tensor], Tensor]) -> Logits:
        """A cotangent of the logits as one of the hidden states, in chunks of rows."""
        hidden = logits[0].detach()
        rows = self._counted(hidden)

        def pulled(rows: Tensor) -> Tensor:
            weight, bias = (None if x is None else x.detach() for x in self._head.parameters())
            assert weight is not None
            narrow = weight.dtype == torch.bfloat16 and multiplies_narrow(weight.device)
            dtype = weight.dtype if narrow else compute_dtype(weight)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            budget = CPU_BUDGET if weight.is_cpu else GPU_BUDGET
            size = max(1, budget // (len(weight) * compute_dtype(weight).itemsize * 6))
            parts = []
            for part in rows.split(size):
                h = part.to(dtype).requires_grad_()
                with torch.enable_grad(), torch.autocast(h.device.type, enabled=False):
                    z = self._head.logits_of(nn.functional.linear(h, weight, bias))
                    of_logits = cotangent(z.detach().to(compute_dtype(z)).softmax(-1)).to(dtype)
                    parts += torch.autograd.grad(z, h, of_logits)
            return torch.cat(parts) if parts else rows.to(dtype)

        grad = self._head.inside(pulled, rows)
        if self._row_weight is not None:
            grad = grad * self._row_weight.unsqueeze(-1)
        if self._rows is not None:
            whole = grad.new_zeros(hidden.shape[:-1].numel(), hidden.size(-1))
            grad = whole.index_copy(0, self._rows, grad)
        return (grad.view(hidden.shape),)


BETA = 0.5
"""The share of the target in "js", as :func:`smart_kernels.divergence` has it."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_on_host(x: Tensor) -> bool:
    """Whether the host knows what is in a tensor without waiting."""
    return x.is_cpu


def find_head(model: nn.Module) -> Head | None:
    """The head of a model, or of its only part that has one; None where there is none."""
    found: dict[int, nn.Module] = {}
    part: Any
    for part in outermost_having(bare(model), "get_output_embeddings"):
        try:
            module = part.get_output_embeddings()
        except (AttributeError, NotImplementedError):  # a library's way of saying that there is none
            continue
        if isinstance(module, nn.Module):
            found[id(module)] = module
    return Head(model, *found.values()) if len(found) == 1 else None


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.dim() and x.is_cpu


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of this module."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def _called_with(module: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function in the place of a module's forward."""

    def call(*tensors: Tensor) -> Tensor:
        with _forward_of(module, function):
            result: Tensor = module(*tensors)
        return result

    return call
