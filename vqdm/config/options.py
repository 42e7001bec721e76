"""Schema and documentation of every option, those of the codecs in `codecs.py`. Imports no torch; Hydra fills these
dataclasses from conf/.

What cannot change a result (device, threads, tracker, folders) is left out of every stage's fingerprint: the
stages name the parts they take, in `vqdm/stages/graph.py`.
"""

import dataclasses

from vqdm.config.codecs import QuantizeConfig
from vqdm.config.ranges import MOST, SEEDS, number

PROMPT_SOURCES = ("tiny", "builtin", "file")
PROMPT_ORDERS = ("first", "shuffled")
METRIC_FAMILIES = (  # vqdm/metrics/families.py says what each yields and needs
    "tiny", "paired", "lpips", "fid_paper", "fid_standard", "cmmd", "clip_h14", "clip_l14", "pickscore", "hpsv2",
)  # fmt: skip
PLAN_CARDS = ("a100", "4090", "h100", "h200")  # vqdm/stages/plan/rates.py has their data sheets
PAPER_PATTERN = (
    r"(down|mid|up)_blocks?.*(to_(q|k|v|out.0)|net\.(0\.proj|2)|conv(\d+|_shortcut)?|proj_(in|out))$"  # released code
)
TRANSFORMER_PATTERN = (
    r"^(single_)?transformer_blocks\..*"
    r"(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj|net\.(0\.proj|2)|proj_(mlp|out)|norm(1|1_context)?\.linear)$"
)


def layer_pattern(denoiser: str, layers: str | None) -> str:
    """The layers to quantize as a regular expression: `layers`, or what goes with a denoiser of that class name.

    U-Nets: the paper's. Transformers (PixArt, SD3, FLUX): every Linear inside the blocks; embeddings and the way out
    stay in 16 bit. The linears of adaptive norms are among them, though they see one token per image: they are a third
    of SD3 and a quarter of FLUX, and at 16 bit would alone take more than all else does at 4. Their Hessians are shrunk
    (vqdm/calibration/collect.py).
    """
    if layers is not None:
        return layers
    return PAPER_PATTERN if denoiser.startswith("UNet") else TRANSFORMER_PATTERN


@dataclasses.dataclass
class PromptsConfig:
    """A list of prompts: the first n, or the first n of a seeded shuffle."""

    source: str = "builtin"  # tiny | builtin | file
    path: str | None = None  # .json (COCO, Karpathy), .csv, .tsv, .jsonl or .txt; a path makes the source a file
    column: str | None = None  # of a table; None = the first of captions, caption, prompt, text
    split: str = "train"  # source=tiny: train | validation | test | reference | unseen_pairs; of Karpathy's file:
    # train (without restval) | val | test | restval; other files have no splits
    n: int | None = number(64, least=1, most=MOST)
    order: str = "first"  # first | shuffled
    seed: int = number(0, least=0, most=SEEDS)  # of the shuffle
    sha256: str | None = None  # of the list that these must be, or be the beginning of; or of the file

    def __post_init__(self):
        if self.path is not None:
            self.source = "file"


@dataclasses.dataclass
class SamplerConfig:
    scheduler: str = "ddim"  # ddim | euler | euler_ancestral | dpm_solver | native: the model's own (flow matching)
    steps: int = number(20, least=1, most=10_000)
    guidance: float = number(3.0, least=0, most=1000)  # classifier-free guidance scale; 0 = none (turbo models)
    timestep_spacing: str | None = None  # None = the model's own; trailing for turbo models
    size: int | None = number(None, least=8, most=16_384)  # pixels; None = the model's own


@dataclasses.dataclass
class RescaleConfig:
    """Function-preserving per-channel rescalings: heavy-tailed channels, as large models have them."""

    sigma: float = number(0.0, least=0, most=5)  # of log s; 0 = off
    seed: int = number(0, least=0, most=SEEDS)


@dataclasses.dataclass
class ModelConfig:
    name: str = "tiny"
    builtin: str | None = None  # a model shipped with the package
    path: str | None = None  # or a local diffusers directory, or a .safetensors file with the original key names
    configs: str | None = None  # of such a file, or to plan a hub model by: shipped ones or a directory; None = found
    hub_id: str | None = None  # or a hub id with a pinned revision
    revision: str | None = None
    variant: str | None = None  # file variant, e.g. fp16
    dtype: str = "float32"  # of the computation
    layers: str | None = None  # regular expression of the layers to quantize; None = by the model: `layer_pattern`
    min_size: int = number(16, least=1, most=MOST)  # layers with fewer inputs or outputs stay in 16 bit
    rescale: RescaleConfig = dataclasses.field(default_factory=RescaleConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)


