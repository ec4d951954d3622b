"""What a user's function did with a model, so that it can be done again without the function.

While the clean pass runs, each call of a module from outside of the model is recorded, with its arguments as they were;
so is each torch function that is applied to a result. It is then known which of these led to a tensor of logits, and
only those are repeated. The function's loss, metrics, counters, random augmentation and other calls run once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from smart_kernels.smart.parallel import without_reducer
from smart_kernels.smart.state import Assignment, Generators, States, set_states, version
from smart_kernels.smart.structure import PLAIN, Filled, copied, leaves, mapped, tensors

OUTPUT_NAMES = ("logits", "scores", "sentence_embedding")
"""How models call their result, in an object or a mapping."""


class _Value:
    """In recorded arguments: the result of an earlier call, by number."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class _Constant:
    """In recorded arguments: a tensor or another object that did not come from the model."""

    __slots__ = ("value", "version")

    def __init__(self, value: Any, version: int | None = None) -> None:
        self.value = value
        self.version = version  # where the value itself is kept, and not a copy


class _Unknown:
    """In recorded arguments: a tensor with a graph that nothing recorded has made."""


@dataclasses.dataclass
class Surroundings:
    """What a call depends on besides its arguments: grad mode, autocast, which modules train."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    training: tuple[bool, ...] = ()

    @contextmanager
    def restored(self, modules: Sequence[nn.Module], grad: bool) -> Iterator[None]:
        """The same again."""
        changed = [(m, m.training) for m, t in zip(modules, self.training, strict=False) if m.training != t]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            for module, training in changed:
                module.training = not training
            try:
                yield
            finally:
                for module, training in changed:
                    module.training = training


@dataclasses.dataclass
class _Node:
    function: Callable[..., Any]
    arguments: Any
    reads: set[int]
    writes: set[int]
    unknown: bool
    surroundings: Surroundings
    generators: States
    outputs: dict[int, int] = dataclasses.field(default_factory=dict)
    """Number by place among the output's leaves."""
    embeddings: range = range(0)
    assigned: int = 0
    """How many of the assignments of :class:`Recording` were made before."""
    output: Any = None
    """Of a call: its output, as long as the recording goes on."""
    call: bool = False
    forwards: tuple[Any, ...] = ()
    """Of a call: what stands in the place of the modules' own ``forward``."""
    results: frozenset[int] = frozenset()
    """Of a call: the numbers of what it gave by the name of a result, or of all that it gave."""
    returned: frozenset[int] = frozenset()
    """Of a call: the numbers of what it got by the name of a result, in a mapping."""
    judges: bool = False
    """Of a call: whether it is of a loss, an activation or a metric, so that what it was given still is a result."""


