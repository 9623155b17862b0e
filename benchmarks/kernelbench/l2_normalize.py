"""Rows of length 1."""

import torch


class Model(torch.nn.Module):
    def forward(self, x):
        return x / torch.sqrt((x * x).sum(dim=1, keepdim=True) + 1e-12)


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return []
