"""Backbones, as plain nn.Modules that map images [n, C, H, W] to features [n, d]."""

from bomemeta.nets.backbones import BACKBONES, build_backbone

__all__ = ["BACKBONES", "build_backbone"]
