"""Contract suites that families, transforms and deltas inherit, and pico models: small random bases for tests.

A plugin's whole test of a family is three lines::

    class TestMine(FamilyContract):
        family = "mine"
        def example(self, rng): return folder_config, tensors, shapes, dense_definitions

Importing this module needs pytest, torch and transformers; nothing in the package imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.adapters.peft_folder import CONFIG, WEIGHTS, read_folder
from ssh_deploy.deltas.base import Delta
from ssh_deploy.deltas.formula import RelativeDelta
from ssh_deploy.deltas.spectral import SpectralDelta
from ssh_deploy.errors import AdapterFileError, AdapterMismatchError
from ssh_deploy.transforms import cpu, get_transform, reference
from ssh_deploy.transforms.base import Axis, Separable

#: Square, non-square, prime, one-wide, and large enough for two stages.
SHAPES = ((8, 8), (12, 20), (7, 13), (1, 9), (9, 1), (1, 1), (32, 48))


def sparse_spectrum(
    rng: np.random.Generator, shape: tuple[int, int], n: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float32]]:
    """``n`` (or all) distinct random places of ``shape`` and normal values: rows, cols, values."""
    size = shape[0] * shape[1]
    flat = rng.choice(size, min(n, size), replace=False)
    rows, cols = np.divmod(flat, shape[1])
    return rows.astype(np.uint16), cols.astype(np.uint16), rng.normal(size=flat.size).astype(np.float32)


def random_adapter(
    modules: Mapping[str, tuple[int, int]],
    *,
    n: int = 40,
    transform: str = "hartley",
    alpha: float = 30.0,
    seed: int = 0,
    heads: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    **fields: Any,
) -> Adapter:
    """An adapter with random spectra on ``modules`` ({path: (out, in)}); ``fields`` go to `Adapter`."""
    from ssh_deploy.deltas.replaced import ReplacedModule

    rng = np.random.default_rng(seed)
    norm, family = ("ortho", "sdctft") if transform == "cosine" else ("backward", "ssh")
    deltas = {}
    for module, shape in modules.items():
        rows, cols, values = sparse_spectrum(rng, shape, n)
        deltas[module] = SpectralDelta(shape, transform, rows, cols, values, alpha, norm)
    replaced = {module: ReplacedModule(dict(tensors)) for module, tensors in (heads or {}).items()}
    settings = {"n": n, "delta_ratio": 0.7, "seed": seed}
    defaults: dict[str, Any] = {"digest": "", "source": Path("random"), "settings": settings}
    return Adapter(family=family, deltas=deltas, replaced=replaced, **(defaults | fields))


def in_two_stages(axis: Axis, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``F x`` along the first side of ``x`` [n, tokens], by the products of `TwoStage`."""
    stages = axis.two_stage(len(x))
    z = x if stages.permutation is None else x[stages.permutation]
    if stages.p > 1:
        z = (stages.first @ z.reshape(stages.p, -1)).reshape(stages.p // 2, 2 * stages.q, -1)
    return (stages.second @ z).reshape(x.shape)[stages.order]


class TransformContract:
    """What every transform must do; subclasses set ``name``."""

    name: str

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("norm", ["backward", "ortho"])
    def test_synthesis_is_the_definition(self, shape: tuple[int, int], norm: str) -> None:
        """CPU path in float64 against the plain sum of `reference.py`; the output is poisoned with NaN first."""
        rows, cols, values = sparse_spectrum(np.random.default_rng(1), shape, 11)
        want = reference.delta(self.name, rows, cols, values, shape, alpha=2.5, norm=norm)
        delta = SpectralDelta(shape, self.name, rows, cols, values, 2.5, norm)
        got = np.full(shape, np.nan)
        got[:] = cpu.synthesis(shape, delta.axis, delta.separable(), gain=delta.gain, dtype=np.float64)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_torch_path_is_the_definition(self, shape: tuple[int, int]) -> None:
        """torch.fft path, float64 tight and float32 within twice what plain torch loses."""
        import torch

        from ssh_deploy.transforms.device import synthesis_torch

        rows, cols, values = sparse_spectrum(np.random.default_rng(2), shape, 11)
        want = reference.delta(self.name, rows, cols, values, shape, alpha=1.0, norm="ortho")
        delta = SpectralDelta(shape, self.name, rows, cols, values, 1.0, "ortho")
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 4e-6)):
            got = synthesis_torch(shape, delta.axis, delta.separable(), gain=delta.gain, device="cpu", dtype=dtype)
            np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max())))

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 24, 31, 64, 96, 384])
    def test_axis(self, n: int) -> None:
        """Orthonormal; torch, ducc0 and two-stage forms of it are the matrix, forward and back."""
        import torch

        axis = get_transform(self.name).axis
        matrix = axis.matrix(n)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12)
        x = np.random.default_rng(n).normal(size=(n, 3))
        np.testing.assert_allclose(axis.forward_cpu(x.copy(), 0), matrix @ x, atol=1e-12)
        np.testing.assert_allclose(axis.inverse_cpu(x.copy(), 0), matrix.T @ x, atol=1e-12)
        np.testing.assert_allclose(axis.forward(torch.from_numpy(x), 0).numpy(), matrix @ x, atol=1e-12)
        np.testing.assert_allclose(axis.inverse(torch.from_numpy(x), 0).numpy(), matrix.T @ x, atol=1e-12)
        np.testing.assert_allclose(in_two_stages(axis, x), matrix @ x, atol=1e-12)

    @pytest.mark.parametrize("shape", [(6, 6), (5, 8), (7, 1)])
    def test_analysis_is_the_definition(self, shape: tuple[int, int]) -> None:
        """Forward 2-D transform against inner products with every basis matrix."""
        weight = np.random.default_rng(3).normal(size=shape)
        got = get_transform(self.name).analyze(weight)
        np.testing.assert_allclose(got, reference.analysis(self.name, weight), atol=1e-12)

    def test_separable_form_keeps_float16_exact(self) -> None:
        """Expansion changes signs only: f16 values stay f16."""
        rows, cols, values = sparse_spectrum(np.random.default_rng(4), (12, 20), 9)
        spectrum: Separable = get_transform(self.name).separable(rows, cols, values.astype(np.float16), (12, 20))
        assert spectrum.values.dtype == np.float16
        assert set(np.abs(spectrum.values)) == set(np.abs(values.astype(np.float16)))


