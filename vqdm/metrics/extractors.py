"""The extractor of a family: it looks at batches of images and gives columns with one row per image."""

from pathlib import Path


def make_extractor(family: str, weights: list[Path], *, device: str):
    """Make an object with `columns(images, captions)` or, for families of pairs, `columns(images, originals)`.

    weights: the paths of the family's files, in its order; for families of the tiny world, its evaluators' directory.
    """
    if family == "tiny":
        from vqdm.tiny.evaluator import TinyWorld

        return TinyWorld(*weights)
    if family in ("paired", "lpips"):
        from vqdm.metrics.paired import Lpips, Pairs

        return Lpips(*weights, device=device) if family == "lpips" else Pairs(device=device)
    if family in ("fid_paper", "fid_standard"):
        from vqdm.metrics.inception import Inception

        return Inception(*weights, resize="paper" if family == "fid_paper" else "none", device=device)
    if family == "pickscore":
        from vqdm.metrics.clip import PickScore

        return PickScore(*weights, device=device)
    from vqdm.metrics.clip import OpenClip

    return OpenClip(OPEN_CLIP[family], *weights, device=device)


def make_asking(family: str, pipeline, world, weights: list[Path], *, guidance: float):
    """Make an object with `columns(prompts)`, each an id and its caption, that asks a pipeline of a tiny world.

    weights: as in `make_extractor`; for pictures, their file. guidance: that of the sampler of the images.
    """
    if family == "edits":
        from vqdm.metrics.probes.edits import Edits

        return Edits(pipeline, world, *weights, guidance=guidance)
    if family == "concepts":
        from vqdm.metrics.probes.concepts import Concepts

        return Concepts(pipeline, world, *weights, guidance=guidance)
    if family == "places":
        from vqdm.metrics.probes.places import Places

        return Places(pipeline, world, *weights, guidance=guidance)
    if family == "pictures":
        from vqdm.metrics.probes.pictures import Pictures

        return Pictures(pipeline, *weights, guidance=guidance)
    if family == "vocabulary":
        from vqdm.metrics.probes.vocabulary import Vocabulary

        return Vocabulary(pipeline, world)
    from vqdm.metrics.probes.recovery import Recovery

    return Recovery(pipeline, world)


OPEN_CLIP = {  # OpenAI's models were trained with the quick GELU
    "cmmd": "ViT-L-14-336-quickgelu",
    "clip_h14": "ViT-H-14",
    "clip_l14": "ViT-L-14-quickgelu",
    "hpsv2": "ViT-H-14",
}
