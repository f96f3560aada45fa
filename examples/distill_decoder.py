"""Language modelling: a Llama is shrunk by text alone, then taught by the original's logits.

pip install 'morphgraph[transformers]'
python examples/distill_decoder.py --steps 300
python examples/distill_decoder.py --steps 300 --lora 8   # adapters of rank 8; pip install peft

The smaller network stays a LlamaForCausalLM, saved by `save_pretrained`.
"""

import argparse
import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import morphgraph as mg

WORDS, LENGTH, BATCH = 24, 16, 32


def sequences(count: int, seed: int) -> Tensor:
    """Every token follows from the two before it, ``[n, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    for k in range(2, LENGTH):
        tokens[:, k] = (tokens[:, k - 1] + tokens[:, k - 2] % 3) % WORDS
    return tokens


def next_token_loss(net: nn.Module, tokens: Tensor) -> Tensor:
    """Of every token but the first two, which are random."""
    scores = net(tokens).logits[:, 1:-1]
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 2:].flatten())


@torch.no_grad()
def perplexity(net: nn.Module) -> float:
    """On sequences that no training has seen; the language's own is 1."""
    return math.exp(float(next_token_loss(net.eval(), sequences(256, 2))))


def distillation_loss(net: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
    """How far the next token's probabilities are from the teacher's (Hinton et al. 2015)."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(tokens).logits, -1).flatten(0, 1)
    found = F.log_softmax(net(tokens).logits, -1).flatten(0, 1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def train(net: nn.Module, loss: Any, steps: int, lr: float) -> None:
    """Lower a loss for so many steps, by what may be trained."""
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    net.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, sequences(BATCH, 100 + step)).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def with_adapters(net: Any, rank: int) -> Any:
    """The network with trainable adapters of low rank beside its frozen kernels."""
    import peft

    return peft.get_peft_model(net, peft.LoraConfig(r=rank, target_modules="all-linear"))


def main(steps: int = 300, lora: int = 0, folder: Path | None = None) -> tuple[float, list[float]]:
    """The share of the parameters that is left; perplexity before, resized, and distilled."""
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
    teacher = LlamaForCausalLM(config)
    train(teacher, next_token_loss, 2 * steps, 3e-3)  # in place of the network that you have

    example = {"input_ids": sequences(2, 0)}
    graph = mg.lift(mg.export(teacher, example))
    text = {"input_ids": sequences(128, 1).numpy()}
    plan = mg.plan(graph, {"params": "60%"}, score="data", data=text, same=["repeated"])

    small: Any = copy.deepcopy(teacher)
    report = mg.resize_module(small, graph, plan, example=example)  # compared with ONNX Runtime
    resized = perplexity(small)
    student = with_adapters(small, lora) if lora else small
    train(student, lambda net, tokens: distillation_loss(net, teacher, tokens), steps, 3e-3)
    small = student.merge_and_unload() if lora else student
    small.save_pretrained(folder)

    again = AutoModelForCausalLM.from_pretrained(folder)
    change = plan.cost["params"]
    found = [perplexity(teacher), resized, perplexity(again)]
    print(f"parameters {change.before:,.0f} -> {change.after:,.0f}; {report.config}")
    print("perplexity: {:.3f}, {:.3f} resized, {:.3f} distilled".format(*found))
    return change.after / change.before, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="0: all weights")
    parser.add_argument("--folder", type=Path, help="for save_pretrained")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.lora, arguments.folder)