class Recording(TorchFunctionMode):
    """Records, within this mode, what is done with a model.

    Args:
        model: the model, wrapped or not.
        modules: of the model.
        parameters: the model's, their devices by id.
        entries: the modules that are called from outside of the model, as far as they are known; None for any.
        generators: whose states are kept with each call.
        count: tells how often the module to perturb has been called.
        moved: tells what has become of attributes, and of whatever else calls depend on, since it was asked last: what
            was assigned, and whether anything else was changed.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        parameters: Mapping[int, torch.device],
        entries: set[nn.Module] | None,
        generators: Generators | None,
        count: Callable[[], int] = lambda: 0,
        moved: Callable[[], tuple[list[Assignment], bool]] = lambda: ([], False),
    ) -> None:
        super().__init__()
        self._model = model
        self._generators = generators
        self._count = count
        self._moved = moved
        self._assigned: list[Assignment] = []  # by the function, between calls
        self._set_apart = False  # whether it has changed otherwise what calls depend on
        self._modules = modules
        self._entries = entries
        self._parameters = parameters
        self._numbers: Any = WeakTensorKeyDictionary()
        self._made_as: dict[int, _Mark] = {}  # by number
        self._taken = False  # whether a value has been read out of a tensor that came from the model
        self._objects: dict[int, tuple[Any, int]] = {}  # by id: kept alive, so that ids stay unique
        self._next = 0
        self._depth = 0
        self._inner: tuple[nn.Module, _Node] | None = None
        self._kinds = sorted({"cpu", *(d.type for d in set(parameters.values()))})
        self.nodes: list[_Node] = []
        self.called: set[nn.Module] = set()

    # ---------------------------------------------------------------------------------------------- recording

    def __enter__(self) -> Any:
        """Begin: the modules tell when they are called."""
        self._installed = [(m, m.__dict__.get("_compiled_call_impl")) for m in self._listening()]
        for module, compiled in self._installed:
            run = module._call_impl if compiled is None else compiled
            module.__dict__["_compiled_call_impl"] = self._caller(module, run)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """End: the modules are as they were."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for module, compiled in self._installed:
            if compiled is None:
                module.__dict__.pop("_compiled_call_impl", None)
            else:
                module.__dict__["_compiled_call_impl"] = compiled

    def _listening(self) -> list[nn.Module]:
        if self._entries is None:
            return list(outside_compiled(self._model))
        inner = {self._model.module} if isinstance(self._model, DistributedDataParallel) else set()
        return list(self._entries | {self._model} | inner)

    def _caller(self, module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return run(*args, **kwargs)
            if self._depth:
                if self._inner is not None and self._inner[0] is module:
                    # the reducer may have moved or cast what it was given
                    node = self._inner[1]
                    self._inner = None
                    node.arguments, node.reads, node.writes, node.unknown = self._kept((args, kwargs), clone=True)
                return run(*args, **kwargs)
            with self._paused():
                return self._record(module, run, args, kwargs)

        return call

    def _record(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module from outside of the model."""
        self.called.add(module)
        inner = without_reducer(module)
        node = self._node(inner, (args, kwargs), call=True)
        assigned, others = self._moved()
        self._assigned += assigned
        self._set_apart |= others or not all(self._may_be_set_again(value) for _, _, value in assigned)
        node.assigned = len(self._assigned)
        node.unknown |= self._set_apart or (self._taken and any(type(x) is float for x in leaves((args, kwargs))))
        self._inner = None if inner is module else (inner, node)
        node.returned = self._named(x for x in (*args, *kwargs.values()) if isinstance(x, Mapping))
        given = [(x.shape, self._numbers.get(x) is not None) for x in tensors((args, kwargs))]
        begin = self._count()
        self._depth += 1
        try:
            output = run(*args, **kwargs)
        finally:
            self._depth -= 1
            self._inner = None
        self._moved()  # what the model changes itself, it changes again
        node.embeddings = range(begin, self._count())
        node.output = dict(output) if isinstance(output, Mapping) else output  # others may fill it further
        node.judges = _judges(inner, given, output)
        self._made(node, output)
        node.results = self._named([output]) or frozenset(node.outputs.values())
        self.nodes.append(node)
        return output

    def _may_be_set_again(self, value: Any) -> bool:
        """Whether an attribute's value is the same in every pass, and no pass changes it."""
        if isinstance(value, Tensor):
            return value.grad_fn is None and self._numbers.get(value) is None
        return isinstance(value, (*PLAIN, nn.Module)) or callable(value)

    def _named(self, outputs: Iterable[Any]) -> frozenset[int]:
        """The numbers of what is a result by its name."""
        found = [part(output, name) for output in outputs for name in OUTPUT_NAMES]
        numbers = [self._numbers.get(x) for x in found if isinstance(x, Tensor)]
        return frozenset(n for n in numbers if n is not None)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Inside of the model nothing is recorded, and nothing is slower."""
        if torch.overrides._get_current_function_mode() is not self:
            yield
            return
        torch.overrides._pop_mode()
        try:
            yield
        finally:
            torch.overrides._push_mode(self)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record what is applied to something that came from the model, if tensors come of it or are changed."""
        kwargs = kwargs or {}
        if self._depth or torch.compiler.is_compiling() or not self._of_model((args, kwargs)):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        self._taken |= name in _TAKING
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        changes = "out" in kwargs or name in _IN_PLACE or name in _ON_GRAPHS or in_place
        again = functools.partial(_where_followed, func) if name in _ON_GRAPHS else func
        node = self._node(again, (args, kwargs), changes=changes)
        node.unknown |= self._taken or (name in _KEEPING and self._keeps(args, kwargs))
        result = func(*args, **kwargs)
        if changes or any(isinstance(x, Tensor) for x in leaves(result)):
            if changes:
                for tensor in tensors((args, kwargs)):
                    self._changed(node, tensor)
            self._made(node, result)
            self.nodes.append(node)
        return result

    def _keeps(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether statistics are kept, in buffers of a module that was called unheard, as no call of it was known."""
        return any(isinstance(x, Tensor) for x in (*args[1:2], kwargs.get("running_mean")))

    def _of_model(self, arguments: Any) -> bool:
        return any(self._numbers.get(x) is not None or id(x) in self._parameters for x in tensors(arguments))

    def _node(self, function: Callable[..., Any], arguments: Any, call: bool = False, changes: bool = False) -> _Node:
        kept, reads, writes, unknown = self._kept(arguments, clone=call or changes)
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self._kinds
            if torch.amp.is_autocast_available(kind)
        )
        training = tuple([m.training for m in self._modules]) if call else ()
        forwards = self._forwards() if call else ()
        surroundings = Surroundings(torch.is_grad_enabled(), autocast, training)
        generators: States = []
        if self._generators is not None:
            generators = self._generators.states() if call else self._generators.torch_states()
        return _Node(function, kept, reads, writes, unknown, surroundings, generators, call=call, forwards=forwards)

    def _forwards(self) -> tuple[Any, ...]:
        """What stands in the place of the modules' own ``forward``, as where a loss keeps what the model gave."""
        return tuple([own if (own := vars(m).get("forward")) is None else _unless_own(m, own) for m in self._modules])

    def _kept(self, arguments: Any, clone: bool) -> tuple[Any, set[int], set[int], bool]:
        """Arguments as they are now, with numbers in the place of what came from the model; what is read; changed."""
        reads: set[int] = set()
        writes: set[int] = set()
        unknown = False

        def keep(x: Any) -> Any:
            nonlocal unknown
            if isinstance(x, Tensor):
                number = self._numbers.get(x)
                if number is not None:
                    unknown |= self._made_as[number] != _mark(x)
                    reads.add(number)
                    return _Value(number)
                if x.grad_fn is not None:
                    unknown = True
                    return _Unknown()
                if x.requires_grad or id(x) in self._parameters:
                    return _Constant(x)
                return _Constant(x.detach().clone()) if clone else _Constant(x, version(x))
            if isinstance(x, (*PLAIN, nn.Module)) or callable(x):
                return _Constant(x)
            # an object with a state of its own, such as a cache: a call may change it, and a later one get it again
            if id(x) not in self._objects:
                number = self._number()
                self._objects[id(x)] = x, number
                again, graph = copied(x)
                self.nodes.append(_Node(_again, again, set(), {number}, graph, _HERE, [], {0: number}))
            number = self._objects[id(x)][1]
            reads.add(number)
            writes.add(number)
            return _Value(number)

        return mapped(arguments, keep, keep=True), reads, writes, unknown

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _made(self, node: _Node, output: Any) -> None:
        for place, x in enumerate(leaves(output)):
            if isinstance(x, Tensor):
                if id(x) in self._parameters:
                    continue
                number = self._numbers.get(x)
                if number is None:
                    number = self._numbers[x] = self._number()
                self._made_as[number] = _mark(x)
            elif isinstance(x, PLAIN) or callable(x):
                continue
            elif id(x) in self._objects:
                number = self._objects[id(x)][1]
            else:
                number = self._number()
                self._objects[id(x)] = x, number
            node.outputs[place] = number
            node.writes.add(number)

    def _changed(self, node: _Node, tensor: Tensor) -> None:
        """An argument that was changed in place, and what shares its memory."""
        if id(tensor) in self._parameters:
            return
        if self._numbers.get(tensor) is None:  # one of the user's own, from here on made by the model
            node.unknown = True
            self._numbers[tensor] = self._number()
        shares: Any = torch._C._is_alias_of  # type: ignore[attr-defined]
        for other, number in list(self._numbers.items()):
            if other is tensor or shares(other, tensor):
                node.writes.add(number)
                node.reads.add(number)
                self._made_as[number] = _mark(other)

    # ---------------------------------------------------------------------------------------------- what it gives

    def outputs(self) -> list[Any]:
        """The results of those calls that no later call reads: the differentiable ones, or all where none is.

        A loss, an activation or a metric of its own gives no result, and what it reads still is one. Nor does a module
        read its own result by being given the mapping again that it has put it into.
        """
        calls = [n for n in self.nodes if n.call and not n.judges and any(x.dim() for x in tensors(n.output))]
        inner: set[int] = set()  # what goes into a later call is no result
        own: dict[int, set[int]] = {}  # the results of a module's calls, by its id
        reads = {id(node): node.reads for node in self.nodes}
        for call in calls:
            before = own.setdefault(id(call.function), set())
            reads[id(call)] = call.reads - (call.returned & before)
            inner |= reads[id(call)]
            before |= call.results
        for node in reversed(self.nodes):
            if node.writes & inner:
                inner |= reads[id(node)]
        outputs = [n.output for n in calls if not n.results & inner]
        with_graph = [o for o in outputs if any(x.requires_grad for x in tensors(o))]
        return with_graph or outputs

    def apart(self, loss: Tensor, logits: Sequence[Tensor]) -> bool:
        """Whether the logits come from other calls than the loss."""
        calls = {id(node) for node in self._behind([loss]) if node.call}
        return not any(id(node) in calls for node in self._behind(logits))

    def _behind(self, results: Sequence[Tensor]) -> list[_Node]:
        """What these came from, in its order."""
        live = {n for n in map(self._numbers.get, results) if n is not None}
        nodes: list[_Node] = []
        for node in reversed(self.nodes):
            if node.writes & live:
                nodes.append(node)
                live |= node.reads
        return nodes[::-1]

    def replay(self, logits: Sequence[Tensor], whole: bool) -> Replay | None:
        """How these logits are computed anew.

        Args:
            logits: tensors that the user's function gave.
            whole: whether a generator's state is set for each call.

        Returns:
            None where it is not known what they were made of.
        """
        numbers = [self._numbers.get(x) for x in logits]
        nodes = self._behind(logits)
        for node in self.nodes:
            node.output = None
        sound = all(n is None or self._made_as[n] == _mark(x) for n, x in zip(numbers, logits, strict=True))
        forwards = self._forwards()
        the_same = all(not n.call or n.forwards == forwards for n in nodes)
        kept = (
            sound
            and the_same
            and all(not n.unknown and (n.function is _again or _as_it_was(n.arguments)) for n in nodes)
        )
        if None in numbers or not kept or not any(n.call for n in nodes):
            return None
        return Replay(nodes, [n for n in numbers if n is not None], list(self._modules), whole, self._assigned)


class Replay(nn.Module):
    """The calls that some logits come from, to be made again."""

    def __init__(
        self,
        nodes: list[_Node],
        logits: list[int],
        modules: list[nn.Module],
        generators: bool,
        assigned: Sequence[Assignment] = (),
    ) -> None:
        super().__init__()
        self._assigned = tuple(assigned)
        self._nodes = nodes
        self._logits = logits
        self._tree = _Held(modules)
        self._set = generators

    def begin_at(self, generators: States) -> States:
        """Set the states that the first call finds the generators in; returns those that it would have found."""
        call = next(n for n in self._nodes if n.call)
        own, call.generators = call.generators, generators
        return own

    @property
    def embeddings(self) -> list[int]:
        """Which calls of the module to perturb, in the order of the clean pass, happen here."""
        return [i for node in self._nodes for i in node.embeddings]

    def arguments(self, embedding: int) -> Mapping[str, Any]:
        """The named arguments of the call in which this call of the module to perturb happened."""
        return _by_name(next(n for n in self._nodes if embedding in n.embeddings))

    def named(self) -> Mapping[str, Any]:
        """The named arguments of all calls; of those of one name the last."""
        named: dict[str, Any] = {}
        for node in self._nodes:
            named |= _by_name(node) if node.call else {}
        return named

    def forward(self, grad: bool = False, values: Mapping[int, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The logits.

        Args:
            grad: with a graph, also where the clean pass made none; never within torch.no_grad().
            values: by id of a parameter, what stands in its place.
        """
        made: dict[int, Any] = {}
        wanted = torch.is_grad_enabled()
        done = 0

        def give(x: Any) -> Any:
            if isinstance(x, _Value):
                return made[x.number]
            if isinstance(x.value, Tensor):
                if values is not None and id(x.value) in values:
                    return values[id(x.value)]
                # a call may change what it gets
                return x.value if x.version is not None or x.value.requires_grad else x.value.clone()
            return x.value

        for node in self._nodes:
            if self._set and node.generators:
                set_states(node.generators)
            for attributes, name, value in self._assigned[done : node.assigned]:
                attributes[name] = value
            done = max(done, node.assigned)
            with node.surroundings.restored(self._tree.modules, wanted and (node.surroundings.grad or grad)):
                if node.function is _again:
                    output, _ = copied(node.arguments)
                else:
                    args, kwargs = mapped(node.arguments, give)
                    output = node.function(*args, **kwargs)
            for place, x in enumerate(leaves(output)):
                if place in node.outputs:
                    made[node.outputs[place]] = x
        return tuple(made[n] for n in self._logits)


class Uses(TorchFunctionMode):
    """Tells whether certain tensors are used in this mode.

    Args:
        ids: of the tensors.
    """

    def __init__(self, ids: Collection[int]) -> None:
        super().__init__()
        self._ids = ids
        self.any = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at what is given to the function."""
        kwargs = kwargs or {}
        self.any |= any(id(x) in self._ids for x in tensors((args, kwargs)))
        return func(*args, **kwargs)


def _by_name(call: _Node) -> Mapping[str, Any]:
    """The arguments of a call by their names, as far as they do not come from the model."""
    args, kwargs = call.arguments
    named: dict[str, Any] = {}
    for given in (*args, dict(zip(_names(call.function), args, strict=False)) | kwargs):
        contents = given.contents if isinstance(given, Filled) else given
        if isinstance(contents, dict):
            named |= {k: v.value for k, v in contents.items() if isinstance(v, _Constant)}
    return named


class _Held:
    """Modules that are not to become parts of another."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules


def _judges(module: nn.Module, given: Sequence[tuple[torch.Size, bool]], output: Any) -> bool:
    """Whether a call is of a loss, an activation or a metric, which take what the model gave and are no part of it.

    Such a module has no parameters. Nor has one that pools or reshapes: it gives at least two dimensions, of another
    shape than the one result that it takes; nor one that scores several results against each other, such as a
    similarity. Neither takes a target, which has the shape of a result or of the losses.

    Args:
        module: what was called.
        given: of each tensor that it got, the shape, and whether it came from the model.
        output: what it gave.
    """
    taken = [shape for shape, of_model in given if of_model]
    if not taken or next(module.parameters(), None) is not None:
        return False
    made = [x.shape for x in tensors(output)]
    others = [shape for shape, of_model in given if not of_model]
    pools = len(taken) == len(made) == 1 and len(made[0]) > 1 and made != taken
    scores = len(taken) > 1 and len(made) == 1
    return not (pools or scores) or any(shape in (*taken, *made) for shape in others)


def _names(module: Any) -> list[str]:
    """Of what a module takes by position, as far as it says so."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    try:
        parameters = inspect.signature(getattr(module, "_orig_mod", module).forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in kinds]


def part(output: Any, name: str) -> Any:
    """What a mapping, or an object, has by a name; None where it has nothing."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _unless_own(module: nn.Module, forward: Any) -> Any:
    own = isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward
    return None if own else forward


def _again() -> None:
    """Stands for a new copy of an object that the first call got."""


_HERE = Surroundings(True, ())
_IN_PLACE = {f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_IN_PLACE |= {"__setitem__", "__set__"}
_ON_GRAPHS = {"register_hook", "retain_grad"}
"""Functions that change what a tensor's graph does."""

_KEEPING = {"batch_norm", "instance_norm"}
"""Functions that may change statistics that they are given."""

_TAKING = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
"""Functions that read a value out of a tensor: what Python makes of it is not seen."""

_Mark = tuple[int, int | None]


def _mark(x: Tensor) -> _Mark:
    """What changes where a tensor is changed, or put into another graph, by something that is not recorded."""
    return version(x), None if x.grad_fn is None else x.grad_fn._sequence_nr()


def _where_followed(function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What changes a graph, where there is one: an extra pass may follow fewer tensors than the clean one."""
    return function(tensor, *args, **kwargs) if tensor.requires_grad else None


def by_compiler(function: Any) -> bool:
    """Whether this is a function that ``torch.compile`` made. Other objects are not asked: they may answer anything."""
    kinds = (FunctionType, MethodType, staticmethod, classmethod)
    return isinstance(function, kinds) and hasattr(function, "_torchdynamo_orig_callable")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled: by ``compile()``, by ``torch.compile`` of it, or of its ``forward``."""
    by_itself = module._compiled_call_impl is not None or "_orig_mod" in module._modules
    return by_itself or by_compiler(module.forward)


def has_compiled_functions(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made one of a module's methods, or a function that it keeps."""
    classes = [c for c in type(module).__mro__ if c.__module__ != nn.Module.__module__]
    return any(by_compiler(value) for owner in (module, *classes) for value in vars(owner).values())


def outside_compiled(module: nn.Module) -> Iterator[nn.Module]:
    """A module and its parts, but for what lies in a compiled one."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            continue
        seen.add(id(module))
        yield module
        if not is_compiled(module):
            waiting += [m for m in module._modules.values() if m is not None]


def _as_it_was(arguments: Any) -> bool:
    """Whether what was kept without a copy has not been changed since."""
    return all(
        c.version is None or version(c.value) == c.version for c in leaves(arguments) if isinstance(c, _Constant)
    )
