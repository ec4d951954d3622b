"""Which rows of the logits count: those that the task loss takes, because they have a label or are no padding.

What the labels are called, and whether the label of a row is its own or the next one's, is the model's own way. Names
and classes suggest it. Where the task loss can be asked which rows it reaches, it decides. A rule is kept, and not the
rows, so that later batches of the same kind ask nothing and wait for no device.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels.smart.embedding import first_having

IGNORED = -100
"""The label of a token that is not counted, as in :func:`torch.nn.functional.cross_entropy`."""

LABELS, MASK = "labels", "attention_mask"
"""The names of labels and mask in a batch, and in the arguments of a model."""

_ASKED = 8
"""How often the loss is asked for a kind of batch, at most, while several rules agree with what it reaches."""
_SURE = 1e-3
"""Where all other classes have a probability below this, the gradient of a loss may be exactly 0."""
_CHUNK = 2**24
"""How many logits are looked at together, about."""


@dataclass(frozen=True)
class Rule:
    """Where a row counts.

    Attributes:
        name: of the tensor that tells; None where all rows count.
        way: which of its entries stands for a row, one of those of :func:`_ways`.
        ignored: the entry of a row that does not count; None where that is any that is not positive, as in a mask.
    """

    name: str | None = None
    way: str = "same"
    ignored: float | None = IGNORED

    def rows(self, named: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
        """True for the rows that count, in the shape of the logits but for the classes; None for all."""
        if self.name is None:
            return None
        values = named[self.name]
        return _placed(values > 0 if self.ignored is None else values != self.ignored, self.way, shape)

    @property
    def certain(self) -> bool:
        """Whether its name alone says that these are the labels."""
        return self.name in (LABELS, _of_call(LABELS)) and self.ignored == IGNORED


@dataclass
class _Found:
    rule: Rule
    asked: int = 0
    settled: bool = False


class Rows:
    """Finds the rows of a model's logits that count.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._speech: Any = first_having(model, "_get_feature_vector_attention_mask")
        self._found: dict[Any, _Found] = {}
        self._told = False

    def find(
        self, logits: Tensor, named: Mapping[str, Tensor], reached: Callable[[], Tensor | None] = lambda: None
    ) -> Tensor | None:
        """The rows that count, True for those; None for all.

        Args:
            logits: (B, L, C), or (B * L, C) of tokens.
            named: what may tell, as :func:`known` gives it.
            reached: gives the rows that the task loss reaches, True for those, or None where that is not known.
        """
        shape = logits.shape
        named = {**named, **_of_frames(self._speech, named, shape)}
        fitting = tuple((name, tuple(_ways(x, shape))) for name, x in sorted(named.items()))
        kind = self._model.training, len(shape), fitting
        if kind not in self._found:
            self._found[kind] = _Found(rule_by_names(named, shape, self._model))
        found = self._found[kind]
        asks = len(shape) == 3 or any(ways for _, ways in fitting)
        if asks and not found.settled:
            rows = reached()
            found.asked += 1
            found.settled = found.asked >= _ASKED
            if rows is not None and bool(rows.any()):
                self._agree(found, logits, named, rows)
        counted = found.rule.rows(named, shape)
        return None if counted is None else counted.to(logits.device)

    def _agree(self, found: _Found, logits: Tensor, named: Mapping[str, Tensor], reached: Tensor) -> None:
        """Take the rule that agrees with what the loss reaches, the one of before first."""
        shape = logits.shape
        possible = reached | _sure(logits, reached)

        def rows(rule: Rule) -> Tensor:
            counted = rule.rows(named, shape)
            return torch.ones_like(reached) if counted is None else counted.to(reached.device)

        def lacks(rule: Rule) -> bool:
            return bool((reached & ~rows(rule)).any())

        def agrees(rule: Rule) -> bool:
            counted = rows(rule)
            return not bool(((reached & ~counted) | (counted & ~possible)).any())

        rules = list(dict.fromkeys((found.rule, *_candidates(named, shape))))
        agreeing = [rule for rule in rules if agrees(rule)]
        if not agreeing:
            agreeing = [rule for rule in _by_value(named, shape, possible) if agrees(rule)]
        if agreeing:
            found.rule = agreeing[0]
            alone = len(agreeing) == 1 and found.rule in rules
            found.settled |= alone or found.rule.certain
            return
        containing = [rule for rule in rules if not lacks(rule)]
        found.rule = min(containing, key=lambda rule: int(rows(rule).sum()))
        if not self._told:
            self._told = True
            warnings.warn(
                f"divergence: the task loss reaches {int(reached.sum())} of {reached.numel()} rows of the logits, and "
                f"the terms count {int(rows(found.rule).sum())}: nothing in the batch, nor in the arguments of the "
                f"model, tells which are meant. Put the labels into the batch as '{LABELS}', with {IGNORED} where "
                "there is none, or give a callable as `divergence`",
                stacklevel=10,  # the caller of a step
            )


