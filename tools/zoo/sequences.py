"""Networks for sequences: small random configurations of transformers, and recurrent nets."""

from collections.abc import Callable
from typing import Any

import torch
from entry import Network
from torch import nn

VOCABULARY = 1000


def tokens(batch: int = 1, length: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


class Text(nn.Module):
    """A transformers model from tokens (and a mask) to one tensor."""

    def __init__(self, net: nn.Module, result: str) -> None:
        super().__init__()
        self.net = net
        self.result = result

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.net(input_ids=input_ids, attention_mask=attention_mask)
        return getattr(output, self.result)


class Causal(nn.Module):
    """A language model from tokens to logits, without a cache."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids=input_ids, use_cache=False).logits


class Signal(nn.Module):
    """A transformers model from pixels or spectrograms to one tensor."""

    def __init__(self, net: nn.Module, argument: str, result: str) -> None:
        super().__init__()
        self.net = net
        self.argument = argument
        self.result = result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.net(**{self.argument: x}), self.result)


def bert() -> Network:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    ids = tokens()
    return Network(
        Text(BertForSequenceClassification(config), "logits"), (ids, torch.ones_like(ids))
    )


def gpt2() -> Network:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=128, n_layer=3, n_head=4)
    return Network(Causal(GPT2LMHeadModel(config)), (tokens(),))


def llama() -> Network:
    """Grouped-query attention: 8 heads share 4 of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    return Network(Causal(LlamaForCausalLM(config)), (tokens(),))


def mixtral() -> Network:
    """A mixture of experts: each token is computed by two of four."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    net = MixtralForCausalLM(config)
    net.set_experts_implementation("batched_mm")  # a grouped product has no ONNX form
    return Network(Causal(net), (tokens(),))


def t5_encoder() -> Network:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4
    )
    ids = tokens()
    return Network(Text(T5EncoderModel(config), "last_hidden_state"), (ids, torch.ones_like(ids)))


def hf_vit() -> Network:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=64,
        patch_size=8,
        num_labels=100,
    )
    image = torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    return Network(Signal(ViTForImageClassification(config), "pixel_values", "logits"), (image,))


def whisper_encoder() -> Network:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=40,
        d_model=128,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        max_source_positions=100,
    )
    sound = torch.randn((1, 40, 200), generator=torch.Generator().manual_seed(0))
    return Network(Signal(WhisperEncoder(config), "input_features", "last_hidden_state"), (sound,))


class Tagger(nn.Module):
    """Embedding, a recurrent stack, a linear layer per token."""

    def __init__(
        self, kind: Callable[..., nn.RNNBase], width: int = 64, hidden: int = 96, **options: Any
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.rnn = kind(width, hidden, batch_first=True, **options)
        self.head = nn.Linear(hidden * (1 + self.rnn.bidirectional), 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def tagger(kind: str, **options: Any) -> Network:
    return Network(Tagger(getattr(nn, kind), **options), (tokens(),))
