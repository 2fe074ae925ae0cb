"""A Hugging Face model to a plain ONNX graph, through `torch.onnx.export(dynamo=True)` and a thin wrapper.

The wrapper takes a flat list of tensors and gives named outputs. What the base checkpoint does not hold is not
invented: transformers fills a missing head with random numbers, and `Loaded.missing` names those modules so that
their numbers are never used (`lowering.head`). A base without a head also gives its hidden state. A decoder takes its
KV cache as flat tensors and gives it back grown (`kv_cache`).

Not covered: models that bring their own code, decoders that keep anything else than keys and values.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ssh_deploy.adapters.base import Adapter
from ssh_deploy.checkpoints.index import Checkpoint
from ssh_deploy.errors import GraphError, UnknownNameError
from ssh_deploy.graph.kv_cache import PAST, CacheShape, cache_shape, cache_tensors, decoder_inputs, make_cache
from ssh_deploy.graph.slices import split_where_sliced

#: Auto class of each task; adapter files call the last one ``causal-lm``.
CLASSES = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "text-generation": "AutoModelForCausalLM",
}
OPSETS = range(18, 24)
_SUFFIXES = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A traced model.

    Attributes:
        graph: the plain ONNX model.
        inputs: names in order.
        outputs: names in order.
        hidden: width of the hidden state.
        base_labels: class names of the base's own head; empty without one.
        cache: what a decoder keeps; None for every other task.
        embedding: module path of a decoder's output embedding; "" for every other task.
    """

    graph: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    hidden: int
    base_labels: tuple[str, ...]
    cache: CacheShape | None = None
    embedding: str = ""


