"""Caption files as they come: Karpathy's split, images of captions, pins, and whatever else the bytes may be."""

import copy
import csv
import hashlib
import io
import json
from pathlib import Path

import pytest
from composed import compose
from hypothesis import given, settings
from hypothesis import strategies as st

from vqdm.errors import UserError
from vqdm.prompts import PromptList, load_prompts

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT.parent / "shared" / "data"
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def load(folder, name, content, **request):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_prompts(source="file", path=str(path), **request)


def triples(prompts):
    return [(prompt.id, prompt.text, prompt.image) for prompt in prompts.prompts]


def shared(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here (third-party data, never copied into the repository)")
    return DATA / name


# Karpathy's split


def image(split, sentences, filename="COCO_val2014_000000000001.jpg", **more):
    sentences = [{"raw": raw, "sentid": sentid, "imgid": 0, "tokens": raw.split()} for sentid, raw in sentences]
    return {"split": split, "filename": filename, "filepath": "val2014", "sentences": sentences, "cocoid": 1} | more


KARPATHY = {
    "dataset": "coco",
    "images": [
        image("test", [(9, "late"), (4, "a  cat\n")], "COCO_val2014_000000000009.jpg"),
        image("restval", [(1, "a dog")]),
        image("train", [(2, "a horse")], "COCO_train2014_000000000002.jpg"),
        image("test", [(3, " ")]),
        image("test", []),
        image("test", [(8, "a cow"), (7, "a brown cow")], "COCO_val2014_000000000008.jpg"),
        image("val", [(5, "a bird")]),
    ],
}


def test_karpathy_takes_one_caption_of_each_image_of_the_split(folder):
    test = load(folder, "dataset_coco.json", json.dumps(KARPATHY), split="test")
    assert triples(test) == [
        ("4", "a cat", "COCO_val2014_000000000009.jpg"),
        ("7", "a brown cow", "COCO_val2014_000000000008.jpg"),
    ]
    rule = "split test, of each image the caption with the lowest sentid, 1 images without a caption, 1 empty rows"
    assert rule in test.origin
    for split, id in (("train", "2"), ("val", "5"), ("restval", "1")):
        assert [p.id for p in load(folder, "dataset_coco.json", json.dumps(KARPATHY), split=split).prompts] == [id]


def test_karpathy_by_default_takes_train_without_restval(folder):
    assert load(folder, "k.json", json.dumps(KARPATHY)).texts == ["a horse"]


def test_a_split_of_a_file_without_splits_changes_nothing(folder):
    assert load(folder, "a.csv", "caption\na cat\n", split="test").texts == ["a cat"]


def damaged(change):
    document = copy.deepcopy(KARPATHY)
    change(document["images"])
    return json.dumps(document)


def shared_sentid(images):
    images[0]["sentences"] = images[5]["sentences"]


MALFORMED = [
    (damaged(lambda images: images[1].pop("split")), "image 1: has no split"),
    (damaged(lambda images: images[1].update(split=3)), "image 1: has no split"),
    (damaged(lambda images: images.append("x")), "has no list of objects 'images'"),
    (damaged(lambda images: images[0].pop("sentences")), "image 0: has no list of objects 'sentences'"),
    (damaged(lambda images: images[0].update(sentences=[4])), "image 0: has no list of objects 'sentences'"),
    (damaged(lambda images: images[0]["sentences"][0].pop("raw")), "image 0: sentence 9 has no text 'raw'"),
    (damaged(lambda images: images[0]["sentences"][0].update(raw=None)), "image 0: sentence 9 has no text 'raw'"),
    (damaged(lambda images: images[5]["sentences"][1].pop("sentid")), "image 5: a sentence has no integer sentid"),
    (damaged(lambda images: images[5]["sentences"][1].update(sentid=True)), "image 5: a sentence has no integer"),
    (damaged(shared_sentid), "sentences that share a sentid"),
    (json.dumps({"images": [image("test", [(1, "a \ud800")])]}), "sentence 1: a character that is no text"),
    (json.dumps({"images": [image("train", [(1, "a")])]}), "unknown split 'test'; choose one of train"),
    (json.dumps({"images": [image("test", [])]}), "holds no prompt (0 empty rows)"),
    (json.dumps(KARPATHY)[:-20], "is not JSON"),
]


@pytest.mark.parametrize(("content", "problem"), MALFORMED, ids=[problem for _, problem in MALFORMED])
def test_a_malformed_karpathy_file_gives_one_clear_line(folder, content, problem):
    with pytest.raises(UserError) as caught:
        load(folder, "dataset_coco.json", content, split="test")
    message = str(caught.value)
    assert problem in message
    assert "dataset_coco.json" in message
    assert "\n" not in message
    assert ";" in message
    assert len(message) < 500


def test_an_unknown_split_names_those_that_are_there(folder):
    with pytest.raises(UserError, match=r"unknown split 'validation'; choose one of restval, test, train, val$"):
        load(folder, "k.json", json.dumps(KARPATHY), split="validation")


def test_a_column_of_karpathys_file_is_refused(folder):
    with pytest.raises(UserError, match="has no columns, but column='raw'"):
        load(folder, "k.json", json.dumps(KARPATHY), split="test", column="raw")


def test_both_formats_of_coco_choose_the_same_captions(folder):
    """The real captions, rewritten as Karpathy's file has them (sentid = annotation id)."""
    path = shared("coco/captions_val2017.json")
    document = json.loads(path.read_text())
    sentences = {entry["id"]: [] for entry in document["images"]}
    for note in document["annotations"]:
        sentences[note["image_id"]].append((note["id"], note["caption"]))
    images = [image("test", sentences[entry["id"]], entry["file_name"]) for entry in document["images"]]
    rewritten = load(folder, "rewritten.json", json.dumps({"images": images}), split="test")
    official = load_prompts(source="file", path=str(path))
    assert triples(rewritten) == triples(official)
    assert rewritten.source_id == official.source_id
    assert {prompt.image for prompt in official.prompts} == {entry["file_name"] for entry in document["images"]}


# the image of a caption


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "x,file_name,captions\n1,val/1.jpg,a cat\n2,,a dog\n"),
        ("a.tsv", "filename\tPrompt\nval/1.jpg\ta cat\n\ta dog\n"),
        ("a.jsonl", '{"file_name": "val/1.jpg", "text": "a cat"}\n{"text": "a dog", "file_name": null}\n'),
    ],
)
def test_tables_keep_the_image_of_a_caption(folder, name, content):
    prompts = load(folder, name, content)
    assert triples(prompts) == [("0", "a cat", "val/1.jpg"), ("1", "a dog", None)]


