"""Vision transformers of timm: its own where it is installed, and small ones of the same layout.

The small ones bear the names of timm's classes, which is what patch() goes by, and hold what it
touches: blocks of norms, attention, scales and MLPs, and how a pass calls them.
"""

import importlib.abc
import importlib.machinery
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
CASES = {
    "vit": {},
    "deit": {"distilled": True},
    "registers": {"reg_tokens": 4, "init_values": 0.5},
    "mean": {"class_token": False, "global_pool": "avg"},
    "normed": {"pre_norm": True, "qk_norm": True},
}
SOURCES = ("layout", "timm")


class Attention(nn.Module):
    def __init__(self, width, heads, norms):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.fused_attn = True
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim) if norms else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if norms else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, attn_mask=None, is_causal=False):
        split = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            made = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = scores if attn_mask is None else scores + attn_mask
            made = scores.softmax(-1) @ v
        return self.proj(made.transpose(1, 2).reshape(x.shape))


class LayerScale(nn.Module):
    def __init__(self, width, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width, heads, norms, scale):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, norms)
        self.ls1 = LayerScale(width, scale) if scale else nn.Identity()
        self.drop_path1 = nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))
        self.ls2 = LayerScale(width, scale) if scale else nn.Identity()
        self.drop_path2 = nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        made = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(made))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(  # noqa: PLR0913
        self,
        img_size,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        num_classes=10,
        class_token=True,
        distilled=False,
        reg_tokens=0,
        init_values=None,
        pre_norm=False,
        qk_norm=False,
        global_pool="token",
    ):
        super().__init__()
        self.embed_dim, self.global_pool = embed_dim, global_pool
        self.has_class_token, self.grad_checkpointing = class_token, False
        self.patch_embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        given = {"cls_token": class_token, "dist_token": distilled, "reg_token": reg_tokens}
        self.num_prefix_tokens = sum(map(int, given.values()))
        for name, tokens in given.items():
            size = 1, int(tokens), embed_dim
            setattr(self, name, nn.Parameter(torch.randn(size)) if tokens else None)
        tokens = (img_size // patch_size) ** 2 + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, embed_dim))
        self.norm_pre = nn.LayerNorm(embed_dim) if pre_norm else nn.Identity()
        blocks = (Block(embed_dim, num_heads, qk_norm, init_values) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def _pos_embed(self, x):
        prefix = (self.cls_token, self.dist_token, self.reg_token)
        prefix = [token.expand(len(x), -1, -1) for token in prefix if token is not None]
        return torch.cat([*prefix, x], 1) + self.pos_embed

    def embed(self, x):
        return self.norm_pre(self._pos_embed(self.patch_embed(x).flatten(2).transpose(1, 2)))

    def forward_features(self, x, attn_mask=None, is_causal=False):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.norm(x)

    def forward_intermediates(self, x):
        x, each = self.embed(x), []
        for block in self.blocks:
            each.append(x := block(x))
        return self.norm(x), each

    def forward_head(self, x):
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1)
        return self.head(x)

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


FILE = "timm.models.vision_transformer"
Block.__module__ = VisionTransformer.__module__ = FILE
Attention.__module__ = "timm.layers.attention"


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, of which timm's models need names only."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        made = types.ModuleType(spec.name)
        made.__getattr__ = lambda name: getattr(_Anything("Anything", (), {}), name)
        made.__version__ = "0"
        return made

    def exec_module(self, module):
        pass


def timm():
    """The package, without a torchvision that may not fit this PyTorch; skips if there is none."""
    if "timm" in sys.modules:
        return sys.modules["timm"]
    held = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "torchvision"}
    finder = _NoTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        return pytest.importorskip("timm", minversion="1.0.16")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(held)


def make(source, case="vit", fused=True, dtype=torch.float32, **fields):
    """A model with random weights, the same on every call, and large: attention matters then."""
    fields = {**SIZES, "num_classes": 10, **CASES[case], **fields}
    kind = VisionTransformer
    if source == "timm":
        models = timm().models
        if fields.pop("distilled", False):
            kind = models.deit.VisionTransformerDistilled
        else:
            kind = models.vision_transformer.VisionTransformer
    torch.manual_seed(0)
    model = kind(**fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("blocks" in name or "token" in name or "head" in name):
                parameter.normal_(std=0.15)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model.to(dtype).eval()


def images(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def embedded(model, values):
    """States before the first block, as the model itself makes them."""
    found = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(values)
    handle.remove()
    return found[0]
