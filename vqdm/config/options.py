"""Schema and documentation of every option, those of the codecs in `codecs.py`. Imports no torch; Hydra fills these
dataclasses from conf/.

What cannot change a result (device, threads, tracker, folders) is left out of every stage's fingerprint: the
stages name the parts they take, in `vqdm/stages/graph/`.
"""

import dataclasses

from vqdm.config.acceleration import ActivationsConfig, CacheConfig, PruneConfig
from vqdm.config.codecs import QuantizeConfig
from vqdm.config.few_step import FewStepConfig
from vqdm.config.parts import PartsConfig
from vqdm.config.ranges import MOST, SEEDS, later, number

TINY_WORLDS = ("tiny", "small")
PROMPT_SOURCES = (*TINY_WORLDS, "builtin", "file")
PROMPT_ORDERS = ("first", "shuffled")
METRIC_FAMILIES = (  # vqdm/metrics/families.py says what each gives and needs
    "tiny", "recovery", "vocabulary", "edits", "concepts", "places", "pictures", "paired", "lpips", "fid_paper",
    "fid_standard", "cmmd", "clip_h14", "clip_l14", "pickscore", "hpsv2",
)  # fmt: skip
PLAN_CARDS = ("a100", "4090", "h100", "h200")  # vqdm/stages/plan/rates.py has their data sheets
PAPER_PATTERN = (
    r"(down|mid|up)_blocks?.*(to_(q|k|v|out.0)|net\.(0\.proj|2)|conv(\d+|_shortcut)?|proj_(in|out))$"  # released code
)
TRANSFORMER_PATTERN = (
    r"^(single_)?transformer_blocks\..*"
    r"(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj|net\.(0\.proj|2)|proj_(mlp|out)|norm(1|1_context)?\.linear)$"
)

CLIP_PATTERN = r"(token_embedding|(q|k|v|out)_proj|fc[12]|text_projection)$"  # positions and norms stay in 16 bit
VAE_PATTERN = r"(conv\d*|conv_(shortcut|in|out)|to_(q|k|v|out\.0))$"


def layer_pattern(denoiser: str, layers: str | None) -> str:
    """A regular expression for the layers to quantize: `layers`, or the default for a model class of that name.

    U-Nets: the paper's layers. Transformers (PixArt, SD3, FLUX): every Linear inside the blocks; embeddings and output
    layers stay in 16 bit. The linears of adaptive norms are quantized too, though they see one token per image: they
    are a third of SD3 and a quarter of FLUX, and in 16 bit would take more than everything else in 4. Their Hessians
    are shrunk (vqdm/calibration/collect.py).
    """
    if layers is not None:
        return layers
    if denoiser.startswith("CLIPText"):
        return CLIP_PATTERN
    if denoiser.startswith("Autoencoder"):
        return VAE_PATTERN
    return PAPER_PATTERN if denoiser.startswith("UNet") else TRANSFORMER_PATTERN


@dataclasses.dataclass
class PromptsConfig:
    """A list of prompts: the first n, or the first n of a seeded shuffle."""

    source: str = "builtin"  # tiny | small | builtin | file
    path: str | None = None  # a .json (COCO, Karpathy), .csv, .tsv, .jsonl or .txt file; giving it sets source=file
    column: str | None = None  # column of a table; None = the first of captions, caption, prompt, text
    # source=tiny, small: train | validation | test | reference | unseen_pairs; Karpathy's file: train (without
    # restval) | val | test | restval; other files have no splits
    split: str = "train"
    n: int | None = number(64, least=1, most=MOST)  # number of prompts; None = all
    order: str = "first"  # the first ones: first | shuffled
    seed: int = number(0, least=0, most=SEEDS)  # seed of the shuffle
    sha256: str | None = None  # required sha256 of the list, of a longer list that begins with it, or of the file

    def __post_init__(self):
        if self.path is not None:
            self.source = "file"


@dataclasses.dataclass
class SamplerConfig:
    """How images are sampled."""

    scheduler: str = "ddim"  # ddim | euler | euler_ancestral | dpm_solver | native (the model's own; flow matching)
    steps: int = number(20, least=1, most=10_000)  # sampling steps
    guidance: float = number(3.0, least=0, most=1000)  # classifier-free guidance scale; 0 = none (turbo models)
    timestep_spacing: str | None = None  # None = the model's own; turbo models use trailing
    size: int | None = number(None, least=8, most=16_384)  # pixels; None = the model's own


