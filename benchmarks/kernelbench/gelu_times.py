"""Two tensors, one through gelu."""

import torch


class Model(torch.nn.Module):
    def forward(self, x, y):
        return torch.nn.functional.gelu(x) * y


def get_inputs():
    return [torch.randn(64, 256), torch.randn(64, 256)]


def get_init_inputs():
    return []
