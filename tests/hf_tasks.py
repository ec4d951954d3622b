"""Tiny, randomly initialised Hugging Face models of every kind, each with a task that it can learn by heart."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smart_kernels.integrations.transformers import SmartTrainer, SmartTrainingArguments

requires_trainer = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="Trainer needs accelerate, which is not installed here"
)

VOCABULARY, LENGTH, EXAMPLES = 20, 6, 16
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@dataclass
class Task:
    """A model class, its configuration, and what its examples have besides input ids."""

    model: str
    config: str
    targets: str
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, **options: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(
            **{"vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": 3} | SIZES | self.options | options
        )
        return getattr(transformers, self.model)(config)

    def examples(self) -> list[dict[str, Tensor]]:
        """Some are padded; in language models the padding has no label."""
        g = torch.Generator().manual_seed(1)
        if self.targets == "image":
            images = torch.randn(EXAMPLES, 3, 8, 8, generator=g)
            return [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(images)]
        examples = []
        for i in range(EXAMPLES):
            ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=g)
            mask = (torch.arange(LENGTH) < LENGTH - i % 4).long()
            example = {"input_ids": ids * mask, "attention_mask": mask}
            labels = ids.masked_fill(mask == 0, -100)
            match self.targets:
                case "class":
                    example["labels"] = torch.tensor(i % 3)
                case "number":
                    example["labels"] = torch.tensor(i % 3 / 2)
                case "token":
                    example["labels"] = torch.where(labels == -100, labels, labels % 3)
                case "span":
                    example |= {"start_positions": torch.tensor(i % 2), "end_positions": torch.tensor(1 + i % 2)}
                case "masked":
                    hidden = torch.arange(LENGTH) % 3 == i % 3
                    example |= {"input_ids": example["input_ids"].masked_fill(hidden, 1)}
                    example["labels"] = labels.masked_fill(~hidden, -100)
                case _:
                    example["labels"] = labels
            examples.append(example)
        return examples


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
TASKS = {
    "bert": Task("BertForSequenceClassification", "BertConfig", "class"),
    "roberta": Task("RobertaForTokenClassification", "RobertaConfig", "token", {"pad_token_id": 1}),
    "distilbert": Task(
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        "span",
        {"dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2, "num_labels": 2},
    ),
    "deberta": Task("DebertaV2ForSequenceClassification", "DebertaV2Config", "number", {"num_labels": 1}),
    "electra": Task("ElectraForSequenceClassification", "ElectraConfig", "class", {"embedding_size": 16}),
    "modernbert": Task("ModernBertForMaskedLM", "ModernBertConfig", "masked", {"cls_token_id": 1, "sep_token_id": 2}),
    "gpt2": Task("GPT2LMHeadModel", "GPT2Config", "next", {"bos_token_id": 1, "eos_token_id": 2}),
    "t5": Task("T5ForConditionalGeneration", "T5Config", "sequence", T5),
    "vit": Task(
        "ViTForImageClassification",
        "ViTConfig",
        "image",
        {"image_size": 8, "patch_size": 4},
        {"smart_embedding": "vit.embeddings"},
    ),
}

NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "deberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}
"""Options that leave a step without chance."""


def trainer_for(
    task: Task,
    folder: Path,
    model: nn.Module | None = None,
    trainer: type = SmartTrainer,
    *,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer for 4 steps of 4 examples, unless the options say otherwise."""
    arguments = SmartTrainingArguments if issubclass(trainer, SmartTrainer) else transformers.TrainingArguments
    arguments = getattr(trainer, "arguments", arguments)
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    if issubclass(trainer, SmartTrainer):
        defaults |= task.arguments
    examples = task.examples()
    return trainer(
        model=task.build() if model is None else model,
        args=arguments(str(folder), **defaults | options),
        train_dataset=examples,
        eval_dataset=examples,
        **keywords or {},
    )
