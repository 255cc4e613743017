"""The same pass as a torch.compile backend. It is found by its name: nothing of rewriter is imported."""

import torch
from torch import nn


class SelfAttention(nn.Module):
    """Attention as people write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


torch.manual_seed(0)
model = SelfAttention(64, 4).eval()
fast = torch.compile(model, backend="rewriter", options={"inner": "eager"})  # the default inner backend is "inductor"
x = torch.randn(2, 300, 64)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
print("the compiled module agrees with the original")