def test_images_are_no_part_of_a_lists_identity(folder):
    named, bare = load(folder, "n.csv", "file_name,text\n1.jpg,a cat\n"), load(folder, "b.csv", "text\na cat\n")
    assert named.prompts == bare.prompts
    assert (named.sha256, named.to_jsonl(), named.source_id) == (bare.sha256, bare.to_jsonl(), bare.source_id)
    assert named.to_jsonl() == b'{"id":"0","text":"a cat"}\n'


@pytest.mark.parametrize(
    "name", ["../1.jpg", "/etc/passwd", "val/../../1.jpg", "C:\\1.jpg", "http://a/1.jpg", " ", ".", "a\0.jpg", 3, ["1"]]
)
def test_names_that_lead_elsewhere_are_no_images(folder, name):
    row = json.dumps({"file_name": name, "text": "a cat"})
    assert triples(load(folder, "a.jsonl", row)) == [("0", "a cat", None)]


# identity of a source


def test_source_id_does_not_depend_on_n_and_is_the_whole_lists_sha256(folder):
    lists = [load_prompts(source="builtin", n=n) for n in (3, 40, None)]
    assert {prompts.source_id for prompts in lists} == {lists[-1].sha256}
    tiny = [load_prompts(source="tiny", split="test", n=n) for n in (1, 5)]
    assert {prompts.source_id for prompts in tiny} == {"tiny-test-seed0"}
    own = PromptList(lists[0].prompts, "given")
    assert own.source_id == own.sha256


def test_source_id_tells_sources_apart(folder):
    table = "a,b\nred,blue\ngreen,black\n"
    found = [load(folder, "t.csv", table, column=column, n=1) for column in "ab"]
    found += [load(folder, "t.csv", table, column="a", n=1, order="shuffled", seed=seed) for seed in (0, 1)]
    found += [
        load(folder, "k.json", json.dumps(KARPATHY), split=split) for split in ("train", "val", "test", "restval")
    ]
    found += [load_prompts(source="tiny", split=split, n=1) for split in ("train", "test")]
    found += [load_prompts(source="tiny", split="test", n=1, order="shuffled", seed=1)]
    assert len({prompts.source_id for prompts in found}) == len(found)
    same = load(folder, "t.jsonl", '{"text": "red"}\n{"text": "green"}\n', n=1)
    assert same.source_id == found[0].source_id


