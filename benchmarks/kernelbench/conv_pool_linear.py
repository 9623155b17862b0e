"""A convolution and pooling, then a classifier."""

import torch


class Model(torch.nn.Module):
    def __init__(self, channels, features, classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, features, 3)
        self.linear = torch.nn.Linear(features * 49, classes)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        return torch.log_softmax(self.linear(x.flatten(1)), dim=-1)


def get_inputs():
    return [torch.randn(2, 3, 16, 16)]


def get_init_inputs():
    return [3, 8, 10]
