"""Are the right sounds at the right times? A small network that hears tokens, frame by frame.

Sentences that nobody says twice cannot be told apart by a recogniser of texts. This one learns
from the training recordings which token is spoken in each frame, by the durations that were
found for them, and has never heard the held-out sentences on which it judges. A frame of a
sample is right where the token that was asked for there is the likeliest of all. Held-out
recordings and their own durations are the floor; it is well below 1, as neighbouring sounds run
into each other and durations are only found to a frame or so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gendiff.metrics import one_thread
from gendiff.modality import Measure
from gendiff.noise import generator
from gendiff.spaces import Batch
from gendiff_speech.recogniser import pad

_VERSION = 1  # of what is cached: grows when the network or its training changes
_STEPS = 600
_CROP = 100  # frames of a training excerpt
_BATCH = 16
_CHANNELS = 128

Told = tuple[Tensor, Tensor]  # a mel (C, T) and the token of each of its frames (T,)


class Listener(nn.Module):
    """Normalised log mels (B, C, T) and lengths (B,) to logits of tokens (B, tokens, T).

    Seven frames to either side are heard, and padding is zero before every convolution.
    """

    def __init__(self, mels: int, tokens: int) -> None:
        super().__init__()
        widths = (mels, _CHANNELS, _CHANNELS)
        self.convs = nn.ModuleList(
            nn.Conv1d(wide, _CHANNELS, 5, padding=2, bias=False) for wide in widths
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(_CHANNELS) for _ in widths)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Conv1d(_CHANNELS, tokens, 3, padding=1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        live = (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.drop(norm(conv(x.masked_fill(~live, 0))).relu())
        logits: Tensor = self.last(x.masked_fill(~live, 0))
        return logits


def token_accuracy(
    digest: str,
    tokens: int,
    told: Sequence[Told],
    reference: Sequence[Told],
    samples: Sequence[Told],
    cache: Path,
    seed: int,
) -> Measure:
    """The share of the samples' frames in which the token asked for is the likeliest.

    Args:
        digest: Identifies the corpus.
        tokens: How many there are, with the padding.
        told: What the network learns from.
        reference: Recordings that it has not heard, for the floor.
        samples: What is judged.
        cache: Folder for trained networks.
        seed: Seed of weights and batches.
    """
    network = listener(digest, tokens, told, cache, seed)
    shares = _right(network, samples)
    note = (
        f"share of frames in which the token asked for is the likeliest of {tokens - 1}, by a "
        f"small network trained on {len(told)} training recordings; {len(samples)} samples, "
        f"floor: {len(reference)} held-out recordings"
    )
    floor = float(_right(network, reference).mean())
    error = float(shares.std(correction=0)) / math.sqrt(len(shares))
    return Measure("token_accuracy", float(shares.mean()), "higher", floor, note, error)


def frames(batch: Batch) -> list[Told]:
    """Samples without their padding, each with the token that was asked for in each frame."""
    assert batch.cond is not None
    space: Any = batch.space
    x = batch.x.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0).clamp(-20, 20)
    asked = zip(batch.cond["tokens"].cpu(), batch.cond["durations"].cpu(), strict=True)
    return [
        (mel[:, :length], said.repeat_interleave(lasts))
        for mel, length, (said, lasts) in zip(x, space.lengths.tolist(), asked, strict=True)
    ]


@torch.no_grad()
def _right(network: Listener, some: Sequence[Told]) -> Tensor:
    """Of each recording, the share of frames that are heard as told."""
    found = []
    with one_thread():
        for start in range(0, len(some), 32):
            part = some[start : start + 32]
            heard = network(*pad([mel for mel, _ in part])).argmax(1)
            found += [
                float((row[: len(said)] == said).float().mean())
                for row, (_, said) in zip(heard, part, strict=True)
            ]
    return torch.tensor(found)


def listener(digest: str, tokens: int, told: Sequence[Told], cache: Path, seed: int) -> Listener:
    """A listener trained on recordings, from the cache if it is there; see the module."""
    bands, count = told[0][0].shape[0], sum(len(said) for _, said in told)
    name = f"tokens {_VERSION} {digest} {bands} {count} {len(told)} {tokens} {seed}"
    path = cache / f"listener-{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.pt"
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed % 2**63)
        network = Listener(bands, tokens)
        if path.exists():
            network.load_state_dict(torch.load(path, weights_only=True))
            return network.eval()
        _train(network, told, seed)
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(network.state_dict(), partial)
    partial.replace(path)
    return network


def _train(network: Listener, told: Sequence[Told], seed: int) -> None:
    gen = generator("listener", seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=_STEPS)
    network.train()
    for _ in range(_STEPS):
        mels, said = [], []
        for i in torch.randint(len(told), (_BATCH,), generator=gen).tolist():
            mel, tokens = told[i]
            start = int(torch.randint(max(1, len(tokens) - _CROP + 1), (), generator=gen))
            mel = mel[:, start : start + _CROP]
            mels.append(mel + 0.2 * torch.randn(mel.shape, generator=gen))
            said.append(tokens[start : start + _CROP])
        wanted = nn.utils.rnn.pad_sequence(said, batch_first=True)  # of padding 0, which is none
        loss = F.cross_entropy(network(*pad(mels)), wanted, ignore_index=0, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    network.eval()
