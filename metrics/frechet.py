"""Frechet distance between two sets of feature vectors, in float64."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to `first [n, D]` and `second [m, D]`.

    `|mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)` (Heusel et al. 2017, Eq. 6) with
    unbiased covariances. Warns where there are not more samples than dimensions: the covariance is then
    singular and the value too large.

    Raises:
        ValueError: shapes differ, fewer than two samples, or a number is not finite.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"the {name} set has shape {tuple(features.shape)}; expected [n, D] with n of 2 or more")
        if not bool(features.isfinite().all()):
            raise ValueError(f"the {name} set holds features that are not finite")
        if len(features) <= features.shape[1]:
            warnings.warn(f"{len(features)} samples for {features.shape[1]} dimensions: the distance is biased upwards")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of {first.shape[1]} and of {second.shape[1]} dimensions cannot be compared")
    return gaussian_frechet(*_moments(first), *_moments(second))


def gaussian_frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Frechet distance of `N(mean1 [D], cov1 [D, D])` and `N(mean2, cov2)`."""
    mean1, cov1, mean2, cov2 = (x.double() for x in (mean1, cov1, mean2, cov2))
    root = _sqrt(cov1)
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, float(distance))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    x = features.detach().cpu().double()
    return x.mean(0), torch.atleast_2d(x.T.cov())


def _sqrt(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
