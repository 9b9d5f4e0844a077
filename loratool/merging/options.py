"""The options of a merge: one frozen value, checked before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.dtypes import MODEL_DTYPES
from loratool.errors import UsageError, unknown
from loratool.models.checkpoint import Checkpoint
from loratool.models.precision import float16_overflows
from loratool.models.quantised.treatment import AS_USUAL, TREATMENTS, Quantised
from loratool.notices import Notice

#: Whose tokenizer a merge takes.
TOKENIZERS = ("base", "adapter")


@dataclass(frozen=True)
class MergeOptions:
    """As `loratool.merge` takes them. `dtype` None is float16, or what `dtype_for` says."""

    dtype: str | None = None
    allow_unmatched: bool = False
    components: tuple[str, ...] = ()
    tokenizer: str | None = None
    again: bool = False
    reversible: bool = False
    verify: bool = False
    push: str | None = None
    keep: bool = True
    private: bool = False
    initial: str | Path | None = None
    replicate_layers: bool = False
    quantised: Quantised = AS_USUAL

    def check(self, output: str | Path | None) -> None:
        """Raise UsageError for options that contradict each other."""
        if self.dtype is not None and self.dtype not in MODEL_DTYPES:
            raise unknown("dtype", self.dtype, MODEL_DTYPES)
        if self.tokenizer is not None and self.tokenizer not in TOKENIZERS:
            raise unknown("tokenizer", self.tokenizer, TOKENIZERS)
        if self.quantised.how not in (None, *TREATMENTS):
            raise unknown("treatment", str(self.quantised.how), TREATMENTS)
        if self.quantised.force and self.quantised.how != "requantise":
            raise UsageError(
                "--force goes with --quantised requantise.", "Omit it; nothing else is refused so."
            )
        if self.push is None and not self.keep:
            raise UsageError("--no-keep without --push would leave nothing.", "Add --push REPO.")
        if self.push is None and self.private:
            raise UsageError("--private goes with --push.", "Omit it, or add --push REPO.")
        if output is None and self.keep:
            hint = "Say where to write: --output OUT, or -o OUT"
            more = "; or keep nothing here: --no-keep." if self.push is not None else "."
            raise UsageError("No output given.", hint + more)
        if output is not None and not self.keep:
            raise UsageError("--no-keep leaves nothing here.", "Omit -o, or --no-keep.")
        if self.reversible and self.replicate_layers:
            raise UsageError(
                "--reversible gives back the base, which --replicate-layers leaves as it is.",
                "Omit --reversible, and keep the base.",
            )
        if self.reversible and not self.keep:
            raise UsageError(
                "--reversible reads the base to its end, and --no-keep deletes base shards as it "
                "goes.",
                "Omit one of the two.",
            )

    def dtype_for(self, base: Checkpoint) -> tuple[str, list[Notice]]:
        """The dtype of a merge into `base`, and what a user should know about it.

        float16 unless something is asked for, and bfloat16 where the architecture's activations
        exceed float16, so that the model would run to infinity though all its weights fit.
        """
        over = float16_overflows(base)
        if over is None or self.dtype not in (None, "float16"):
            return self.dtype or "float16", []
        kind, source = over
        if self.dtype is None:
            text = (
                f"bfloat16 is written, because activations of {kind} exceed float16 ({source}). "
                "--dtype float16 writes that all the same."
            )
            return "bfloat16", [Notice("float16-overflows", text, base.label)]
        text = (
            f"float16 is written as asked, but activations of {kind} exceed it ({source}): the "
            "model may give NaN. --dtype bfloat16 does not."
        )
        return "float16", [Notice("float16-overflows", text, base.label)]