# pins

THREE = "captions\na cat\na dog\na cow\n"


def hash_of(*texts):
    lines = [json.dumps({"id": str(i), "text": text}, separators=(",", ":")) + "\n" for i, text in enumerate(texts)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    "pin",
    [
        hash_of("a cat", "a dog"),
        hash_of("a cat", "a dog", "a cow"),
        hash_of("a cat", "a dog").upper(),
        hashlib.sha256(THREE.encode()).hexdigest(),
    ],
    ids=["the list", "a longer list", "in capitals", "the file"],
)
def test_a_pin_that_fits(folder, pin):
    assert load(folder, "three.csv", THREE, n=2, sha256=pin).texts == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("request_", "pin"),
    [
        ({"n": 2}, hash_of("a cat")),  # covers one of the two
        ({"n": 2}, hash_of("a cat", "a cow")),
        ({"n": 2, "order": "shuffled", "seed": 1}, hash_of("a cat", "a dog")),
        ({}, "0" * 64),
    ],
)
def test_a_pin_that_does_not_fit_is_one_line_with_both_hashes(folder, request_, pin):
    with pytest.raises(UserError) as caught:
        load(folder, "three.csv", THREE, sha256=pin, **request_)
    found = load(folder, "three.csv", THREE, **request_).sha256
    message = str(caught.value)
    assert f"the list's sha256 is {found}, but sha256={pin} is pinned" in message
    assert message.startswith("three.csv (sha256 ")
    assert "\n" not in message
    assert len(message) < 500


def test_the_endless_world_can_be_pinned_at_its_own_length():
    pin = load_prompts(source="tiny", split="test", n=3).sha256
    assert load_prompts(source="tiny", split="test", n=3, sha256=pin).sha256 == pin
    with pytest.raises(UserError, match="is pinned"):
        load_prompts(source="tiny", split="test", n=2, sha256=pin)


@pytest.mark.parametrize("pin", ["", "5fe9155f", "g" * 64, "a" * 65])
def test_a_pin_that_is_no_sha256_is_refused(pin):
    with pytest.raises(UserError, match="is no sha256; give its 64 hexadecimal digits"):
        load_prompts(source="builtin", sha256=pin)


# the presets of conf/evaluate


def preset(name, *overrides):
    return compose(f"evaluate={name}", *overrides).evaluate.prompts


def load_preset(config, path):
    options = ("column", "split", "n", "order", "seed", "sha256")
    return load_prompts(source=config.source, path=str(path), **{name: getattr(config, name) for name in options})


@pytest.mark.parametrize(
    ("name", "path", "count", "images"),
    [
        ("coco5k", "coco/coco2014_val_30k.csv", 5000, 4745),
        ("coco10k", "coco/coco2014_val_30k.csv", 10_000, 9053),
        ("coco30k", "coco/coco2014_val_30k.csv", 30_000, 22_320),
        ("parti", "prompts/PartiPrompts.tsv", 1632, 1),
        ("parti128", "prompts/parti128.csv", 128, 1),
    ],
)
def test_a_preset_pins_the_published_list(name, path, count, images):
    """The expected texts are read by the csv module alone."""
    config = preset(name)
    prompts = load_preset(config, shared(path))
    assert prompts.sha256 == config.sha256
    assert Path(config.path).name == Path(path).name
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if path.endswith(".tsv") else (",", csv.QUOTE_MINIMAL)
    with (DATA / path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))[:count]
    assert prompts.texts == [" ".join(row[config.column].split()) for row in rows]
    assert [prompt.image for prompt in prompts.prompts] == [row.get("file_name") for row in rows]
    assert len({prompt.image for prompt in prompts.prompts}) == images


def test_a_shorter_run_of_a_preset_keeps_its_pin_and_another_list_does_not():
    config = preset("coco5k", "evaluate.prompts.n=16")
    assert len(load_preset(config, shared("coco/coco2014_val_30k.csv"))) == 16
    with pytest.raises(UserError, match="is pinned"):
        load_preset(config, shared("prompts/parti128.csv"))


