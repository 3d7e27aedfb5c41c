"""The metrics: closed forms, and that they tell good samples from bad ones on a made corpus."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gendiff.metrics import BETTER, Reals, verdicts
from gendiff.modality import Features, Measure
from gendiff.spaces import Batch, Cond, Masked
from gendiff_speech import metrics, recogniser, tokens
from gendiff_speech.mel import CONVENTIONS, griffin_lim, log_mel
from gendiff_speech.metrics import (
    along_path,
    cepstra,
    measure,
    mel_cepstral_distortion,
    pitch_difference,
    time_warp,
)
from gendiff_speech.pitch import fundamental
from gendiff_speech.recogniser import Recogniser, Recordings, augment, hear, pad

MELS, TEXTS, SPEAKERS = 24, 4, 2
FACTS: dict[str, Any] = {
    "convention": "8khz",
    "mels": MELS,
    "tokens": ["", *"abcd"],
    "speakers": ["low", "high"],
    "texts": list("abcd"),
    "mean": [-4.0] * MELS,
    "std": [2.0] * MELS,
    "digest": "made",
}
Figures = dict[str, Measure]


def spoken(text: int, speaker: int, gen: torch.Generator) -> Tensor:
    """A ridge that glides along the bands as the text says, over the speaker's tilt."""
    frames = int(torch.randint(16, 30, (), generator=gen))
    time, band = torch.linspace(0, 1, frames), torch.arange(MELS)[:, None]
    centre = (6 + 10 * time, 16 - 10 * time, 6 + 0 * time, 16 + 0 * time)[text]
    ridge = 3 * torch.exp(-((band - centre) ** 2) / 8)
    tilt = (speaker - 0.5) * torch.cos(math.pi * (band + 0.5) / MELS)
    return ridge - 1 + 2 * tilt + 0.3 * torch.randn(MELS, frames, generator=gen)


def corpus(each: int, seed: int) -> Recordings:
    gen = torch.Generator().manual_seed(seed)
    asked = [(t, s) for t in range(TEXTS) for s in range(SPEAKERS) for _ in range(each)]
    mels = tuple(spoken(text, speaker, gen) for text, speaker in asked)
    text, speaker = torch.tensor(asked).unbind(1)
    return Recordings(mels, tuple((t + 1,) for t, _ in asked), text, speaker)


def batch(recordings: Recordings) -> Batch:
    x, lengths = pad(recordings.mels)
    tokens = torch.tensor([[*spelt, 0] for spelt in recordings.tokens])
    durations = torch.zeros_like(tokens)
    durations[:, 0] = lengths
    values = {"tokens": tokens, "text": recordings.text, "speaker": recordings.speaker}
    values["durations"] = durations
    return Batch(x, Masked(lengths, x.shape[1], x.shape[2]), Cond(values))


class Corpus:
    """Measures samples against the made corpus, with a short training."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.patch = cache, monkeypatch
        self.verdicts: list[str] = []
        self.splits = {"train": corpus(12, 0), "test": corpus(10, 1)}

    def measure(self, samples: Recordings, **facts: Any) -> Figures:
        self.patch.setattr(recogniser, "_STEPS", 60)
        self.patch.setattr(metrics, "_recordings", lambda *told: self.splits[told[2]])
        for name in ("_ceiling", "_pitch"):  # these are no spectrograms
            self.patch.setattr(metrics, name, lambda *_: [])
        told = {**FACTS, **facts}
        found = list(measure(told, None, batch(samples), self.cache, 0))
        _, held_out = metrics._dealt(told, self.splits["test"])

        def seen(recordings: Recordings) -> Features:
            return metrics.features(told, None, [batch(recordings)], self.cache, 0)

        reference = seen(self.splits["test"].select(held_out))
        real = Reals(reference.values, seen(self.splits["train"]).values, reference.about, 0)
        found += real.measures(seen(samples).values)
        self.verdicts = [v.name for v in verdicts(found, len(samples))]
        return {one.name: one for one in found}


def own(found: Figures) -> list[str]:
    """The figures that are not the engine's."""
    assert not found or list(found)[-len(BETTER) :] == list(BETTER)
    return [name for name in found if name not in BETTER]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    return Corpus(cache, monkeypatch)


@pytest.fixture
def fresh() -> Recordings:
    return corpus(10, 2)


