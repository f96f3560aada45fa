"""A dataset that sounds like audio: spectrograms of synthesized sounds, ten kinds.

No recordings are at hand offline. Every sound is one second at 8 kHz, of a random pitch (80 to 500
Hz), loudness and onset, in noise: a sine, a square and a sawtooth wave, a plucked string (Karplus
and Strong, 1983), a rising and a falling chirp, a tremolo, a vibrato, band noise, and a train of
clicks. The image is the logarithm of its short-time spectrum, 32 bands by 32 frames.
"""

from pathlib import Path

import numpy as np

RATE, BANDS, FRAMES, WINDOW = 8000, 32, 32, 512
KINDS = (
    "sine",
    "square",
    "sawtooth",
    "pluck",
    "rise",
    "fall",
    "tremolo",
    "vibrato",
    "noise",
    "clicks",
)
TRAIN, TEST = 12_000, 3_000

Array = np.ndarray


def sounds(folder: Path) -> Path:
    """The file with the dataset; made if it is not there."""
    path = folder / "sounds.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(20181)
        x_train, y_train = _drawn(TRAIN, generator)
        x_test, y_test = _drawn(TEST, generator)
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
        part.replace(path)
    return path


def _drawn(count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    labels = generator.integers(0, len(KINDS), count).astype(np.uint8)
    images = np.stack([_image(_sound(KINDS[label], generator)) for label in labels])
    return images, labels


def _sound(kind: str, generator: np.random.Generator) -> Array:
    time = np.arange(RATE) / RATE
    pitch = float(np.exp(generator.uniform(np.log(80), np.log(500))))
    phase = 2 * np.pi * (pitch * time + generator.uniform())
    if kind == "sine":
        wave = np.sin(phase)
    elif kind == "square":
        wave = np.sign(np.sin(phase))
    elif kind == "sawtooth":
        wave = 2 * ((phase / (2 * np.pi)) % 1) - 1
    elif kind == "pluck":
        wave = _plucked(pitch, generator)
    elif kind in ("rise", "fall"):
        speed = generator.uniform(0.5, 1.5) * (1 if kind == "rise" else -0.45)
        wave = np.sin(2 * np.pi * pitch * (time + speed * time**2 / 2))
    elif kind == "tremolo":
        wave = np.sin(phase) * (1 + np.sin(2 * np.pi * generator.uniform(4, 9) * time)) / 2
    elif kind == "vibrato":
        wave = np.sin(phase + 8 * np.sin(2 * np.pi * generator.uniform(4, 9) * time))
    elif kind == "noise":
        wave = _band_noise(pitch, generator)
    else:
        wave = (
            np.floor(phase / (2 * np.pi) / 20) != np.floor((phase - 0.3) / (2 * np.pi) / 20)
        ) * 1.0
    start = int(generator.uniform(0, 0.3) * RATE)
    quiet = np.concatenate([np.zeros(start), wave[: RATE - start]])
    return quiet * generator.uniform(0.2, 1.0) + generator.normal(0, 0.15, RATE)


def _plucked(pitch: float, generator: np.random.Generator) -> Array:
    string = generator.uniform(-1, 1, max(2, int(RATE / pitch)))
    rounds = [string]
    for _ in range(RATE // len(string) + 1):
        string = 0.498 * (string + np.roll(string, 1))
        rounds.append(string)
    return np.concatenate(rounds)[:RATE]


def _band_noise(center: float, generator: np.random.Generator) -> Array:
    spectrum = np.fft.rfft(generator.normal(0, 1, RATE))
    frequency = np.fft.rfftfreq(RATE, 1 / RATE)
    wave = np.fft.irfft(spectrum * np.exp(-(((frequency - center) / (0.2 * center)) ** 2)), RATE)
    return wave / (np.abs(wave).max() + 1e-9)


def _image(sound: Array) -> Array:
    """``[BANDS, FRAMES]``, uint8."""
    starts = np.linspace(0, RATE - WINDOW, FRAMES).astype(int)
    frames = np.stack([sound[s : s + WINDOW] for s in starts]) * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.geomspace(2, WINDOW // 2, BANDS + 1)
    bins = np.clip(np.searchsorted(edges, np.arange(power.shape[1])) - 1, 0, BANDS - 1)
    bands = np.stack([np.bincount(bins, row, BANDS) for row in power], axis=1)
    level = np.log10(bands + 1e-3)
    return np.clip(255 * (level + 2) / 6, 0, 255).astype(np.uint8)