def test_drawbench_is_a_csv_with_prompts_and_categories(folder):
    content = "Prompts,Category\n" + "".join(f'"A car, {i} of them.",Colors\n' for i in range(200))
    (folder / "drawbench.csv").write_text(content)
    assert load_preset(preset("drawbench"), folder / "drawbench.csv").texts[199] == "A car, 199 of them."
    assert load(folder, "d.csv", content).texts[0] == "A car, 0 of them."


def test_karpathys_preset_takes_the_test_split(folder):
    (folder / "k.json").write_text(json.dumps(KARPATHY))
    assert len(load_preset(preset("karpathy5k", "evaluate.prompts.n=2"), folder / "k.json")) == 2


# whatever the bytes may be


def prompts_or_one_line(folder, name, content, **request):
    """What every file must give: a list that knows itself again, or one line that names the file."""
    try:
        prompts = load(folder, name, content, **request)
    except UserError as error:
        assert name in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return
    assert prompts.texts
    assert all(text and text == " ".join(text.split()) for text in prompts.texts)
    assert len({prompt.id for prompt in prompts.prompts}) == len(prompts)
    again = folder / "again.jsonl"
    again.write_bytes(prompts.to_jsonl())
    assert PromptList.read_jsonl(again).prompts == prompts.prompts


@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".jsonl", ".txt"])
@QUICK
@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=80)))
def test_any_bytes_give_prompts_or_one_line(folder, suffix, content):
    prefix = "caption,x\n" if suffix == ".csv" else "caption\tx\n" if suffix == ".tsv" else ""
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    prompts_or_one_line(folder, f"any{suffix}", prefix.encode() + content)


OFFICIAL = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [{"id": 5, "image_id": 1, "caption": "a"}, {"id": 3, "image_id": 2, "caption": "b"}],
}
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


def places(node, path=()):
    """Every place in a JSON document, the whole included."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@pytest.mark.parametrize("document", [OFFICIAL, KARPATHY], ids=["official", "karpathy"])
@QUICK
@given(data=st.data())
def test_any_damage_to_a_coco_file_gives_prompts_or_one_line(folder, document, data):
    document = copy.deepcopy(document)
    *path, last = data.draw(st.sampled_from([place for place in places(document) if place]))
    node = document
    for key in path:
        node = node[key]
    if data.draw(st.booleans()):
        del node[last]
    else:
        node[last] = data.draw(VALUES)
    prompts_or_one_line(folder, "any.json", json.dumps(document), split="test")


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), min_size=1)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@QUICK
@given(texts=TEXTS)
def test_what_the_csv_module_writes_comes_back(folder, suffix, delimiter, texts):
    """Quoted on purpose throughout: a .tsv without any quoted field is read as one that knows no quoting."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["x", "caption"], *(["1", text] for text in texts)])
    expected = [(str(i), " ".join(text.split())) for i, text in enumerate(texts) if text.split()]
    if not expected:
        return
    prompts = load(folder, f"written{suffix}", buffer.getvalue())
    assert [(prompt.id, prompt.text) for prompt in prompts.prompts] == expected


SENTENCES = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["a cat", " ", "a  dog"])), max_size=3)
SPLITS = ("train", "val", "test", "restval")


@QUICK
@given(images=st.lists(st.tuples(st.sampled_from(SPLITS), SENTENCES), min_size=1, max_size=6))
def test_karpathys_rule_by_brute_force(folder, images):
    numbers = iter(range(10**6))  # sentids are unique over the file, as published
    images = [(s, [(100 * next(numbers) + i, raw) for i, raw in sentences]) for s, sentences in images]
    split = images[0][0]
    expected = []
    for own, sentences in images:
        if own == split and sentences:
            first, raw = sorted(sentences)[0]
            expected += [(str(first), " ".join(raw.split()))] if raw.strip() else []
    content = json.dumps({"images": [image(own, sentences) for own, sentences in images]})
    if not expected:
        with pytest.raises(UserError, match="holds no prompt"):
            load(folder, "brute.json", content, split=split)
        return
    assert [(p.id, p.text) for p in load(folder, "brute.json", content, split=split).prompts] == expected


def test_the_page_on_data_has_the_hashes_of_the_presets():
    page = (ROOT / "docs" / "data.md").read_text()
    pins = {name: preset(name).sha256 for name in ("coco5k", "coco10k", "coco30k", "parti", "parti128")}
    for name, pin in pins.items():
        assert any(f"`{name}`" in line and f"`{pin}`" in line for line in page.splitlines())
