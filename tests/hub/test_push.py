"""What goes to the hub, up to the network's edge."""

from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCard
from quantized import quantized_unet


def test_what_is_pushed_has_our_card_and_codes(tmp_path, monkeypatch):
    pushed = {}

    def upload_folder(*, repo_id, folder_path, **_):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        pushed[repo_id] = files

    where = "diffusers.models.modeling_utils."
    monkeypatch.setattr(where + "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(where + "load_or_create_model_card", lambda *_, **__: ModelCard("an empty card"))
    monkeypatch.setattr(where + "populate_model_card", lambda card: card)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload_folder)
    quantized_unet("rtn").save_pretrained(str(tmp_path / "unet"), push_to_hub=True, repo_id="me/small")
    card = pushed["me/small"]["README.md"].decode()
    assert "bits per weight" in card and "import vqdm" in card and "an empty card" not in card
    assert {"config.json", "diffusion_pytorch_model.safetensors"} < set(pushed["me/small"])
