"""What tiny models are fed: one function per kind of input, the same values each time."""

from __future__ import annotations

import torch

from helpers.tiny.build import Inputs


def _ids() -> torch.Tensor:
    return torch.arange(1, 25).reshape(2, 12) % 80 + 3


def _line(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


def text() -> Inputs:
    return {"input_ids": _ids()}


def pair() -> Inputs:
    return {"input_ids": _ids(), "decoder_input_ids": _ids()[:, :5]}


def image() -> Inputs:
    return {"pixel_values": _line(2, 3, 16, 16)}


def image32() -> Inputs:
    return {"pixel_values": _line(2, 3, 32, 32)}


def image64() -> Inputs:
    return {"pixel_values": _line(2, 3, 64, 64)}


def image_and_text() -> Inputs:
    return {**text(), **image()}


def video() -> Inputs:
    return {"pixel_values": _line(2, 4, 3, 16, 16)}


def wave() -> Inputs:
    return {"input_values": _line(2, 800).sin()}


def spectrogram() -> Inputs:
    return {"input_features": _line(2, 8, 32), "decoder_input_ids": _ids()[:, :5]}


def frames() -> Inputs:
    return {"input_features": _line(2, 20, 8)}
