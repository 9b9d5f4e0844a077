"""PEFT without the card that it writes beside every adapter: no test reads one, and to make it
takes as long as all else of a small adapter. Import this before PEFT saves something."""

from __future__ import annotations

from peft import PeftModel


def _no_card(self: PeftModel, output_dir: object) -> None:
    """What stands for `create_or_update_model_card`."""


PeftModel.create_or_update_model_card = _no_card
