"""Families of metrics, each computed from one look at the images; their results and needs. Imports no torch.

A family's name stands in `evaluate.metrics`; its metrics are the columns of tables.
"""

import importlib.metadata
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Weights:
    """A file, or directory with a `marker` file, that a metric needs: in evaluate.weights, or from its publisher."""

    name: str  # the file's or directory's name in evaluate.weights
    hub: str | None = None  # owner/name, or owner/name:file
    url: str | None = None
    sha256: str = ""  # its first digits, if published; "" = any file is taken, and its hash goes into the protocol
    marker: str | None = None  # the file that marks a directory as whole
    megabytes: int = 0  # to download, about: the network's parameters × 4 bytes, those of HPS × 2


@dataclass(frozen=True)
class Family:
    version: int  # raise it when what is extracted may change
    metrics: tuple[str, ...]
    protocol: dict[str, str] = field(default_factory=dict)  # what all its metrics have in common, in words
    library: str = "vqdm"  # the package whose version goes into the protocol
    computed_in: str = "float32"  # dtype of what is extracted
    weights: tuple[Weights, ...] = ()
    pairs: bool = False  # looks at each image beside the full-precision one
    of_model: bool = False  # asks the model that made the images, not the images
    of_file: bool = False  # asks it about the pictures of probes.path, whose captions are any
    evaluators: bool = False  # looks through the tiny world's own networks (evaluate.evaluators)
    against_reference: tuple[str, ...] = ()  # metrics that need evaluate.reference
    against_originals: tuple[str, ...] = ()  # metrics that need the full-precision images

    def installed(self) -> str:
        """The library and its version, as installed here."""
        return self.library if self.library == "vqdm" else f"{self.library} {importlib.metadata.version(self.library)}"

    def details(self, metric: str) -> dict[str, str]:
        """Protocol of one metric, beyond what the family has in common."""
        return {"is": DETAILS[metric]} if metric in DETAILS else {}


