"""What a plan says of one stage, what all stages' costs follow from, and sizes in words."""

from dataclasses import dataclass, field

from torch import nn

from vqdm.config.options import Config, SamplerConfig
from vqdm.models.specs import LayerSpec
from vqdm.runs.texts import duration as duration  # for the files of this folder, beside sizes in words
from vqdm.runs.texts import two_digits
from vqdm.stages.plan.forward import DenoiserCost, ForwardCost
from vqdm.stages.plan.memory import Memory, Model
from vqdm.stages.plan.rates import Machine, Rates
from vqdm.stages.plan.recorded import Rate, Recorded


@dataclass(frozen=True)
class StageCost:
    """What a stage takes. name: its field of `vqdm.stages.graph.Graph`. None: not estimated, and `note` says why.

    origin: how the seconds are known, estimated or recorded. detail: numbers behind the note, for the plan's JSON.
    disk: the most bytes that its directory takes when it is done.
    """

    name: str
    memory: Memory | None
    seconds: float | None
    note: str = ""
    origin: str = ""
    detail: dict = field(default_factory=dict)
    disk: int | None = None


@dataclass(frozen=True)
class Experiment:
    """What the costs of all stages follow from: a configuration, its models' costs, and the machine to plan for."""

    config: Config
    denoiser: nn.Module  # on meta
    student: nn.Module | None  # the quantized denoiser on meta, where something is distilled
    vae: nn.Module | None
    specs: list[LayerSpec]  # of layers that are quantized, and executed
    cost: DenoiserCost
    model: Model
    decoding: ForwardCost  # of one image
    machine: Machine
    recorded: Recorded
    guided: int  # rows of the denoiser's batch for an image
    scored: int  # images
    calibration_prompts: int
    finetune_prompts: int

    def timed(
        self, recorded: Rate | None, count: float, work: list[ForwardCost], *, dtype: str
    ) -> tuple[float | None, str]:
        """Seconds and their origin: what was recorded here, or else an estimate, if the machine's rates are known.

        recorded: of a unit of work, of which there are `count`. dtype: of the products in `work`.
        """
        if recorded is not None:
            return recorded.times(count), recorded.origin
        rates = self.machine.rates(dtype)
        return (None, "") if rates is None else (sum(map(rates.seconds, work)), rates.origin)

    def rates(self) -> Rates | None:
        """Rates for the model's own dtype."""
        return self.machine.rates(self.config.model.dtype)

    def sampling(self, images: int, sampler: SamplerConfig) -> tuple[float | None, str]:
        """Seconds of sampling without decoding, and where they come from."""
        steps = images * sampler.steps
        cost = self.cost.sample.times(self.guided * steps)
        return self.timed(self.recorded.sampling(), steps, [cost], dtype=self.config.model.dtype)

    def forwards(self, samples: float) -> tuple[float | None, str]:
        """Seconds of the denoiser on so many samples, and where they come from."""
        return self.timed(None, 0, [self.cost.sample.times(samples)], dtype=self.config.model.dtype)

    def samples_per_call(self) -> int:
        return self.guided * max(1, min(self.config.calibration.batch_size, self.calibration_prompts))

    def recorded_samples(self) -> int:
        """Number of samples in all recorded calls."""
        steps = min(self.config.calibration.recorded_steps, self.config.model.sampler.steps)
        return self.calibration_prompts * self.guided * steps

    def stage(self, name: str, used: Memory, timed: tuple[float | None, str], note: str = "", **detail) -> StageCost:
        silence = self.machine.silence if timed[0] is None else ""
        return StageCost(name, used, timed[0], "; ".join(filter(None, (note, silence))), timed[1], detail)


def gibibytes(size: float) -> str:
    return f"{two_digits(size / 2**30)} GiB"