@dataclasses.dataclass
class RescaleConfig:
    """Function-preserving per-channel rescalings, which give heavy-tailed channels like those of large models."""

    sigma: float = number(0.0, least=0, most=5)  # standard deviation of log s; 0 = off
    seed: int = number(0, least=0, most=SEEDS)  # seed of the draws of s


@dataclasses.dataclass
class ModelConfig:
    name: str = "tiny"  # the model's name, in labels and records
    builtin: str | None = None  # a model shipped with the package, or with the repository beside it
    world: str = "tiny"  # whose captions and evaluators calibration=tiny and evaluate=tiny take: TINY_WORLDS
    path: str | None = None  # or a local diffusers directory or .safetensors file with the original key names
    configs: str | None = None  # configs for a file, or to plan a hub model: a name or directory; None = found
    # seed of random weights for `configs`, drawn into `path` (sdxl: 7 GB); None: the files that are there
    random_seed: int | None = number(None, least=0, most=SEEDS)
    hub_id: str | None = None  # or a hub id with a pinned revision
    revision: str | None = None  # the commit of hub_id to take; must be given with it
    variant: str | None = None  # variant of the weight files, e.g. fp16
    dtype: str = "float32"  # dtype of the computation
    layers: str | None = None  # regular expression for the layers to quantize; None = by the model (`layer_pattern`)
    min_size: int = number(16, least=1, most=MOST)  # layers with fewer inputs or outputs stay in 16 bit
    rescale: RescaleConfig = dataclasses.field(default_factory=RescaleConfig)
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)


@dataclasses.dataclass
class CalibrationConfig(PromptsConfig):
    """Prompts, and the calls of the full-precision denoiser that are recorded for them."""

    recorded_steps: int = number(4, least=1, most=10_000)  # number of sampling steps whose denoiser calls are kept
    timesteps: str = "uniform"  # uniform: evenly spread steps | normal: each batch draws its own ~ N(0.4 T, 0.4 T)
    batch_size: int = number(16, least=1, most=65_536)  # prompts sampled at once
    noise_seed: int = number(0, least=0, most=SEEDS)  # seed of the noise to sample from


@dataclasses.dataclass
class TrajectoriesConfig(PromptsConfig):
    """Prompts, and the noisy latents on the way to their images, on which the student learns."""

    n: int | None = number(128, least=1, most=MOST)  # number of prompts to train on
    order: str = "shuffled"  # with a seed other than the calibration's, so that a long list gives few of the same
    seed: int = number(1, least=0, most=SEEDS)
    along: str = "teacher"  # sampled by teacher | student; data: noised latents of images
    images: str | None = None  # for along=data, a folder of <prompt id>.png or .jpg; None: the tiny world's own scenes
    # number of further prompts, never trained on and always sampled by the teacher
    validation: int = number(16, least=1, most=MOST)
    # numbers of steps to sample with, each in turn; None: the model's
    sampler_steps: list[int] | None = number(None, least=1, most=10_000)
    recorded_steps: int | None = number(None, least=1, most=10_000)  # evenly spread steps kept of each; None = all
    batch_size: int = number(16, least=1, most=65_536)  # prompts sampled at once
    noise_seed: int = number(0, least=0, most=SEEDS)  # seed of the noise to sample from


@dataclasses.dataclass
class TrainedConfig:
    """The parts of the student that train."""

    codebooks: bool = True  # codebooks, or the trellis table
    scales: bool = True  # scales of quantized layers
    biases: bool = True  # biases of quantized layers
    norms: bool = True  # weights and biases of norms
    rest: bool = True  # layers that are not quantized