class DeltaContract:
    """What every delta must do; subclasses give `make` and `definition`."""

    def make(self, rng: np.random.Generator, shape: tuple[int, int]) -> Delta:
        """A delta of ``shape``."""
        raise NotImplementedError

    def definition(self, delta: Any) -> NDArray[np.float64]:
        """Its ΔW, float64, as plainly as can be."""
        raise NotImplementedError

    @pytest.mark.parametrize("shape", SHAPES)
    def test_dense_add_and_apply_agree(self, shape: tuple[int, int]) -> None:
        """``dense``, ``add_to`` in every dtype and ``apply`` against the definition."""
        import torch

        rng = np.random.default_rng(5)
        delta = self.make(rng, shape)
        want = self.definition(delta)
        size = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(delta.dense(dtype=torch.float64).numpy(), want, atol=1e-12 * size)
        np.testing.assert_allclose(delta.dense().numpy(), want, atol=4e-6 * size)
        base = torch.from_numpy(rng.normal(size=shape))
        summed = delta.add_to(base.clone(), scale=-0.5)
        np.testing.assert_allclose(summed.numpy(), base.numpy() - 0.5 * want, atol=1e-12 * size)
        x = torch.from_numpy(rng.normal(size=(2, 3, shape[1])))
        np.testing.assert_allclose(delta.apply(x).numpy(), x.numpy() @ want.T, atol=1e-11 * size)

    def test_float32_is_added_in_place_and_half_is_rounded_once(self) -> None:
        """In place for f32; bf16 and f16 get one rounding of the exact f32 sum."""
        import torch

        rng = np.random.default_rng(6)
        delta = self.make(rng, (12, 20))
        weight = torch.from_numpy(rng.normal(size=(12, 20)).astype(np.float32))
        before = weight.clone()
        assert delta.add_to(weight) is weight
        for dtype in (torch.bfloat16, torch.float16):
            half = before.to(dtype)
            torch.testing.assert_close(
                delta.add_to(half), (half.float() + delta.dense()).to(dtype), rtol=1e-2, atol=1e-6
            )
            assert torch.equal(half, before.to(dtype))


