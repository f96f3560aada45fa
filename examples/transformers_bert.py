"""Text classification with Hugging Face's Trainer: a small BERT of random weights.

pip install 'morphgraph[transformers]'
python examples/transformers_bert.py --steps 400
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import morphgraph as mg
from morphgraph.integrations.transformers import BudgetCallback

WORDS, LENGTH = 40, 12


def texts(count: int, seed: int) -> dict[str, Tensor]:
    """Random tokens, the end of some masked; the class says which of two words is there more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, WORDS, (count, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (count, 1), generator=generator)
    low, high = ((tokens < 21) & mask).sum(1), ((tokens >= 21) & mask).sum(1)
    return {
        "input_ids": torch.where(mask, tokens, 0),
        "attention_mask": mask.long(),
        "labels": (high > low).long(),
    }


def rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A data set as the Trainer wants it."""
    return [{key: value[k] for key, value in batch.items()} for k in range(len(batch["labels"]))]


def fit(
    net: nn.Module, steps: int, lr: float, folder: Path, every: int, *callbacks: TrainerCallback
) -> None:
    """Train with checkpoints; a run that was killed goes on."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        save_steps=every,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=net, args=arguments, train_dataset=rows(texts(1024, 1)), callbacks=list(callbacks)
    )
    found = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=found)


@torch.no_grad()
def accuracy(net: Any) -> float:
    """The share of texts that get their class."""
    batch = texts(256, 2)
    labels = batch.pop("labels")
    return float((net.eval()(**batch).logits.argmax(1) == labels).float().mean())


def main(steps: int = 400, folder: Path | None = None, every: int = 100) -> tuple[float, float]:
    """Shrink to half of the FLOPs, fine-tune; the share of the FLOPs left, and the accuracy."""
    folder = folder or Path(tempfile.mkdtemp())
    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
    )
    net = BertForSequenceClassification(config)
    example = {key: value for key, value in texts(2, 0).items() if key != "labels"}
    graph = mg.lift(mg.export(net, example))
    callback = BudgetCallback(graph, {"flops": "50%"})
    fit(net, steps, 2e-3, folder / "shrink", every, callback)
    plan, before = callback.plan(), accuracy(net)
    mg.resize_module(net, graph, plan, example=example)  # compared with the resized ONNX model
    fit(net, steps // 3, 5e-4, folder / "tune", every)
    change = plan.cost["flops"]
    print(f"FLOPs {change.before:,.0f} -> {change.after:,.0f}")
    print(f"accuracy: {before:.1%}, then {accuracy(net):.1%}")
    return change.after / change.before, accuracy(net)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, help="of checkpoints; a second run goes on there")
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.folder, arguments.every)
