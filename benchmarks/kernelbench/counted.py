"""A module that counts its calls, and so cannot be a function of tensors."""

import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.relu(x) * self.calls


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return []
