"""The hinge loss of scores and signs."""

import torch


class Model(torch.nn.Module):
    def forward(self, predicted, target):
        return torch.mean(torch.clamp(1 - predicted * target, min=0))


def get_inputs():
    return [torch.randn(64, 256), torch.randint(0, 2, (64, 256)).float() * 2 - 1]


def get_init_inputs():
    return []
