"""A tagger: embeddings, an LSTM in both directions, a tag per token.

python examples/lstm_tagger.py --steps 400
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import morphgraph as mg

WORDS, TAGS, LENGTH = 24, 4, 12


class Tagger(nn.Module):
    """Scores of every tag, ``[n, tokens, tags]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 24)
        self.lstm = nn.LSTM(24, 32, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[n, tokens]`` are integers."""
        states, _ = self.lstm(self.embed(tokens))
        scores: Tensor = self.head(self.hidden(states).relu())
        return scores


def sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens; a tag depends on the parity of the token before and of the one behind."""
    tokens = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    odd = F.pad(tokens % 2, (1, 1))
    return tokens, 2 * odd[:, :-2] + odd[:, 2:]


def train(net: nn.Module, steps: int, lr: float, penalty: mg.Budget | None = None) -> None:
    """A training loop like any other, but for one line."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0)
    if penalty is not None:
        penalty.attach(optimizer)
    net.train()
    for _ in range(steps):
        tokens, tags = sentences(32, generator)
        optimizer.zero_grad()
        F.cross_entropy(net(tokens).transpose(1, 2), tags).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of tokens that get their tag."""
    tokens, tags = sentences(128, torch.Generator().manual_seed(2))
    return float((net.eval()(tokens).argmax(2) == tags).float().mean())


def main(steps: int = 400) -> tuple[float, float]:
    """Shrink to half of the parameters, fine-tune; the share that is left, and the accuracy."""
    torch.manual_seed(0)
    net = Tagger()
    graph = mg.lift(mg.export(net, (torch.zeros(1, LENGTH, dtype=torch.long),)))
    budget = mg.Budget(mg.Regularizer(graph, net, cost="params"), {"params": "50%"}, steps=steps)
    train(net, steps, 1e-2, budget)
    plan = budget.regularizer.plan({"params": "50%"})
    slim = mg.apply(graph, plan, weights=net)  # compared with the masked original
    small = mg.to_torch(slim)
    train(small, steps // 3, 3e-3)
    change = plan.cost["params"]
    print(f"parameters {change.before:,.0f} -> {change.after:,.0f}")
    print(f"accuracy: {accuracy(net):.1%}, then {accuracy(small):.1%}")
    return change.after / change.before, accuracy(small)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)
