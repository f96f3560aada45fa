"""Classification with Lightning: a residual network on scikit-learn's digits.

pip install 'morphgraph[lightning,data]'
python examples/lightning_digits.py --steps 400
"""

import argparse
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import morphgraph as mg
from morphgraph.integrations.lightning import BudgetCallback
from morphgraph.testing.examples import residual_cnn


class Classifier(pl.LightningModule):
    """A LightningModule like any other: it knows nothing of budgets."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch of images and labels."""
        x, labels = batch
        return F.cross_entropy(self.net(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; decay would also shrink what the budget shrinks."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0)


def digits(train: bool) -> TensorDataset:
    """Images ``[n, 1, 8, 8]`` and labels; every fifth is for the test."""
    found = load_digits()
    x, labels = torch.from_numpy(found.images).float()[:, None] / 16, torch.tensor(found.target)
    rows = (torch.arange(len(x)) % 5 > 0) == train
    return TensorDataset(x[rows], labels[rows])


def fit(
    net: nn.Module, steps: int, lr: float, *callbacks: pl.Callback, resume: bool = False
) -> None:
    """Train; a run that was killed goes on from its last checkpoint."""
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=resume,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(digits(train=True), batch_size=64, shuffle=True)
    trainer.fit(Classifier(net, lr), batches, ckpt_path="last" if resume else None)


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of test images that get their digit."""
    x, labels = digits(train=False).tensors
    return float((net.eval()(x).argmax(1) == labels).float().mean())


def main(steps: int = 400, folder: Path | None = None, every: int = 100) -> tuple[float, float]:
    """Shrink to half of the FLOPs, fine-tune; the share of the FLOPs left, and the accuracy."""
    folder = folder or Path(tempfile.mkdtemp())
    pl.seed_everything(0, verbose=False)
    net = residual_cnn((16, 32))
    graph = mg.lift(mg.export(net, (torch.zeros(1, 1, 8, 8),)))
    callback = BudgetCallback(graph, {"flops": "50%"})
    saver = ModelCheckpoint(folder, every_n_train_steps=every, save_last=True)
    fit(net, steps, 3e-3, callback, saver, resume=True)
    plan = callback.plan()
    slim = mg.apply(graph, plan, weights=net)  # compared with the masked original
    small = mg.to_torch(slim)
    fit(small.train(), steps // 3, 1e-3)
    mg.save(mg.with_weights(slim, small), folder / "slim.onnx", overwrite=True)
    change = plan.cost["flops"]
    print(f"FLOPs {change.before:,.0f} -> {change.after:,.0f}, {folder / 'slim.onnx'}")
    print(f"accuracy: {accuracy(net):.1%}, then {accuracy(small):.1%}")
    return change.after / change.before, accuracy(small)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, help="of checkpoints; a second run goes on there")
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.folder, arguments.every)
