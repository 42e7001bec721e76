"""Damaged and hostile checkpoints are refused with a clear error or load as they were saved."""

import json
from pathlib import Path

import checkpoint_damage as damage
import fuzz_checkpoints as fuzz
import pytest
from diffusers import UNet2DConditionModel

from vqdm.errors import UserError
from vqdm.hub.config import VQDMConfig
from vqdm.weights.registry import scheme_from_dict

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"


def test_fifty_cases_have_no_findings(tmp_path):
    with fuzz.quiet():
        cases = {number: fuzz.run_case(number, tmp_path) for number in range(50)}
    assert not {number: case for number, case in cases.items() if case[1] == "finding"}
    assert {case[0] for case in cases.values()} == {mutate.__name__ for mutate in damage.MUTATIONS}
    assert {case[1] for case in cases.values()} >= {"refused", "same", "forged"}
    assert not list(tmp_path.iterdir())


def test_a_case_is_its_number(tmp_path):
    with fuzz.quiet():
        assert fuzz.run_case(123, tmp_path) == fuzz.run_case(123, tmp_path)


def _copied(kind: str, tmp_path: Path) -> Path:
    for name in (damage.CONFIG, damage.WEIGHTS):
        (tmp_path / name).write_bytes((GOLDEN / kind / name).read_bytes())
    return tmp_path


def test_an_untouched_copy_is_the_same_and_another_weight_is_a_finding(tmp_path):
    folder = tmp_path / "rtn"
    folder.mkdir()
    _copied("rtn", folder)
    assert fuzz.judge(folder, forged=False) == ("same", "")
    model, original = fuzz.load(folder), fuzz.load(GOLDEN / "rtn")
    model.conv_in.bias.data[0] += 1
    assert fuzz.difference(model, original) == "another conv_in.bias"


def test_a_forged_nan_is_refused_by_the_name_of_its_tensor(tmp_path):
    """Checksums tell damage, not malice: a NaN in the shared table would decode to NaN even in columns without bits."""
    folder = _copied("trellis", tmp_path)
    file = damage.File.read(folder / damage.WEIGHTS)
    name = "shared.trellis_table.table"
    file.put(name, b"\x00\x7e" * (len(file.get(name)) // 2))
    file.write()
    with pytest.raises(UserError, match=f"tensor {name} is not as it was saved"):
        fuzz.load(folder)
    damage.forge_checksums(folder)
    with pytest.raises(UserError, match=f"tensor {name} has NaN numbers"):
        fuzz.load(folder)


def test_forged_rates_that_reach_beyond_the_codes_are_refused_by_the_name_of_the_layer(tmp_path):
    folder = _copied("trellis", tmp_path)
    file = damage.File.read(folder / damage.WEIGHTS)
    name = next(name for name in file.tensors if name.endswith(".weight.codes"))
    for byte, said in (
        (b"\xff", "rate is 34 quarter bits, above 24"),
        (b"\x84", "columns take .* bits where the stream"),
    ):
        file.put(name, byte * len(file.get(name)))
        file.write()
        damage.forge_checksums(folder)
        with pytest.raises(UserError, match=f"layer {name.removesuffix('.weight.codes')} are damaged: .*{said}"):
            fuzz.load(folder)


@pytest.mark.parametrize("content", ["[]", "3", "{", "{}", '{"_class_name": "DDIMScheduler"}', '{"_class_name": 5}'])
def test_a_config_of_another_form_is_refused_before_diffusers_reads_it(content, tmp_path):
    folder = _copied("rtn", tmp_path)
    (folder / damage.CONFIG).write_text(content)
    with pytest.raises(UserError, match=str(folder)) as error:
        fuzz.load(folder)
    assert "\n" not in str(error.value)


def _with_groups(folder: Path, change) -> Path:
    """Both files with the same change of their groups: consistent, so that only what they ask for can be refused."""
    config, file = damage.read_config(folder), damage.File.read(folder / damage.WEIGHTS)
    for groups in (config["quantization_config"]["groups"], file.about["groups"]):
        change(groups)
    damage.write_config(folder, config)
    file.write()
    return folder


def _schemes(**fields):
    return lambda groups: [group["scheme"].update(fields) for group in groups]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("additive", _schemes(num_codebooks=1 << 40), "num_codebooks must be from 0 to 65536"),
        ("additive", _schemes(num_codebooks=65536, codebook_bits=16), r"codebooks is .* where the model has"),
        ("additive", _schemes(shared="codebooks"), "lacks the tensor shared.codebooks.codebooks"),
        ("shared", _schemes(shared="a.b"), "cannot name shared codebooks"),
        ("shared", _schemes(shared="keys"), "cannot name shared codebooks"),
        ("shared", lambda groups: groups[0]["scheme"].update(codebook_bits=5), "cannot decode with the shared"),
        ("rtn", _schemes(bits="3"), "bits must be of type int"),
        ("rtn", _schemes(bits=True), "bits must be of type int"),
        ("rtn", _schemes(bits=4), "is .* where the model has"),
        ("rtn", _schemes(group_size=0), "group_size must be 1 or more"),
        ("rtn", _schemes(group_size=5), "does not divide"),
        ("rtn", _schemes(codec=[]), "codec must be of type str"),
        ("rtn", _schemes(more=1), "not a weight scheme"),
        ("rtn", lambda groups: groups.append(groups[0]), "in two groups"),
        ("rtn", lambda groups: groups[0]["layers"].append(groups[0]["layers"][0]), "each once"),
        ("rtn", lambda groups: groups[0].update(shape=[1 << 50, 1 << 50]), "in the model and"),
        ("rtn", lambda groups: groups[0].update(layers=["shared.x"]), "lacks"),
    ],
)
def test_what_both_files_ask_for_is_checked_before_memory_is_taken(kind, change, said, tmp_path):
    folder = _with_groups(_copied(kind, tmp_path), change)
    with fuzz.limited(5), pytest.raises(UserError, match=said) as error:
        UNet2DConditionModel.from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("bits", [float("nan"), float("inf"), -1.0, 0, 10**30, "4", None, [4.0]])
def test_bits_that_are_none_are_refused(bits):
    with pytest.raises(UserError, match="bits must be"):
        scheme_from_dict({"kind": "trellis", "codec": "trellis", "bits": bits})


@pytest.mark.parametrize(
    "changed", [{"groups": 5}, {"groups": {}}, {"groups": [5]}, {"metrics": 5}, {"version": True}, {"version": "1"}]
)
def test_a_quantization_config_of_other_types_is_refused(changed):
    config = json.loads((GOLDEN / "rtn" / damage.CONFIG).read_text())["quantization_config"]
    assert VQDMConfig.from_dict(config).layer_groups()
    with pytest.raises(UserError):
        VQDMConfig.from_dict(config | changed)


def test_deep_nesting_is_refused_at_once(tmp_path):
    folder = _copied("rtn", tmp_path)
    deep = "[" * 1_000_000
    damage.File.read(folder / damage.WEIGHTS).write(about=deep)
    with fuzz.limited(5), pytest.raises(UserError, match="does not say what it holds"):
        UNet2DConditionModel.from_pretrained(folder)
