"""Softmax of scaled logits."""

import torch


class Model(torch.nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, x):
        return torch.softmax(x / self.temperature, dim=-1)


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return [2.0]
