"""RMSNorm, then a linear layer."""

import torch


class Model(torch.nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.norm = torch.nn.RMSNorm(inside, eps=1e-6)
        self.linear = torch.nn.Linear(inside, outside, bias=False)

    def forward(self, x):
        return self.linear(self.norm(x))


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return [256, 128]
