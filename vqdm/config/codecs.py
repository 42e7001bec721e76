"""Options of every codec, in a dataclass each, which Hydra picks by the group `quantize=`. Imports no torch.

A codec's file in `vqdm/codecs/` ends with its card, which says what it does with these; `OPTIONS` lists them all.
"""

import re
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from vqdm.config.ranges import SEEDS, check_fields, choice, later, number, settings_of
from vqdm.errors import UserError


@dataclass(kw_only=True)
class QuantizeConfig:
    """Full precision (quantize=none), and the base of every codec's options."""

    kind: str = "none"  # key of OPTIONS; set by the group (quantize=rtn) or the class, never by hand
    bits: float = number(4, least=1, most=16)  # bits per weight
    seed: int = number(0, least=0, most=SEEDS)  # seed of the codec's draws, and of the choice of tokens for Hessians
    # tokens of a denoiser call that a Hessian takes; None: all. It is here since experiments set it for any codec
    tokens_per_call: int | None = number(None, least=1)
    low_rank: int = number(0, least=0, most=4096)  # rank of a 16-bit branch beside the codes, counted in the bits
    smoothing: float = number(0.0, least=0, most=1)  # with low_rank, α of scales for the codes' inputs; 0: no scales

    short: ClassVar[str] = "fp"  # beginning of names and folders: rtn4, vq3
    counts_all: ClassVar[bool] = False  # `bits` are all of a layer's bits, so that a branch takes some of them
    version: ClassVar[int] = 1  # raised when the codec may give other weights from the same options

    @property
    def name(self) -> str:
        """Short name for labels: rtn4, vq3, trellis2.5, trellis2.5r8 with a branch of rank 8; fp."""
        rank = f"r{self.low_rank}" if self.low_rank != type(self)().low_rank else ""
        return self.short if self.kind == "none" else f"{self.short}{self.bits:g}{rank}"

    @classmethod
    def from_name(cls, name: str) -> "QuantizeConfig | None":
        """Options from a name such as rtn4, rtn4g64 with groups, rtn4r8 with a branch; None if another codec's."""
        pattern = rf"{cls.short}(?P<bits>\d+(?:\.\d+)?)(?:g(?P<group>\d+))?(?:r(?P<rank>\d+))?"
        found = re.fullmatch(pattern, name)
        grouped = any(field.name == "group_size" for field in fields(cls))
        if found is None or (found["group"] is not None and not grouped):
            return None
        group = {} if found["group"] is None else {"group_size": int(found["group"])}
        rank = {} if found["rank"] is None else {"low_rank": int(found["rank"])}
        return cls(bits=float(found["bits"]), **group, **rank)

    def check(self) -> None:
        """Raise UserError, naming the key, for values and combinations that make no sense."""
        if type(self) is not OPTIONS.get(self.kind):
            raise UserError(
                f"quantize.kind={self.kind!r} is not given by hand: choose the codec by quantize={', '.join(OPTIONS)}"
            )
        check_fields(self, "quantize", where=f" for {self.kind}")
        if self.smoothing and not self.low_rank:
            raise UserError(f"quantize.smoothing={self.smoothing:g} is for quantize.low_rank=1 or more: give that too")

    def settings(self) -> dict:
        """The options that can change the quantized weights, which enter the stage's fingerprint."""
        unused = () if isinstance(self, HessianOptions) else ("tokens_per_call",)
        unused += () if self.low_rank else ("low_rank", "smoothing")  # which earlier fingerprints do not have
        own = {key: value for key, value in settings_of(self).items() if key not in unused}
        return own if self.version == 1 else own | {"codec_version": self.version}

    def sensitivity(self) -> dict | None:
        """The options in the sensitivity stage's fingerprint; None if bits are not allotted by sensitivity."""
        return None


def check_whole_bits(config: QuantizeConfig) -> None:
    if config.bits != int(config.bits):
        raise UserError(
            f"quantize.bits={config.bits:g} must be a whole number for {config.kind}; quantize=trellis takes any"
        )


@dataclass(kw_only=True)
class ScalarOptions(QuantizeConfig):
    """Options of codecs with one code per weight."""

    bits: float = number(4, least=1, most=8)
    clip: str = choice("mse", "minmax", "hessian")  # how a row's range is clipped; hessian: for least output error
    group_size: int | None = number(None, least=1)  # number of inputs per scale; None: the whole row

    def check(self) -> None:
        super().check()
        check_whole_bits(self)


@dataclass(kw_only=True)
class HessianOptions:
    """Options for the Hessian of a layer's inputs, whose tokens are drawn by `seed` and `tokens_per_call`."""

    # teacher: recorded calls | student: the student's own sampling (paper) | both: recorded calls through both, layer
    # after layer, each coded for what it should give behind those that are quantized already (GPTAQ)
    hessian_from: str = choice("teacher", "student", "both")
    damping: float = number(0.01, least=0, most=100)  # added to the Hessian's diagonal, relative to its mean


