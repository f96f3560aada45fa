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


class Generating(nn.Module):
    """A language model from tokens and a cache to logits and the longer cache."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[Any]
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        output = self.net(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        layers = output.past_key_values.layers
        return (output.logits, *(t for layer in layers for t in (layer.keys, layer.values)))


def decoder(kind: str, entries: dict[str, Any], cache: bool = False) -> Network:
    """A decoder by its config; tokens stand behind a random cache, or are alone.

    Args:
        kind: the config's class in transformers.
        entries: of the config.
        cache: whether there is one.
    """
    import transformers

    config = getattr(transformers, kind)(**entries)
    net = transformers.AutoModelForCausalLM.from_config(config)
    if "num_experts_per_tok" in entries:
        net.set_experts_implementation("batched_mm")  # a grouped product has no ONNX form
    ids = tokens(length=16) % config.vocab_size
    if not cache:
        return Network(Causal(net), (ids,))
    generator = torch.Generator().manual_seed(1)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = [
        tuple(torch.randn((1, heads, 6, size), generator=generator) for _ in "kv")
        for _ in range(config.num_hidden_layers)
    ]
    return Network(Generating(net), (ids, torch.ones((1, 22), dtype=torch.int64), past))


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