def test_new_real_recordings_score_at_the_floors(made: Corpus, fresh: Recordings) -> None:
    found = made.measure(fresh)
    assert own(found) == ["label_accuracy", "speaker_accuracy", "mel_cepstral_distortion"]
    assert made.verdicts == []
    for name in ("label_accuracy", "speaker_accuracy"):
        assert found[name].value > 0.95
        assert found[name].floor > 0.95
        assert "40 held-out recordings" in found[name].note
        assert "for 80 training recordings" in found[name].note
    distance, distortion = found["frechet_distance"], found["mel_cepstral_distortion"]
    assert 0.4 < distance.value / distance.floor < 2.5
    assert distortion.value == pytest.approx(distortion.floor, rel=0.1)
    assert "80 of 80 samples" in distortion.note
    assert "text and speaker of 40 other held-out recordings" in distance.note
    assert "80 samples against 40 held-out items" in distance.note


def test_wrong_texts_and_speakers_are_called_out(made: Corpus, fresh: Recordings) -> None:
    good = made.measure(fresh)
    text, speaker = (fresh.text + 1) % TEXTS, 1 - fresh.speaker
    tokens = tuple((t + 1,) for t in text.tolist())
    found = made.measure(Recordings(fresh.mels, tokens, text, fresh.speaker))
    assert found["label_accuracy"].value < 0.1
    assert found["speaker_accuracy"].value > 0.95
    distortion = found["mel_cepstral_distortion"]
    assert distortion.value > 1.2 * distortion.floor
    found = made.measure(Recordings(fresh.mels, fresh.tokens, fresh.text, speaker))
    assert found["speaker_accuracy"].value < 0.1
    assert found["label_accuracy"].value == good["label_accuracy"].value