_RENDERS = "against 4,096 renders"
DETAILS = {
    "fid": "Fréchet distance on the attribute network's features, each in units of its spread over the renders (at "
    f"least a tenth of the median one), {_RENDERS}; no Inception FID",
    "fid_to_fp": "Fréchet distance on the same features to the full-precision images of the same captions and noise",
    "kid": f"unbiased MMD², cubic kernel, on the same features, {_RENDERS}, all rows",
    "cmmd": f"1000 × MMD², Gaussian kernel of width 10, on the tiny open_clip model's unit vectors, {_RENDERS}",
    "clip_score": "raw cosine of the tiny open_clip model",
    "fidelity": "share of the caption's attributes that the attribute network finds",
    "all_right": "share of images in which it finds all of them",
    "distance_to_fp": "Euclidean distance of the standardised features to those of the full-precision image",
    "agreement_with_fp": "share of equal attributes with the full-precision image",
    "psnr_to_fp": "dB, mean over images, peak 1, squared error at least that of rounding to 8 bits (58.9 dB)",
    "ssim_to_fp": "Gaussian window of 11 pixels, σ 1.5, over all pixels: images are mirrored at their edges",
    "recovery_gap_colour": "least error of the predicted noise with another colour word, minus that with the right one",
    "recovery_gap_shape": "least error of the predicted noise with another shape word, minus that with the right one",
    "recovery_colour": "share of images whose right colour word has the least error",
    "recovery_shape": "share of images whose right shape word has the least error",
    "recovery_error": "mean squared error of the predicted noise with the right caption",
    "vocabulary_recovered": "share of a picture's attributes in the caption that a search by predicted noise ends at",
    "vocabulary_exact": "share of pictures of which it has all attributes",
    "vocabulary_reached": "share in which its error is no larger than that of the caption with the true attributes",
    "edit_success": "share of inversion's edits (strength .8) in which the attribute network sees the new colour",
    "edit_exact": "share in which it sees the new colour and everything else as it was",
    "edit_psnr_in": "dB to the rendered truth over the pixels that change",
    "edit_psnr_out": "dB to the rendered truth over the latent cells in which no pixel changes",
    "region_success": "share of edits inside a mask (strength .7) in which the attribute network sees the new colour",
    "region_exact": "share in which it sees the new colour and everything else as it was",
    "region_psnr_in": "dB to the rendered truth over the pixels that change",
    "region_psnr_out": "dB to the rendered truth over the latent cells in which no pixel changes",
    "reconstruction_psnr": "dB of a picture after DDIM up and down without guidance, to the decoded latent it began as",
    "concept_hit": "share of captions with a red thing whose shape the edited model shows in blue",
    "concept_said": "share of them in which the unedited model shows it in blue when asked for blue: the ceiling",
    "concept_right": "share of them in which everything is as the caption with blue says",
    "concept_rest": "share of captions without red in which the edited model gets everything right",
    "concept_rest_psnr": "dB between the images of captions without red before and after the edit",
    "place_said": "share of captions whose thing the model shows in the colour that is said",
    "place_none": "share that shows it when another colour is said: the floor",
    **{
        f"place_{group}": f"share that shows it when another colour is said, but not to {layers}"
        for group, layers in (
            ("keys", "the keys and values of cross-attention"),
            ("keys_down", "those of the down blocks"),
            ("keys_mid", "those of the mid block"),
            ("keys_up", "those of the up blocks"),
            ("pooled", "the layer of the pooled text"),
            ("self", "self-attention"),
            ("feed", "the feed-forward layers"),
            ("blocks", "the residual blocks"),
            ("words", "the text encoders' token embeddings"),
            ("text_first", "the text encoders' first self-attention"),
            ("text_attention", "any self-attention of theirs"),
            ("text_mlp", "their MLPs"),
        )
    },
    "picture_gap": "error of the predicted noise with the edited caption minus that with the picture's own",
    "picture_error": "mean squared error of the predicted noise with the picture's own caption",
    "picture_reconstruction_psnr": "dB after DDIM up and down without guidance, to the decoded latent it began as",
    "picture_edit_psnr_in": "dB to the given truth inside the mask, of inversion's edits (strength .8)",
    "picture_edit_psnr_out": "dB to the picture, or the given truth, outside the mask's latent cells",
    "picture_region_psnr_in": "dB to the given truth inside the mask, of edits inside it (strength .7)",
    "picture_region_psnr_out": "dB to the picture, or the given truth, outside the mask's latent cells",
    "fid_paper_to_fp": "to the full-precision images of the same captions and noise",
    "kid_standard": "unbiased MMD², cubic kernel, mean over 100 subsets of at most 1,000",
    "inception_score": "mean over 10 parts",
    "cmmd_l14_336": "1000 × MMD², Gaussian kernel of width 10",
    "clip_h14_similarity_to_fp": "raw cosine of the image to the full-precision one",
}

INCEPTION = Weights(
    "weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    megabytes=96,
)
CLIP_H14 = Weights(
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    hub="laion/CLIP-ViT-H-14-laion2B-s32B-b79K:open_clip_model.safetensors",
    megabytes=3944,
)
CLIP_L14 = Weights(
    "ViT-L-14-openai.safetensors",
    hub="timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors",
    megabytes=1711,
)
CLIP_L14_336 = Weights(
    "ViT-L-14-336-openai.safetensors",
    hub="timm/vit_large_patch14_clip_336.openai:open_clip_model.safetensors",
    megabytes=1712,
)
PICKSCORE = Weights("PickScore_v1", hub="yuvalkirstain/PickScore_v1", marker="model.safetensors", megabytes=3944)
HPSV2 = Weights("HPS_v2.1_compressed.pt", hub="xswu/HPSv2:HPS_v2.1_compressed.pt", megabytes=1972)
ALEXNET = Weights(
    "alexnet-owt-7be5be79.pth",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256="7be5be79",
    megabytes=244,
)

