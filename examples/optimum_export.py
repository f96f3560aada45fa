"""Shrink what Hugging Face Optimum exports, and load the result with Optimum again.

    pip install optimum-onnx
    python examples/optimum_export.py

The network is a small classifier of token sequences that is trained here; put the folder or name of
yours in its place. What is exported is a folder with ``model.onnx`` and ``config.json``, and so is
what comes out, with the new sizes in the config.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import BertConfig, BertForSequenceClassification

import morphgraph as mg
from morphgraph.cli import main as morphgraph

CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def sequences(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and whether the smallest is in the first half."""
    tokens = torch.randint(0, 40, (count, 8), generator=torch.Generator().manual_seed(seed))
    return tokens, (tokens.argmin(dim=1) < 4).long()


def main(steps: int = 300, budget: str = "body_params=60%") -> tuple[float, float]:
    """The share of the parameters outside of embeddings that is left, and the accuracy."""
    torch.manual_seed(0)
    net = BertForSequenceClassification(CONFIG)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(steps):
        tokens, labels = sequences(64, seed=step)
        loss = net(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = Path(tempfile.mkdtemp())
    net.eval().save_pretrained(folder / "trained")

    main_export(
        str(folder / "trained"), output=folder / "exported", task="text-classification"
    )  # on the command line: optimum-cli export onnx --model trained --task ... exported

    tokens, _ = sequences(400, seed=10_000)  # inputs like those of use, without labels
    ones, zeros = np.ones(tokens.shape, np.int64), np.zeros(tokens.shape, np.int64)
    np.savez(
        folder / "inputs.npz",
        input_ids=tokens.numpy(),
        attention_mask=ones,
        token_type_ids=zeros,
    )
    data, small = str(folder / "inputs.npz"), str(folder / "small")
    code = morphgraph(
        ["shrink", str(folder / "exported"), "--data", data, "--budget", budget, "-o", small]
    )
    assert code == 0

    loaded = ORTModelForSequenceClassification.from_pretrained(small)
    tokens, labels = sequences(500, seed=20_000)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    logits = loaded(**inputs, token_type_ids=torch.zeros_like(tokens)).logits
    accuracy = float((logits.argmax(dim=1) == labels).float().mean())
    whole, left = (
        mg.cost(mg.lift(folder / name / "model.onnx"), "body_params").total
        for name in ("exported", "small")
    )
    print(f"{whole:,.0f} -> {left:,.0f} parameters, {accuracy:.1%} right; in {small}")
    return left / whole, accuracy


if __name__ == "__main__":
    main()
