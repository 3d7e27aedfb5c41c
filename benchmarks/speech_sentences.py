"""Held-out sentences beside their recordings: mels, alignment, and how fast they are made.

    gendiff train --modality speech --config configs/speech/kathleen.yaml speech.path=FOLDER
    python benchmarks/speech_sentences.py runs/speech/kathleen --mels mels.png --align align.png

Durations are predicted from the text, so that a sample need not last as long as its recording.

The *real-time factor* is CPU-seconds of one thread for a second of sound, at each number of
network calls, without guidance, which doubles them; on a CPU each sentence is made by itself.

The *alignment* draws how likely each of the sentence's tokens is in each frame, as the listener of
``gendiff evaluate`` hears it (:mod:`gendiff_speech.tokens`), in a recording and in the sample; the
line is what was found in the recording, and what was asked of the model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import gendiff
from gendiff import console
from gendiff.generate import Model
from gendiff.runs import cache_folder
from gendiff_speech import data, metrics, pictures
from gendiff_speech.mel import griffin_lim
from gendiff_speech.tokens import Listener, Told, frames, listener


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--calls", nargs="+", type=int, default=[4, 10, 50])
    parser.add_argument("--timed", type=int, default=8, help="sentences that are timed")
    parser.add_argument("--shown", type=int, default=3, help="sentences in the picture of mels")
    parser.add_argument("--mels", type=Path, help="draws recordings and samples of their texts")
    parser.add_argument("--align", type=Path, help="draws the alignment of the first sentence")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = gendiff.load(args.run)
    facts, section = model.run.facts, model.run.section
    texts = facts["reading"]["examples"]
    timing(model, texts[: args.timed], args.calls)
    if not (args.mels or args.align):
        return
    split = data.dataset(section, facts, "test")
    made = [frames(model.sample(1, seed=i, cond={"text": texts[i]}))[0] for i in range(args.shown)]
    items = [split[i, 0] for i in range(args.shown)]
    real = [(item.mel, item.tokens.repeat_interleave(item.durations)) for item in items]
    mean, std = (torch.tensor(facts[key])[:, None] for key in ("mean", "std"))
    if args.mels:
        pairs = [told for both in zip(real, made, strict=True) for told in both]
        roles = ("recording", "sample")
        titles = [f"{role}: {t[:30]}" for t in texts[: args.shown] for role in roles]
        shown = [mel * std + mean for mel, _ in pairs]
        pictures.grid(shown, titles, data.convention(facts), args.mels, columns=2)
    if args.align:
        told = metrics.token_frames(section, facts, "train")
        network = listener(str(facts["digest"]), len(facts["tokens"]), told, cache_folder(), 0)
        draw_alignment(network, real[0], made[0], facts["tokens"], args.align)


def timing(model: Model, texts: list[str], calls: list[int]) -> None:
    """Prints the real-time factors."""
    convention = data.convention(model.run.facts)
    second = convention.sample_rate_hz / convention.hop
    mean, std = (torch.tensor(model.run.facts[key])[:, None] for key in ("mean", "std"))
    model.sample(1, steps=1, cond={"text": texts[0]})  # to warm up
    rows = []
    for steps in calls:
        begin = time.process_time()
        made = frames(model.sample(len(texts), steps=steps, guidance=1, cond={"text": texts}))
        spent = time.process_time() - begin
        length = sum(mel.shape[1] for mel, _ in made) / second
        rows.append([str(steps), f"{spent / length:.3f}"])
    begin = time.process_time()
    waves = [griffin_lim(mel * std + mean, convention) for mel, _ in made]
    spent = time.process_time() - begin
    factor = spent * convention.sample_rate_hz / sum(map(len, waves))
    console.table("", ["network calls", "CPU-seconds for a second of sound"], rows)
    console.say(f"Griffin-Lim takes {factor:.3f} more")


@torch.no_grad()
def heard(network: Listener, mel: Tensor, tokens: Tensor) -> Tensor:
    """How likely each token of a sentence is in each frame, (L, T)."""
    likely = network(mel[None], torch.tensor([mel.shape[1]]))[0].softmax(0)
    return likely[tokens]


def draw_alignment(
    network: Listener, real: Told, made: Told, names: list[str], path: Path
) -> None:
    """Both alignments side by side, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    both = zip(figure.subplots(1, 2), (real, made), ("recording", "sample"), strict=True)
    for axis, (mel, said), title in both:
        tokens, lasts = said.unique_consecutive(return_counts=True)
        axis.imshow(heard(network, mel, tokens).numpy(), origin="lower", aspect="auto", vmin=0)
        place = torch.arange(len(tokens)).repeat_interleave(lasts)
        axis.plot(place.numpy(), color="white", linewidth=0.7)
        axis.set_yticks(range(len(tokens)), [names[t] for t in tokens.tolist()], fontsize=6)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("frame", fontsize=8)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
