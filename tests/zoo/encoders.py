"""Encoders of text, images and sound: the model types that are tried, and what their tiny configurations need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from zoo.shrink import tiny_config

from precast.runtime.artifact.tasks import TASK_TABLE, get_task

_ROBERTA = {"type_vocab_size": 1}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_CONVS = {
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "tdnn_dim": [32, 32, 48],
    "tdnn_kernel": [3, 2, 1],
    "tdnn_dilation": [1, 2, 1],
    "xvector_output_dim": 24,
    "vocab_size": tiny.VOCABULARY,
    "ctc_loss_reduction": "mean",
    "classifier_proj_size": 32,
}

_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def _plain(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {} for name in names}


TEXT: dict[str, dict[str, Any]] = {
    **_plain("albert", "bert", "canine", "electra", "ernie", "flaubert", "fnet", "funnel", "ibert", "layoutlm",
             "layoutlmv2", "luke", "markuplm", "megatron-bert", "modernbert", "mpnet", "mra", "rembert",
             "roc_bert", "roformer", "splinter", "squeezebert", "tapas", "xlm", "xlnet", "yoso", "clip_text_model",
             "siglip_text_model"),
    **dict.fromkeys(["camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"],
                    _ROBERTA),
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"embedding_size": 64},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "position_buckets": 8, "conv_kernel_size": 3, "share_att_key": True},
    "distilbert": {"dim": 64, "hidden_dim": 96},
    "esm": {"vocab_size": tiny.VOCABULARY, "position_embedding_type": "rotary", "token_dropout": True,
            "mask_token_id": 3},
    "eurobert": {"num_key_value_heads": 4},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 48},
    "longformer": {"attention_window": 8},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32,
                   "num_feedforward_networks": 2},
    "nystromformer": {"num_landmarks": 16, "segment_means_seq_len": 16},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}  # fmt: skip
_STARTS = {"decoder_start_token_id": 0}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    **_plain("bart", "mbart", "mvp", "plbart"),
    **dict.fromkeys(["mt5", "t5", "umt5"], _STARTS),
    "bigbird_pegasus": {"attention_type": "original_full"},
}
"""Encoder-decoders that read a text at once to classify it."""
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
        "layer_type": "basic", "out_features": ["stage2"],
    },
    "d_model": 32, "num_queries": 5, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_layers": 1, "decoder_layers": 1,
}  # fmt: skip
_STAGES = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "image_size": 32}
_SEGMENTED = {**_IMAGE, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
# As published: by default neither type has a table of relative positions.
_RELATIVE = {**_SEGMENTED, "use_relative_position_bias": True}

IMAGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "vit", "vit_msn",
                     "clip_vision_model", "siglip_vision_model"], _IMAGE),
    **_plain("bit", "convnext", "convnextv2", "cvt", "dinov3_convnext", "focalnet", "mobilenet_v1",
             "mobilenet_v2", "mobilevit", "poolformer", "pvt", "pvt_v2", "resnet", "segformer", "swiftformer",
             "clip", "siglip", "siglip2"),
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "beit": _RELATIVE, "data2vec-vision": _RELATIVE,
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.4, "hidden_dim": 640},
    "yolos": {**_IMAGE, "image_size": [32, 32], "num_detection_tokens": 5},
    "hiera": {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "levit": {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8]},
    "mobilevitv2": {"image_size": 64},
    "dpt": {**_IMAGE, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16},
    "swin": _STAGES, "swinv2": _STAGES,
    "upernet": {"hidden_size": 32, "auxiliary_in_channels": 32, "auxiliary_channels": 16, "backbone_config": {
        "model_type": "convnext", "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}},
    "detr": _RESNET, "conditional_detr": _RESNET, "table-transformer": _RESNET,
}  # fmt: skip
SOUND: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "sew", "sew-d", "data2vec-audio",
                     "wav2vec2-conformer"], _CONVS),
    "wav2vec2-bert": {"vocab_size": tiny.VOCABULARY, "feature_projection_input_dim": 24, "tdnn_dim": [32, 32, 48],
                      "tdnn_kernel": [3, 2, 1], "tdnn_dilation": [1, 2, 1], "xvector_output_dim": 24},
    "audio-spectrogram-transformer": {"max_length": 48, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8,
                                      "frequency_stride": 8},
}  # fmt: skip

_LARGER = (
    "conditional_detr",
    "detr",
    "hiera",
    "levit",
    "mobilenet_v1",
    "mobilevitv2",
    "table-transformer",
    "upernet",
)
FAMILIES = {**TEXT, **CLASSIFIERS, **IMAGES, **SOUND}


def make(path: Path, model_type: str, task: str) -> Path:
    """A tiny random checkpoint."""
    torch.manual_seed(0)
    config = tiny_config(model_type, FAMILIES[model_type])
    model = _class(config, task)(config)
    fill(model)
    settle(model.eval(), (options(model_type, task).get("image_size") or (0,))[0])
    model.save_pretrained(path)
    if model_type in TEXT or model_type in CLASSIFIERS or model_type in ("clip", "siglip", "siglip2"):
        tiny.tokenizer().save_pretrained(path)
    return path


def fill(model: torch.nn.Module) -> None:
    """Random weights, large enough that every layer matters, and no larger with depth."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.numel():
                parameter.normal_(0, 1.2 / (parameter.numel() / len(parameter)) ** 0.5)


