r"""The ten digit words by a formant synthesiser: buzzing vowels and noise, to try the code with.

It needs nothing but SciPy, and it is not speech to learn from: six voices that are one voice with
another pitch, tempo and length of the vocal tract, no stress, no intonation but a fall.

A source-filter model after Klatt (1980, https://doi.org/10.1121/1.383940). The voice's source is
the derivative of a glottal flow that is :math:`p^2 (q - p)` in the open part, the first q of a
period, and 0 in the rest (Klatt & Klatt, 1990, https://doi.org/10.1121/1.398894). With breath,
which is noise, it passes a cascade of resonators

.. math:: y_n = a x_n + b y_{n-1} + c y_{n-2}, \quad c = -e^{-2 \pi B T}, \quad
    b = 2 e^{-\pi B T} \cos(2 \pi F T), \quad a = 1 - b - c

of frequency F and bandwidth B at 1 / T samples a second. Frication and bursts are noise through
one resonator beside the cascade. The lowest three formants of plain vowels but the schwa are the
men's means of Peterson & Barney (1952, https://doi.org/10.1121/1.1906875); those of consonants are
near Klatt's table III, and the higher ones a uniform tube's. The nasal has a low first formant in
place of a pole and a zero. Gains, durations, bands of noise and voices were chosen here, by eye.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.signal import sosfilt

from gendiff.noise import derive_seed
from gendiff_speech.espeak import Spoken

RATE_HZ = 22050
_STEP = 55  # samples between updates of the resonators, 2.5 ms
_OPEN = 0.6  # q
_PEAK = 0.5  # of every wave
_FALL = (1.12, 0.82)  # of the pitch, from a word's beginning to its end
_WIDTHS = (60.0, 90.0, 150.0)  # of the lowest three formants in Hz, after Klatt
_BLEND = (0.025, 0.008)  # seconds before and after a boundary, of formants and of gains

Formants = tuple[float, float, float]


class Voice(NamedTuple):
    """A speaker.

    pitch_hz: Of the voice at ``pitch=50``.
    tract: Length of the vocal tract; 1 is that of the men of the tables.
    pace: What durations are multiplied by.
    breath: Gain of the noise in the voice.
    """

    pitch_hz: float
    tract: float
    pace: float
    breath: float


SPEAKERS = {
    "bass": Voice(88, 1.07, 1.12, 0.02),
    "baritone": Voice(112, 1.0, 1.0, 0.03),
    "tenor": Voice(140, 0.95, 0.92, 0.02),
    "alto": Voice(180, 0.89, 1.05, 0.06),
    "soprano": Voice(225, 0.84, 0.95, 0.04),
    "child": Voice(290, 0.74, 1.1, 0.08),
}
VOICES = tuple(SPEAKERS)


class Sound(NamedTuple):
    """A phoneme: targets that are reached just after its beginning and kept, or left for others.

    formants: The lowest three in Hz; None in silence, which has those of what follows.
    to: Those at its end, of a diphthong.
    voice: Gain of the glottal source.
    breath: Gain of noise through the formants.
    noise: Gains of noise beside the formants, at the beginning and at the end.
    band: That noise's frequency and bandwidth in Hz.
    """

    formants: Formants | None
    to: Formants | None = None
    voice: float = 0.0
    breath: float = 0.0
    noise: tuple[float, float] = (0.0, 0.0)
    band: tuple[float, float] = (0.0, 0.0)


_II, _I, _U = (270.0, 2290.0, 3010.0), (390.0, 1990.0, 2550.0), (300.0, 870.0, 2240.0)
_LOW_U = (440.0, 1020.0, 2240.0)
SOUNDS = {
    "_": Sound(None),
    "i:": Sound(_II, voice=1.0),
    "I": Sound(_I, voice=1.0),
    "E": Sound((530, 1840, 2480), voice=1.0),
    "V": Sound((640, 1190, 2390), voice=1.0),
    "@": Sound((490, 1350, 2300), voice=0.7),
    "O:": Sound((570, 840, 2410), voice=1.0),
    "u:": Sound(_U, voice=1.0),
    "eI": Sound((480, 1900, 2500), to=_II, voice=1.0),
    "aI": Sound((730, 1090, 2440), to=_I, voice=1.0),
    "oU": Sound((520, 920, 2350), to=_LOW_U, voice=1.0),
    "w": Sound((290, 610, 2150), voice=0.6),
    "r": Sound((330, 1060, 1380), voice=0.7),
    "n": Sound((250, 1340, 2470), voice=0.4),
    "v": Sound((220, 1100, 2080), voice=0.4, noise=(0.03, 0.03), band=(6500, 6000)),
    "z": Sound((240, 1390, 2530), voice=0.3, noise=(0.12, 0.12), band=(6000, 2200)),
    "f": Sound((340, 1100, 2080), noise=(0.06, 0.06), band=(7500, 7000)),
    "T": Sound((320, 1290, 2540), noise=(0.04, 0.04), band=(5500, 5000)),
    "s": Sound((320, 1390, 2530), noise=(0.25, 0.25), band=(6200, 2000)),
    "t": Sound((350, 1800, 2600), breath=0.15, noise=(0.4, 0.0), band=(4500, 2500)),
    "k": Sound((300, 1990, 2850), breath=0.15, noise=(0.4, 0.0), band=(2000, 500)),
}
# Each sound's milliseconds at rate 160; a word begins and ends in silence, and so does a stop.
WORDS = {
    "zero": "z 90 i: 110 r 80 oU 190",
    "one": "w 80 V 150 n 130",
    "two": "t 70 u: 230",
    "three": "T 100 r 80 i: 220",
    "four": "f 110 O: 180 r 110",
    "five": "f 110 aI 210 v 80",
    "six": "s 120 I 90 _ 60 k 50 s 140",
    "seven": "s 120 E 100 v 60 @ 70 n 110",
    "eight": "eI 170 _ 70 t 80",
    "nine": "n 90 aI 210 n 120",
}
_EDGE = 40  # milliseconds of silence before and after a word


def speak(text: str, voice: str, pitch: int = 50, rate: int = 160) -> Spoken:
    """Speak a digit; the same arguments give the same samples.

    Args:
        text: One of ``WORDS``.
        voice: One of ``VOICES``.
        pitch: From 0 to 99, half an octave below the voice's own to half an octave above.
        rate: 160 is the voice's own; twice the rate is half the time.

    Raises:
        KeyError: No such word or voice.
    """
    speaker, said = SPEAKERS[voice], WORDS[text].split()
    names = ("_", *said[::2], "_")
    milliseconds = np.array([_EDGE, *map(int, said[1::2]), _EDGE])
    lasts = np.round(milliseconds * speaker.pace * 160 / rate * RATE_HZ / 1000).astype(int)
    ends = lasts.cumsum()
    starts = ends - lasts
    sounds = [SOUNDS[name] for name in names]
    count = int(ends[-1])
    random = np.random.default_rng(derive_seed("formants", text, voice, pitch, rate))

    def course(
        pairs: list[tuple[float, float]], blend: float, step: int = 1
    ) -> NDArray[np.float64]:
        """A value at every ``step`` samples, given its first and last target in each sound."""
        inside = np.minimum(blend * RATE_HZ, lasts / 2 - 1)
        at = np.stack([starts + inside, ends - inside], 1).ravel()
        return np.interp(np.arange(0, count, step), at, np.ravel(pairs))

    firsts, finals = _formants(sounds)
    formants = [
        course(list(zip(firsts[:, i], finals[:, i], strict=True)), _BLEND[0], _STEP)
        / speaker.tract
        for i in range(3)
    ]
    voiced = course([(s.voice, s.voice) for s in sounds], _BLEND[1])
    breathed = course([(s.breath, s.breath) for s in sounds], _BLEND[1])
    pitch_hz = speaker.pitch_hz * 2 ** ((pitch - 50) / 100) * np.geomspace(*_FALL, count)
    source = voiced * _glottis(pitch_hz)
    source += (breathed + speaker.breath * voiced) * random.standard_normal(count)
    wave = _cascade(source, np.stack(formants, 1), speaker.tract)
    for i, sound in enumerate(sounds):
        if any(sound.noise):
            gains = [sound.noise if k == i else (0.0, 0.0) for k in range(len(sounds))]
            band, width = (hertz / speaker.tract for hertz in sound.band)
            white = np.diff(random.standard_normal(count + 1))  # 6 dB an octave by radiation
            noise = sosfilt(resonator(min(band, 9500), width), white)
            wave += course(gains, _BLEND[1] / 2) * noise / noise.std()
    wave *= _PEAK / np.abs(wave).max()
    return Spoken(wave.astype(np.float32), RATE_HZ, names, tuple(starts.tolist()))


def _formants(sounds: list[Sound]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The first and the last targets of each sound, (sounds, 3) each."""
    known = [sound.formants for sound in sounds]
    last = next(s.to or s.formants for s in reversed(sounds) if s.formants)
    firsts: list[Formants] = []
    for formants in reversed(known):
        firsts.append(formants or (firsts[-1] if firsts else last))
    firsts.reverse()
    finals = [sound.to or first for sound, first in zip(sounds, firsts, strict=True)]
    return np.array(firsts), np.array(finals)