EDIT_SCORES = ("success", "exact", "psnr_in", "psnr_out")
_TINY_TO_FP = ("distance_to_fp", "agreement_with_fp", "fid_to_fp")
_POOL = "Inception-v3 of 2015-12-05, pool features, 2048, bilinear to 299 as TensorFlow 1 does it"
FAMILIES = {
    "tiny": Family(
        2,
        ("fid", "kid", "cmmd", "clip_score", "fidelity", "all_right", *_TINY_TO_FP),
        {"features": "the tiny world's own evaluators: compares with nothing else"},
        library="open_clip_torch",
        evaluators=True, against_originals=_TINY_TO_FP,
    ),
    "recovery": Family(
        1, ("recovery_gap_colour", "recovery_gap_shape", "recovery_colour", "recovery_shape", "recovery_error"),
        {"images": "renders of the captions' own scenes, noised at timesteps 201 and 401; no guidance"},
        of_model=True,
    ),
    "vocabulary": Family(
        1, ("vocabulary_recovered", "vocabulary_exact", "vocabulary_reached"),
        {"images": "renders as in recovery; all captions of the world in fixed words: greedily, then by coordinates"},
        of_model=True,
    ),
    "edits": Family(
        1, (*(f"{by}_{score}" for by in ("edit", "region") for score in EDIT_SCORES), "reconstruction_psnr"),
        {"images": "renders of the captions' own scenes; 20 DDIM steps, up without guidance, down with the sampler's"},
        of_model=True, evaluators=True,
    ),
    "concepts": Family(
        2, ("concept_hit", "concept_said", "concept_right", "concept_rest", "concept_rest_psnr"),
        {"images": "20 DDIM steps with the sampler's guidance; red made blue by a ridge edit of all that reads text"},
        of_model=True, evaluators=True,
    ),
    "places": Family(
        1, tuple(name for name in DETAILS if name.startswith("place_")),
        {"images": "20 DDIM steps with the sampler's guidance; one group's outputs are those of the right caption"},
        of_model=True, evaluators=True,
    ),
    "pictures": Family(
        1, tuple(name for name in DETAILS if name.startswith("picture_")),
        {"images": "those of probes.path, their middle squares at the model's size; 20 DDIM steps, as in edits"},
        of_model=True, of_file=True,
    ),
    "paired": Family(
        2, ("psnr_to_fp", "ssim_to_fp"), {"images": "uint8 RGB, each beside the full-precision one of the same noise"},
        pairs=True, against_originals=("psnr_to_fp", "ssim_to_fp"),
    ),
    "lpips": Family(
        1, ("lpips_to_fp",), {"network": "LPIPS 0.1, AlexNet, images in [-1, 1] at their own size"},
        library="lpips", weights=(ALEXNET,), pairs=True, against_originals=("lpips_to_fp",),
    ),
    "fid_paper": Family(
        1, ("fid_paper", "fid_paper_to_fp"),
        {"features": _POOL, "resize": "short side to 256 by PIL LANCZOS, centre crop of 256 (VQDM's code)"},
        library="torch-fidelity", weights=(INCEPTION,), against_reference=("fid_paper",),
        against_originals=("fid_paper_to_fp",),
    ),
    "fid_standard": Family(
        1, ("fid_standard", "kid_standard", "inception_score"),
        {"features": _POOL, "resize": "none before it, no antialias (torch-fidelity's default)"},
        library="torch-fidelity", weights=(INCEPTION,), against_reference=("fid_standard", "kid_standard"),
    ),
    "cmmd": Family(
        1, ("cmmd_l14_336",), {"features": "CLIP ViT-L/14 at 336 pixels of OpenAI, bicubic, unit vectors"},
        library="open_clip_torch", weights=(CLIP_L14_336,), against_reference=("cmmd_l14_336",),
    ),
    "clip_h14": Family(
        1, ("clip_h14", "clip_h14_similarity_to_fp"),
        {"model": "ViT-H-14 laion2b_s32b_b79k", "score": "raw cosine (VQDM's code)"},
        library="open_clip_torch", weights=(CLIP_H14,), against_originals=("clip_h14_similarity_to_fp",),
    ),
    "clip_l14": Family(
        1, ("clip_l14",), {"model": "ViT-L/14 of OpenAI", "score": "100 · max(cosine, 0)"},
        library="open_clip_torch", weights=(CLIP_L14,),
    ),
    "pickscore": Family(
        1, ("pickscore", "pickscore_scaled"),
        {"model": "PickScore_v1", "score": "raw cosine (VQDM's code); scaled: times the model's logit scale"},
        library="transformers", weights=(PICKSCORE,),
    ),
    "hpsv2": Family(
        1, ("hpsv2",), {"model": "HPS v2.1 (ViT-H-14)", "score": "raw cosine"},
        library="open_clip_torch", weights=(HPSV2,),
    ),
}  # fmt: skip