def resolve_task(checkpoint: Checkpoint, task: str, adapters: Sequence[Adapter] = ()) -> str:
    """The task to trace: ``task`` itself, or for ``auto`` what the adapters were trained for, else the base's own.

    Raises:
        UnknownNameError: no such task.
        GraphError: adapters of different tasks.
    """
    if task != "auto":
        if task not in CLASSES:
            raise UnknownNameError(f"No task {task!r}.", hint=f"There is auto, {', '.join(CLASSES)}.")
        return task
    own = next(
        (t for name in checkpoint.config.get("architectures") or () for s, t in _SUFFIXES.items() if name.endswith(s)),
        None,
    )
    vision = "image_size" in checkpoint.config
    headed = "image-classification" if vision else "text-classification"
    wanted = {a.task or (headed if a.replaced else own or "feature-extraction") for a in adapters}
    wanted = {"text-generation" if t == "causal-lm" else t for t in wanted}
    if vision:
        wanted = {headed if t == "text-classification" else t for t in wanted}
    if len(wanted) > 1:
        raise GraphError(
            f"The adapters were trained for different tasks: {', '.join(sorted(wanted))}.",
            hint="Export each task to a folder of its own, or choose one with --task.",
        )
    return next(iter(wanted), own or "feature-extraction")


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A torch model of transformers, float32, in eval mode.

    ``missing``: modules whose weight the checkpoint does not hold, so that transformers made it up.
    ``cache``: what a decoder of text keeps, None for every other task.
    """

    model: Any
    task: str
    missing: frozenset[str]
    cache: CacheShape | None = None


def load_torch(checkpoint: Checkpoint, task: str, *, labels: int | None = None) -> Loaded:
    """The checkpoint as a torch model of ``task``.

    Args:
        checkpoint: the base.
        task: of `CLASSES`.
        labels: number of labels of a head that the base does not have.

    Raises:
        GraphError: transformers cannot load it for this task, or it generates text without a KV cache.
    """
    import torch

    transformers: Any = importlib.import_module("transformers")
    changes = {} if labels is None else {"num_labels": labels}
    with quiet():
        try:
            model, info = getattr(transformers, CLASSES[task]).from_pretrained(
                checkpoint.folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=labels is not None,
                **changes,
            )
        except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
            raise GraphError(
                f"{checkpoint.folder}: transformers cannot load it for {task}: {str(error).splitlines()[0]}",
                hint=f"Is it a model for {task}? Choose another --task, or upgrade transformers.",
            ) from error
    missing = frozenset(str(key).rpartition(".")[0] for key in info["missing_keys"])
    model.eval()
    return Loaded(model, task, missing, cache_shape(model) if task == "text-generation" else None)


def trace_model(loaded: Loaded, *, opset: int = 20) -> Traced:
    """Trace a model, batch and sequence free; its weights are in the graph as views until that is saved.

    Raises:
        GraphError: transformers or torch refuses, or the opset is none of `OPSETS`.
    """
    if opset not in OPSETS:
        raise GraphError(
            f"Opset {opset} is not supported.", hint=f"Use {OPSETS[0]} to {OPSETS[-1]}; 20 is tested most."
        )
    model, task, missing = loaded.model, loaded.task, loaded.missing
    headless = bool(missing) and task.endswith("classification")
    outputs: tuple[str, ...] = ("last_hidden_state",) if task == "feature-extraction" else ("logits",)
    if headless:
        outputs = (*outputs, "last_hidden_state")
    if loaded.cache is not None:
        outputs = (*outputs, *loaded.cache.outputs)
    example = example_inputs(model) if loaded.cache is None else decoder_inputs(model, loaded.cache)
    graph = _export(model, example, outputs, opset)
    config = model.config
    labelled = task.endswith("classification") and not missing
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names[i]) for i in sorted(names)) if labelled else ()
    return Traced(graph, tuple(example), outputs, int(config.hidden_size), labels, loaded.cache, _embedding(loaded))


def example_inputs(model: Any, *, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Any]:
    """Random inputs of ``model`` by name: token ids with their mask, or pixels; the last row is padded.

    Args:
        model: a torch model of transformers.
        batch: rows.
        length: tokens a row; ignored for images.
        seed: of the numbers.
    """
    import torch

    parameters = inspect.signature(model.forward).parameters
    made = torch.Generator().manual_seed(seed)
    if "pixel_values" in parameters:
        side = model.config.image_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        return {"pixel_values": torch.randn((batch, model.config.num_channels, *sides), generator=made)}
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=made)
    mask = torch.ones_like(ids)
    if batch > 1 and length > 2:
        pad = getattr(model.config, "pad_token_id", None) or 0
        ids[-1, length - length // 3 :] = pad
        mask[-1, length - length // 3 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in parameters and (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def run_torch(model: Any, inputs: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any]:
    """Outputs of ``model`` by name; ``last_hidden_state`` is that of its base model.

    Args:
        model: a torch model of transformers.
        inputs: tensors by name.
        outputs: of ``logits``, ``last_hidden_state`` and, for decoders, all of `CacheShape.outputs` or none.
    """
    kept: dict[str, Any] = {}
    hook = cache = None
    if "last_hidden_state" in outputs:
        hook = model.base_model.register_forward_hook(lambda _m, _i, out: kept.update(last_hidden_state=out[0]))
    options: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        if any(name.startswith(PAST) for name in inputs):
            cache = make_cache(inputs)
            inputs = {name: value for name, value in inputs.items() if not name.startswith(PAST)}
        options = {"past_key_values": cache, "use_cache": cache is not None}
    try:
        answer = model(**inputs, return_dict=True, **options)
    finally:
        if hook is not None:
            hook.remove()
    if "logits" in outputs:
        kept["logits"] = answer.logits
    if cache is not None:
        kept |= cache_tensors(cache)
    return {name: kept[name] for name in outputs}


def _export(model: Any, example: dict[str, Any], outputs: Sequence[str], opset: int) -> ir.Model:
    import torch

    names = list(example)

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            return tuple(run_torch(self.model, dict(zip(names, tensors, strict=True)), outputs).values())

    decoder = any(name.startswith(PAST) for name in names)
    free = tuple(_free_sides(name, tensor.ndim, decoder=decoder) for name, tensor in example.items())
    with quiet(), _rules_of_one_node():
        try:
            program = torch.onnx.export(
                Wrapper().eval(),
                tuple(example.values()),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(free,),
                input_names=names,
                output_names=list(outputs),
                verbose=False,
            )
        except Exception as error:  # torch raises many kinds; the first line of each says what
            raise GraphError(
                f"torch cannot export {type(model).__name__}: {type(error).__name__}: {str(error).splitlines()[0]}",
                hint="This architecture cannot be traced with this torch; upgrade torch and transformers together.",
            ) from error
    assert program is not None
    graph: ir.Model = program.model
    for node in graph.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names files of this machine
    split_where_sliced(graph.graph)
    return graph


@contextmanager
def _rules_of_one_node() -> Iterator[None]:
    """The exporter's optimiser without rules for several nodes at once, of which it tries all in every place.

    In onnxscript 0.7 that is one, two Slices of a whole become a Split (`slices` does it in one pass), and half of what
    a decoder's export takes. Where another version keeps its rules elsewhere, all of them stay.
    """
    rewriter: Any = importlib.import_module("onnxscript.rewriter")
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    single = [rule for rule in rules if getattr(getattr(rule, "_target_pattern", None), "has_single_output_node", True)]
    if len(single) == len(rules):
        yield
        return
    rewriter._DEFAULT_REWRITE_RULES = tuple(single)  # no argument of the exporter reaches it
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


def _embedding(loaded: Loaded) -> str:
    made = loaded.model.get_output_embeddings() if loaded.cache is not None else None
    return next((name for name, module in loaded.model.named_modules() if module is made), "")


def _free_sides(name: str, ndim: int, *, decoder: bool) -> dict[int, str]:
    """Sides of an input that stay free, by their names in the graph."""
    if name.startswith(PAST):
        return {0: "batch", 2: "past"}
    if ndim != 2:
        return {0: "batch"}
    if not decoder:
        return {0: "batch", 1: "sequence"}
    return {0: "batch", 1: "past + tokens" if name == "attention_mask" else "tokens"}


@contextmanager
def quiet() -> Iterator[None]:
    """Third parties' progress bars, warnings and log lines held back."""
    transformers_logging: Any = importlib.import_module("transformers.utils.logging")

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