class FamilyContract:
    """What every family must do; subclasses set ``family`` and give `example`."""

    family: str

    def example(
        self, rng: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]], dict[str, tuple[int, int]], dict[str, Any]]:
        """Config, tensors as PEFT saves them, shapes of the base's weights and ΔW by module (float64).

        For a change that depends on the weight, a function of W (float64) in the place of ΔW.
        """
        raise NotImplementedError

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The example written as a PEFT folder."""
        config, tensors, _, _ = self.example(np.random.default_rng(7))
        return write_peft_example(tmp_path / "adapter", config, tensors)

    def test_reads_the_definition(self, folder: Path) -> None:
        """Every delta is the definition's ΔW."""
        import torch

        _, _, shapes, want = self.example(np.random.default_rng(7))
        adapter = read_folder(folder, shapes=shapes)
        assert adapter.family == self.family
        assert set(adapter.deltas) == set(want)
        for module, delta in adapter.deltas.items():
            if isinstance(delta, RelativeDelta):
                weight = np.random.default_rng(8).normal(size=shapes[module])
                got = delta.add_to(torch.from_numpy(weight.copy())).numpy() - weight
                np.testing.assert_allclose(got, want[module](weight), atol=1e-6)
            else:
                np.testing.assert_allclose(delta.dense(dtype=torch.float64).numpy(), want[module], atol=1e-6)

    def test_its_slots_are_those_its_deltas_fill(self, folder: Path) -> None:
        """Every delta goes into a slot the family names, or is refused where it names none."""
        from ssh_deploy.graph.bank_file import slot_kind
        from ssh_deploy.registry import get_family

        _, _, shapes, _ = self.example(np.random.default_rng(7))
        slots = get_family(self.family).slots
        for module, delta in read_folder(folder, shapes=shapes).deltas.items():
            if slots:
                assert slot_kind(module, delta) in slots
            else:
                with pytest.raises(AdapterMismatchError, match=f"no slot can hold a {delta.kind} delta"):
                    slot_kind(module, delta)

    def test_a_stray_tensor_is_refused(self, folder: Path, tmp_path: Path) -> None:
        """A tensor that nobody reads would be dropped in silence."""
        config, tensors, shapes, _ = self.example(np.random.default_rng(7))
        stray = write_peft_example(
            tmp_path / "stray", config, {**tensors, "base_model.model.x.y": np.ones(3, np.float32)}
        )
        with pytest.raises(AdapterFileError, match=r"x\.y"):
            read_folder(stray, shapes=shapes)


def write_peft_example(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Path:
    """Write a PEFT folder as given, unchecked; returns it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


_WORDS = ["what", "who", "where", "when", "why", "how", "is", "the", "a", "of", "free", "now", "win", "prize", "call"]
_WORDS += ["good", "bad", "great", "film", "movie", "question"]


def pico_model(architecture: str, folder: Path, *, task: str = "base", labels: int = 3, seed: int = 0) -> Path:
    """Save a small random model as a Hugging Face folder and return it.

    Args:
        architecture: ``bert``, ``roberta``, ``distilbert``, ``vit`` or ``gpt2``; decoders of the LLaMA shape with two
            heads of keys: ``llama`` (embeddings tied), ``llama-bias`` (biases everywhere), ``qwen2`` (biases at query,
            key and value), ``mistral`` (a window of 6 tokens), ``phi3`` (query, key and value in one weight).
        folder: where; made if missing.
        task: ``base`` (no head), ``text-classification`` (``image`` for ViT) or ``causal-lm``.
        labels: of the head.
        seed: of the weights.

    Text models get a word-level tokenizer.json over a few words.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    stem, fields = _PICO[architecture]
    config = getattr(transformers, f"{stem}Config")(**fields, num_labels=labels)
    head = "ForCausalLM" if task == "causal-lm" and stem != "GPT2" else _HEADS[task]
    model = getattr(transformers, stem + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # default initialisation is so small that adapters hide in rounding
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    if architecture != "vit":
        _save_tokenizer(folder, roberta=architecture == "roberta")
    return folder


_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
_GPT2_SIZES = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
_TOKENS = {"vocab_size": 64, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
_DECODER = {**_SIZES, **_TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 96}
#: architecture: (stem of its classes in transformers, fields of its config)
_PICO: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**_SIZES, "vocab_size": 64, "max_position_embeddings": 64}),
    "roberta": ("Roberta", {**_SIZES, "vocab_size": 64, "max_position_embeddings": 66, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBert",
        {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80, "vocab_size": 64, "max_position_embeddings": 64},
    ),
    "vit": ("ViT", {**_SIZES, "image_size": 32, "patch_size": 8}),
    "gpt2": ("GPT2", {**_GPT2_SIZES, **_TOKENS}),
    "llama": ("Llama", {**_DECODER, "tie_word_embeddings": True}),
    "llama-bias": ("Llama", {**_DECODER, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", _DECODER),
    "mistral": ("Mistral", {**_DECODER, "sliding_window": 6}),
    "phi3": ("Phi3", _DECODER),
}
_HEADS = {
    "base": "Model",
    "text-classification": "ForSequenceClassification",
    "image": "ForImageClassification",
    "causal-lm": "LMHeadModel",
}


def _save_tokenizer(folder: Path, *, roberta: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    begin, end = ("<s>", "</s>") if roberta else ("[CLS]", "[SEP]")
    unknown, pad = ("<unk>", "<pad>") if roberta else ("[UNK]", "[PAD]")
    vocabulary = {word: i for i, word in enumerate([*special, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "pad_token": pad,
        "unk_token": unknown,
        "cls_token": begin,
        "sep_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
