"""Small models and batches that the tests of SMART share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH = 20, 8


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Encoder(nn.Module):
    """Word and position embeddings, layer norm, dropout, one layer of attention, a mean over the real tokens, a head.

    One class is a regression. It is called as a Hugging Face model is.
    """

    def __init__(self, classes: int = 3, dropout: float = 0.0, frozen_words: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(32, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, classes)
        self.words.requires_grad_(not frozen_words)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        return self.from_embeddings(self.words(input_ids), attention_mask, labels)

    def from_embeddings(self, x: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        x = self.dropout(self.norm(x + self.positions[: x.shape[1]]))
        query, key, value = self.query_key_value(x).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) / WIDTH**0.5).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        x = x + self.dropout(scores.softmax(-1)) @ value
        kept = attention_mask.to(x.dtype)[..., None]
        logits = self.head((torch.tanh(x) * kept).sum(1) / kept.sum(1))
        loss = None
        if labels is not None:
            loss = F.mse_loss(logits.squeeze(-1), labels) if logits.shape[1] == 1 else F.cross_entropy(logits, labels)
        return Output(loss, logits)


def batch_for(model: Encoder, samples: int = 4, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A batch with padding on the right, the model's own dtype for regression labels."""
    g = torch.Generator().manual_seed(seed)
    classes, dtype = model.head.out_features, model.head.weight.dtype
    lengths = torch.randint(2, length + 1, (samples,), generator=g)
    lengths[0] = length
    labels = torch.randint(0, max(classes, 2), (samples,), generator=g)
    return {
        "input_ids": torch.randint(0, VOCABULARY, (samples, length), generator=g),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "labels": labels.to(dtype) if classes == 1 else labels,
    }


class Tagger(nn.Module):
    """Classifies tokens; its loss is a mean over those that have a label, or their sum over a number it is told."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.mix(self.words(input_ids))))
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch, logits
