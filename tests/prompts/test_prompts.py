import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vqdm.errors import UserError
from vqdm.prompts import TINY_LENGTH, Prompt, PromptList, load_prompts, one_line, token_report
from vqdm.tiny.scenes import SPLITS, draw_scene

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def pairs(prompts):
    return [(prompt.id, prompt.text) for prompt in prompts.prompts]


def coco(annotations, images=(1, 2)):
    return json.dumps({"info": {}, "images": [{"id": i} for i in images], "annotations": annotations})


def note(id, image_id, caption):
    return {"id": id, "image_id": image_id, "caption": caption}


# sources


def test_builtin_has_256_distinct_prompts():
    prompts = load_prompts(source="builtin")
    assert len(prompts) == 256
    assert len({text.lower().rstrip(".") for text in prompts.texts}) == 256
    assert all(text == " ".join(text.split()) and 8 < len(text) < 160 for text in prompts.texts)
    assert prompts.prompts[0].id == "builtin-000"
    assert prompts.origin == "list shipped with vqdm; the first 256 of 256"


def test_tiny_splits_are_deterministic_and_share_no_scene():
    scenes = {}
    for split in SPLITS:
        prompts = load_prompts(source="tiny", split=split, n=40)
        assert prompts == load_prompts(source="tiny", split=split, n=40)
        assert prompts.prompts[7].id == f"{split}-000007"
        scenes[split] = {draw_scene(0, split, int(prompt.id.split("-")[1])).key for prompt in prompts.prompts}
    assert sum(map(len, scenes.values())) == len(set.union(*scenes.values()))


def test_tiny_prompts_are_the_captions_of_the_scenes_on_disk():
    from vqdm.tiny.data import SceneSet

    assert load_prompts(source="tiny", split="test", n=20).texts == SceneSet(seed=0, split="test", n=20).captions


@pytest.mark.parametrize("request_", [{"source": "builtin"}, {"source": "tiny", "split": "validation"}])
@pytest.mark.parametrize("order", ["first", "shuffled"])
def test_a_shorter_list_is_a_prefix(request_, order):
    long = load_prompts(**request_, order=order, seed=3, n=50)
    short = load_prompts(**request_, order=order, seed=3, n=20)
    assert short.prompts == long.prompts[:20]
    assert short.sha256 != long.sha256


def test_shuffled_depends_on_the_seed_and_keeps_every_prompt():
    in_order, one, two = (
        load_prompts(source="builtin", order=order, seed=seed)
        for order, seed in [("first", 1), ("shuffled", 1), ("shuffled", 2)]
    )
    assert set(one.prompts) == set(two.prompts) == set(in_order.prompts)
    assert len({one.prompts, two.prompts, in_order.prompts}) == 3
    assert one.origin.endswith("256 of 256, shuffled with seed 1")


def test_importing_and_loading_import_no_torch():
    code = (
        "import sys; from vqdm.prompts import load_prompts; load_prompts(source='tiny', split='test', n=2);"
        "load_prompts(source='builtin'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


# identity


def test_sha256_is_that_of_the_canonical_lines():
    prompts = PromptList((Prompt("a", "a café"), Prompt("b", 'says "no"\u2028')), "anywhere")
    expected = '{"id":"a","text":"a café"}\n{"id":"b","text":"says \\"no\\"\u2028"}\n'.encode()
    assert prompts.to_jsonl() == expected
    assert prompts.sha256 == hashlib.sha256(expected).hexdigest()
    assert prompts.sha256 == PromptList(prompts.prompts, "elsewhere").sha256


def test_lists_do_not_change_between_versions():
    """Images and calibrations already made carry these hashes."""
    assert load_prompts(source="tiny", split="test", n=3).sha256.startswith("f54f21fb")
    shuffled = load_prompts(source="tiny", split="train", n=3, order="shuffled", seed=1)
    assert [prompt.id for prompt in shuffled.prompts] == ["train-640728", "train-370104", "train-784657"]


def test_jsonl_comes_back_to_the_byte(tmp_path):
    prompts = load_prompts(source="builtin", n=30)
    back = PromptList.read_jsonl(write(tmp_path / "prompts.jsonl", prompts.to_jsonl()))
    assert back.prompts == prompts.prompts
    assert back.sha256 == prompts.sha256


@pytest.mark.parametrize(
    "content",
    ["", '{"id":"a"}\n', '{"id":1,"text":"x"}\n', '{"id": "a", "text": "x"}\n', '{"id":"a","text":"\\ud800"}\n', "[1]"],
)
def test_jsonl_that_is_not_ours_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"prompts\.jsonl"):
        PromptList.read_jsonl(write(tmp_path / "prompts.jsonl", content))


