"""Cosines and image vectors against open_clip and transformers called directly, on random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from random_networks import photographs, random_open_clip, random_transformers_clip, textures

from vqdm.metrics.clip import OpenClip, PickScore

CAPTIONS = ["a red circle above a blue square", "two dogs on a beach at sunset, photograph", "", "word " * 200]


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory):
    return random_open_clip(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory):
    return random_transformers_clip(tmp_path_factory.mktemp("pickscore"))


def pictures():
    return [textures(1, size, seed=i)[0] for i, size in enumerate([(48, 48), (64, 100), (90, 51), (256, 256)])]


def cosines(one, other):
    one, other = one.double().numpy(), other.double().numpy()
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def preprocessed(picture, size):
    """As CLIP has it: short side by Pillow's bicubic, centre, mean and spread of CLIP's pictures."""
    image = Image.fromarray(picture)
    short = min(image.size)
    image = image.resize([size if s == short else int(size * s / short) for s in image.size], Image.Resampling.BICUBIC)
    left, top = (round((s - size) / 2) for s in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size))) / 255.0
    mean, spread = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((pixels - mean) / spread).permute(2, 0, 1).float()


def direct_open_clip(name, weights, images):
    import open_clip

    model = open_clip.create_model(name)
    model.load_state_dict(open_clip.factory.load_state_dict(str(weights)))
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([preprocessed(picture, 48) for picture in images])
        seen = model.encode_image(pixels)
        read = torch.cat([model.encode_text(open_clip.tokenize([caption])) for caption in CAPTIONS[: len(images)]])
    return seen, read


def test_cosines_and_vectors_are_open_clips(open_clip_model):
    images = pictures()
    found = OpenClip(*open_clip_model, device="cpu").columns(images, CAPTIONS)
    seen, read = direct_open_clip(*open_clip_model, images)
    expected = cosines(seen, read)
    assert found["cosine"].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found["image"].norm(dim=1).tolist() == pytest.approx([1] * 4, rel=1e-5)
    assert found["image"].numpy() == pytest.approx((seen / seen.norm(dim=1, keepdim=True)).numpy(), abs=1e-3)
    assert np.std(expected) > 0.01  # not all alike


def test_cosine_of_given_vectors_is_exact(open_clip_model):
    """The formula alone: float64 from the same vectors, to 1e-6."""
    images = pictures()
    extractor = OpenClip(*open_clip_model, device="cpu")
    found = extractor.columns(images, CAPTIONS)
    with torch.no_grad():
        read = extractor.model.encode_text(extractor.tokenize(CAPTIONS))
    assert found["cosine"].numpy() == pytest.approx(cosines(found["image"], read), rel=1e-6, abs=1e-7)


def test_without_captions_there_is_no_cosine(open_clip_model):
    assert set(OpenClip(*open_clip_model, device="cpu").columns(pictures())) == {"image"}


def test_photographs(open_clip_model):
    images = photographs(3)
    if not images:
        pytest.skip("no photographs in ../shared/data/coco/mini")
    found = OpenClip(*open_clip_model, device="cpu").columns(images, CAPTIONS[:3])
    assert found["cosine"].numpy() == pytest.approx(
        cosines(*direct_open_clip(*open_clip_model, images)), rel=1e-3, abs=1e-4
    )


def test_pickscore_is_the_cosine_of_transformers_vectors(pickscore):
    """As its authors compute it: vectors of either side by itself, captions cut to 77 tokens."""
    from transformers import CLIPModel, CLIPProcessor

    images = pictures()
    found = PickScore(pickscore, device="cpu").columns(images, CAPTIONS)
    model = CLIPModel.from_pretrained(pickscore).eval()
    processor = CLIPProcessor.from_pretrained(pickscore)
    with torch.no_grad():
        pixels = [processor.image_processor(Image.fromarray(i), return_tensors="pt").pixel_values for i in images]
        seen = model.visual_projection(model.vision_model(torch.cat(pixels)).pooler_output)
        tokens = [processor.tokenizer(c, truncation=True, max_length=77, return_tensors="pt") for c in CAPTIONS]
        read = torch.cat([model.text_projection(model.text_model(t.input_ids).pooler_output) for t in tokens])
    expected = cosines(seen, read)
    assert found["cosine"].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found["scaled"].numpy() == pytest.approx(expected * model.logit_scale.exp().item(), rel=1e-3, abs=1e-4)
    assert np.std(expected) > 0.01


def test_convolutions_are_not_rounded_to_tf32(open_clip_model):
    """Nor is the choice left behind for others."""
    extractor, seen = OpenClip(*open_clip_model, device="cpu"), []
    before = torch.backends.cudnn.allow_tf32
    extractor.model.visual.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    for _ in range(2):
        extractor.columns(pictures())
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32 == before