@dataclasses.dataclass
class CalibrationConfig(PromptsConfig):
    """Prompts, and calls of the full-precision denoiser recorded on them."""

    recorded_steps: int = number(4, least=1, most=10_000)  # sampling steps whose denoiser calls are kept
    timesteps: str = "uniform"  # uniform: evenly spread steps | normal: each batch draws its own ~ N(0.4 T, 0.4 T)
    batch_size: int = number(16, least=1, most=65_536)
    noise_seed: int = number(0, least=0, most=SEEDS)


@dataclasses.dataclass
class TrajectoriesConfig(PromptsConfig):
    """Prompts, and the noisy latents on the way to their images, which the student learns on."""

    n: int | None = number(128, least=1, most=MOST)
    order: str = "shuffled"  # by another seed than the calibration's: few are the same, if the list is long
    seed: int = number(1, least=0, most=SEEDS)
    along: str = "teacher"  # whose sampling: teacher | student; data: latents of images, noised
    images: str | None = None  # along=data: folder of <prompt id>.png or .jpg; None: the tiny world's own scenes
    # as many prompts more, never trained on: always the teacher's sampling
    validation: int = number(16, least=1, most=MOST)
    # sampled with each of these numbers of steps; None: the model's
    sampler_steps: list[int] | None = number(None, least=1, most=10_000)
    recorded_steps: int | None = number(None, least=1, most=10_000)  # of each, evenly spread; None = all
    batch_size: int = number(16, least=1, most=65_536)  # prompts sampled at once
    noise_seed: int = number(0, least=0, most=SEEDS)


@dataclasses.dataclass
class TrainedConfig:
    """What of the student trains."""

    codebooks: bool = True  # or the trellis table
    scales: bool = True
    biases: bool = True
    norms: bool = True
    rest: bool = True  # layers that are not quantized


@dataclasses.dataclass
class FinetuneConfig:
    """Distillation of the quantized denoiser from its teacher: block after block, then end to end. 0 steps: not so."""

    block_steps: int = number(0, least=0, most=MOST)  # for every block, on what the teacher's gives
    steps: int = number(0, least=0, most=MOST)  # end to end, on the predictions of the whole denoiser
    train: TrainedConfig = dataclasses.field(default_factory=TrainedConfig)
    tune_codes: bool = False  # codes follow where the gradient draws their weights
    # of a weight's step, in parts of the learning rate × its row's root mean square
    code_rate: float = number(2.0, least=0, most=1e4, above=True)
    code_every: int = number(10, least=1, most=MOST)  # steps between two searches for nearer codes
    seed: int = number(0, least=0, most=SEEDS)
    # block after block, on the calibration's recorded calls
    # in parts of a number's size; None = 0.03 × the root of the block's error
    block_rate: float | None = number(None, least=0, most=10, above=True)
    block_samples: int = number(512, least=1, most=MOST)  # rows of recorded calls; an eighth of them judges
    block_batch_size: int = number(32, least=1, most=65_536)
    # end to end
    trajectories: TrajectoriesConfig = dataclasses.field(default_factory=TrajectoriesConfig)
    # samples in a step, over all processes: one caption at one timestep, both guidance halves
    batch_size: int = number(32, least=1, most=65_536)
    # of them at once on a device; gradients add up; None = all
    micro_batch_size: int | None = number(None, least=1, most=65_536)
    # None = 0.01 × the root of the validation's error to begin with
    learning_rate: float | None = number(None, least=0, most=10, above=True)
    relative_rate: bool = True  # in parts of a scale, or of a tensor's root mean square; false: absolute (the paper)
    warmup: int = number(10, least=0, most=MOST)  # steps
    # of the steps, from where the rate falls to 0 by half a cosine; 1 = constant
    decay_from: float = number(0.0, least=0, most=1)
    precision: str = "float32"  # of the activations: float32 | bfloat16
    checkpointing: bool = False  # activations are computed again for the backward pass
    loss: str = "guided"  # of the prediction that guided sampling goes by: guided | of both its halves alike: halves
    weighting: str = "uniform"  # of timesteps: uniform | min_snr (Hang et al. 2023)
    min_snr: float = number(5.0, least=0, most=1e6, above=True)
    # of the relative squared error of the blocks' outputs; the teacher then runs along
    feature_weight: float = number(0.0, least=0, most=1e6)
    refresh: int = number(50, least=1, most=MOST)  # trajectories.along=student: steps between two recordings
    check_every: int = number(50, least=1, most=MOST)  # steps between two validations, each with a checkpoint
    validation_samples: int = number(256, least=1, most=MOST)