def settle(model: torch.nn.Module, side: int) -> None:
    """Give batch norms the statistics of pictures: with those they start with, deep models answer next to nothing."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.momentum = 1.0
        norm.train()
    waves = torch.sin(torch.arange(side) * torch.rand(16, 3, side, 1) * 0.3 + torch.rand(16, 3, side, 1) * 6)
    pictures = waves + 0.3 * torch.randn_like(waves)
    with torch.no_grad():
        model(pictures)
        largest = model.eval()(pictures[:2], return_dict=False)[0].abs().max()
    assert 0.01 < largest < 100, largest


def _class(config: Any, task: str) -> Any:
    """The first, where transformers has several."""
    found = getattr(transformers, get_task(task, "encoder").auto)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def options(model_type: str, task: str) -> dict[str, Any]:
    """The sizes to compile it for."""
    sizes: dict[str, Any] = {"batch_size": 2}
    if task == "zero-shot-image-classification":
        sizes |= {"text_batch_size": 3, "sequence_length": (16,)}
    elif model_type in TEXT or model_type in CLASSIFIERS:
        sizes["sequence_length"] = (24,)
    elif model_type in SOUND and model_type != "audio-spectrogram-transformer":
        sizes["audio_sequence_length"] = (64,) if model_type == "wav2vec2-bert" else (1200,)
    elif model_type in IMAGES:
        sizes["image_size"] = (64,) if model_type in _LARGER else (32,)
    if task == "multiple-choice":
        sizes["num_choices"] = 3
    return sizes


def pairs() -> list[tuple[str, str]]:
    """Every family with every task that transformers has a class for, those in REFUSED too."""
    return [
        (family, row.name)
        for family in FAMILIES
        for row in TASK_TABLE
        if row.kind == "encoder"
        and (family not in CLASSIFIERS or row.name in ("question-answering", "text-classification"))
        and transformers.CONFIG_MAPPING[family] in getattr(transformers, row.auto)._model_mapping
    ]


_TOGETHER = "it reads images and texts together; zero-shot-image-classification has both embeddings among its answers"

REFUSED: dict[str | tuple[str, str], str] = {
    "canine": "it pools characters in groups, padding among them, and cannot read fewer than a group itself",
    "funnel": "it pools positions in groups, padding among them, and cannot read a single token itself",
    "layoutlmv2": "its visual backbone needs detectron2",
    "longformer": "it decides by its inputs' values which tokens have global attention, which one graph cannot",
    "reformer": "it hashes positions with random numbers, so that its answers differ from call to call",
    "sew-d": "its answer to sound changes with the length that the sound is padded to",
    "siglip2": "its images are sequences of patches of any number, not pixels of one size",
    "tapas": "its token_type_ids are seven numbers per token, made from tables; precast passes one",
    "yoso": "its answer to a text changes with the length that the text is padded to",
    ("clip", "feature-extraction"): _TOGETHER,
    ("siglip", "feature-extraction"): _TOGETHER,
}
"""Model types, or pairs, that cannot be exported, each with the reason in one line for users."""