# files


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("a.txt", "a cat\r\n\r\n# a  dog\n", None, [("0", "a cat"), ("2", "# a dog")]),
        ("a.TXT", "\ufeffa cat", None, [("0", "a cat")]),
        (
            "a.csv",
            ',caption\n9,"red, green\nand ""blue"""\n8,  plain \n',
            None,
            [("0", 'red, green and "blue"'), ("1", "plain")],
        ),
        ("a.csv", "x,text,prompt\n1,low,high\n", None, [("0", "high")]),
        ("a.csv", "x,text,prompt\n1,low,high\n", "text", [("0", "low")]),
        ("a.csv", "id,prompt\nk1,one\n\nk2,\nk3,two\n", None, [("k1", "one"), ("k3", "two")]),
        ("a.csv", "id,prompt\nk1,one\nk1,two\n", None, [("0", "one"), ("1", "two")]),
        ("a.csv", "id,prompt\n../k,one\n", None, [("0", "one")]),
        ("a.tsv", 'Prompt\tNote\nsays "hi", she\t\n"a\tb"\tx\n', None, [("0", 'says "hi", she'), ("1", "a b")]),
        (
            "a.jsonl",
            '{"prompt":"a\\nb"}\n\n{"prompt":null}\n{"prompt":"c\u2028d"}\n',
            None,
            [("0", "a b"), ("2", "c d")],
        ),
        (
            "a.tsv",
            'Prompt\tNote\n"GO" on a sign, "NO"\t"x\n\n"a\tb"\n',
            None,
            [("0", '"GO" on a sign, "NO"'), ("2", '"a')],
        ),
        ("a.jsonl", '{"id":7,"q":"x"}\n{"id":"y","q":"z"}', "q", [("7", "x"), ("y", "z")]),
        (
            "a.json",
            coco([note(9, 1, "late"), note(5, 2, "two\n"), note(3, 1, "early"), note(2, 4, " ")], images=(2, 1, 3, 4)),
            None,
            [("5", "two"), ("3", "early")],
        ),
    ],
)
def test_each_format(tmp_path, name, content, column, expected):
    path = write(tmp_path / name, content)
    assert pairs(load_prompts(source="file", path=path, column=column)) == expected


def test_origin_counts_what_was_left_out(tmp_path):
    path = write(tmp_path / "c.json", coco([note(5, 2, "two"), note(2, 4, " ")], images=(2, 3, 4)))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    assert load_prompts(source="file", path=path).origin == (
        f"c.json (sha256 {digest}), of each image the caption with the lowest id, 1 images without a caption, "
        "1 empty rows skipped; the first 1 of 1"
    )


