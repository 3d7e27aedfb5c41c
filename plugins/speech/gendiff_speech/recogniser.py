"""A small network that tells what was said and by whom, to judge samples with.

It learns from the held-out recordings it is given and nothing else, in about a minute on one CPU
core, so that it is independent of the model it judges. Convolutions over bands and frames, each
followed by the mask, then the mean over live frames: what lies in the padding changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gendiff.metrics import one_thread
from gendiff.noise import generator

_VERSION = 1  # of what is cached: grows when the network or its training changes
_STEPS = 450
_FRAMES = 1600  # of a training batch, which holds 8 to 32 recordings
_CROP = 200  # frames of a training excerpt, where only the speaker is asked for
_FEATURES = 32


@dataclass(frozen=True)
class Recordings:
    """Spectrograms of any lengths, and what was asked of them.

    Args:
        mels: Normalised log mel-spectrograms, (bands, frames) each.
        tokens: The tokens of each, without padding.
        text: Index of each one's text, (N,), or -1.
        speaker: Index of each one's speaker, (N,).
    """

    mels: tuple[Tensor, ...]
    tokens: tuple[tuple[int, ...], ...]
    text: Tensor
    speaker: Tensor

    def __len__(self) -> int:
        return len(self.mels)

    def select(self, ids: Sequence[int]) -> Recordings:
        """Those with these numbers, in this order."""
        rows = torch.tensor(list(ids), dtype=torch.int64)
        mels = tuple(self.mels[i] for i in ids)
        tokens = tuple(self.tokens[i] for i in ids)
        return Recordings(mels, tokens, self.text[rows], self.speaker[rows])


def pad(mels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Spectrograms (C, T_i) as one tensor (N, C, max T), zeros behind, and the lengths (N,)."""
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    frames = int(lengths.max())
    return torch.stack([F.pad(mel, (0, frames - mel.shape[1])) for mel in mels]), lengths


class Recogniser(nn.Module):
    """Log mels to 32 features, and these to texts and speakers.

    Args:
        mels: Bands of the spectrograms.
        texts: Number of texts; 0 for no such head.
        speakers: Number of speakers; 0 for no such head.
    """

    def __init__(self, mels: int, texts: int, speakers: int) -> None:
        super().__init__()
        layers, bands = [], mels
        for wide, out, stride in ((1, 16, (2, 1)), (16, 32, 2), (32, 64, 2), (64, 96, 2)):
            layers.append(
                nn.Sequential(
                    nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
                )
            )
            bands = (bands + 1) // 2
        self.body = nn.ModuleList(layers)
        self.drop = nn.Dropout(0.2)
        self.features = nn.Linear(96 * bands, _FEATURES)
        self.text = nn.Linear(_FEATURES, texts) if texts else None
        self.speaker = nn.Linear(_FEATURES, speakers) if speakers else None

    def embed(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Features (N, 32) of spectrograms (N, C, T) that are live for their lengths (N,)."""
        live = (torch.arange(x.shape[2]) < lengths[:, None])[:, None, None]
        h = x[:, None].masked_fill(~live, 0)
        for number, layer in enumerate(self.body):
            h = layer(h)
            live = live if number == 0 else live[..., ::2]
            h = h.masked_fill(~live, 0)
        mean = h.sum(3) / live.sum(3)
        features: Tensor = self.features(self.drop(mean.flatten(1)))
        return features

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the texts (N, K) and of the speakers (N, S); None without that head."""
        h = F.relu(self.embed(x, lengths))
        text = None if self.text is None else self.text(h)
        return text, None if self.speaker is None else self.speaker(h)


@dataclass(frozen=True)
class Heard:
    """What the recogniser makes of recordings.

    Args:
        features: (N, 32).
        text: The most likely text of each, (N,), or None.
        speaker: The most likely speaker of each, (N,), or None.
    """

    features: Tensor
    text: Tensor | None
    speaker: Tensor | None


@torch.no_grad()
def hear(network: Recogniser, mels: Sequence[Tensor]) -> Heard:
    """Runs the recogniser over spectrograms (C, T_i)."""
    features = []
    with one_thread():
        for start in range(0, len(mels), 32):
            features.append(network.embed(*pad(mels[start : start + 32])))
    found = torch.cat(features)
    h = F.relu(found)
    text = None if network.text is None else network.text(h).argmax(1)
    return Heard(found, text, None if network.speaker is None else network.speaker(h).argmax(1))


def recogniser(
    cache: Path, digest: str, told: Recordings, texts: int, speakers: int, seed: int
) -> Recogniser:
    """A recogniser trained on the recordings, from the cache if it is there.

    Args:
        cache: Folder for trained networks.
        digest: Identifies the corpus.
        told: What it learns from.
        texts: Number of texts to tell apart; 0 or 1 for none.
        speakers: Number of speakers to tell apart; 0 or 1 for none.
        seed: Seed of weights, batches and augmentation.
    """
    bands, frames = told.mels[0].shape[0], sum(mel.shape[1] for mel in told.mels)
    name = f"{_VERSION} {digest} {bands} {frames} {len(told)} {texts} {speakers} {seed}"
    path = cache / f"recogniser-{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        network = Recogniser(bands, texts if texts > 1 else 0, speakers if speakers > 1 else 0)
        if path.exists():
            network.load_state_dict(torch.load(path, weights_only=True))
            return network.eval()
        with one_thread():
            train(network, told, seed)
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(network.state_dict(), partial)
    partial.replace(path)
    return network


def train(network: Recogniser, told: Recordings, seed: int) -> None:
    """Trains on augmented batches by cross-entropy, the sum over both heads."""
    gen = generator("recogniser", seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=_STEPS)
    crop = None if network.text is not None else _CROP
    typical = sum(mel.shape[1] for mel in told.mels) // len(told)
    size = max(8, min(32, _FRAMES // max(1, min(typical, crop or typical))))
    network.train()
    for _ in range(_STEPS):
        rows = torch.randint(len(told), (size,), generator=gen)
        x, lengths = pad([augment(told.mels[i], gen, crop) for i in rows.tolist()])
        wanted = (told.text[rows], told.speaker[rows])
        loss = sum(
            F.cross_entropy(logits, labels, label_smoothing=0.1)
            for logits, labels in zip(network(x, lengths), wanted, strict=True)
            if logits is not None
        )
        assert isinstance(loss, Tensor)  # the caller asked for a head
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    network.eval()


def augment(mel: Tensor, gen: torch.Generator, crop: int | None = None) -> Tensor:
    """A spectrogram (C, T) said a little otherwise.

    An excerpt, begun up to a tenth later, is stretched in time by up to a fifth, made louder or
    softer, given noise, and loses a strip of bands and one of frames (the masks of SpecAugment,
    Park et al., 2019, https://arxiv.org/abs/1904.08779).
    """
    bands, frames = mel.shape

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=gen))

    start = int(uniform(0, frames * 0.1))
    if crop is not None and frames > crop:
        start = int(uniform(0, frames - crop))
        frames = start + crop
    mel = mel[:, start:frames]
    length = max(4, round(mel.shape[1] * uniform(0.83, 1.2)))
    mel = F.interpolate(mel[None], size=length, mode="linear", align_corners=False)[0]
    mel = mel + uniform(-0.3, 0.3) + 0.2 * torch.randn(mel.shape, generator=gen)
    for axis, most in ((0, bands // 8), (1, length // 6)):
        width = int(uniform(0, most + 1))
        at = int(uniform(0, mel.shape[axis] - width + 1))
        mel.narrow(axis, at, width).zero_()
    return mel
