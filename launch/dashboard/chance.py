"""What routing shows beyond chance: domains that prefer experts, experts that are chosen together. No torch.

With many comparisons some differ by chance alone, so a z counts only above Bonferroni's limit: two-sided
0.01 over all that were made. Tokens of one document are alike, which no formula here knows: z says what
is clear, and is not to be read as a probability.

Legend: D domains, L layers, E experts, K experts that a token chooses.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.01  # chance that any of all comparisons is called clear where there is nothing
FEWEST = 5.0  # tokens expected, below which a count is too small for a normal approximation


def preferred(domains: NDArray[np.int64], top_k: int, most: int) -> list[tuple[int, int, int, float, float]]:
    """(domain, layer, expert, share / overall share, z) of counts [D, L, E], the greatest |z| first.

    A token chooses an expert at most once, so of the n/K tokens of a domain (n assignments) those that choose
    one are binomial with probability K p, p being the expert's share of all N assignments of the layer.
    Against all other domains, of which the domain's share d is no part, the two-proportion z is

        z = (d - p) / sqrt(p (1 - K p) (1/n - 1/N))
    """
    counts = domains.astype(np.float64)
    in_domain = counts.sum(-1, keepdims=True)  # [D, L, 1]
    in_layer = in_domain.sum(0)  # [L, 1]
    overall = counts.sum(0) / np.maximum(1, in_layer)  # [L, E]
    share = counts / np.maximum(1, in_domain)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = overall * (1 - top_k * overall) * (1 / in_domain - 1 / in_layer)
        z = (share - overall) / np.sqrt(variance)
    tested = (in_domain * overall >= FEWEST) & np.isfinite(z)
    clear = tested & (np.abs(z) > _limit(int(tested.sum())))
    found = np.argwhere(clear)
    order = np.argsort(-np.abs(z[clear]), kind="stable")[:most]
    return [
        (d, layer, e, float(share[d, layer, e] / overall[layer, e]), float(z[d, layer, e]))
        for d, layer, e in found[order].tolist()
    ]


def together(pairs: NDArray[np.int64], most: int) -> list[tuple[int, int, int, float, int]]:
    """(layer, i, j, observed / expected, observed) of pair counts [L, E(E-1)/2], the greatest ratio first.

    Under independent choice of two different experts, a pair's expected count is in proportion to c_i c_j,
    where c_i, how often i was chosen in the same tokens, is the sum over j of pairs_ij divided by K - 1:

        expected_ij = c_i c_j x (sum of all pairs) / (sum over i < j of c_i c_j)

    so that K cancels, and so does the number of tokens T. The plain c_i c_j / T also expects an expert to be
    chosen with itself: even routing by chance would give E (K - 1) / (K (E - 1)) times it, 0.8 for 4 of 16.
    Kept is what lies above chance by the z of a Poisson count, (observed - expected) / sqrt(expected).
    """
    num_experts = round((1 + np.sqrt(1 + 8 * pairs.shape[-1])) / 2)
    first, second = np.triu_indices(num_experts, 1)
    observed = pairs.astype(np.float64)
    chosen = np.stack(
        [np.bincount(first, row, num_experts) + np.bincount(second, row, num_experts) for row in observed]
    )
    products = chosen[:, first] * chosen[:, second]
    scale = observed.sum(-1) / np.maximum(1, products.sum(-1))
    expected = products * scale[:, None]
    tested = expected >= FEWEST
    z = (observed - expected) / np.sqrt(np.maximum(expected, FEWEST))
    ratio = observed / np.maximum(expected, FEWEST)
    clear = tested & (z > _limit(int(tested.sum())))
    found = np.argwhere(clear)
    order = np.argsort(-ratio[clear], kind="stable")[:most]
    return [
        (layer, int(first[p]), int(second[p]), float(ratio[layer, p]), int(pairs[layer, p]))
        for layer, p in found[order].tolist()
    ]


def _limit(comparisons: int) -> float:
    """The |z| that chance alone exceeds once in `LEVEL` of such sets of comparisons."""
    return NormalDist().inv_cdf(1 - LEVEL / (2 * max(1, comparisons)))