def test_one_collapsed_sample_is_called_out(made: Corpus, fresh: Recordings) -> None:
    """One recording for each text and speaker, again and again: every label is right."""
    ids = [10 * (i // 10) for i in range(len(fresh))]
    good, found = made.measure(fresh), made.measure(fresh.select(ids))
    assert found["label_accuracy"].value > 0.95
    assert found["frechet_distance"].value > good["frechet_distance"].value
    same = fresh.select([0] * len(fresh))
    found = made.measure(Recordings(same.mels, fresh.tokens, fresh.text, fresh.speaker))
    assert found["frechet_distance"].value > 5 * found["frechet_distance"].floor
    assert made.verdicts == ["collapsed"]
    assert found["label_accuracy"].value == pytest.approx(1 / TEXTS)


def test_recordings_of_the_training_split_are_copies(made: Corpus) -> None:
    found = made.measure(made.splits["train"])
    assert made.verdicts == ["memorised"]
    assert found["training_copies"].value == 1


def test_noise_is_called_out(made: Corpus, fresh: Recordings) -> None:
    gen = torch.Generator().manual_seed(3)
    mels = tuple(torch.randn(mel.shape, generator=gen) for mel in fresh.mels)
    found = made.measure(Recordings(mels, fresh.tokens, fresh.text, fresh.speaker))
    assert found["label_accuracy"].value < 0.6
    assert found["frechet_distance"].value > 3 * found["frechet_distance"].floor
    assert found["mel_cepstral_distortion"].value > 1.5 * found["mel_cepstral_distortion"].floor
    assert "untrained" in made.verdicts


def test_samples_that_are_not_finite_are_judged(made: Corpus, fresh: Recordings) -> None:
    mels = tuple(torch.full_like(mel, math.nan) for mel in fresh.mels)
    found = made.measure(Recordings(mels, fresh.tokens, fresh.text, fresh.speaker))
    assert all(math.isfinite(one.value) for one in found.values())
    assert found["frechet_distance"].value > 3 * found["frechet_distance"].floor


def test_texts_that_nobody_spoke_have_no_accuracy_and_no_distortion(
    made: Corpus, fresh: Recordings
) -> None:
    none = torch.full_like(fresh.text, -1)
    unknown = Recordings(fresh.mels, ((1, 2, 3),) * len(fresh), none, fresh.speaker)
    found = made.measure(unknown)
    assert own(found) == ["speaker_accuracy"]


def test_open_vocabulary_has_speakers_only(made: Corpus, fresh: Recordings) -> None:
    none = torch.full_like(fresh.text, -1)
    test = made.splits["test"]
    alone = tuple((i + 1,) for i in range(len(test)))  # no text twice
    made.splits["test"] = Recordings(test.mels, alone, none, test.speaker)
    samples = Recordings(fresh.mels, alone, none, fresh.speaker)
    found = made.measure(samples, texts=[], digest="open")
    assert own(found) == ["speaker_accuracy", "mel_cepstral_distortion"]
    assert "learnt the speaker of" in found["frechet_distance"].note
    assert found["mel_cepstral_distortion"].floor is None
    assert found["speaker_accuracy"].value > 0.9


def test_one_speaker_and_open_vocabulary_leave_cepstra(made: Corpus, fresh: Recordings) -> None:
    def one(split: Recordings) -> Recordings:
        part = split.select((split.speaker == 0).nonzero()[:, 0].tolist())
        return Recordings(part.mels, part.tokens, part.text * 0 - 1, part.speaker)

    made.splits = {name: one(split) for name, split in made.splits.items()}
    samples = one(fresh)
    found = made.measure(samples, texts=[], speakers=["one"], digest="one")
    assert own(found) == ["mel_cepstral_distortion"]
    distance = found["frechet_distance"]
    assert "13 mel cepstra" in distance.note
    assert 0.4 < distance.value / distance.floor < 2.5
    worse = made.measure(samples.select([0] * 40), texts=[], speakers=["one"], digest="one")
    assert worse["frechet_distance"].value > 5 * distance.floor


def test_sentences_are_judged_by_the_frame(made: Corpus, fresh: Recordings) -> None:
    made.patch.setattr(metrics, "token_frames", lambda *t: tokens.frames(batch(made.splits[t[2]])))
    made.patch.setattr(tokens, "_STEPS", 60)
    heard = []
    for said in (fresh.tokens, [(t % TEXTS + 1,) for (t,) in fresh.tokens]):
        samples = Recordings(fresh.mels, tuple(said), fresh.text, fresh.speaker)
        found = made.measure(samples, texts=[], digest="sentences", reading={})
        heard.append(found["token_accuracy"])
    right, wrong = heard
    assert right.floor is not None
    assert abs(right.value - right.floor) < 0.1
    assert wrong.value < right.value - 0.3


def test_too_little_is_not_measured(made: Corpus, fresh: Recordings) -> None:
    assert made.measure(fresh.select([0])) == {}


def test_figures_are_a_function_of_data_and_seed(
    made: Corpus, fresh: Recordings, tmp_path: Path
) -> None:
    cached = made.measure(fresh)
    made.cache = tmp_path
    assert made.measure(fresh) == cached
    assert len(list(tmp_path.iterdir())) == 1


def test_stand_ins_are_of_the_same_text_and_speaker(fresh: Recordings) -> None:
    real = corpus(12, 0)
    ids = metrics._stand_ins(real, fresh, torch.Generator().manual_seed(0))
    assert len(set(ids)) == len(fresh)
    assert torch.equal(real.text[ids], fresh.text)
    assert torch.equal(real.speaker[ids], fresh.speaker)
    unknown = Recordings(fresh.mels, ((9,),) * len(fresh), fresh.text * 0 - 1, fresh.speaker)
    ids = metrics._stand_ins(real, unknown, torch.Generator().manual_seed(0))
    assert torch.equal(real.speaker[ids], fresh.speaker)


def test_halves_share_every_text_and_speaker() -> None:
    keys = [key for key in "abc" for _ in range(5)]
    told, reference = metrics._halves(keys)
    assert sorted(told + reference) == list(range(15))
    assert {keys[i] for i in told} == {keys[i] for i in reference} == set("abc")
    assert abs(len(told) - len(reference)) <= 1


@pytest.mark.parametrize("mels", [80, 64, 7])
def test_padding_changes_nothing(mels: int) -> None:
    """Whatever stands in the padding, and however much of it."""
    torch.manual_seed(0)
    network = Recogniser(mels, 5, 3)
    network(torch.randn(4, mels, 30), torch.tensor([30, 20, 9, 1]))  # statistics of its own
    network.eval()
    for frames in (1, 2, 7, 8, 31):
        x, length = torch.randn(1, mels, frames), torch.tensor([frames])
        alone = network.embed(x, length)
        padded = torch.cat([x, torch.full((1, mels, 13), 7.0)], 2)
        assert (network.embed(padded, length) - alone).abs().max() < 1e-5
        others = [torch.randn(mels, 50), x[0], torch.randn(mels, 3)]
        heard = hear(network, others)
        assert (heard.features[1] - alone[0]).abs().max() < 1e-5


def test_recogniser_is_small() -> None:
    assert 50_000 < sum(p.numel() for p in Recogniser(80, 10, 6).parameters()) < 150_000


def test_augmentation_keeps_bands_and_draws_from_the_generator() -> None:
    for frames in (1, 5, 50, 500):
        mel = torch.randn(10, frames)
        one, two = (augment(mel, torch.Generator().manual_seed(4), 100) for _ in range(2))
        assert torch.equal(one, two)
        assert one.shape[0] == 10
        assert 4 <= one.shape[1] <= 120


def test_distortion_of_a_cosine() -> None:
    """The root-mean-square difference in dB: a cosine of amplitude a has a / sqrt 2 nepers."""
    band = (torch.arange(40) + 0.5)[:, None]
    flat = torch.zeros(40, 6)
    for order in (1, 5, 13):
        other = 0.7 * torch.cos(math.pi * order * band / 40).expand(40, 9) - 3  # level: left out
        wanted = 20 / math.log(10) * 0.7 / math.sqrt(2)
        found = mel_cepstral_distortion([flat, flat, other], [other, flat - 1, other])
        assert found.tolist() == pytest.approx([wanted, 0, 0], abs=1e-4)
    assert cepstra(torch.cos(math.pi * 14 * band / 40)).abs().max() < 1e-5


def test_distortion_forgives_tempo() -> None:
    mel = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    slow = mel.repeat_interleave(torch.tensor([1, 3, 1, 2, 1, 1, 4, 1, 1]), dim=1)
    assert mel_cepstral_distortion([mel], [slow]).item() == pytest.approx(0, abs=1e-6)
    assert mel_cepstral_distortion([mel], [slow.flip(1)]).item() > 1


def by_hand(cost: Tensor) -> float:
    """Dynamic time warping cell by cell."""
    best: dict[tuple[int, int], tuple[float, int]] = {(-1, -1): (0.0, 0)}
    nothing = (math.inf, 0)
    for i in range(cost.shape[0]):
        for j in range(cost.shape[1]):
            ways = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            total, cells = min((best.get(way, nothing) for way in ways), key=lambda way: way[0])
            best[i, j] = (total + float(cost[i, j]), cells + 1)
    total, cells = best[cost.shape[0] - 1, cost.shape[1] - 1]
    return total / cells


def test_time_warp_is_the_textbook_one() -> None:
    gen = torch.Generator().manual_seed(0)
    cost = torch.rand(6, 9, 12, generator=gen, dtype=torch.float64)
    rows, columns = torch.tensor([9, 1, 5, 9, 3, 1]), torch.tensor([12, 1, 12, 2, 3, 7])
    wanted = [
        by_hand(part[:t, :u])
        for part, t, u in zip(cost, rows.tolist(), columns.tolist(), strict=True)
    ]
    assert time_warp(cost, rows, columns).tolist() == pytest.approx(wanted, rel=1e-12)


def test_values_are_summed_along_the_least_cost_path() -> None:
    """Of the path that librosa finds."""
    librosa = pytest.importorskip("librosa")
    gen = torch.Generator().manual_seed(2)
    cost, values = torch.rand(2, 9, 12, generator=gen), torch.rand(2, 3, 9, 12, generator=gen)
    rows, columns = torch.tensor([9, 5]), torch.tensor([12, 8])
    total, sums = along_path(cost, values, rows, columns)
    for k in range(2):
        part = cost[k, : rows[k], : columns[k]]
        table, path = librosa.sequence.dtw(C=part.numpy())
        i, j = torch.tensor(path.tolist()).unbind(1)
        assert total[k].item() == pytest.approx(table[-1, -1], rel=1e-5)
        assert sums[k].tolist() == pytest.approx(values[k][:, i, j].sum(1).tolist(), rel=1e-5)


def test_pitch_difference_of_a_transposed_voice() -> None:
    """Every frame's own spectrum leads the path down the diagonal, or to where it is slower."""
    mel = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    f = torch.tensor([100.0, 120, math.nan, 150, math.nan, 200])
    whole_tone = f * 2 ** (2 / 12)
    rmse, wrong = pitch_difference([mel], [mel], [f], [whole_tone])
    assert rmse == pytest.approx(200, rel=1e-4)
    assert wrong == 0
    slow = torch.tensor([1, 3, 1, 2, 1, 1])
    g = torch.tensor([100.0, 120, 90, 150, math.nan, math.nan]).repeat_interleave(slow)
    rmse, wrong = pitch_difference([mel], [mel.repeat_interleave(slow, 1)], [f], [g])
    assert rmse == 0
    assert wrong == pytest.approx(2 / 9)
    rmse, wrong = pitch_difference([mel], [mel], [f], [torch.full((6,), math.nan)])
    assert math.isnan(rmse)
    assert wrong == pytest.approx(4 / 6)


def test_pitch_of_a_glide_survives_mel_and_griffin_lim() -> None:
    """Harmonics of a fundamental that rises from 110 to 220 Hz, then hiss."""
    convention, rate = CONVENTIONS["8khz"], 8000
    hertz = 110 * 2 ** torch.linspace(0, 1, 40 * 128)
    phase = 2 * math.pi * hertz.cumsum(0) / rate
    voice = sum(torch.sin(k * phase) / k for k in range(1, 12)) * 0.1
    hiss = 0.02 * torch.randn(20 * 128, generator=torch.Generator().manual_seed(0))
    wave = torch.cat([voice, hiss])  # type: ignore[list-item]
    truth = hertz.reshape(40, 128).mean(1)
    for sound in (wave, griffin_lim(log_mel(wave, convention), convention)):
        found = fundamental(sound, convention)
        assert found.shape == (60,)
        assert found[44:58].isnan().float().mean() > 0.7
        cents = 1200 * torch.log2(found[2:38] / truth[2:38])
        assert cents.abs().max() < 60


def test_pitch_is_judged_against_other_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A voice of 130 Hz: its like are at the floor, and one a fourth higher is 500 cents off."""
    convention = CONVENTIONS["8khz"]

    def voices(hertz: float, count: int, seed: int) -> Recordings:
        gen = torch.Generator().manual_seed(seed)
        mels = []
        for _ in range(count):
            frames = int(torch.randint(24, 32, (), generator=gen))
            time = torch.arange(frames * 128) / 8000
            pitch = hertz * (1 + 0.01 * torch.rand((), generator=gen))
            wave = sum(torch.sin(2 * math.pi * k * pitch * time) / k for k in range(1, 12))
            mels.append((log_mel(0.1 * wave, convention) + 4) / 2)  # type: ignore[arg-type]
        zero = torch.zeros(count, dtype=torch.int64)
        return Recordings(tuple(mels), ((1,),) * count, zero, zero)

    facts = {**FACTS, "mels": 64, "mean": [-4.0] * 64, "std": [2.0] * 64}
    reference, others = voices(130, 3, 0), voices(130, 3, 1)
    for hertz, low, high in ((130, 0, 40), (130 * 2 ** (5 / 12), 470, 530)):
        rmse, voicing = metrics._pitch(facts, reference, others, voices(hertz, 3, 2))
        assert (rmse.name, voicing.name) == ("f0_rmse", "voicing_error")
        assert low <= rmse.value < high
        assert rmse.floor is not None
        assert rmse.floor < 40
        assert voicing.value < 0.2
    unknown = Recordings(others.mels, ((2,),) * 3, others.text - 1, others.speaker)
    assert metrics._pitch(facts, reference, None, unknown) == []


def test_time_warp_has_librosas_total() -> None:
    librosa = pytest.importorskip("librosa")
    cost = torch.rand(1, 15, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total, path = librosa.sequence.dtw(C=cost[0].numpy())
    found = time_warp(cost, torch.tensor([15]), torch.tensor([11]))
    assert found.item() * len(path) == pytest.approx(total[-1, -1], rel=1e-12)


def test_griffin_lim_ceiling_of_tones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low and high tones stay apart on the way through sound."""
    from gendiff_speech import mel

    convention = mel.CONVENTIONS["8khz"]
    time = torch.arange(4000) / convention.sample_rate_hz
    waves = [0.3 * torch.sin(2 * math.pi * hertz * time) for hertz in (300.0, 2000.0)] * 3
    mels = [mel.log_mel(wave, convention) for wave in waves]
    every = torch.cat(mels, 1)
    mean, std = every.mean(1), every.std(1)
    text = torch.tensor([0, 1] * 3)
    normal = tuple((one - mean[:, None]) / std[:, None] for one in mels)
    told = Recordings(normal, tuple((t + 1,) for t in text.tolist()), text, torch.zeros(6))
    monkeypatch.setattr(recogniser, "_STEPS", 40)
    torch.manual_seed(0)
    network = Recogniser(convention.mels, 2, 0)
    recogniser.train(network, told, 0)
    facts = {**FACTS, "mean": mean.tolist(), "std": std.tolist()}
    (found,) = metrics._ceiling(network, facts, told)
    assert found.name == "griffin_lim_ceiling"
    assert found.value == 1
    assert found.floor == 1