MALFORMED = [
    ("a.csv", "", "is empty"),
    ("a.txt", " \n\n", "is empty"),
    ("a.csv", "caption\n \n", "holds no prompt (1 empty rows)"),
    ("a.csv", "a photo of a dog,0\nb,1\n", "no column 'captions' or"),
    ("a.csv", "caption,caption\na,b\n", "more than one column 'caption'"),
    ("a.csv", "caption,x\na,b\nc,d,e\n", "line 3: 3 fields where the header has 2"),
    ("a.csv", 'caption,x\n"a,b\n', "is malformed"),
    ("a.csv", 'caption,x\n"a" b,c\n', "line 2: is malformed"),
    ("a.csv", "caption,x\n" + "a" * 200_000 + ",b\n", "is malformed"),
    ("a.txt", b"fine\nna\xefve\n", "line 2: is not UTF-8"),
    ("a.csv", "caption\nfine\n".encode("utf-16"), "line 1: is not UTF-8"),
    ("a.txt", "fine\na\0b\n", "line 2: a character that is no text"),
    ("a.txt", "fine\n" + "x" * 10_001, "line 2: a prompt of 10001 characters"),
    ("a.jsonl", '{"prompt":"a"}\n{"prompt":}', "a.jsonl: is not JSON (line 2, column 11: Expecting value"),
    ("a.jsonl", '{"prompt":"a"}\n["b"]\n', "line 2: is no JSON object"),
    ("a.jsonl", '{"prompt":"a"}\n{"caption":"b"}\n', "line 2: no column 'prompt' among: 'caption'"),
    ("a.jsonl", '{"prompt":["a"]}\n', "line 1: 'prompt' is no string"),
    ("a.jsonl", '{"prompt":"\\ud83d"}\n', "line 1: a character that is no text"),
    ("a.json", '{"images": [],\n "annotations": [}', "is not JSON (line 2, column 18"),
    ("a.json", "[" * 100_000, "is JSON that cannot be read"),
    ("a.json", "1" * 5_000, "is JSON that cannot be read"),
    ("a.json", "[]", "has no list of objects 'annotations'"),
    ("a.json", '{"images": []}', "has no list of objects 'annotations'"),
    ("a.json", '{"annotations": []}', "has no list of objects 'images'"),
    ("a.json", '{"annotations": [3], "images": []}', "has no list of objects 'annotations'"),
    ("a.json", '{"annotations": [], "images": [{"id": [1]}]}', "'images' without unique integer ids"),
    ("a.json", coco([], images=(1, 1)), "'images' without unique integer ids"),
    ("a.json", coco([]), "holds no prompt"),
    ("a.json", coco([note(1, 1, None)]), "annotation 1: has no caption"),
    ("a.json", coco([note(None, 1, "a")]), "an annotation has no integer id"),
    ("a.json", coco([note(1, 7, "a")]), "annotation 1: image_id 7 is not among 'images'"),
    ("a.json", coco([note(1, [1], "a")]), "annotation 1: image_id [1] is not among 'images'"),
    ("a.json", coco([note(1, 1, "a"), note(1, 2, "b")]), "annotations that share an id"),
    ("a.parquet", "PAR1", "unknown suffix '.parquet'; give a .json, .csv"),
]


@pytest.mark.parametrize(("name", "content", "problem"), MALFORMED, ids=[problem for _, _, problem in MALFORMED])
def test_a_malformed_file_gives_one_clear_line(tmp_path, name, content, problem):
    with pytest.raises(UserError) as caught:
        load_prompts(source="file", path=write(tmp_path / name, content))
    message = str(caught.value)
    assert problem in message
    assert name in message
    assert "\n" not in message
    assert ";" in message  # what to do
    assert len(message) < 500


REQUESTS = [
    ({"source": "web"}, "unknown source 'web'; choose one of tiny, small, builtin, file"),
    ({"source": "builtin", "order": "last"}, "unknown order 'last'"),
    ({"source": "builtin", "n": 0}, "n=0 is not a number of prompts"),
    ({"source": "builtin", "n": -3}, "n=-3 is not"),
    ({"source": "builtin", "n": 257}, "has 256 prompts, but n=257 were asked for"),
    ({"source": "builtin", "path": "a.csv"}, "mean nothing to source 'builtin'"),
    ({"source": "file"}, "source 'file' has no path"),
    ({"source": "file", "path": "no/such.csv"}, "no/such.csv: no such file"),
    ({"source": "file", "path": "no\nsuch.csv"}, "no such.csv: no such file"),
    ({"source": "file", "path": "a\0.csv"}, "no such file"),
    ({"source": "file", "path": "x" * 300 + ".csv"}, "cannot be read"),
    ({"source": "file", "path": "~nobody-here/a.csv"}, "cannot be read"),
    ({"source": "file", "path": str(Path(__file__).parent)}, "is a directory"),
    ({"source": "file", "path": "/dev/zero"}, "is no ordinary file"),
    ({"source": "tiny"}, "never ends; set n"),
    ({"source": "tiny", "split": "val", "n": 2}, "unknown split 'val'; choose one of validation, test"),
    ({"source": "tiny", "n": TINY_LENGTH + 1}, f"has {TINY_LENGTH} prompts, but n={TINY_LENGTH + 1}"),
]


@pytest.mark.parametrize(("request_", "problem"), REQUESTS, ids=[problem for _, problem in REQUESTS])
def test_a_wrong_request_gives_one_clear_line(request_, problem):
    with pytest.raises(UserError) as caught:
        load_prompts(**request_)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "a"), ("a.json", coco([note(1, 1, "a")]))])
def test_a_column_of_a_file_without_columns_is_refused(tmp_path, name, content):
    with pytest.raises(UserError, match="has no columns, but column='caption'"):
        load_prompts(source="file", path=write(tmp_path / name, content), column="caption")