@dataclasses.dataclass
class FinetuneConfig:
    """Distillation of the quantized denoiser from its teacher: block after block, then end to end. 0 steps: not so."""

    block_steps: int = number(0, least=0, most=MOST)  # for every block, on what the teacher's gives
    steps: int = number(0, least=0, most=MOST)  # steps end to end, towards the whole denoiser's predictions
    train: TrainedConfig = dataclasses.field(default_factory=TrainedConfig)
    tune_codes: bool = False  # True: codes follow the gradient
    # a weight's step, in units of the learning rate × its row's root mean square
    code_rate: float = number(2.0, least=0, most=1e4, above=True)
    code_every: int = number(10, least=1, most=MOST)  # steps between two searches for nearer codes
    seed: int = number(0, least=0, most=SEEDS)  # seed of the draws of samples
    # learning rate, relative, of block after block; None = 0.03 × the root of the block's error
    block_rate: float | None = number(None, least=0, most=10, above=True)
    block_samples: int = number(512, least=1, most=MOST)  # rows of recorded calls; an eighth of them judges
    block_batch_size: int = number(32, least=1, most=65_536)  # rows per step
    trajectories: TrajectoriesConfig = dataclasses.field(default_factory=TrajectoriesConfig)
    # samples per step over all processes; one is a caption at a timestep, both guidance halves
    batch_size: int = number(32, least=1, most=65_536)
    # samples at once on a device, whose gradients add up; None = all
    micro_batch_size: int | None = number(None, least=1, most=65_536)
    # peak rate; None = 0.01 × the root of the first validation error
    learning_rate: float | None = number(None, least=0, most=10, above=True)
    relative_rate: bool = True  # in units of a scale or a tensor's root mean square; false: absolute (the paper)
    warmup: int = number(10, least=0, most=MOST)  # steps
    # share of the steps after which the rate falls to 0 by half a cosine; 1 = constant
    decay_from: float = number(0.0, least=0, most=1)
    precision: str = "float32"  # precision of the activations: float32 | bfloat16
    checkpointing: bool = False  # True: recompute activations for the backward pass
    # error of the guided prediction (guided), or of both its halves alike (halves); dmd: no error, but the distribution
    # of the few-step student's images is matched to that of its many-step teacher, with few_step's critic and pairs
    loss: str = "guided"
    # for dmd: steps of the critic before the student's first, since it begins as the teacher
    critic_first: int = later(number(0, least=0, most=MOST))
    weighting: str = "uniform"  # weights of timesteps: uniform | min_snr (Hang et al. 2023)
    min_snr: float = number(5.0, least=0, most=1e6, above=True)  # limit of the weights of weighting=min_snr
    # weight of the blocks' relative squared error, for which the teacher has to run along
    feature_weight: float = number(0.0, least=0, most=1e6)
    refresh: int = number(50, least=1, most=MOST)  # for trajectories.along=student: steps between two recordings
    check_every: int = number(50, least=1, most=MOST)  # steps between two validations, each with a checkpoint
    validation_samples: int = number(256, least=1, most=MOST)  # samples that a validation looks at


@dataclasses.dataclass
class EvaluateConfig:
    prompts: PromptsConfig = dataclasses.field(default_factory=PromptsConfig)
    metrics: list[str] = dataclasses.field(default_factory=lambda: ["tiny", "paired"])  # families: METRIC_FAMILIES
    # numbers of prompts after which to score on the way to all of them, so that a bad run is seen early; null = none
    ladder: list[int] | None = number(None, least=1, most=MOST)
    images_per_prompt: int = number(1, least=1, most=65_536)  # images of each prompt, from noise of their own
    evaluators: str | None = None  # of family tiny: a directory or one of TINY_WORLDS; None = those of tiny
    weights: str = "data/metrics"  # folder searched for the other families' files, before the hub's cache
    reference: str | None = None  # statistics of real images (scripts/make_reference_stats.py), or .npz with mu, sigma
    published_reference: str | None = None  # a .npz that stands in for `reference` as soon as it is there
    steps: int | None = number(None, least=1, most=10_000)  # sampling steps; None = model.sampler.steps
    original_steps: int | None = number(None, least=1, most=10_000)  # of the originals; None = as many as the images'
    batch_size: int = number(32, least=1, most=65_536)  # images sampled, and looked at, at once
    seed: int = number(0, least=0, most=SEEDS)  # image i starts from the noise drawn from (seed, prompt i)
    # resamples for the standard errors of FID, KID and CMMD, which are not means over images
    bootstrap: int = number(100, least=2, most=1_000_000)


@dataclasses.dataclass
class ProbesConfig:
    """Pictures of one's own, of which family pictures asks the model."""

    # a JSONL of images, captions and masks (docs/probes.md), whose captions then are evaluate.prompts; null: none
    path: str | None = None


@dataclasses.dataclass
class TrackerConfig:
    kind: str = "wandb"  # wandb | none
    mode: str = "auto"  # auto: online when a key is set, else offline | offline | online
    project: str = "vqdm"  # the project of W&B
    group: str | None = None  # the group of W&B; None = the table's or sweep's name
    artifacts: str = "reference"  # compressed weights: reference: their place on this machine | upload: the files too


