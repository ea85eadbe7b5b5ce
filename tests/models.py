"""Small models of many families, built from configs, with batches that differ between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCAB = 67


@dataclass(frozen=True)
class Case:
    """``batch(generator)`` makes keyword arguments; the model returns something with a ``loss``."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, Any]]


def _ids(g: torch.Generator, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=g)


def _labels(ids: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Labels with an uneven number of ignored positions a row."""
    labels = ids.clone()
    cut = torch.randint(1, ids.shape[1] - 2, (ids.shape[0],), generator=g)
    for row, length in enumerate(cut):
        labels[row, :length] = -100
    return labels


def causal_batch(g: torch.Generator, length: int = 12) -> dict[str, Any]:
    ids = _ids(g, length=length)
    return {"input_ids": ids, "labels": _labels(ids, g), "use_cache": False}


def masked_batch(g: torch.Generator, length: int = 12) -> dict[str, Any]:
    ids = _ids(g, length=length)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "labels": _labels(ids, g), "attention_mask": mask}


def _llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = dict(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **options}))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCAB, max_position_embeddings=64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(
        RobertaConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCAB, max_position_embeddings=64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCAB, max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0,
        )
    )  # fmt: skip


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, ffn_dim=44, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCAB, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
        )
    )  # fmt: skip


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, vocab_size=VOCAB,
            max_position_embeddings=64, sliding_window=4, attn_implementation="eager",
        )
    )  # fmt: skip


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, vocab_size=VOCAB,
            max_position_embeddings=64, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4, vocab_size=VOCAB,
            dropout_rate=0.0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=64,
            num_local_experts=3, num_experts_per_tok=2, output_router_logits=True,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            image_size=8, patch_size=4, num_labels=5,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _image_batch(g: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(3, 3, 8, 8, generator=g),
        "labels": torch.randint(0, 5, (3,), generator=g),
    }


@dataclass
class Output:
    loss: torch.Tensor


class SmallResNet(nn.Module):
    """Convolutions, batch norms, a skip with a projection, odd channel counts.

    Convolutions before a batch norm have no bias, as in ResNets: the norm takes it out again, so its
    gradient would be rounding noise, and nothing to compare.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7))
        self.body = nn.Sequential(
            nn.Conv2d(7, 9, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(9), nn.ReLU(),
            nn.Conv2d(9, 9, 3, padding=1, bias=False), nn.BatchNorm2d(9),
        )  # fmt: skip
        self.skip = nn.Conv2d(7, 9, 1, stride=2)
        self.head = nn.Linear(9, 5)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Output:
        x = self.stem(pixel_values).relu()
        x = (self.body(x) + self.skip(x)).relu().mean((2, 3))
        return Output(nn.functional.cross_entropy(self.head(x), labels))


class Odds(nn.Module):
    """What breaks careless sharding: tied, frozen, unused, 0-d, integer, tiny and uneven parameters,
    a buffer that the forward changes, a recurrent layer, and a parameter list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.extra = nn.ParameterList([nn.Parameter(torch.randn(1, 6)) for _ in range(2)])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(5, 6), requires_grad=False)
        self.unused = nn.Linear(3, 3)
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)
        self.shift = nn.Parameter(torch.tensor(2), requires_grad=False)
        self.head = nn.Linear(6, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Output:
        self.calls += 1
        x, _ = self.rnn(self.embed(input_ids))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x * (sum(self.extra) * self.scale + self.frozen.sum(0))
        x = x * (self.table.sum() + self.shift) / 8
        logits = self.head(x)
        return Output(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def _odds_batch(g: torch.Generator) -> dict[str, Any]:
    ids = _ids(g, 3, 5)
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


CASES: dict[str, Case] = {
    "llama": Case(_llama, causal_batch),
    "llama_tied": Case(lambda: _llama(tie_word_embeddings=True), causal_batch),
    "qwen3": Case(_qwen3, causal_batch),
    "gpt2": Case(_gpt2, causal_batch),
    "bert": Case(_bert, masked_batch),
    "llama_1kv": Case(lambda: _llama(num_key_value_heads=1), causal_batch),
    "neox": Case(_neox, causal_batch),
    "opt": Case(_opt, causal_batch),
    "roberta": Case(_roberta, masked_batch),
    "gemma2": Case(_gemma2, causal_batch),
    "gemma3": Case(_gemma3, causal_batch),
    "t5": Case(_t5, masked_batch),
    "mixtral": Case(_mixtral, causal_batch),
    "vit": Case(_vit, _image_batch),
    "resnet": Case(SmallResNet, _image_batch),
    "odds": Case(Odds, _odds_batch),
}
