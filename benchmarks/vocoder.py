"""Sound from the mels of held-out recordings: a trained vocoder beside Griffin-Lim.

Each recording is turned into its log mel and back. Told of what comes back: the log-spectral
distance from the recording and the distance of the mels, both in dB (RMS over bins or bands, mean
over frames); PESQ (ITU-T P.862, wide band at 16 kHz, narrow band at 8 kHz) and STOI (Taal et al.,
2011) of recordings of 1.5 s or more, by their usual packages in an environment of the
benchmark's own; and the CPU-seconds of one thread for each second of sound.

    gendiff train --modality vocoder --config configs/vocoder/kathleen.yaml vocoder.path=FOLDER
    python benchmarks/vocoder.py runs/vocoder/kathleen --picture vocoder.png
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peers import ROOT, peers_python
from torch import Tensor

from gendiff import generate
from gendiff_speech import pictures, waves
from gendiff_speech.mel import MelConvention, griffin_lim, log_mel, log_spectral_distance
from gendiff_speech.vocoder import sound

SCORE = """
import json, sys, numpy as np
from pesq import pesq
from pystoi import stoi
kept = np.load(sys.argv[1])
rate, count = int(kept["rate"]), int(kept["count"])
pairs = [(kept[f"real{i}"], kept[f"made{i}"]) for i in range(count)]
pairs = [pair for pair in pairs if len(pair[0]) >= 1.5 * rate]  # STOI needs that
found = {}
if pairs:
    found["stoi"] = float(np.mean([stoi(a, b, rate) for a, b in pairs]))
if pairs and rate in (8000, 16000):
    mode = "wb" if rate == 16000 else "nb"
    found["pesq"] = float(np.mean([pesq(rate, a, b, mode) for a, b in pairs]))
print(json.dumps(found))
"""


def spectrum_db(wave: Tensor, c: MelConvention) -> Tensor:
    """STFT magnitudes in dB, at least -80 dB of a full-scale sine's."""
    window = torch.hann_window(c.n_fft)
    magnitude = torch.stft(wave, c.n_fft, c.hop, c.n_fft, window, return_complex=True).abs()
    return 20 * magnitude.clamp(min=1e-4 * c.n_fft / 4).log10()


def row(
    vocoder: Callable[[Tensor], Tensor], real: list[Tensor], c: MelConvention, python: Path | None
) -> tuple[dict[str, Any], list[Tensor]]:
    """What one vocoder does, and its waves."""
    mels = [log_mel(wave, c) for wave in real]
    vocoder(mels[0])
    begin = time.process_time()
    made = [vocoder(mel) for mel in mels]
    spent = time.process_time() - begin
    real = [w[: len(m)] for w, m in zip(real, made, strict=True)]
    spectral = [
        (spectrum_db(a, c) - spectrum_db(b, c)).square().mean(0).sqrt().mean()
        for a, b in zip(real, made, strict=True)
    ]
    mel = [log_spectral_distance(log_mel(w, c), m) for w, m in zip(made, mels, strict=True)]
    figures = {
        "log_spectral_distance_db": float(torch.stack(spectral).mean()),
        "mel_distance_db": float(torch.stack(mel).mean()),
        "real_time_factor": spent * c.sample_rate_hz / sum(map(len, made)),
    }
    if python is not None:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "waves.npz"
            arrays = {f"real{i}": w.numpy() for i, w in enumerate(real)}
            arrays |= {f"made{i}": w.numpy() for i, w in enumerate(made)}
            np.savez(file, rate=c.sample_rate_hz, count=len(real), **arrays)  # type: ignore[arg-type]
            done = subprocess.run(
                [python, "-c", SCORE, file], capture_output=True, text=True, check=True
            )
        figures |= json.loads(done.stdout)
    return figures, made


def main() -> None:
    """Prints a row for each vocoder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run of gendiff train --modality vocoder")
    parser.add_argument("--count", type=int, default=40, help="held-out recordings")
    parser.add_argument("--iterations", type=int, nargs="*", default=[60, 4], help="Griffin-Lim's")
    parser.add_argument("--python", type=Path, help="interpreter that has pesq and pystoi")
    parser.add_argument("--no-scores", action="store_true", help="no PESQ and no STOI")
    parser.add_argument("--picture", type=Path, help="draws real and made mels")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    python = args.python
    if python is None and not args.no_scores:
        python = peers_python(ROOT / ".venv-vocoder", ROOT / "benchmarks" / "vocoder.txt")
    model = generate.load(args.run, "cpu")
    torch.set_num_threads(1)
    data = waves.Waves(model.run.facts, "test", 16)
    c = data.convention
    count = min(args.count, len(data))
    real = [data.whole(i * len(data) // count) for i in range(count)]
    rows: dict[str, dict[str, Any]] = {}
    made: dict[str, list[Tensor]] = {"real": real}
    by_rule: dict[str, Callable[[Tensor], Tensor]] = {
        f"griffin-lim, {n} iterations": partial(griffin_lim, convention=c, iterations=n)
        for n in args.iterations
    }
    for name, vocoder in (by_rule | {"vocoder": partial(sound, model)}).items():
        rows[name], made[name] = row(vocoder, real, c, python)
        print(f"{name:28}", {k: round(v, 4) for k, v in rows[name].items()}, flush=True)
    seconds = sum(map(len, real)) / c.sample_rate_hz
    print(f"{count} held-out recordings, {seconds:.1f} s, step {model.step}")
    if args.picture:
        shown = [w for ws in made.values() for w in ws[:3]]
        titles = [name for name in made for _ in range(3)]
        pictures.grid([log_mel(w, c) for w in shown], titles, c, args.picture, 3)
    if args.out:
        args.out.write_text(json.dumps({"recordings": count, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
