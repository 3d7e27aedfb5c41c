"""The vocoder modality, its network, and weights that others trained."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import gendiff
from gendiff import config, runs
from gendiff.errors import CheckpointError, ConfigError, DataError
from gendiff.modality import Request
from gendiff.spaces import Cond, Masked
from gendiff.testing import check_modality
from gendiff.train import Trainer
from gendiff_speech import audio, vocoders, waves
from gendiff_speech.hifigan import HiFiGAN, HiFiGANShape, without_weight_norm
from gendiff_speech.mel import (
    CONVENTIONS,
    MelConvention,
    griffin_lim,
    log_mel,
    log_spectral_distance,
)
from gendiff_speech.plugin import SpeechModality
from gendiff_speech.refine import refined
from gendiff_speech.spectral import MEL_WEIGHT, spectral_distance
from gendiff_speech.vocoder import VocoderModality, sound
from gendiff_speech.vocos import ISTFT, OneStepVocos, Vocos

SMALL = ["vocoder.convention=8khz", "vocoder.dim=16", "vocoder.hidden=32", "vocoder.layers=2"]
SMALL += ["vocoder.held_out=_[12]", "train.batch_size=4", "vocoder.frames=16"]


RECIPES = sorted((Path(__file__).parents[3] / "configs" / "vocoder").glob("*.yaml"))


def resolved(path: Path, *more: str) -> config.RunConfig:
    return config.resolve(VocoderModality(), overrides=[*SMALL, f"vocoder.path={path}", *more])


@pytest.fixture
def run(fsdd: Path, tmp_path: Path) -> runs.Run:
    """A vocoder run of two steps."""
    gendiff.register(VocoderModality())
    settings = resolved(fsdd, f"out={tmp_path / 'runs'}")
    facts = VocoderModality().prepare(settings.vocoder).facts  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(VocoderModality(), settings, facts))
    for _ in range(2):
        trainer.advance([next(trainer.batches())])
    trainer.save()
    return trainer.run


def test_the_contract(fsdd: Path) -> None:
    lines = list(check_modality(VocoderModality(), [*SMALL, f"vocoder.path={fsdd}"]))
    assert any("written, as .wav" in line for line in lines)


@pytest.mark.parametrize("centred", [False, True])
def test_the_inverse_transform_inverts(centred: bool) -> None:
    n_fft, hop, frames = 64, 16, 12
    pad = n_fft // 2 if centred else (n_fft - hop) // 2
    wave = torch.randn(2, (frames - 1) * hop + n_fft - 2 * pad)
    spectrum = torch.stft(
        torch.nn.functional.pad(wave, (pad, pad)), n_fft, hop, n_fft, torch.hann_window(n_fft),
        center=False, return_complex=True,
    )  # fmt: skip
    assert spectrum.shape[2] == frames
    again = ISTFT(n_fft, hop, n_fft, pad)(spectrum, torch.ones(2, 1, frames))
    torch.testing.assert_close(again, wave, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_and_the_noise_neither() -> None:
    torch.manual_seed(0)
    c = MelConvention(8000, 64, 16, 64, 8, 0, 4000)
    net = OneStepVocos(c, [0.0] * 8, [1.0] * 8, 1.0, 16, 32, 2)
    lengths = [9, 5]
    both = Masked(torch.tensor(lengths), 16, 9)
    mel = torch.randn(2, 9, 8)  # what stands in the padding must not matter
    together = net(torch.randn(2, 16, 9), torch.zeros(2), Cond({"mel": mel}), both)
    for row, length in enumerate(lengths):
        space = Masked(torch.tensor([length]), 16, length)
        one = slice(row, row + 1)
        cond = Cond({"mel": mel[one, :length]})
        alone = net(torch.zeros(1, 16, length), torch.ones(1), cond, space)
        torch.testing.assert_close(together[row, :, :length], alone[0], rtol=1e-4, atol=1e-5)
        assert together[row, :, length:].abs().sum() == 0


def test_an_untrained_head_puts_a_tone_where_the_mel_has_it() -> None:
    """Of bin 10. Without the steady phases only every fourth bin could sound."""
    c = MelConvention(8000, 256, 64, 256, 60, 0, 4000)
    wave = torch.sin(2 * torch.pi * 10 / 256 * torch.arange(64 * 40))
    net = OneStepVocos(c, [0.0] * 60, [1.0] * 60, 0.5, 16, 32, 2)
    torch.nn.init.zeros_(net.head.out.weight)
    torch.nn.init.zeros_(net.head.out.bias)
    cond = Cond({"mel": log_mel(wave, c).T[None]})
    made = net(torch.zeros(1, 64, 40), torch.zeros(1), cond, Masked(torch.tensor([40]), 64, 40))
    spectrum = torch.fft.rfft(made[0].T.reshape(-1)[:2560]).abs()  # bins 10 times as fine
    assert abs(int(spectrum.argmax()) - 100) <= 5
    assert float(0.5 * made.detach().std() / wave.std()) == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize("name", ["16khz", "vocos24khz"])
def test_refining_brings_a_wave_nearer_to_the_mel_and_stays_in_place(name: str) -> None:
    c = CONVENTIONS[name]
    torch.manual_seed(0)
    time = torch.arange(60 * c.hop) / c.sample_rate_hz
    wave = 0.2 * sum(torch.sin(2 * torch.pi * 220 * k * time) / k for k in range(1, 9))
    wave = wave * (0.5 + 0.5 * torch.sin(2 * torch.pi * 5 * time))
    mel = log_mel(wave, c)
    rough = 0.7 * wave + 0.05 * torch.randn(len(wave))
    better = refined(rough, mel, c)
    assert better.shape == wave.shape
    before, after = (log_spectral_distance(log_mel(w, c), mel) for w in (rough, better))
    assert after < 0.5 * before
    alike = torch.nn.functional.cosine_similarity(better, wave, dim=0)
    assert alike > 0.9  # the phases are those of the wave that was given
    assert refined(torch.zeros(c.hop), mel[:, :1], c).isfinite().all()


def test_the_distance_of_scaled_waves_is_known() -> None:
    """Of 2x from x: convergence 1, logarithms log 2 in all bins and bands, far above the floors"""
    c = MelConvention(8000, 256, 64, 256, 20, 0, 4000)
    x = torch.randn(3, 2048)
    found = spectral_distance(2 * x, x, c, 1.0)
    log2 = torch.tensor(2.0).log()
    known = 1 + log2 + MEL_WEIGHT * log2
    torch.testing.assert_close(found, known.expand(3), rtol=1e-3, atol=0)
    assert spectral_distance(x, x, c, 1.0).abs().max() < 1e-6
    silence = torch.zeros(1, 2048).requires_grad_()
    spectral_distance(silence, x[:1], c, 1.0).sum().backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


def test_a_stretch_has_the_mel_of_the_whole(fsdd: Path) -> None:
    section = resolved(fsdd, "vocoder.frames=20").vocoder  # type: ignore[attr-defined]
    facts = VocoderModality().prepare(section).facts
    data, convention = waves.Waves(facts, "train", 16), CONVENTIONS["8khz"]
    begins = set()
    for seed in range(20):
        item, wave = data[3, seed], data.whole(3)
        assert item.wave.shape == (16 * 128,)
        starts = [
            k for k in range(len(wave) // 128 - 15)
            if torch.allclose(wave[k * 128 :][: 16 * 128] / facts["scale"], item.wave, atol=1e-4)
        ]  # fmt: skip
        mel = waves.normalised(facts, log_mel(wave, convention))[:, starts[0] :][:, :16]
        torch.testing.assert_close(item.mel, mel, rtol=1e-3, atol=1e-3)
        begins.add(starts[0])
    assert len(begins) > 3
    held = waves.Waves(facts, "test", 16)
    assert len(held) == 8  # indices 1 and 2 of two digits and two speakers
    assert torch.equal(held[0, 1].wave, held[0, 2].wave)


def test_numbers_of_the_recordings_are_those_of_all_their_samples(fsdd: Path) -> None:
    loud = 0.9 * np.sin(np.arange(8000)) + 0.4  # passes 1, where it is cut
    soundfile.write(fsdd / "0_cat_9.wav", loud, 16000, subtype="FLOAT")
    facts = VocoderModality().prepare(resolved(fsdd).vocoder).facts  # type: ignore[attr-defined]
    train, test = (waves.Waves(facts, split, 16) for split in ("train", "test"))
    files = sorted(fsdd.glob("*.wav"))
    direct = [audio.resample(*audio.read(path, path.name), 8000) for path in files]
    held = ["_1." in path.name or "_2." in path.name for path in files]
    used = [wave for wave, out in zip(direct, held, strict=True) if not out]
    mels = torch.cat([log_mel(wave, CONVENTIONS["8khz"]) for wave in used], 1)
    assert facts["scale"] == pytest.approx(float(torch.cat(used).std()), rel=1e-5)
    np.testing.assert_allclose(facts["mean"], mels.mean(1), rtol=1e-5)
    np.testing.assert_allclose(facts["std"], mels.std(1), rtol=1e-4)
    kept = [data.whole(i) for data in (train, test) for i in range(len(data))]
    for wave, whole in zip(
        [*used, *(w for w, out in zip(direct, held, strict=True) if out)], kept, strict=True
    ):
        torch.testing.assert_close(whole, wave.clamp(-1, 1), rtol=0, atol=0.5001 / 32767)
    assert len(pickle.dumps(train)) < 10_000  # it travels to a loader's workers as a path


def test_a_short_recording_is_followed_by_silence(fsdd: Path) -> None:
    section = resolved(fsdd, "vocoder.frames=99").vocoder  # type: ignore[attr-defined]
    data = VocoderModality().dataset(section, VocoderModality().prepare(section).facts, "train")
    item = data[0, 0]
    assert item.wave.shape == (99 * 128,)
    assert item.mel.shape == (64, 99)
    assert item.wave[-1000:].abs().max() == 0


def test_what_is_wrong_with_the_recordings_is_said(
    fsdd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for overrides, message in (
        (["vocoder.path=null"], "vocoder.path: not set"),
        ([f"vocoder.path={tmp_path / 'empty'}"], r"vocoder.path: no .wav"),
        (["vocoder.held_out=zzz"], "'zzz' is found in the names of none of 36 files"),
        (["vocoder.held_out=wav"], "'wav' is found in the names of all of 36 files"),
    ):
        section = resolved(fsdd, *overrides).vocoder  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=message):
            VocoderModality().prepare(section)
    (fsdd / "1_ann_1.wav").write_bytes(b"RIFF")
    section = resolved(fsdd).vocoder  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"1_ann_1.wav: cannot be decoded"):
        VocoderModality().prepare(section)
    assert not [p for p in (fsdd.parent / "cache").rglob("*") if p.is_file()]


def test_a_held_out_that_is_no_expression(fsdd: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocoder.held_out: '\(x' is no regular expression"):
        resolved(fsdd, "vocoder.held_out=(x")


def test_training_is_by_the_distance_alone(run: runs.Run) -> None:
    trainer = Trainer(run)
    batch = next(trainer.batches())
    x_hat = trainer.denoiser.bind(batch.space, batch.cond)(torch.randn(batch.space.shape), 1.0)
    made, real = (v.transpose(1, 2).flatten(1) for v in (x_hat, batch.x))
    distance = spectral_distance(made, real, CONVENTIONS["8khz"], run.facts["scale"])
    torch.testing.assert_close(trainer.advance([batch]).loss.per_sample, distance.detach())


def test_a_run_s_samples_are_the_sound_of_held_out_mels(run: runs.Run, tmp_path: Path) -> None:
    model = gendiff.load(run.folder, "cpu")
    batch = model.sample(9, seed=1)
    paths = run.modality.write(run.section, run.facts, batch, tmp_path, list(range(9)))
    data = waves.Waves(run.facts, "test", 16)
    for i, path in enumerate(paths):  # 8 are held out, so the ninth is of the first
        wave = sound(model, log_mel(data.whole(i % 8), data.convention))
        written = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        assert (written - wave / max(1, wave.abs().max())).abs().max() < 1e-4
    first, second = run.modality.metrics(run.section, run.facts, batch, tmp_path, 0)
    assert first.name == "mel_distance_db"
    assert first.value > second.value  # two steps of training against 60 of Griffin-Lim
    assert run.modality.preview(run.section, run.facts, batch, tmp_path / "p.png").exists()


def test_mels_from_files(run: runs.Run, fsdd: Path, tmp_path: Path) -> None:
    modality, convention = VocoderModality(), CONVENTIONS["8khz"]
    file = fsdd / "7_ann_3.wav"
    wave = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    mel = log_mel(wave, convention)
    np.save(tmp_path / "mel.npy", mel.numpy())

    def asked(value: Any) -> Tensor:
        request = Request([0, 1], 0, {"mel": value})
        cond = modality.templates(run.section, run.facts, request)[1]
        assert cond is not None
        return cond["mel"]

    by_file, by_mel = asked(str(file)), asked(str(tmp_path / "mel.npy"))
    assert torch.equal(by_file, by_mel)
    assert torch.equal(by_file[0].T, waves.normalised(run.facts, mel))
    np.save(tmp_path / "wrong.npy", np.zeros((80, 9)))
    np.save(tmp_path / "text.npy", np.full((64, 9), "loud"))
    (tmp_path / "junk.npy").write_bytes(b"junk")
    for value, message in (
        (str(tmp_path / "wrong.npy"), r"holds float64 \(80, 9\). A finite log mel of 64 bands"),
        (str(tmp_path / "text.npy"), r"holds <U4 \(64, 9\)"),
        (str(tmp_path / "junk.npy"), "junk.npy is no .npy file"),
        ("nowhere.wav", "mel: nowhere.wav does not exist"),
        ([], "mel: an empty list"),
    ):
        with pytest.raises(ConfigError, match=message):
            asked(value)


def test_a_run_gives_the_same_sound_alone_and_through_the_speech_modality(
    run: runs.Run, fsdd: Path, tmp_path: Path
) -> None:
    speech = SpeechModality()
    section = speech.Config(data="fsdd", path=str(fsdd), vocoder=str(run.folder))
    facts = speech.prepare(section).facts
    items = [speech.dataset(section, facts, "test")[i, 0] for i in range(2)]
    batch = speech.collate(section, facts, items)
    paths = speech.write(section, facts, batch, tmp_path, [0, 1])
    for path in paths:
        mel = torch.from_numpy(np.load(path.with_suffix(".npy")))
        wave = sound(gendiff.load(run.folder, "cpu"), mel)
        written = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        assert len(written) == 128 * mel.shape[1]
        assert (written - wave / max(1, wave.abs().max())).abs().max() < 1e-4
        by_rule = griffin_lim(mel, CONVENTIONS["8khz"])
        assert (written - by_rule).abs().max() > 0.01


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_to_run_it(recipe: Path) -> None:
    config.resolve(VocoderModality(), [recipe])
    call = f"gendiff train --modality vocoder --config configs/vocoder/{recipe.name}"
    assert call in recipe.read_text()


# --- weights of others --------------------------------------------------------------------------

V1 = {
    "resblock": "1", "upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4],
    "upsample_initial_channel": 512, "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]], "num_mels": 80,
    "n_fft": 1024, "hop_size": 256, "win_size": 1024, "sampling_rate": 22050, "fmin": 0,
    "fmax": 8000, "fmax_for_loss": None,
}  # fmt: skip
V3 = V1 | {
    "resblock": "2", "upsample_rates": [8, 8, 4], "upsample_kernel_sizes": [16, 16, 8],
    "upsample_initial_channel": 256, "resblock_kernel_sizes": [3, 5, 7],
    "resblock_dilation_sizes": [[1, 2], [2, 6], [3, 12]],
}  # fmt: skip
VOCOS = {
    "feature_extractor": {
        "class_path": "vocos.feature_extractors.MelSpectrogramFeatures",
        "init_args": {"sample_rate": 24000, "n_fft": 1024, "hop_length": 256, "n_mels": 100,
                      "padding": "center"},
    },
    "backbone": {
        "class_path": "vocos.models.VocosBackbone",
        "init_args": {"input_channels": 100, "dim": 512, "intermediate_dim": 1536,
                      "num_layers": 8},
    },
    "head": {
        "class_path": "vocos.heads.ISTFTHead",
        "init_args": {"dim": 512, "n_fft": 1024, "hop_length": 256, "padding": "center"},
    },
}  # fmt: skip


def published_hifigan(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of jik876's state dict, written out by hand, under weight norm."""

    def normed(name: str, *shape: int, bias: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.bias", (bias,)
        yield f"{name}.weight_g", (shape[0], 1, 1)
        yield f"{name}.weight_v", shape

    width = c["upsample_initial_channel"]
    yield from normed("conv_pre", width, c["num_mels"], 7, bias=width)
    for i, kernel in enumerate(c["upsample_kernel_sizes"]):
        yield from normed(f"ups.{i}", width, width // 2, kernel, bias=width // 2)
        width //= 2
        for j, size in enumerate(c["resblock_kernel_sizes"]):
            block = f"resblocks.{3 * i + j}"
            for k in range(len(c["resblock_dilation_sizes"][j])):
                for convs in ("convs1", "convs2") if c["resblock"] == "1" else ("convs",):
                    yield from normed(f"{block}.{convs}.{k}", width, width, size, bias=width)
    yield from normed("conv_post", 1, width, 7, bias=1)


def published_vocos() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of charactr/vocos-mel-24khz."""
    yield "feature_extractor.mel_spec.spectrogram.window", (1024,)
    yield "feature_extractor.mel_spec.mel_scale.fb", (513, 100)
    yield from (("backbone.embed.weight", (512, 100, 7)), ("backbone.embed.bias", (512,)))
    for norm in ("norm", "final_layer_norm"):
        yield from ((f"backbone.{norm}.{part}", (512,)) for part in ("weight", "bias"))
    for i in range(8):
        block = f"backbone.convnext.{i}"
        yield f"{block}.gamma", (512,)
        yield from ((f"{block}.dwconv.weight", (512, 1, 7)), (f"{block}.dwconv.bias", (512,)))
        yield from ((f"{block}.norm.{part}", (512,)) for part in ("weight", "bias"))
        for name, shape in (("pwconv1", (1536, 512)), ("pwconv2", (512, 1536))):
            yield from (
                (f"{block}.{name}.weight", shape),
                (f"{block}.{name}.bias", shape[:1]),
            )
    yield from (("head.out.weight", (1026, 512)), ("head.out.bias", (1026,)))
    yield "head.istft.window", (1024,)


def drawn(names: Iterator[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: 0.02 * torch.randn(shape) for name, shape in names}


@pytest.mark.parametrize(
    ("shape", "form"), [(V1, "generator"), (V3, "safetensors")], ids=["v1", "v3"]
)
def test_published_hifigan_weights_load(shape: dict[str, Any], form: str, tmp_path: Path) -> None:
    weights = drawn(published_hifigan(shape))
    (tmp_path / "config.json").write_text(json.dumps(shape))
    if form == "generator":
        torch.save({"generator": weights}, tmp_path / "g_02500000")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    vocoder = vocoders.open_vocoder(str(tmp_path), CONVENTIONS["22khz"])
    wave = vocoder(torch.randn(80, 5))
    assert wave.shape == (5 * 256,)
    assert wave.isfinite().all()


def test_hifigan_counts_its_published_parameters() -> None:
    """13.92 and 1.46 million (Kong et al., 2020, table 1)."""
    for c, millions in ((V1, 13.92), (V3, 1.46)):
        shape = HiFiGANShape(**{key: c[key] for key in HiFiGANShape.__dataclass_fields__})
        count = sum(p.numel() for p in HiFiGAN(shape).parameters())
        # The paper counts g of the weight norm too, one for each output channel.
        assert count / 1e6 == pytest.approx(millions, abs=0.02)


@pytest.mark.parametrize("conv", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
def test_weight_normalization_is_torch_s(conv: Any) -> None:
    x = torch.randn(1, 4, 9)
    plain = conv(4, 6, 3)
    for norm in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        normed = norm(conv(4, 6, 3))
        for p in normed.parameters():
            torch.nn.init.normal_(p)
        plain.load_state_dict(without_weight_norm(normed.state_dict()))
        torch.testing.assert_close(plain(x), normed(x))


def vocos_files(folder: Path, weights: dict[str, Tensor], changed: str = "") -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(VOCOS).replace("100", changed or "100"))
    torch.save(weights, folder / "pytorch_model.bin")


def published_vocos_weights() -> dict[str, Tensor]:
    from torchaudio.transforms import MelSpectrogram

    weights = drawn(published_vocos())
    mel = MelSpectrogram(24000, 1024, hop_length=256, n_mels=100, center=True, power=1)
    weights["feature_extractor.mel_spec.mel_scale.fb"] = mel.mel_scale.fb
    weights["head.istft.window"] = torch.hann_window(1024)
    return weights


def test_published_vocos_weights_load(tmp_path: Path) -> None:
    vocos_files(tmp_path, published_vocos_weights())
    convention = CONVENTIONS["vocos24khz"]
    wave = vocoders.open_vocoder(str(tmp_path), convention)(torch.randn(100, 5))
    assert wave.shape == (5 * 256,)
    with pytest.raises(ConfigError, match="floor 1e-07 for 1e-05, power 0.0 for 1e-09, bands htk"):
        vocoders.open_vocoder(str(tmp_path), CONVENTIONS["24khz"])
    weights = published_vocos_weights()
    weights["feature_extractor.mel_spec.mel_scale.fb"] *= 2
    other = tmp_path / "other"
    other.mkdir()
    vocos_files(other, weights)
    with pytest.raises(ConfigError, match="has other mel filters than"):
        vocoders.open_vocoder(str(other), convention)


def test_vocos_mels_are_torchaudio_s() -> None:
    """As Vocos' own front end takes them: the logarithm of at least 1e-7."""
    from torchaudio.transforms import MelSpectrogram

    wave = 0.1 * torch.randn(7000)
    wave[3000:5000] = 0
    mel = MelSpectrogram(24000, 1024, hop_length=256, n_mels=100, center=True, power=1)
    expected = mel(wave).clamp(min=1e-7).log()[:, :-1]
    found = log_mel(wave, CONVENTIONS["vocos24khz"])
    assert found.shape == (100, 7000 // 256)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_wrong_vocoder_is_named_in_one_line(tmp_path: Path, run: runs.Run) -> None:
    def folder(name: str, shape: Any, weights: Any, file: str = "g_1") -> str:
        (tmp_path / name).mkdir()
        if shape is not None:
            text = shape if isinstance(shape, str) else json.dumps(shape)
            (tmp_path / name / "config.json").write_text(text)
        if weights is not None:
            torch.save(weights, tmp_path / name / file)
        return str(tmp_path / name)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "evil",))

    good = drawn(published_hifigan(V3))
    few = {k: v for k, v in good.items() if not k.startswith("conv_post")}
    no_g = {k: v for k, v in good.items() if k != "conv_pre.weight_g"}
    cases = [
        (folder("no_g", V3, no_g), "does not fit its configuration: Missing key"),
        ("nowhere", "nowhere does not exist"),
        (folder("nothing", None, good), "holds neither run.json"),
        (folder("no_weights", V3, None), "one file of weights is needed in"),
        (folder("no_json", "{", good), "config.json cannot be used"),
        (folder("no_key", {"num_mels": 80}, good), "has no key 'sampling_rate'"),
        (folder("no_block", V3 | {"resblock": "3"}, good), "resblock is '3', not '1' or '2'"),
        (folder("no_hop", V3 | {"hop_size": 200}, good), "do not multiply to hop_size 200"),
        (folder("no_dict", [], good), "config.json cannot be used"),
        (folder("pickled", V3, {"generator": Evil()}), "no weights that can be read safely"),
        (folder("nested", V3, {"generator": {"a": 1}}), "is no state dict"),
        (folder("missing", V3, few), "does not fit its configuration: Missing key"),
        (folder("other_size", V1, good), "does not fit its configuration"),
        (folder("other_mel", V3 | {"fmax": 11025}, good), "high_hz 11025 for 8000"),
        (str(run.folder), "wants other mels than this run's: sample_rate_hz 8000 for 22050"),
    ]
    for name, message in cases:
        with pytest.raises((ConfigError, CheckpointError), match=message) as error:
            vocoders.open_vocoder(name, CONVENTIONS["22khz"])
        assert len(str(error.value).splitlines()) == 1
        assert str(error.value).startswith("speech.vocoder: ")
    assert not (tmp_path / "evil").exists()


def test_a_wrong_vocoder_stops_before_training(fsdd: Path) -> None:
    section = SpeechModality.Config(data="fsdd", path=str(fsdd), vocoder="nowhere")
    with pytest.raises(ConfigError, match="speech.vocoder: nowhere does not exist"):
        SpeechModality().prepare(section)


def test_the_head_s_magnitude_and_phase_make_that_wave() -> None:
    """One bin of magnitude 1 whose phase is the same in all frames: a cosine through them."""
    net = Vocos(4, 8, 16, 1, 64, 16, False)
    torch.nn.init.zeros_(net.head.out.weight)
    bias = torch.full((66,), -60.0)
    bias[33:], bias[4] = 0.3, 0.0  # phases of all, and the magnitude of bin 4, which fits the hop
    net.head.out.bias.data = bias
    wave = net(torch.randn(1, 4, 8))[0]
    n = torch.arange(128) + 24  # the first frame begins (64 - 16) / 2 before the wave
    # Hann windows a quarter apart add to 2, their squares to 3 / 2.
    expected = 2 / 64 * torch.cos(2 * torch.pi * 4 * n / 64 + 0.3) * 2 / 1.5
    torch.testing.assert_close(wave[40:-40], expected[40:-40], rtol=1e-4, atol=1e-6)