def _glottis(pitch_hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """The derivative of the glottal flow by its phase, at these pitches (samples,)."""
    phase = np.concatenate([[0.0], (pitch_hz / RATE_HZ).cumsum()])
    p = phase % 1
    flow = np.where(p < _OPEN, p**2 * (_OPEN - p), 0.0) / _OPEN**2
    # The difference over a sample is the derivative's mean in it: less is folded back at the
    # closure, which is a jump of the derivative, than of its value at one point.
    return np.diff(flow) / np.diff(phase)


def resonator(hertz: NDArray[np.float64] | float, width: float) -> NDArray[np.float64]:
    """Second-order sections (*, 1, 6) of resonators (*) with this bandwidth in Hz; 1 at 0 Hz."""
    b = 2 * np.exp(-np.pi * width / RATE_HZ) * np.cos(2 * np.pi * np.asarray(hertz) / RATE_HZ)
    c = np.full_like(b, -np.exp(-2 * np.pi * width / RATE_HZ))
    zero, one = np.zeros_like(b), np.ones_like(b)
    return np.stack([1 - b - c, zero, zero, one, -b, -c], -1)[..., None, :]


def _cascade(
    source: NDArray[np.float64], formants: NDArray[np.float64], tract: float
) -> NDArray[np.float64]:
    """A source (samples,) through formants (steps, 3) and a tube's higher ones."""
    higher = np.arange(3500.0, 0.47 * RATE_HZ * tract, 1000) / tract
    columns = [(f, width) for f, width in zip(formants.T, _WIDTHS, strict=True)]
    columns += [(np.full(len(formants), hertz), 0.05 * hertz) for hertz in higher]
    sections = np.concatenate([resonator(hertz, width) for hertz, width in columns], 1)
    b, c = -sections[:, :, 4], -sections[:, :, 5]
    wave, state = np.empty_like(source), np.zeros((len(columns), 2))
    for i, start in enumerate(range(0, len(source), _STEP)):
        part = slice(start, start + _STEP)
        wave[part], state = sosfilt(sections[i], source[part], zi=state)
        # scipy's state is (b y_n + c y_n-1, c y_n). It is made anew of y with the next b and c,
        # or each update would be a click.
        k = min(i + 1, len(sections) - 1)
        last = state[:, 1] / c[i]
        before = (state[:, 0] - b[i] * last) / c[i]
        state = np.stack([b[k] * last + c[k] * before, c[k] * last], 1)
    return wave
