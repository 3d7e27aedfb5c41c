r"""How long each token of a new sentence lasts.

The duration predictor of FastSpeech (Ren et al., 2019, https://arxiv.org/abs/1905.09263, section
3.3), which Grad-TTS and Matcha-TTS keep: two convolutions over the tokens, each with ReLU, layer
norm and dropout, and a linear layer, trained by squared error on the logarithm of the frames.
Here it reads the tokens themselves and learns apart from the diffusion model, in seconds.

The mean of logarithms is below the logarithm of the mean, so that sentences would be too short.
:func:`fit` therefore shifts the output until the training sentences last as long as they do:
:math:`b = \log \sum d - \log \sum \exp \hat l`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence

from gendiff.noise import generator

_CHANNELS = 48
_STEPS = 500
_BATCH = 32


class DurationPredictor(nn.Module):
    """Tokens (B, L), of which 0 is padding, and speakers (B,) to log frames (B, L)."""

    def __init__(self, tokens: int, speakers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, _CHANNELS)
        self.speaker = nn.Embedding(speakers, _CHANNELS)
        self.convs = nn.ModuleList(nn.Conv1d(_CHANNELS, _CHANNELS, 5, padding=2) for _ in "12")
        self.norms = nn.ModuleList(nn.LayerNorm(_CHANNELS) for _ in "12")
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(_CHANNELS, 1)

    def forward(self, tokens: Tensor, speaker: Tensor) -> Tensor:
        live = (tokens > 0)[..., None]
        h = (self.token(tokens) + self.speaker(speaker)[:, None]) * live
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = self.dropout(norm(conv(h.transpose(1, 2)).transpose(1, 2).relu())) * live
        log_frames: Tensor = self.last(h)[..., 0]
        return log_frames


def fit(
    tokens: Sequence[Tensor],
    durations: Sequence[Tensor],
    speaker: Tensor,
    counts: tuple[int, int],
) -> DurationPredictor:
    """A predictor trained on sentences: the same ones give the same predictor.

    Args:
        tokens: Of each sentence, (L,), from 1 on.
        durations: Of each sentence, (L,) frames, at least 1.
        speaker: Of each sentence, (N,).
        counts: How many tokens, with the padding, and speakers there are.
    """
    gen = generator("durations", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictor = DurationPredictor(*counts)
        optimizer = torch.optim.AdamW(predictor.parameters(), lr=4e-3, weight_decay=0.01)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=_STEPS)
        for _ in range(_STEPS):
            rows = torch.randint(len(tokens), (_BATCH,), generator=gen)
            x, d = (
                pad_sequence([values[i] for i in rows.tolist()], batch_first=True)
                for values in (tokens, durations)
            )
            error = (predictor(x, speaker[rows]) - d.clamp(min=1).log())[x > 0]
            optimizer.zero_grad()
            error.square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            plan.step()
    predictor.eval()
    with torch.no_grad():
        wanted = sum(int(d.sum()) for d in durations)
        found = sum(
            float(log_frames.exp().sum()) for log_frames in predict(predictor, tokens, speaker)
        )
        predictor.last.bias.add_(float(np.log(wanted / found)))
    return predictor


@torch.no_grad()
def predict(
    predictor: DurationPredictor, tokens: Sequence[Tensor], speaker: Tensor
) -> list[Tensor]:
    """Log frames (L,) of sentences, each on its own: no sentence knows the others."""
    return [predictor(x[None], s[None])[0] for x, s in zip(tokens, speaker, strict=True)]


def to_text(predictor: DurationPredictor) -> str:
    """The weights in half precision, as base64: a run keeps them among its facts."""
    weights = parameters_to_vector(predictor.parameters()).detach().half().numpy()
    return base64.b64encode(weights.astype("<f2").tobytes()).decode()


def from_text(text: str, counts: tuple[int, int]) -> DurationPredictor:
    """The predictor of :func:`to_text`."""
    predictor = DurationPredictor(*counts)
    weights = np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
    vector_to_parameters(torch.from_numpy(weights), predictor.parameters())
    return predictor.eval()