@dataclass(kw_only=True)
class RtnConfig(HessianOptions, ScalarOptions):
    """Options of round-to-nearest, which uses a Hessian only for clip=hessian."""

    kind: str = "rtn"
    short: ClassVar[str] = "rtn"

    def settings(self) -> dict:
        of_hessian = ("seed", "tokens_per_call", *(field.name for field in fields(HessianOptions)))
        unused = () if self.clip == "hessian" else of_hessian
        return {key: value for key, value in super().settings().items() if key not in unused}


@dataclass(kw_only=True)
class GptqConfig(HessianOptions, ScalarOptions):
    """Options of GPTQ. Clipping and damping gave the least error of those tried on tiny (docs/lab-notes.md)."""

    kind: str = "gptq"
    clip: str = choice("hessian", "mse", "minmax")
    damping: float = number(0.001, least=0, most=100)
    act_order: bool = True  # take columns by falling power of their inputs
    short: ClassVar[str] = "gptq"


@dataclass(kw_only=True)
class SvdquantConfig(GptqConfig):
    """Options of SVDQuant's weights (arXiv 2411.05007): smoothed, a low-rank branch, the rest by GPTQ."""

    kind: str = "svdquant"
    low_rank: int = number(32, least=1, most=4096)
    smoothing: float = number(0.5, least=0, most=1)
    short: ClassVar[str] = "svdquant"


@dataclass(kw_only=True)
class AdaroundConfig(ScalarOptions):
    """Options of AdaRound with block reconstruction; batches of 16 are as good as 32 on residual blocks, and faster."""

    kind: str = "adaround"
    clip: str = choice("mse", "minmax")
    iterations: int = number(2000, least=1, most=10**7)  # training steps per block
    batch_size: int = number(16, least=1)  # samples per step
    samples: int | None = later(number(None, least=1))  # rows of recorded calls, drawn by `seed`; None: all
    # a range for each of the two parts of an up block's shortcuts: hidden state | skip connection (Q-Diffusion)
    split_shortcuts: bool = later(False)
    short: ClassVar[str] = "adaround"

    def check(self) -> None:
        super().check()
        if self.low_rank:
            raise UserError(
                f"quantize.low_rank={self.low_rank} goes with codecs that make a layer at a time: choose quantize=gptq4"
            )
        if self.split_shortcuts and self.group_size is not None:
            raise UserError(
                f"quantize.split_shortcuts=true gives rows two scales: leave quantize.group_size={self.group_size} out"
            )


@dataclass(kw_only=True)
class AdditiveConfig(HessianOptions, QuantizeConfig):
    """Options of additive codes, by default 3x8g8; `bits` are those of all codes together."""

    kind: str = "additive"
    bits: float = number(3, least=1, most=16)
    group_size: int = number(8, least=1)  # number of weights per code vector
    codebook_bits: int = number(8, least=1, most=16)  # log2 of the codebook size
    codebooks: str = choice("layer", "block", "model")  # each has a set of its own
    input_scales: bool = False  # True: an additional scale per input
    recipe: str = choice("fast", "paper")  # exact group searches | VQDM as published
    beam_size: int = number(8, least=1, most=4096)  # candidates kept in a search for codes
    short: ClassVar[str] = "vq"
    version: ClassVar[int] = 2

    @property
    def num_codebooks(self) -> int:
        return int(self.bits * self.group_size) // self.codebook_bits

    @classmethod
    def from_name(cls, name: str) -> "QuantizeConfig | None":
        """Options from a name; additive codes also have names like 3x8g8 (codebooks × bits, groups)."""
        found = re.fullmatch(r"(\d+)x(\d+)g(\d+)", name)
        if found is None:
            return super().from_name(name)
        count, width, group_size = (int(number) for number in found.groups())
        return cls(bits=count * width / max(1, group_size), codebook_bits=width, group_size=group_size)

    def check(self) -> None:
        super().check()
        check_whole_bits(self)
        if self.bits * self.group_size % self.codebook_bits:
            raise UserError(
                f"quantize.bits={self.bits:g} with group_size={self.group_size} is no whole number of "
                f"{self.codebook_bits}-bit codebooks; choose bits × group_size as a multiple of codebook_bits"
            )
        if self.recipe == "paper" and self.codebooks != "layer":
            raise UserError(f"quantize.recipe=paper learns codebooks with each layer, not codebooks={self.codebooks}")


