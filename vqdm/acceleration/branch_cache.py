"""A cache of a U-Net's deep branch: most calls run its shallowest layers only, on features of earlier calls.

In a cached call everything but conv_in, the last `depth` residual units of the last up block and what these read by
their skips is passed over; the feature that comes in from below is predicted from the last full calls (DeepCache, arXiv
2312.00858, reuses the last one; a straight line through the last two is TaylorSeer's first order, arXiv 2503.06923).
Diffusers' hooks carry it, so that layers, codecs and adapters know nothing of it.
"""

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from vqdm.acceleration.stored_cache import Schedule, StoredCache, predicted
from vqdm.errors import UserError

ROOT, PART = "vqdm_cache", "vqdm_cache_part"  # names of the hooks
OWN_CACHE = ("FluxTransformer2DModel",)  # whose pipelines work with diffusers' own caches
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class BranchCache:
    """State of the sampling that goes on: which call this is, and the features of the last full calls."""

    def __init__(self, stored: StoredCache):
        self.stored = stored
        self.reset()

    @property
    def schedule(self) -> Schedule:
        return self.stored.schedule

    def reset(self) -> None:
        self.call, self.full, self.shape = -1, True, None
        self.features: list[tuple[int, Tensor]] = []

    def begin(self, timestep: float, shape: torch.Size) -> None:
        """Note the next call. The schedule's first timestep begins a new sampling, whatever was before.

        UserError for a call that the schedule does not have there: another sampler, or another number of steps.
        """
        known = self.schedule.timesteps
        if timestep == known[0]:
            self.reset()
            self.shape = shape
        self.call += 1
        if self.call >= len(known) or timestep != known[self.call] or shape != self.shape:
            expected = f"{known[self.call]:g}" if self.call < len(known) else "none"
            found = f"timestep {timestep:g} where {expected} was expected"
            self.reset()
            raise UserError(
                f"the cache is for {len(known)} calls of {self.schedule.scheduler} from timestep {known[0]:g}, and "
                f"call comes with {found}: sample with these steps, or call vqdm.disable_cache(pipeline)"
            )
        self.full = self.call in self.schedule.full

    def keep(self, feature: Tensor) -> None:
        self.features = [*self.features, (self.call, feature.detach())][-2:]

    def feature(self) -> Tensor:
        """The feature for the cached call that goes on."""
        kept = self.features[-len(self.schedule.sources(self.call)) :]
        return self.stored.corrected(predicted(kept, self.call), self.call)


class _Root(ModelHook):
    """Counts the U-Net's calls."""

    _is_stateful = True

    def __init__(self, cache: BranchCache):
        super().__init__()
        self.cache = cache

    def pre_forward(self, module, *args, **kwargs):
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        if (name := next((name for name in RESIDUALS if given.get(name) is not None), None)) is not None:
            raise UserError(
                f"the cache cannot run with {name} (ControlNet, T2I adapters): vqdm.disable_cache(pipeline)"
            )
        if torch.is_grad_enabled():
            raise UserError("the cache is for sampling: call the denoiser under torch.no_grad(), or disable the cache")
        self.cache.begin(float(torch.as_tensor(given["timestep"]).flatten()[0]), given["sample"].shape)
        return args, kwargs

    def reset_state(self, module):
        self.cache.reset()
        return module


class _Part(ModelHook):
    """Passes a block or unit over in cached calls.

    gives: what stands in for its output, "inputs" or "feature". Blocks that give skips as well stand in for as many as
    in the last full call: with a wrong number the U-Net would take others' in silence.
    """

    def __init__(self, cache: BranchCache, *, gives: str = "inputs"):
        super().__init__()
        self.cache, self.gives, self.skips, self.in_tuple = cache, gives, None, False

    def new_forward(self, module, *args, **kwargs):
        if self.cache.full:
            output = self.fn_ref.original_forward(*args, **kwargs)
            self.in_tuple = isinstance(output, tuple)
            self.skips = len(output[1]) if self.in_tuple and len(output) == 2 else None
            return output
        first = args[0] if args else next(kwargs[name] for name in ("hidden_states", "input_tensor") if name in kwargs)
        stand_in = self.cache.feature() if self.gives == "feature" else first
        if self.skips is not None:
            return stand_in, (stand_in,) * self.skips
        return (stand_in,) if self.in_tuple else stand_in


