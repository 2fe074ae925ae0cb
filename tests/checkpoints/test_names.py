"""Names: prefixes, transformers' renamings, near misses; orientation; fingerprints across copies of one base."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ssh_deploy.checkpoints.fingerprint import Fingerprint
from ssh_deploy.checkpoints.index import open_checkpoint
from ssh_deploy.checkpoints.names import canonical, match_modules
from ssh_deploy.checkpoints.orientation import is_transposed, site_shape, site_weight
from ssh_deploy.checkpoints.sampling import fingerprint_of
from ssh_deploy.errors import AdapterMismatchError

BARE = ["embeddings.word", "encoder.layer.0.query", "encoder.layer.0.value"]
TASK = [f"bert.{path}" for path in BARE] + ["classifier"]


@pytest.mark.parametrize("options", [{}, {"prefix": "bert"}, {"config": {"model_type": "bert"}}])
def test_prefix_is_dropped_and_added(options):
    assert match_modules(["bert.encoder.layer.0.query"], BARE, **options) == {
        "bert.encoder.layer.0.query": "encoder.layer.0.query"
    }
    assert match_modules(["encoder.layer.0.query"], TASK, **options) == {
        "encoder.layer.0.query": "bert.encoder.layer.0.query"
    }


def test_equal_paths_win_over_prefixed_ones():
    known = ["encoder.a", "bert.encoder.a"]
    assert match_modules(known, known, prefix="bert") == {path: path for path in known}


def test_a_path_that_could_mean_two_is_refused(pico):
    stored = "encoder.layer.1.attention.attention.value"
    config = open_checkpoint(pico("vit")).config
    with pytest.raises(AdapterMismatchError, match=rf"could mean {stored} or vit\.{stored} of the base"):
        match_modules(["layers.1.attention.v_proj"], [stored, f"vit.{stored}"], config=config)


def test_two_modules_that_mean_one_are_refused():
    with pytest.raises(
        AdapterMismatchError, match=r"bert\.encoder\.a and encoder\.a of the adapter both mean encoder\.a"
    ):
        match_modules(["bert.encoder.a", "encoder.a"], ["encoder.a"], prefix="bert")


def test_nothing_matched_lists_near_misses():
    with pytest.raises(
        AdapterMismatchError, match=r"1 of 1 modules .*: encoder\.layer\.0\.quary\..*\n.*layer\.0\.query"
    ):
        match_modules(["encoder.layer.0.quary"], BARE)


def test_partly_matched_is_refused_too():
    with pytest.raises(
        AdapterMismatchError, match=r"1 of 2 modules of the adapter match nothing.*encoder\.layer\.9\.query"
    ):
        match_modules(["bert.encoder.layer.0.query", "bert.encoder.layer.9.query"], BARE, config={"model_type": "bert"})


def test_no_modules_is_refused():
    with pytest.raises(AdapterMismatchError, match="adapts no module"):
        match_modules([], BARE)


def test_canonical():
    assert canonical("bert.encoder.layer.0.query", {"model_type": "bert"}) == "encoder.layer.0.query"
    assert canonical("encoder.layer.0.query", {"model_type": "bert"}) == "encoder.layer.0.query"
    assert canonical("transformer.h.0.attn.c_attn", {"model_type": "gpt2"}) == "h.0.attn.c_attn"
    assert canonical("model.layers.0.q", {"model_type": "mistral3_text_no_such"}) == "model.layers.0.q"


@pytest.mark.parametrize(("kind", "prefix"), [("bart", "model"), ("vit_mae", "vit"), ("deberta-v2", "deberta")])
def test_prefix_of_what_the_table_does_not_hold_comes_from_transformers(kind, prefix):
    assert canonical(f"{prefix}.x.y", {"model_type": kind}) == "x.y"


def test_the_table_of_prefixes_is_transformers_own():
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from ssh_deploy.checkpoints.architecture import _PREFIXES

    for kind in ("albert", "bert", "camembert", "distilbert", "electra", "gpt2", "llama", "mistral", "roberta", "vit"):
        assert getattr(transformers, MODEL_MAPPING_NAMES[kind]).base_model_prefix == _PREFIXES[kind]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "vit", "gpt2"])
@pytest.mark.parametrize("task", ["base", "head"])
def test_every_linear_module_of_the_live_model_is_found_in_its_file(pico, architecture, task):
    """Modules of the model that transformers loads, base and task model alike, against either file: same tensor."""
    import transformers

    head = "image" if architecture == "vit" else "text-classification"
    folder = pico(architecture, task="base" if task == "base" else head)
    checkpoint = open_checkpoint(folder)
    auto = (
        transformers.AutoModelForImageClassification
        if architecture == "vit"
        else (transformers.AutoModelForSequenceClassification)
    )
    for model in (transformers.AutoModel.from_pretrained(folder), auto.from_pretrained(folder)):
        linear = {
            name: module.weight.detach().numpy()
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and ("layer" in name or ".h." in f".{name}")
        }
        assert linear
        places = match_modules(linear, checkpoint.modules(), config=checkpoint.config)
        for name, place in places.items():
            np.testing.assert_array_equal(checkpoint.read(f"{place}.weight"), linear[name])
            transposed = architecture == "gpt2"
            assert is_transposed(checkpoint, place) == transposed
            want = linear[name].T if transposed else linear[name]
            np.testing.assert_array_equal(site_weight(checkpoint, place), want)
            assert site_shape(checkpoint, place) == want.shape


def test_vit_names_of_both_releases_mean_one_weight(pico):
    """The model of transformers 5, the model of transformers 4 (as in files), with and without prefix."""
    checkpoint = open_checkpoint(pico("vit"))
    stored = "encoder.layer.1.attention.attention.value"
    for module in ("layers.1.attention.v_proj", "vit.layers.1.attention.v_proj", stored, f"vit.{stored}"):
        assert match_modules([module], checkpoint.modules(), config=checkpoint.config) == {module: stored}
    live = ["vit.layers.1.attention.v_proj", "vit.layers.1.attention.q_proj"]
    assert match_modules([stored], live, config=checkpoint.config) == {stored: live[0]}


def test_only_a_matrix_is_a_site(pico):
    with pytest.raises(AdapterMismatchError, match=r"LayerNorm\.weight is \[48\], not a matrix"):
        site_shape(open_checkpoint(pico("bert")), "encoder.layer.0.output.LayerNorm")


def test_fingerprint_is_the_same_for_base_task_model_and_half_copies(pico, tmp_path):
    base = open_checkpoint(pico("bert"))
    modules = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    ours = fingerprint_of(base, modules)
    assert set(ours.sites) == {"encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"}
    for dtype in (np.float16, ml_dtypes.bfloat16):
        copy = tmp_path / np.dtype(dtype).name
        shutil.copytree(base.folder, copy)
        tensors = load_file(copy / "model.safetensors")
        save_file({f"bert.{k}": v.astype(dtype) for k, v in tensors.items()}, copy / "model.safetensors")
        assert ours.differences(fingerprint_of(open_checkpoint(copy), modules)) == []
    other = fingerprint_of(open_checkpoint(pico("bert", seed=1)), modules)
    assert len(ours.differences(other)) == 2


def test_fingerprint_of_conv1d_is_in_out_in_order(pico):
    checkpoint = open_checkpoint(pico("gpt2"))
    site = fingerprint_of(checkpoint, ["transformer.h.0.mlp.c_fc"]).sites["h.0.mlp.c_fc"]
    assert site.shape == (192, 48)
    first_row = site_weight(checkpoint, "h.0.mlp.c_fc")[0]
    assert float(site.values[0]) in first_row.astype(ml_dtypes.bfloat16).astype(float)


def test_fingerprints_without_sites_say_nothing_of_the_base():
    assert Fingerprint("bert", {}).differences(Fingerprint("bert", {})) == ["no site in common"]
