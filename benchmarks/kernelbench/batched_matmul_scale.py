"""A batched product, scaled, plus a tensor."""

import torch


class Model(torch.nn.Module):
    def forward(self, x, y, z):
        return torch.bmm(x, y) * 0.125 + z


def get_inputs():
    return [torch.randn(4, 32, 64), torch.randn(4, 64, 48), torch.randn(4, 32, 48)]


def get_init_inputs():
    return []
