"""
NeoBERT (Le Breton et al. 2025, arXiv 2502.19587) for transformers, which has no class of its own
for it. This file lies in every NeoBERT folder that is saved, beside weights with the published
names, and config.json points to it:

    AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)     # or AutoModel
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


class NeoBERTConfig(PretrainedConfig):
    """The keys of config.json are attributes; those that it may lack have their values here."""

    model_type = "neobert"

    def __init__(self, norm_eps=1e-6, decoder_bias=True, is_causal=False, **keys):
        keys = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
                "tie_word_embeddings": False} | keys  # fmt: skip
        super().__init__(**keys)
        self.norm_eps, self.decoder_bias, self.is_causal = norm_eps, decoder_bias, is_causal
        if self.rope_parameters["rope_type"] != "default":
            raise ValueError(f"rope_type {self.rope_parameters['rope_type']!r}: expected default")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))"""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        n_hidden = (int(2 * c.intermediate_size / 3) + 7) // 8 * 8  # 3072 stands for 2048
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.wo = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.ffn = nn.ModuleDict({
            "w12": nn.Linear(c.hidden_size, 2 * n_hidden, bias=False),
            "w3": nn.Linear(n_hidden, c.hidden_size, bias=False)})  # fmt: skip
        self.attention_norm = nn.RMSNorm(c.hidden_size, c.norm_eps)
        self.ffn_norm = nn.RMSNorm(c.hidden_size, c.norm_eps)

    def forward(self, x, mask, turn):  # [B, n, C], [B, 1, n, n] or None, [n, D/2] complex
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (self.config.num_attention_heads, -1))
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)  # [B, H, n, D]; side by side in each head
        y = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, mask)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        gate, up = self.ffn.w12(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn.w3(F.silu(gate) * up)


def rotate(x, turn):
    """Neighbouring dimensions are one complex number. x [B, H, n, D], turn [n, D/2] complex."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class NeoBERTPreTrainedModel(PreTrainedModel):
    config_class = NeoBERTConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True


class NeoBERT(NeoBERTPreTrainedModel):
    """AutoModel: hidden states after the final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer_encoder = nn.ModuleList(
            Block(config) for _ in range(config.num_hidden_layers)
        )
        self.layer_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **_):
        x = self.encoder(input_ids) if inputs_embeds is None else inputs_embeds  # [B, n, C]
        c, n, device = self.config, x.size(1), x.device
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]  # [B, 1, 1, n]: keys
        if c.is_causal:
            causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
            mask = causal if mask is None else mask & causal
        even = torch.arange(0, c.hidden_size // c.num_attention_heads, 2, device=device)
        freq = c.rope_parameters["rope_theta"] ** -(even / (2 * len(even)))  # [D/2]
        angle = torch.outer(torch.arange(n, device=device), freq)
        turn = torch.polar(torch.ones_like(angle), angle)
        for block in self.transformer_encoder:
            x = block(x, mask, turn)
        return BaseModelOutput(last_hidden_state=self.layer_norm(x))


class NeoBERTLMHead(NeoBERTPreTrainedModel):
    """AutoModelForMaskedLM."""

    _tied_weights_keys = {"decoder.weight": "model.encoder.weight"}  # if tie_word_embeddings

    def __init__(self, config):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.encoder

    def get_output_embeddings(self):
        return self.decoder

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **_):
        hidden = self.model(input_ids, attention_mask, inputs_embeds).last_hidden_state
        logits, loss = self.decoder(hidden), None
        if labels is not None:  # -100 where nothing is asked
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)
