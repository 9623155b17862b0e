"""Dropout in training mode: random numbers stay PyTorch's."""

import torch


class Model(torch.nn.Module):
    def __init__(self, features):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.linear = torch.nn.Linear(features, features)

    def forward(self, x):
        return torch.relu(self.linear(self.dropout(x))) + x


def get_inputs():
    return [torch.randn(64, 256)]


def get_init_inputs():
    return [256]
