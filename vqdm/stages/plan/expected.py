"""The stages that runs still need and what those like them took here, for the time that is left while they run."""

from collections.abc import Iterable

from vqdm.config.options import Config
from vqdm.runs.store import Store
from vqdm.stages.graph.denoiser import Quantization
from vqdm.stages.graph.experiment import Graph, image_list
from vqdm.stages.plan.command import images_made
from vqdm.stages.plan.recorded import Recorded


def missing_stages(
    runs: Iterable[tuple[Config, Graph | Quantization]], store: Store, *, device: str
) -> tuple[dict[str, str], dict[str, float]]:
    """Kinds of the stages that are not done, by fingerprint, and the seconds of those that records tell of.

    Images are told of by what sampling took in other stages, as their own keep no time.
    """
    kinds: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for config, graph in runs:
        recorded = Recorded(store, config, device)
        for stage in graph.stages():
            if stage.fingerprint in kinds or store.status(stage) == "done":
                continue
            found = recorded.like(stage)
            if stage.name == "generate":
                count = len(image_list(config, graph.prompts))
                left = count - images_made(store.directory(stage), count, batch_size=config.evaluate.batch_size)
                if left == 0:
                    continue
                rate = recorded.sampling()
                found = None if rate is None else rate.times(left * stage.config["sampler"]["steps"])
            kinds[stage.fingerprint] = stage.name
            if found is not None:
                seconds[stage.fingerprint] = found
    return kinds, seconds