@dataclasses.dataclass
class EvaluateConfig:
    prompts: PromptsConfig = dataclasses.field(default_factory=PromptsConfig)
    metrics: list[str] = dataclasses.field(default_factory=lambda: ["tiny", "paired"])  # families: METRIC_FAMILIES
    images_per_prompt: int = number(1, least=1, most=65_536)
    evaluators: str | None = None  # of family tiny: a directory; None = those shipped with the package
    weights: str = "data/metrics"  # where the files of the other families are looked for, before the hub's cache
    reference: str | None = None  # real images' statistics: of scripts/make_reference_stats.py, or .npz with mu, sigma
    steps: int | None = number(None, least=1, most=10_000)  # of sampling; None = model.sampler.steps
    batch_size: int = number(32, least=1, most=65_536)  # images sampled at once, and looked at at once
    seed: int = number(0, least=0, most=SEEDS)  # image i starts from the noise of (seed, prompt i)
    # resamples behind the standard errors of what is no mean over images (FID, KID, CMMD)
    bootstrap: int = number(100, least=2, most=1_000_000)


@dataclasses.dataclass
class TrackerConfig:
    kind: str = "wandb"  # wandb | none
    mode: str = "auto"  # auto: online when a key is set, else offline | offline | online
    project: str = "vqdm"
    group: str | None = None


@dataclasses.dataclass
class TinyTrainConfig:
    """Retrain the tiny world from nothing; step counts are those of the shipped weights."""

    seed: int = number(0, least=0, most=SEEDS)
    scenes: int = number(150_000, least=1, most=MOST)
    batch_size: int = number(128, least=1, most=65_536)
    vae_steps: int = number(4200, least=1, most=MOST)
    vae_batch_size: int = number(32, least=1, most=65_536)
    vae_scenes: int = number(100_000, least=1, most=MOST)
    text_steps: int = number(3000, least=1, most=MOST)
    text_scenes: int = number(100_000, least=1, most=MOST)
    unet_steps: int = number(12_000, least=1, most=MOST)
    turbo_steps: int = number(2500, least=1, most=MOST)
    turbo_guidance: float = number(3.0, least=0, most=1000)
    attribute_steps: int = number(2500, least=1, most=MOST)
    clip_steps: int = number(1500, least=1, most=MOST)
    evaluator_scenes: int = number(80_000, least=1, most=MOST)  # and a quarter as many with unseen pairs
    reference_scenes: int = number(4096, least=1, most=MOST)
    init_from: str | None = None  # a diffusers directory whose U-Net to go on from


@dataclasses.dataclass
class Config:
    name: str = "custom"  # of the experiment; names the run record
    task: str = "experiment"  # experiment: quantize, distil, generate, evaluate | compress: write it | tiny_train
    table: str | None = None  # a file of experiments/: run its rows and write its table
    row: str | None = None  # of a table: run only this one, by its name; the others are shown as far as they were run
    mixed: bool = False  # a table's columns may mix runs of different protocols, dtypes or devices; footnotes say which
    seeds: int | None = number(None, least=1, most=MOST)  # of a table's rows at most; None = as many as the table says
    method: str | None = None  # how tables call this row
    plan: bool = False  # only say what is done and what would run
    plan_for: str | None = None  # plan=true: for a GPU that need not be here: PLAN_CARDS; None = this machine
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = number(None, least=1, most=1024)  # of torch on the CPU; None = all cores
    results_dir: str = "results"
    show_layers: bool = False  # a line for every layer that is quantized
    output: str | None = None  # task=compress: the directory to write; None = below results_dir
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    quantize: QuantizeConfig = dataclasses.field(default_factory=QuantizeConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    tiny_train: TinyTrainConfig = dataclasses.field(default_factory=TinyTrainConfig)
