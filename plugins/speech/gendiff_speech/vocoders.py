"""Sound from mels by whatever can make it: Griffin-Lim, a vocoder run, HiFi-GAN or Vocos weights.

``open_vocoder("griffin_lim", convention)``, or a path to one of

========================================= =====================================================
a run of ``gendiff train --modality        its newest checkpoint
vocoder``
a folder or file with HiFi-GAN's weights   a state dict or safetensors, ``config.json`` beside it
a folder or file with Vocos' weights       a state dict or safetensors, ``config.yaml`` beside it
========================================= =====================================================

Weights are read as tensors only, never as pickled objects. A vocoder that was trained on mels of
another convention makes metallic noise of these, so conventions are compared first.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from gendiff.errors import CheckpointError, ConfigError, GendiffError
from gendiff_speech.hifigan import HiFiGAN, HiFiGANShape, without_weight_norm
from gendiff_speech.mel import CONVENTIONS, MelConvention, filters, griffin_lim
from gendiff_speech.vocos import Vocos

Vocoder = Callable[[Tensor], Tensor]  # a log mel (mels, T) to a wave (T * hop,)
GRIFFIN_LIM = "griffin_lim"
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def open_vocoder(name: str, convention: MelConvention) -> Vocoder:
    """The vocoder of this name or path, for mels of a convention.

    Raises:
        ConfigError: There is none, or it wants mels of another convention.
        CheckpointError: Its weights cannot be read or do not fit its configuration.
    """
    if name == GRIFFIN_LIM:
        return lambda mel: griffin_lim(mel, convention)
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(
            f"speech.vocoder: {name} does not exist. Give {GRIFFIN_LIM}, the folder of a vocoder "
            "run, or the weights of HiFi-GAN or Vocos"
        )
    vocoder, wants = _open(path)
    differing = [
        f"{field.name} {getattr(wants, field.name)} for {getattr(convention, field.name)}"
        for field in dataclasses.fields(MelConvention)
        if getattr(wants, field.name) != getattr(convention, field.name)
    ]
    if differing:
        raise ConfigError(
            f"speech.vocoder: {name} wants other mels than this run's: {', '.join(differing)}. "
            f"Use one that was trained on the run's, or {GRIFFIN_LIM}"
        )
    return vocoder


@lru_cache(maxsize=2)
def _open(path: Path) -> tuple[Vocoder, MelConvention]:
    if (path / "run.json").is_file():
        return _run(path)
    folder = path if path.is_dir() else path.parent
    for name, build in (("config.json", _hifigan), ("config.yaml", _vocos)):
        if (folder / name).is_file():
            network, convention = build(folder / name, path)
            return _single(network.eval().requires_grad_(False)), convention
    raise ConfigError(
        f"speech.vocoder: {folder} holds neither run.json (a vocoder run), config.json (HiFi-GAN) "
        "nor config.yaml (Vocos)"
    )


def _single(network: nn.Module) -> Vocoder:
    @torch.inference_mode()
    def vocoder(mel: Tensor) -> Tensor:
        wave: Tensor = network(mel[None].float())[0]
        return wave.clone()

    return vocoder


def _run(folder: Path) -> tuple[Vocoder, MelConvention]:
    from gendiff import generate
    from gendiff_speech.vocoder import sound

    model = generate.load(folder, "cpu")
    if model.run.modality.name != "vocoder":
        raise ConfigError(
            f"speech.vocoder: {folder} is a run of modality '{model.run.modality.name}'. "
            "Give one of gendiff train --modality vocoder"
        )
    return lambda mel: sound(model, mel), CONVENTIONS[model.run.facts["convention"]]


def _weights(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a file, or of the only weights file of a folder, and that file."""
    if path.is_dir():
        files = [
            p
            for p in sorted(path.iterdir())
            if p.suffix in WEIGHTS or p.name.startswith(("g_", "generator"))
        ]
        if len(files) != 1:
            found = ", ".join(p.name for p in files) or "none"
            raise ConfigError(
                f"speech.vocoder: one file of weights is needed in {path}, found {found}. "
                "Give the file itself"
            )
        path = files[0]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise of every kind on foreign bytes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"speech.vocoder: {path} holds no weights that can be read safely ({reason[:120]})"
        ) from None
    if isinstance(state, dict) and part is not None and part in state:
        state = state[part]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"speech.vocoder: {path} is no state dict, names to tensors")
    return state, path


