"""Voice conversion and infilling of held-out recordings, judged by a recogniser.

    gendiff train --modality speech name=fsdd speech.data=fsdd speech.path=FSDD train.steps=2500
    python benchmarks/voice_conversion.py runs/speech/fsdd --out conversion.json

The recogniser of ``gendiff evaluate`` has heard half of the held-out recordings; the other half
is edited here as ``gendiff edit`` does it. Their text is told to the model, as ``--cond text=``.

*Conversion*: recordings go to other speakers, by variation (``--noise N --cond speaker=…``) or by
translation (also ``--from speaker=…``), at each amount of noise, sigma / alpha. Printed: the share
in which the recording's text is heard, the share in which the target speaker is, and how far the
mel has moved (RMS, in the data's standard deviations). The row "recordings" is the ceiling of the
text and the floor of the speaker; "from nothing" is what the model says with nothing of the
recording but its length.

*Infilling* (``--keep 0-a,b-``): the middle third of each recording is made anew for the same
speaker, knowing its surroundings. Beside it, the recordings themselves; their middle third at the
data's mean; and it made without its surroundings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gendiff
from gendiff import console
from gendiff.editing import Kept, Translated, time_of_noise
from gendiff.generate import Model
from gendiff.modality import Request
from gendiff.noise import Streams
from gendiff.runs import cache_folder
from gendiff.samplers import sample, start
from gendiff.spaces import Batch, Masked
from gendiff_speech import editing
from gendiff_speech.data import Item
from gendiff_speech.metrics import listener
from gendiff_speech.recogniser import Recogniser, Recordings, hear

AT_ONCE = 25
Make = Callable[[Batch, Batch, Streams], Tensor]  # of the recordings and of what is asked for


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--count", type=int, default=200, help="conversions, of each row")
    parser.add_argument("--infilled", type=int, default=100, help="recordings with a new middle")
    parser.add_argument("--vary", nargs="*", type=float, default=[1.0, 4.0])
    parser.add_argument("--translate", nargs="*", type=float, default=[4.0, 20.0, 80.0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = gendiff.load(args.run)
    network, _, held_out = listener(model.run.section, model.run.facts, cache_folder(), 0)
    assert network is not None
    report: dict[str, Any] = {**vars(args), "out": None, "run": model.name}
    report["conversion"] = conversion(model, network, held_out, args)
    report["infilling"] = infilling(model, network, held_out, args)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def conversion(
    model: Model, network: Recogniser, held_out: Recordings, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each way and each amount of noise."""
    speakers = len(model.run.facts["speakers"])
    shift = 1 + torch.arange(args.count) % (speakers - 1)
    chosen = held_out.select([i * len(held_out) // args.count for i in range(args.count)])
    target = (chosen.speaker + shift) % speakers
    makes: list[tuple[str, float | None, Make]] = [("recordings", None, lambda x, y, z: x.x)]
    makes += [("vary", n, lambda x, y, z, n=n: made(model, args.steps, x, y, z, n))
              for n in args.vary]  # fmt: skip
    makes += [("translate", n, lambda x, y, z, n=n: made(model, args.steps, x, y, z, n, True))
              for n in args.translate]  # fmt: skip
    makes.append(("from nothing", None, lambda x, y, z: made(model, args.steps, x, y, z, None)))
    rows = []
    for name, noise, make in makes:
        mels = list(edited(model, chosen, target, make))
        heard = hear(network, mels)
        far = [float((a - b).square().mean()) for a, b in zip(mels, chosen.mels, strict=True)]
        rows.append(
            {
                "way": name,
                "noise": noise,
                "count": len(mels),
                "text": share(heard.text, chosen.text),
                "target": share(heard.speaker, target),
                "source": share(heard.speaker, chosen.speaker),
                "moved": (sum(far) / len(far)) ** 0.5,
            }
        )
        print(rows[-1], flush=True)
    show("conversion", rows)
    return rows


def infilling(
    model: Model, network: Recogniser, held_out: Recordings, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for the recordings, without their middle third, and with a new one."""
    count = args.infilled
    chosen = held_out.select([i * len(held_out) // count for i in range(count)])

    def erased(source: Batch, _: Batch, __: Streams) -> Tensor:
        return source.space.hold(torch.zeros_like(source.x), source.x, outer(source))

    def infilled(source: Batch, _: Batch, streams: Streams) -> Tensor:
        return made(model, args.steps, source, source, streams, None, keep=outer(source))

    def blind(source: Batch, _: Batch, streams: Streams) -> Tensor:
        new = made(model, args.steps, source, source, streams, None)
        return source.space.hold(new, source.x, outer(source))

    rows = []
    for name, make in (
        ("recordings", lambda x, y, z: x.x),
        ("middle third erased", erased),
        ("made without surroundings", blind),
        ("made with surroundings", infilled),
    ):
        mels = list(edited(model, chosen, chosen.speaker, make))
        heard = hear(network, mels)
        row = {"way": name, "count": count, "text": share(heard.text, chosen.text)}
        row["speaker"] = share(heard.speaker, chosen.speaker)
        row["jump"] = sum(jump(mel) for mel in mels) / count
        rows.append(row)
        print(rows[-1], flush=True)
    show("infilling", rows)
    return rows


def outer(batch: Batch) -> Tensor:
    """True in the first and the last third of each sample, of the batch's shape."""
    assert isinstance(batch.space, Masked)
    frame, lengths = torch.arange(batch.space.frames), batch.space.lengths[:, None]
    kept = (frame < lengths // 3) | (frame >= lengths - lengths // 3)
    return (kept[:, None] & batch.space.mask).expand(batch.space.shape)


def jump(mel: Tensor) -> float:
    """RMS change of the mel from frame to frame at the two ends of its middle third."""
    third = mel.shape[1] // 3
    edges = torch.tensor([third, mel.shape[1] - third])
    return float((mel[:, edges] - mel[:, edges - 1]).square().mean().sqrt())


def made(
    model: Model,
    steps: int,
    source: Batch,
    wanted: Batch,
    streams: Streams,
    noise: float | None,
    translate: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """What ``gendiff edit`` makes, for many recordings at once; without a file where no noise."""
    settings, schedule, space = model.settings(steps=steps), model.denoiser.schedule, source.space
    first = 1.0 if noise is None else time_of_noise(schedule, noise)
    times = settings.grid.times(schedule, settings.steps, first)
    denoiser: Any = model.denoiser.bind(space, wanted.cond)
    if translate:
        own, z = model.denoiser.bind(space, source.cond), space.noise(streams, 0)
        denoiser = Translated(denoiser, own, space, schedule, source.x, z)
    x = source.x if noise is not None else None
    if keep is not None:
        denoiser = Kept(denoiser, space, schedule, source.x, keep)
        x = space.hold(torch.zeros_like(source.x), source.x, keep)
    x = start(space, schedule, times[0], streams, x)
    return sample(denoiser, space, schedule, settings.sampler, times, streams, x)


def edited(model: Model, some: Recordings, speaker: Tensor, make: Make) -> Iterator[Tensor]:
    """The mels that come of recordings, (mels, T_i) each."""
    for begin in range(0, len(some), AT_ONCE):
        ids = list(range(begin, min(begin + AT_ONCE, len(some))))
        part = some.select(ids)
        source, wanted = (batch(model, part, who) for who in (part.speaker, speaker[ids]))
        x = make(source, wanted, Streams(0, tuple(ids)))
        yield from (row[:, : mel.shape[1]] for row, mel in zip(x, part.mels, strict=True))


def batch(model: Model, some: Recordings, speaker: Tensor) -> Batch:
    """Recordings with the conditions that ``gendiff edit`` gives them, for these speakers."""
    run = model.run
    items = []
    for i, (mel, text, who) in enumerate(
        zip(some.mels, some.text.tolist(), speaker.tolist(), strict=True)
    ):
        request = Request([i], 0, {"text": text, "speaker": who})
        cond = run.modality.templates(run.section, run.facts, request)[1]
        assert cond is not None
        durations = editing.fitted(cond["durations"], mel.shape[1])[0]
        items.append(Item(mel, cond["tokens"][0], durations, who, text))
    return run.modality.collate(run.section, run.facts, items)


def share(found: Tensor | None, told: Tensor) -> float:
    """Of those that are as told."""
    assert found is not None
    return float((found == told).double().mean())


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints a table."""
    cells = [
        ["" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in rows
    ]
    console.table(title, list(rows[0]), cells)


if __name__ == "__main__":
    main()
