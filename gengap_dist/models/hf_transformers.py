"""Networks of Hugging Face's transformers by the model type of their configuration, with random weights.

Only architectures of the installed package: no weights, code or kernels are downloaded, and no files are read. A
network is transformers' own object, so that `save_pretrained` works, but it returns logits alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gengap_dist.compat.fast_imports import fast_imports
from gengap_dist.compat.offline_hub import offline_hub
from gengap_dist.errors import UsageError, did_you_mean, first_of

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Unset unless the user sets them: their defaults are those of another vocabulary, and padding is never trained."""


def transformers_model(
    name: str, *, input_shape: tuple[int, ...], output_shape: tuple[int, ...], options: Mapping[str, Any]
) -> nn.Module:
    """A causal language model, [N, T] to [N, T, V], or a classifier of images, [N, C, H, W] to [N, K].

    Args:
        name: model type, such as gpt2, llama, vit or resnet.
        input_shape: (T,) or (C, H, W).
        output_shape: (T, V) or (K,).
        options: settings of the configuration of this type. Vocabulary, context, classes, channels and image size are
            those of the data.

    Raises:
        UsageError: if transformers is not installed, it has no such network for these samples, or an option is unknown
            or not possible.
    """
    try:
        with fast_imports():
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
            from transformers.models.auto import modeling_auto
    except ImportError:
        raise UsageError(
            f"model.name (transformers:{name}) needs the package transformers: pip install 'gengap_dist[transformers]'"
        ) from None
    shapes = len(input_shape), len(output_shape)
    if shapes == (1, 2):
        auto, known = AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        kind = "causal language model"
        of_data: dict[str, Any] = {"max_position_embeddings": input_shape[0], "vocab_size": output_shape[1]}
    elif shapes == (3, 1):
        auto, known = AutoModelForImageClassification, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        channels, height, width = input_shape
        kind = "classifier of images"
        of_data = {"num_channels": channels, "image_size": height if height == width else [height, width]}
    else:
        raise UsageError(
            f"model.name (transformers:{name}) reads tokens or images, and the samples are inputs of shape "
            f"{list(input_shape)} with outputs of shape {list(output_shape)}: choose another network, such as your own "
            "module.path:factory"
        )
    if name not in known:
        raise UsageError(
            f"model.name (transformers:{name}) is no {kind} of transformers{did_you_mean(name, [*known])}: choose a "
            f"model type, such as {'gpt2 or llama' if shapes == (1, 2) else 'vit or resnet'}"
        )
    with offline_hub():
        settings = _settings(name, AutoConfig.for_model(name), of_data, options)
        if shapes == (3, 1):
            settings["num_labels"] = output_shape[0]
        try:
            model = auto.from_config(AutoConfig.for_model(name, **settings), trust_remote_code=False)
        except Exception as error:  # of any architecture
            raise UsageError(
                f"model.name (transformers:{name}) cannot be built with model.options ({dict(options)}): "
                f"{' '.join(str(error).split()) or type(error).__name__}"
            ) from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # of the keys and values of earlier tokens, for generating text
    model.register_forward_hook(_logits)
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.is_measured = True  # see probes/trace.py
    return model


def _logits(module: nn.Module, args: Any, output: Any) -> Tensor:
    return output.logits


def _settings(name: str, config: Any, of_data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a type is made of: the options, and what follows from the data, where it has that.

    Args:
        name: of the type.
        config: its default.
        of_data: by name; other settings of the same meaning are found by the configuration's table of names.
        options: of the user.

    Raises:
        UsageError: if an option is unknown, or follows from the data.
    """
    from transformers import PretrainedConfig

    names: dict[str, str] = config.attribute_map  # other names of some settings
    every = {*config.to_dict(), *names.values()}
    of_all_types = {*PretrainedConfig().to_dict(), "model_type"} - {*SPECIAL_TOKENS, "tie_word_embeddings"}
    fixed = {names.get(key, key): value for key, value in of_data.items()}
    fixed = {key: value for key, value in fixed.items() if key in every}
    known = {key for key in {*every, *names} if names.get(key, key) not in {*fixed, *of_all_types, "use_cache"}}
    for key in options:
        if names.get(key, key) in fixed:
            raise UsageError(
                f"model.options.{key} ({options[key]}) follows from the data, {fixed[names.get(key, key)]}: remove it"
            )
        if key not in known:
            raise UsageError(
                f"model.options.{key} ({options[key]}) is no setting of transformers:{name}"
                f"{did_you_mean(key, [*known])}: choose among {first_of(sorted(known), 8)}"
            )
    unset = {key: None for key in SPECIAL_TOKENS if key in every}
    return unset | {names.get(key, key): value for key, value in options.items()} | fixed
