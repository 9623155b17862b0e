"""The first half of a gated MLP."""

import torch


class Model(torch.nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.gate = torch.nn.Linear(inside, outside, bias=False)
        self.up = torch.nn.Linear(inside, outside, bias=False)

    def forward(self, x):
        return torch.nn.functional.silu(self.gate(x)) * self.up(x)


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return [256, 512]
