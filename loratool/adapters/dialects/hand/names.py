"""What the keys of a hand-written state dict mean: factors, the layers they wrap, scales, the rest.

Scripts call things as they like, and agree in this: both factors of a layer lie in one module,
perhaps one inside of the layer's place (`q_proj.lora.lora_A`), and the wrapped layer, if it was
saved, lies beside them (`q_proj.orig_linear.weight`, `q_proj.q_proj.weight`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from loratool.adapters.dialects.dialect import Evidence
from loratool.adapters.dialects.litgpt.config import is_of_litgpt
from loratool.adapters.dialects.prefixes import unwrapped
from loratool.adapters.recognise import is_foreign
from loratool.storage.tensors import TensorInfo

#: Modules that hold factors and nothing else, by the names that scripts give them.
_HOLDER = r"(?:lora(?:_?(?:layer|adapter|module|linear|block))?|parametrizations\.weight\.\d+)"
#: One that may hold something else too, as the layers of bottleneck adapters.
_MAYBE_HOLDER = r"(?:adapter\.)?"
#: Names of factors that say so themselves, and those that say so inside of a holder only.
_SIDE = r"lora_[AaBb]|(?:lora_)?matrix_[AaBb]|[AB]|[Ww]_[AaBb]|lora_(?:down|up)"
_HELD = rf"{_SIDE}|[ab]|down|up"
_FACTOR = re.compile(
    rf"(?P<path>.+?)\.(?:{_HOLDER}\.(?P<held>{_HELD})|{_MAYBE_HOLDER}(?P<side>{_SIDE}))"
    r"(?P<leaf>\.weight|\.bias)?"
)
_END = re.compile(_HELD)
_LONGEST = 20
#: What torch.nn.utils.parametrize calls the weight that it computes with.
_ORIGINAL = ".parametrizations.weight.original"
#: A number that a script kept as a buffer or parameter.
_NUMBER = re.compile(
    rf"(?:(?P<path>.+?)\.)??(?:{_HOLDER}\.)?(?P<what>(?:lora_)?(?:scaling|scale|alpha|rank|r))"
)
#: Tables of a checkpoint that a training run goes on from, beside that of the model.
_OF_A_RUN = re.compile(
    r"(optimi[sz]ers?|optim|(lr_)?schedulers?|scaler|rng|callbacks|loops)"
    r"(_states?)?(_dict)?\."
)
#: What the table of the model is called there.
_TABLE = re.compile(r"(model|net|lora|module|network)?_?state_dict\.|(weights|params)\.")
#: Names of diffusion models, of litgpt's, and of PEFT's adapters.
_FOREIGN = re.compile(
    r"(^|\.)(diffusion_model|unet|(single_)?transformer_blocks|(double|single|joint|down|up)_blocks"
    r"|mid_block|(input|output)_blocks|middle_block|processor|base_model\.model)\."
    r"|^(model\.)?transformer\.h\.\d+\.(attn\.(qkv|attn|proj)|mlp\.(fc|fc_1|fc_2|proj))\.lora_[AB]$"
    r"|\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.(?!weight$|bias$)"
)


@dataclass
class HandPair:
    """What lies at the path of one adapted layer.

    `a` and `b` are the tensors named so, of several shapes where `layers` is False: bare
    parameters. As layers of their own (nn.Linear) they have their weights as layers have.
    """

    path: str
    layers: bool
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    @property
    def a(self) -> TensorInfo:
        return self.tensors["A"]

    @property
    def b(self) -> TensorInfo:
        return self.tensors["B"]

    @property
    def is_whole(self) -> bool:
        return {"A", "B"} <= self.tensors.keys()

    @property
    def style(self) -> tuple[str, bool]:
        """What pairs of one class have in common: the words for the factors, and their kind."""
        return self.words.get("A", ""), self.layers


@dataclass
class Sorted:
    """The tensors of a file by what they are.

    `numbers` are by path ("" for all modules) and what they say: "alpha", "scale", "rank". `own`
    are weights and biases of the model under the names they have there, `wrapped` what the layer
    at a path is called inside of its wrapper.
    """

    pairs: dict[str, HandPair] = field(default_factory=dict)
    numbers: dict[str, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))
    own: dict[str, TensorInfo] = field(default_factory=dict)
    wrapped: dict[str, str] = field(default_factory=dict)
    of_a_run: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def sorted_names(tensors: Mapping[str, TensorInfo]) -> Sorted:
    """Say of each tensor what it is."""
    found = Sorted()
    rest: dict[str, TensorInfo] = {}
    table = _table_of(tensors)
    for key, info in tensors.items():
        if not key.startswith(table) or (not table and _OF_A_RUN.match(key)):
            (found.of_a_run if _OF_A_RUN.match(key) else found.unknown).append(key)
            continue
        name = unwrapped(key.removeprefix(table))
        match = _FACTOR.fullmatch(name) if may_be_factor(name) else None
        if match is None:
            rest[name] = info
        elif not _take(found.pairs, match, info):
            found.unknown.append(key)
    inside: dict[str, set[str]] = defaultdict(set)
    for name, info in rest.items():
        number = _NUMBER.fullmatch(name) if info.numel == 1 else None
        if number is not None and (number["path"] or "") in {"", *found.pairs}:
            what = number["what"].removeprefix("lora_").replace("scaling", "scale")
            found.numbers[number["path"] or ""]["rank" if what == "r" else what] = info
            continue
        owner, child, leaf = _split(name)
        if owner in found.pairs and leaf == "weight":
            inside[owner].add(child)
        if "lora" in name.lower():
            found.unknown.append(info.name)
        else:
            found.own[name] = info
    found.wrapped = {path: next(iter(one)) for path, one in inside.items() if len(one) == 1}
    found.own = _unwrapped(found)
    return found


def _take(pairs: dict[str, HandPair], match: re.Match[str], info: TensorInfo) -> bool:
    """Put a factor into its pair; False where something lies there already."""
    word, leaf = match["held"] or match["side"], match["leaf"] or ""
    pair = pairs.setdefault(match["path"], HandPair(match["path"], bool(leaf)))
    side = "A" if word[-1] in "Aa" or word.endswith("down") else "B"
    slot = f"{side}.bias" if leaf == ".bias" else side
    if slot in pair.tensors or pair.layers != bool(leaf):
        return False
    pair.tensors[slot] = info
    pair.words[slot] = word
    return True


def _table_of(tensors: Collection[str]) -> str:
    """What the names of a checkpoint's model begin with, as `model_state_dict.`; mostly ""."""
    model = of_a_model(tensors)
    first = _TABLE.match(model[0]) if model else None
    if first is not None:
        return first[0] if all(name.startswith(first[0]) for name in model) else ""
    tops = Counter(name.partition(".")[0] for name in model)
    # {"model": state_dict}, whose own names mostly begin so too.
    inner = any(name.startswith(("model.model.", "model.transformer.")) for name in model)
    return "model." if inner and tops.keys() == {"model"} else ""