def known(batch: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that may tell which rows count, by name.

    Args:
        batch: the batch: their names are those of a mapping, or places in a sequence.
        arguments: the named arguments of the model's calls.
    """
    own = (x for x in arguments.items() if isinstance(x[1], Tensor))
    every = (*_named(batch, ""), *((_of_call(name), x) for name, x in own))
    return {name: x for name, x in every if x.layout is torch.strided and not x.is_nested}


def first_known(named: Mapping[str, Tensor], *names: str) -> str | None:
    """Under which name one of these is known: of the batch, or of the model's call."""
    return next((n for name in names for n in (name, _of_call(name)) if n in named), None)


def rule_by_names(named: Mapping[str, Tensor], shape: torch.Size, model: nn.Module) -> Rule:
    """What names and classes suggest: the labels, in a decoder that predicts the next token the next ones; the mask."""
    labels = first_known(named, LABELS)
    if labels is not None and (way := _likely_way(named, labels, shape, model)) is not None:
        ahead = way in _AHEAD and _predicts_next(model)
        return Rule(labels, _AHEAD[way] if ahead else way)
    # the rows of a decoder's words are none of the encoder's
    decodes = first_known(named, "decoder_input_ids", "decoder_inputs_embeds") is not None
    mask = first_known(named, f"decoder_{MASK}" if decodes else MASK)
    if mask is not None and (way := _likely_way(named, mask, shape, model)) is not None:
        return Rule(mask, way, None)
    return Rule()


def _likely_way(named: Mapping[str, Tensor], name: str, shape: torch.Size, model: nn.Module) -> str | None:
    """Which entries of the labels, or of the mask, stand for the rows; None where they do not fit.

    Logits of more rows than there are words begin with those of virtual tokens, as of a learnt prompt, which have no
    label. Where there are no words, nor anything else as long as the labels, these are a sequence of their own, as for
    the alignment of speech; not so in an encoder-decoder, whose labels are what the decoder says.
    """
    values, ways = named[name], tuple(_ways(named[name], shape))
    if len(shape) == 2 or "cut" in ways or not ways:
        return next((way for way in ("same", "cut") if way in ways), None)
    beside = (_of_call(LABELS), _of_call(MASK)) if name.startswith(_CALL) else (LABELS, MASK)
    others = [
        x for n, x in named.items() if n.startswith(_CALL) == name.startswith(_CALL) and n not in (*beside, _FRAMES)
    ]
    words = any(not x.is_floating_point() and x.dim() > 1 for x in others)
    as_long = any(x.shape[:2] == values.shape for x in others)
    if "same" in ways:
        decoded = LABELS in name and _is_encoder_decoder(model)
        return "same" if words or as_long or not others or decoded else None
    rows_have_words = any(
        x.dim() == 2 and x.shape == shape[:2] and not x.is_floating_point() for n, x in named.items() if n != _FRAMES
    )
    return "virtual" if "virtual" in ways and as_long and not rows_have_words else None


# ------------------------------------------------------------------------------------------------- rows and entries

_CALL = "model("
_FRAMES = "(frames)"
_AHEAD = {"same": "next", "virtual": "virtual next"}


def _of_call(name: str) -> str:
    return f"{_CALL}{name})"


def _named(x: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch by name, or by place."""
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, Mapping):
        for key, value in x.items():
            yield from _named(value, f"{name}.{key}".lstrip("."))
    elif isinstance(x, tuple | list):
        for i, value in enumerate(x):
            yield from _named(value, f"{name}.{i}".lstrip("."))
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        for field in dataclasses.fields(x):
            yield from _named(getattr(x, field.name, None), f"{name}.{field.name}".lstrip("."))


def _ways(values: Tensor, shape: torch.Size) -> Iterator[str]:
    """How the entries of a tensor (B, L) may stand for the rows of logits.

    "same": each for its own; "next": for the one before; "cut": the same of logits[:, :-1]; "short": the last row has
    none; "virtual", "virtual next": the first rows have none, as there are more rows than words.
    """
    if values.dim() != 2 or values.is_complex() or not values.numel():
        return
    length = values.shape[1]
    if len(shape) == 2:  # (B * L, C)
        if length < 2 or shape[0] % len(values):
            return
        rows = shape[0] // len(values)
        if rows == length:
            yield from ("same", "next")
        elif rows == length - 1 and length > 2:
            yield "cut"
    elif len(values) == shape[0]:
        rows = shape[1]
        if rows == length:
            yield from ("same", "next")
        elif rows == length - 1:
            yield "cut"
        elif rows > length:
            yield from (("short",) if rows == length + 1 else ())
            yield from ("virtual", "virtual next")


def _placed(entries: Tensor, way: str, shape: torch.Size) -> Tensor:
    """The entries by row, 0 where a row has none."""
    if way.startswith("virtual"):
        entries = nn.functional.pad(entries, (shape[1] - entries.shape[1], 0))
    if way == "cut" or way.endswith("next"):
        entries = entries[:, 1:]
    if way == "short" or way.endswith("next"):
        entries = nn.functional.pad(entries, (0, 1))
    return entries.flatten() if len(shape) == 2 else entries


def _of_frames(speech: Any, named: Mapping[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
    """The mask of a speech model's frames, made of the one of the samples of sound, where rows are frames."""
    mask = first_known(named, MASK)
    if speech is None or mask is None or len(shape) != 3 or named[mask].dim() != 2:
        return {}
    found = frames(speech, shape[1], named[mask])
    return {} if found is None else {_FRAMES: found}


def frames(model: Any, positions: int, mask: Tensor) -> Tensor | None:
    """The mask of a speech model's frames, if it has as many."""
    try:
        found = model._get_feature_vector_attention_mask(positions, mask)
        lengths = model._get_feat_extract_output_lengths(mask.shape[1])
    except Exception:  # an other model's convention
        return None
    fits = isinstance(found, Tensor) and found.shape == (len(mask), positions) and int(lengths) == positions
    return found if fits else None


# -------------------------------------------------------------------------------------------------- what may be meant


def _candidates(named: Mapping[str, Tensor], shape: torch.Size) -> Iterator[Rule]:
    """The rules that fit the logits' shape, likely ones first."""

    def rank(name: str) -> tuple[bool, bool]:
        return name not in (LABELS, _of_call(LABELS)), not ("label" in name or "target" in name)

    masks = [name for name in named if MASK in name or name == _FRAMES]
    labels = [name for name, x in named.items() if name not in masks and not x.is_floating_point()]
    for name in sorted(labels, key=rank):
        yield from (Rule(name, way) for way in _ways(named[name], shape))
    for name in masks:
        yield from (Rule(name, way, None) for way in _ways(named[name], shape))
    yield Rule()


def _by_value(named: Mapping[str, Tensor], shape: torch.Size, possible: Tensor) -> Iterator[Rule]:
    """Rules by another entry than -100, as of padding: the only one of the rows that the loss does not reach."""
    for name, x in named.items():
        for way in _ways(x, shape):
            there = _placed(torch.ones_like(x, dtype=torch.bool), way, shape).to(possible.device)
            entries = _placed(x, way, shape).to(possible.device)[there & ~possible]
            if entries.numel() > 1 and bool((entries == entries[0]).all()):
                yield Rule(name, way, entries[0].item())


def _sure(logits: Tensor, reached: Tensor) -> Tensor:
    """The rows that a loss does not reach although it may be of them: of predictions that are as good as sure."""
    sure = torch.zeros_like(reached)
    size = max(1, _CHUNK // max(1, logits[:1].numel()))
    if logits.shape[-1] > 1:
        for x, known, found in zip(logits.detach().split(size), reached.split(size), sure.split(size), strict=True):
            rest = x[~known].float()
            found[~known] = rest.logsumexp(-1) - rest.amax(-1) < _SURE
    return sure


def _predicts_next(model: nn.Module) -> bool:
    """Whether the model's loss is likely to compare the logits at a token with the next token's label."""
    part: Any = first_having(model, "can_generate")
    return part is not None and part.can_generate() and not _is_encoder_decoder(model)


def _is_encoder_decoder(model: nn.Module) -> bool:
    part: Any = first_having(model, "can_generate")
    return bool(getattr(getattr(part, "config", None), "is_encoder_decoder", False))