@dataclasses.dataclass
class TinyTrainConfig:
    """Train a world from nothing; step counts are those of the shipped weights of tiny."""

    world: str = later("tiny")  # which world: TINY_WORLDS
    seed: int = number(0, least=0, most=SEEDS)  # seed of everything that is drawn
    scenes: int = number(150_000, least=1, most=MOST)  # scenes to train the U-Net on
    batch_size: int = number(128, least=1, most=65_536)  # scenes per step
    vae_steps: int = number(4200, least=1, most=MOST)  # steps of the VAE
    # before them: steps of the VAE on crops about things
    vae_crop_steps: int = later(number(0, least=0, most=MOST))
    vae_batch_size: int = number(32, least=1, most=65_536)  # scenes per step of the VAE
    vae_scenes: int = number(100_000, least=1, most=MOST)  # scenes to train the VAE on
    text_steps: int = number(3000, least=1, most=MOST)  # steps of the text encoders
    # steps in which the text encoders then learn to say all that is said of a thing
    word_steps: int = later(number(0, least=0, most=MOST))
    text_scenes: int = number(100_000, least=1, most=MOST)  # scenes to train the text encoders on
    unet_steps: int = number(12_000, least=1, most=MOST)  # steps of the U-Net
    turbo_steps: int = number(2500, least=1, most=MOST)  # steps of the few-step student
    turbo_guidance: float = number(3.0, least=0, most=1000)  # guidance that the few-step student learns in
    attribute_steps: int = number(2500, least=1, most=MOST)  # steps of the attribute network, an evaluator
    clip_steps: int = number(1500, least=1, most=MOST)  # steps of the CLIP model, an evaluator
    # scenes to train the evaluators on, plus a quarter as many with unseen pairs
    evaluator_scenes: int = number(80_000, least=1, most=MOST)
    reference_scenes: int = number(4096, least=1, most=MOST)  # scenes that FID, KID and CMMD compare with
    # scenes per step of the U-Net; None = batch_size
    unet_batch_size: int | None = later(number(None, least=1, most=65_536))
    # steps of the U-Net between two looks at its images
    growth_every: int | None = later(number(None, least=1, most=MOST))
    growth_captions: int = later(number(128, least=1, most=MOST))  # captions of such a look
    init_from: str | None = None  # diffusers directory with a U-Net to train on from
    # directory with finished parts, a folder each or in the world's pipeline, which are taken as they are (with
    # init_from, its evaluators alone); unet_begun there is trained on
    parts: str | None = None


@dataclasses.dataclass
class Config:
    name: str = "custom"  # the experiment's name, which names the run record
    task: str = "experiment"  # experiment (quantize, distil, generate, evaluate) | compress (write it) | tiny_train
    table: str | None = None  # a file of experiments/, whose rows to run and whose table to write
    row: str | None = None  # run only the table's row of this name; the others are shown if they were run before
    mixed: bool = False  # True: columns may mix runs of different protocols, dtypes or devices; footnotes say which
    seeds: int | None = number(None, least=1, most=MOST)  # at most so many of a row; None = as the table says
    method: str | None = None  # this row's name in tables
    plan: bool = False  # True: only say what is done and what would run
    plan_for: str | None = None  # plan=true: for a GPU that need not be here: PLAN_CARDS; None = this machine
    device: str = "auto"  # auto | cpu | cuda | the type of another accelerator that torch sees
    threads: int | None = number(None, least=1, most=1024)  # torch's threads on the CPU; None = the free cores
    # GiB of Hessians that quantize.hessian_from=student sums in one pass of sampling, of calls that wait between layers
    # for hessian_from=both; less: more passes, same result
    memory_budget_gb: float = number(4.0, least=0, most=100_000, above=True)
    results_dir: str = "results"  # the folder for all that runs make
    show_layers: bool = False  # True: print a line for every layer quantized
    verbose: bool = False  # True, or -v: say everything, also each stage's own lines and a table's whole protocol
    output: str | None = None  # for task=compress, the directory to write; None = below results_dir
    picture: bool = True  # for task=compress: the pipeline's card shows an image that it made, in at most 20 steps
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    few_step: FewStepConfig = dataclasses.field(default_factory=FewStepConfig)
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    quantize: QuantizeConfig = dataclasses.field(default_factory=QuantizeConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    prune: PruneConfig = dataclasses.field(default_factory=PruneConfig)
    parts: PartsConfig = dataclasses.field(default_factory=PartsConfig)
    activations: ActivationsConfig = dataclasses.field(default_factory=ActivationsConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    probes: ProbesConfig = dataclasses.field(default_factory=ProbesConfig)
    tracker: TrackerConfig = dataclasses.field(default_factory=TrackerConfig)
    tiny_train: TinyTrainConfig = dataclasses.field(default_factory=TinyTrainConfig)

    def __post_init__(self):
        if self.probes.path is not None:
            self.evaluate.prompts = PromptsConfig(path=self.probes.path, column="caption", n=None)