def _split(name: str) -> tuple[str, str, str]:
    """`(owner, child, leaf)` of a tensor in a layer that may be wrapped: `q.linear.weight`."""
    owner, dot, _ = name.partition(_ORIGINAL)
    if dot:
        return owner, _ORIGINAL[1:], "weight"
    module, _, leaf = name.rpartition(".")
    owner, _, child = module.rpartition(".")
    return owner, child, leaf


def _unwrapped(found: Sorted) -> dict[str, TensorInfo]:
    """The model's own tensors by the names they have without wrappers."""
    own: dict[str, TensorInfo] = {}
    for name, info in found.own.items():
        owner, child, leaf = _split(name)
        plain = f"{owner}.{leaf}" if found.wrapped.get(owner) == child else name
        if plain in own:
            found.unknown.append(info.name)
        else:
            own[plain] = info
    return own


def of_a_model(names: Collection[str]) -> list[str]:
    """The names without those of a training run's other tables, as the optimizer's."""
    return [name for name in names if not _OF_A_RUN.match(name)]


@lru_cache(maxsize=1)  # every dialect that hand-written files look like asks
def is_hand_written(evidence: Evidence) -> bool:
    """Whether a file holds factors as scripts name them, and no program that has a config does.

    Those are bare parameters, layers of other names than PEFT's and torchtune's, and any beside the
    layer that they wrap, a scale of their own or an optimizer. MLX has bare `lora_a` and `lora_b`,
    but not in files of torch.
    """
    tensors = evidence.tensors
    if not may_be_hand_written(evidence):
        return False
    if is_foreign(of_a_model(tensors)) or any(_FOREIGN.search(name) for name in tensors):
        return False
    found = sorted_names(tensors)
    beside = found.wrapped.keys() | found.numbers.keys()
    has_more = bool(found.of_a_run) or "" in found.numbers
    for pair in found.pairs.values():
        if not pair.is_whole:
            continue
        word, is_apart = pair.words["A"], not has_more and pair.path not in beside
        if pair.layers and not (is_apart and word in ("lora_A", "lora_a")):
            return True
        if not pair.layers and (evidence.in_torch or word != "lora_a"):
            return True
    return False


def may_be_hand_written(evidence: Evidence) -> bool:
    """Whether some names could be those of factors, and no config says whose."""
    if evidence.config or evidence.values or evidence.top in ("tensor", "list", "tuple"):
        return False
    named = any(map(may_be_factor, evidence.tensors))
    return named and not is_of_litgpt(evidence.folder)


def may_be_factor(name: str) -> bool:
    """Whether a name ends like that of a factor; a look at the end of it, since models have very
    many names."""
    owner, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        leaf = owner.rpartition(".")[2]
    return len(leaf) < _LONGEST and _END.fullmatch(leaf) is not None
