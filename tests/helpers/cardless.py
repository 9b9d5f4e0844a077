"""PEFT without the card that it writes beside every adapter, which takes as long as all else of a
small one: who reads it asks `write_card` for it. Import this before PEFT saves something."""

from __future__ import annotations

from peft import PeftModel

write_card = PeftModel.create_or_update_model_card


def _no_card(self: PeftModel, output_dir: object) -> None:
    """What stands for `create_or_update_model_card`."""


PeftModel.create_or_update_model_card = _no_card