def test_a_missing_column_lists_those_present(tmp_path):
    path = write(tmp_path / "a.csv", "caption,file\na,b\n")
    with pytest.raises(UserError, match="no column 'text' among: 'caption', 'file'; set column"):
        load_prompts(source="file", path=path, column="text")


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("coco/captions_val2017.json", 5000, None),
        (
            "coco/coco2014_val_30k.csv",
            30_000,
            ("0", "Green commercial building with refrigerator and refrigeration units outside."),
        ),
        ("prompts/PartiPrompts.tsv", 1632, ("0", "bond")),
        ("prompts/parti128.csv", 128, ("0", "A city in 4-dimensional space-time")),
    ],
)
def test_real_files(name, count, first):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here (third-party data, never copied into the repository)")
    prompts = load_prompts(source="file", path=str(DATA / name))
    assert len(prompts) == len({prompt.id for prompt in prompts.prompts}) == count
    assert all(prompts.texts)
    assert first is None or pairs(prompts)[0] == first


def test_coco_rule_on_the_real_file():
    path = DATA / "coco/captions_val2017.json"
    if not path.exists():
        pytest.skip(f"{path} is not here (third-party data, never copied into the repository)")
    document = json.loads(path.read_text())
    image = document["images"][0]["id"]
    lowest = min((a["id"], a["caption"]) for a in document["annotations"] if a["image_id"] == image)
    assert pairs(load_prompts(source="file", path=str(path), n=1)) == [(str(lowest[0]), " ".join(lowest[1].split()))]


# tokens


@pytest.fixture(scope="module")
def tokenizer():
    from vqdm.tiny.tokenizer import build_tokenizer

    return build_tokenizer()


def test_token_report_counts_what_is_cut(tokenizer):
    prompts = load_prompts(source="builtin", n=40)
    lengths = [len(tokenizer(text)["input_ids"]) for text in prompts.texts]  # start and end included
    expected = {
        "prompts": 40,
        "tokens": sum(lengths) - 2 * 40,
        "unknown": 0,
        "truncated_prompts": sum(length > 24 for length in lengths),
        "truncated_tokens": sum(max(0, length - 24) for length in lengths),
    }
    report = token_report(prompts, tokenizer, 24)
    assert report == expected
    assert report["truncated_prompts"] > 0
    kept = tokenizer(prompts.texts, truncation=True, max_length=24)["input_ids"]
    assert sum(lengths) - sum(map(len, kept)) == report["truncated_tokens"]
    assert one_line(report).startswith(f"40 prompts, {expected['tokens']} tokens, 0 unknown, ")


def test_tiny_captions_fit_the_tiny_tokenizer(tokenizer):
    prompts = load_prompts(source="tiny", split="test", n=50)
    report = token_report(prompts, tokenizer, 24)
    assert report["tokens"] == sum(len(text.split()) for text in prompts.texts)
    assert one_line(report) == f"50 prompts, {report['tokens']} tokens, 0 unknown, none truncated"


def test_unknown_tokens_are_counted_unless_they_are_the_end_token():
    class Words:
        """A stand-in with T5's habit: an unknown token of its own."""

        unk_token_id, eos_token_id = 2, 1

        def num_special_tokens_to_add(self):
            return 1

        def __call__(self, texts, **_):
            return {"input_ids": [[5 if word == "cat" else 2 for word in text.split()] for text in texts]}

    words = Words()
    expected = {"prompts": 2, "tokens": 5, "unknown": 3, "truncated_prompts": 1, "truncated_tokens": 2}
    assert token_report(["a cat", "cat b c"], words, 2) == {**expected, "truncated_prompts": 2, "truncated_tokens": 3}
    assert token_report(["a cat", "cat b c"], words, 4) == {**expected, "truncated_prompts": 0, "truncated_tokens": 0}
    words.eos_token_id = 2
    assert token_report(["a cat"], words, 4)["unknown"] == 0
    assert token_report([], words, 4)["tokens"] == 0
    with pytest.raises(ValueError, match="max_length 1 leaves no room"):
        token_report(["a cat"], words, 1)


def test_token_report_is_quiet(tokenizer, caplog, capsys):
    token_report(["red circle " * 200], tokenizer, 24)
    assert caplog.text == ""
    assert capsys.readouterr().err == ""