@dataclass(kw_only=True)
class TrellisConfig(HessianOptions, QuantizeConfig):
    """Options of trellis codes; `bits` are true bits, with everything counted."""

    kind: str = "trellis"
    damping: float = number(0.003, least=0, most=100)  # of .001 to .03 tried, safe on few tokens (docs/lab-notes.md)
    bits: float = number(3, least=1, most=8)
    allocation: str = choice("uniform", "sensitivity")  # same bits for all layers | by output error
    row_exponent: float = number(1.0, least=0, most=8)  # 1: rows weigh by their output error; 0: all alike
    short: ClassVar[str] = "trellis"
    counts_all: ClassVar[bool] = True
    version: ClassVar[int] = 2
    fewest_outputs: ClassVar[int] = 16  # layers of fewer, which model.min_size may let in, get scalar codes
    scalar_bits: ClassVar[int] = 8  # of those codes

    def check(self) -> None:
        super().check()
        if self.low_rank and self.allocation == "sensitivity":
            raise UserError(
                "quantize.low_rank goes with quantize.allocation=uniform: harm is measured without a branch"
            )

    def settings(self) -> dict:
        """All options but the allocation, which the sensitivity stage stands for."""
        return {key: value for key, value in super().settings().items() if key != "allocation"}

    def sensitivity(self) -> dict | None:
        """The options of the sensitivity stage, of which one serves all bit-widths of a model."""
        if self.allocation == "uniform":
            return None
        return {key: value for key, value in self.settings().items() if key not in ("kind", "bits")}


PEERS = {  # other libraries and the types that they round to, by their own names
    "sdnq": ("uint2", "uint3", "uint4", "uint5", "uint6", "uint8"),
    "bitsandbytes": ("nf4", "fp4", "int8"),
    "torchao": ("int4", "int8"),
    "quanto": ("int2", "int4", "int8", "float8"),
    "gguf": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    "autoround": ("int2", "int3", "int4", "int8"),
}


@dataclass(kw_only=True)
class PeerConfig(QuantizeConfig):
    """Options of another library, which quantizes the denoiser by diffusers' own loading (`vqdm/hub/peers.py`)."""

    kind: str = "peer"
    bits: float = number(0, least=0, most=16)  # never given: `weights` says it
    library: str = choice(*PEERS)
    weights: str = "uint4"  # one of the library's types in PEERS
    svd: bool = False  # sdnq: a low-rank branch of rank 32 beside the codes, as SVDQuant has it
    hadamard: bool = False  # sdnq: weights are rotated first
    codebook: bool = False  # sdnq: codes stand for entries of a codebook
    short: ClassVar[str] = "peer"

    @property
    def name(self) -> str:
        """Short name for labels: sdnq-uint4-svd."""
        switches = [name for name in ("svd", "hadamard", "codebook") if getattr(self, name)]
        return "-".join([self.library, self.weights, *switches])

    @property
    def package(self) -> str:
        """Name of the library's package."""
        return {"quanto": "optimum-quanto", "autoround": "auto-round"}.get(self.library, self.library)

    @classmethod
    def from_name(cls, name: str) -> None:
        """None: no short name stands for a peer."""

    def check(self) -> None:
        super().check()
        if self.bits:
            raise UserError(f"quantize.bits={self.bits:g} is not for quantize=peer: quantize.weights says the type")
        if self.weights not in PEERS[self.library]:
            known = ", ".join(PEERS[self.library])
            raise UserError(f"quantize.weights={self.weights!r} is not one of {known} for {self.library}")
        used = next((name for name in ("svd", "hadamard", "codebook") if getattr(self, name)), None)
        if used is not None and self.library != "sdnq":
            raise UserError(f"quantize.{used}=true is an option of sdnq: leave it out for {self.library}")

    def settings(self) -> dict:
        """The options in the fingerprint; the library's version comes to them in the stage."""
        unused = ("kind", "bits", "tokens_per_call")
        return {key: value for key, value in asdict(self).items() if key not in unused}


OPTIONS: dict[str, type[QuantizeConfig]] = {
    "none": QuantizeConfig,
    "peer": PeerConfig,
    "rtn": RtnConfig,
    "gptq": GptqConfig,
    "svdquant": SvdquantConfig,
    "adaround": AdaroundConfig,
    "additive": AdditiveConfig,
    "trellis": TrellisConfig,
}


def parse_scheme(name: str) -> QuantizeConfig:
    """The options that a short name stands for: rtn4, rtn4g64, gptq3, trellis2.5, vq3, or 3x8g8 (codebooks × bits).

    The settings are those of the presets in conf/quantize/. UserError for any other name.
    """
    candidates = (options.from_name(str(name)) for kind, options in OPTIONS.items() if kind != "none")
    config = next((config for config in candidates if config is not None), None)
    if config is None:
        raise UserError(
            f"{str(name)[:80]!r} is no scheme; give one like trellis3, trellis2.5, 3x8g8, vq3, gptq4 or rtn4g64"
        )
    config.check()
    return config
