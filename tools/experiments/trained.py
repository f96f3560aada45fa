"""Networks that are trained before they are shrunk, each once, kept under ``runs/``."""

import warnings
from pathlib import Path

import torch
from networks import NETWORKS

import morphgraph as mg
from morphgraph.recipes.data import Augmentation, load_data
from morphgraph.recipes.trainer import Recipe, accuracy, train
from morphgraph.train.phases import NoPenalty

EPOCHS = {"ResNet-20": 30, "VGG, by hand": 15, "MobileNet": 15}


def trained(name: str, seed: int, data: Path, folder: Path, epochs: int | None = None) -> Path:
    """The ONNX file of a trained network, BatchNorm as nodes, with an open batch.

    Args:
        name: one of :data:`~networks.NETWORKS`.
        seed: of its weights, and of the order of its batches.
        data: CIFAR-10 at 16x16 pixels.
        folder: where it is kept, or made.
        epochs: of its training; those of :data:`EPOCHS` by default.
    """
    slug = name.lower().replace(", ", "-").replace(" ", "-")
    epochs = epochs or EPOCHS[name]
    told = "" if epochs == EPOCHS.get(name, epochs) else f"-{epochs}-epochs"
    path = folder / f"{slug}{told}-{seed}.onnx"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    dataset = load_data(str(data))
    network, size = NETWORKS[name], dataset.preprocessing.size
    torch.manual_seed(seed)
    net = network.make(len(dataset.preprocessing.mean), len(dataset.classes), size[0])
    augmentation = Augmentation(crop=2, flip=True)
    recipe = Recipe(epochs, lr=network.lr, augmentation=augmentation, bf16=network.bf16)
    train(net, dataset, recipe, seed=seed, phase="train", penalty=NoPenalty())
    print(f"{slug}-{seed}: {accuracy(net, dataset):.4f}", flush=True)
    net = net.eval().to(memory_format=torch.contiguous_format)
    image = torch.zeros(2, len(dataset.preprocessing.mean), *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mg.save(mg.export(net, (image,), dynamic_batch=True), path, overwrite=True)
    return path
