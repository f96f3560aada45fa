"""Language modelling with accelerate: a small Llama with grouped queries, and accumulation.

pip install 'morphgraph[accelerate,transformers]'
python examples/accelerate_llama.py --steps 300
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import morphgraph as mg
from morphgraph.integrations.accelerate import shrink

WORDS, LENGTH = 24, 16


def sequences(count: int, seed: int) -> Tensor:
    """Every token follows from the two before it, ``[n, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    for k in range(2, LENGTH):
        tokens[:, k] = (tokens[:, k - 1] + tokens[:, k - 2] % 3) % WORDS
    return tokens


def loss_of(net: Any, tokens: Tensor) -> Tensor:
    """Of every token but the first two, which are random."""
    scores = net(tokens).logits[:, 1:-1]
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 2:].flatten())


def train(
    net: nn.Module,
    steps: int,
    lr: float,
    every: int,
    shrinking: Any = None,
    folder: Path | None = None,
) -> Any:
    """The loop of accelerate, of so many steps an epoch; returns what ``shrinking`` has made of it.

    A folder gets a checkpoint after every epoch, and a run that was killed goes on there.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0)
    batches = DataLoader(TensorDataset(sequences(32 * every, 1)), batch_size=16)
    net, optimizer, batches = accelerator.prepare(net, optimizer, batches)
    phase = shrinking and shrinking(accelerator, net, optimizer)
    begin, epochs = 0, -(-steps // every)
    saved = sorted(folder.glob("*")) if folder else []
    if saved:
        accelerator.load_state(str(saved[-1]))
        begin = len(saved)
    net.train()
    for epoch in range(begin, epochs):
        for index, (tokens,) in enumerate(batches):
            if every * epoch + index // 2 == steps:
                break
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net, tokens))
                optimizer.step()
                optimizer.zero_grad()
        if folder:
            accelerator.save_state(str(folder / f"{epoch:03d}"))
    if phase:
        phase.end()
    return phase


def main(steps: int = 300, folder: Path | None = None, every: int = 100) -> tuple[float, float]:
    """Shrink to half of the parameters, fine-tune; the share that is left, and the test loss."""
    folder = folder or Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    net = LlamaForCausalLM(config)
    graph = mg.lift(mg.export(net, {"input_ids": sequences(2, 0)}))

    def shrinking(accelerator: Accelerator, wrapped: nn.Module, optimizer: Any) -> Any:
        return shrink(accelerator, graph, {"params": "50%"}, wrapped, optimizer, steps=steps)

    phase = train(net, steps, 3e-3, every, shrinking, folder)
    plan, test = phase.plan(), sequences(256, 2)
    before = float(loss_of(net.eval(), test))
    example = {"input_ids": sequences(2, 0)}
    mg.resize_module(net, graph, plan, example=example)  # compared with the resized ONNX model
    train(net, steps // 3, 1e-3, every)
    after = float(loss_of(net.eval(), test).detach())
    change = plan.cost["params"]
    print(f"parameters {change.before:,.0f} -> {change.after:,.0f}")
    print(f"test loss: {before:.3f}, then {after:.3f}")
    return change.after / change.before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="of checkpoints; a second run goes on there")
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.folder, arguments.every)