class _Source(_Part):
    """The part whose output is the feature: keeps it in full calls, stands in for it in cached ones."""

    def __init__(self, cache: BranchCache):
        super().__init__(cache, gives="feature")

    def new_forward(self, module, *args, **kwargs):
        output = super().new_forward(module, *args, **kwargs)
        if self.cache.full:
            self.cache.keep(output[0] if self.in_tuple else output)
        return output


def _units(block: nn.Module) -> list[list[nn.Module]]:
    """A block's residual units, each with the transformer that follows it."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    pairs = zip(block.resnets, attentions, strict=True)
    return [[module for module in pair if module is not None] for pair in pairs]


def source_of(unet: nn.Module, depth: int) -> nn.Module:
    """The module whose output a cache of this depth keeps. UserError for what has no such branch."""
    kind = type(unet).__name__
    if kind in OWN_CACHE:
        raise UserError(f"{kind} has diffusers' own caches: pipeline.transformer.enable_cache(FirstBlockCacheConfig())")
    if kind != "UNet2DConditionModel":
        raise UserError(f"cache=branch is for U-Nets (UNet2DConditionModel), and {kind} is none: leave cache=none")
    last, others = unet.up_blocks[-1], unet.up_blocks[:-1]
    most = len(last.resnets) if len(others) else len(last.resnets) - 1
    if depth > most:
        raise UserError(f"cache.depth={depth} of at most {most}: the last up block of this U-Net has no more units")
    return others[-1] if depth == len(last.resnets) else _units(last)[-depth - 1][-1]


def _passed_over(unet: nn.Module, depth: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules that cached calls pass over: those that give their inputs, those that give the feature."""
    first, *others = unet.down_blocks
    inputs = [*others, *unet.up_blocks[:-1], *([] if unet.mid_block is None else [unet.mid_block])]
    if depth == 1:
        inputs.append(first)
    else:  # its first units make the skips that the units of the last up block read
        inputs += [module for unit in _units(first)[depth - 1 :] for module in unit]
        inputs += list(first.downsamplers or [])
    feature = [module for unit in _units(unet.up_blocks[-1])[:-depth] for module in unit]
    source = source_of(unet, depth)
    return [m for m in inputs if m is not source], [m for m in feature if m is not source]


def add_cache(unet: nn.Module, stored: StoredCache) -> BranchCache:
    """Hook a cache into a U-Net, in the place of the one that is there; returns its state."""
    remove_cache(unet)
    source = source_of(unet, stored.schedule.depth)
    cache = BranchCache(stored)
    inputs, feature = _passed_over(unet, stored.schedule.depth)
    hooks = [(module, _Part(cache)) for module in inputs]
    hooks += [(module, _Part(cache, gives="feature")) for module in feature] + [(source, _Source(cache))]
    for module, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, PART)
    HookRegistry.check_if_exists_or_initialize(unet).register_hook(_Root(cache), ROOT)
    return cache


def remove_cache(unet: nn.Module) -> None:
    """Take the hooks out again; nothing happens where there are none."""
    for module in unet.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in (ROOT, PART):
            if registry is not None and registry.get_hook(name) is not None:
                registry.remove_hook(name, recurse=False)
                if not registry.hooks:  # diffusers leaves the class's own method behind as an attribute
                    module.__dict__.pop("forward", None)


def cache_of(unet: nn.Module) -> BranchCache | None:
    """The cache that is hooked in; None without one."""
    hook = None if (registry := getattr(unet, "_diffusers_hook", None)) is None else registry.get_hook(ROOT)
    return None if hook is None else hook.cache
