"""adapter_config.json of mlx-lm and mlx-vlm: whose it is, what it says, which scale it tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool.adapters.adapter import Declared
from loratool.errors import AdapterError
from loratool.storage.fields import (
    ABSENT,
    ANYTHING,
    COUNT,
    NAMES,
    NUMBER,
    TEXT,
    FieldType,
    check_fields,
    mapping_to,
)

_KINDS = ("lora", "dora", "full")

_FIELDS = {
    "fine_tune_type": FieldType("lora, dora or full", lambda v: v in _KINDS),
    "model": TEXT | ABSENT,
    "lora_parameters": mapping_to(ANYTHING, "a table") | ABSENT,
}
_PARAMETERS = {"rank": COUNT, "scale": NUMBER, "alpha": NUMBER | ABSENT, "keys": NAMES | ABSENT}
#: What mlx-vlm wrote before it took over mlx-lm's form.
_OF_VLM = {"rank": COUNT, "alpha": NUMBER}


def is_of_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a config is one of mlx-lm's, or of an mlx-vlm that writes the same."""
    telling = "fine_tune_type" in config or isinstance(config.get("lora_parameters"), dict)
    return telling and not config.get("peft_type")


def is_of_vlm(config: Mapping[str, Any]) -> bool:
    """Whether a config is one of an older mlx-vlm: rank and alpha, and no word of anything else."""
    return {"rank", "alpha"} <= config.keys() <= {"rank", "alpha", "dropout"}


def kind_of_training(config: Mapping[str, Any]) -> str:
    """ "lora", "dora", "full", or "" where nothing says it."""
    kind = config.get("fine_tune_type")
    return kind if isinstance(kind, str) else ""


def lora_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config says of the factors."""
    return config if is_of_vlm(config) else config.get("lora_parameters") or {}


def check_mlx(config: Mapping[str, Any], where: object) -> None:
    """Raise AdapterError for a field of a wrong type."""
    if is_of_vlm(config):
        check_fields(config, _OF_VLM, where, AdapterError)
    elif is_of_mlx(config):
        check_fields(config, _FIELDS, where, AdapterError)
        inner = f"{where}, lora_parameters"
        check_fields(config.get("lora_parameters") or {}, _PARAMETERS, inner, AdapterError)


def scale_of(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """The factor of all products; or None, and why nothing tells it.

    mlx-lm multiplies with `scale` alone; the `alpha` beside it in configs until April 2025 is not
    used (ml-explore/mlx-lm#65). In its first months it was `scale·alpha/r` (mlx-examples#623), and
    configs of that time have `lora_layers` and no `fine_tune_type`, as do some of a little later.
    mlx-vlm multiplied with `alpha` until March 2026, and with `alpha/r` since (mlx-vlm#846).
    """
    said = lora_settings(config)
    if is_of_vlm(config):
        alpha, rank = said["alpha"], said["rank"] or 1
        if rank == 1:
            return float(alpha), ""
        return None, (
            f"mlx-vlm multiplied with alpha itself ({alpha:g}) until March 2026 and with alpha/r "
            f"({alpha / rank:g}) since, and its config is the same"
        )
    scale = said.get("scale")
    if not is_of_mlx(config):
        return None, "it is in the config that mlx-lm writes (adapter_config.json), or in the call"
    if scale is None:
        return None, "lora_parameters of its config has no scale"
    if "fine_tune_type" in config or "num_layers" in config:
        return float(scale), ""
    alpha, rank = said.get("alpha"), said.get("rank")
    early = f", {scale * alpha / rank:g}" if alpha and rank else ""
    return None, (
        f"its config is of the first half of 2024 or before, when mlx-lm multiplied with "
        f"scale·alpha/r{early}, or with scale alone, {scale:g}"
    )


def declared_by(config: Mapping[str, Any]) -> Declared:
    """What the config says of the base and of training."""
    return Declared(base_name=config.get("model") or None, settings=tuple(_settings(config)))


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    said = lora_settings(config)
    words = [f"{name} {said[name]:g}" for name in ("rank", "scale") if name in said]
    if is_of_vlm(config):
        words = [f"{name} {said[name]:g}" for name in ("rank", "alpha")]
    if kind_of_training(config):
        words.insert(0, kind_of_training(config))
    if words:
        yield "configured", ", ".join(words)
    if said.get("keys"):
        yield "targets", ", ".join(sorted(said["keys"]))