def _fill(network: nn.Module, weights: dict[str, Tensor], path: Path) -> nn.Module:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise CheckpointError(
            f"speech.vocoder: {path} does not fit its configuration: {first[:200]}"
        ) from None
    return network


def _read(path: Path, parse: Callable[[str], Any], build: Callable[[Any], Any]) -> Any:
    """What ``build`` makes of a configuration, or one line of what is wrong with it."""
    try:
        return build(parse(path.read_text()))
    except GendiffError:
        raise
    except KeyError as error:
        raise ConfigError(f"speech.vocoder: {path} has no key {error}") from None
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"speech.vocoder: {path} cannot be used: {reason}") from None


def _hifigan(config: Path, path: Path) -> tuple[nn.Module, MelConvention]:
    """jik876/hifi-gan: ``config.json``, and the weights under ``generator``."""

    def build(c: Mapping[str, Any]) -> tuple[HiFiGAN, MelConvention]:
        convention = MelConvention(
            c["sampling_rate"],
            c["n_fft"],
            c["hop_size"],
            c["win_size"],
            c["num_mels"],
            c["fmin"],
            c["sampling_rate"] / 2 if c["fmax"] is None else c["fmax"],
        )
        keys = [field.name for field in dataclasses.fields(HiFiGANShape)]
        shape = HiFiGANShape(**{key: c[key] for key in keys})
        if shape.resblock not in ("1", "2"):
            raise ValueError(f"resblock is {shape.resblock!r}, not '1' or '2'")
        if math.prod(shape.upsample_rates) != convention.hop:
            raise ValueError(
                f"upsample_rates {shape.upsample_rates} do not multiply to hop_size "
                f"{convention.hop}"
            )
        return HiFiGAN(shape), convention

    network, convention = _read(config, json.loads, build)
    weights, path = _weights(path, "generator")
    return _fill(network, without_weight_norm(weights), path), convention


def _vocos(config: Path, path: Path) -> tuple[nn.Module, MelConvention]:
    """charactr's Vocos: ``config.yaml``, and a state dict that also holds its mel filters."""

    def build(c: Mapping[str, Any]) -> tuple[Vocos, MelConvention]:
        kind = c["feature_extractor"]["class_path"]
        if not kind.endswith("MelSpectrogramFeatures"):
            raise ValueError(f"feature_extractor {kind}: only Vocos on mels can be used")
        f, b, h = (c[key]["init_args"] for key in ("feature_extractor", "backbone", "head"))
        centred = f["padding"] == "center"
        rate, n_fft, hop, mels = (
            f[key] for key in ("sample_rate", "n_fft", "hop_length", "n_mels")
        )
        convention = MelConvention(
            rate, n_fft, hop, n_fft, mels, 0, rate / 2, 1e-7, 0.0, "htk", centred
        )
        network = Vocos(
            b["input_channels"],
            b["dim"],
            b["intermediate_dim"],
            b["num_layers"],
            h["n_fft"],
            h["hop_length"],
            h["padding"] == "center",
        )
        return network, convention

    network, convention = _read(config, yaml.safe_load, build)
    weights, path = _weights(path)
    prefix = "feature_extractor."
    bank = weights.get(prefix + "mel_spec.mel_scale.fb")
    if bank is not None and not _agree(bank, filters(convention)):
        raise ConfigError(f"speech.vocoder: {path} has other mel filters than {config} says")
    weights = {k: v for k, v in weights.items() if not k.startswith(prefix)}
    return _fill(network, weights, path), convention


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4)
