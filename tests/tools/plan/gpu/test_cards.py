"""Known GPUs, and the text that names them."""

from __future__ import annotations

import pytest

from rae_xla.errors import UserError
from rae_xla.tools.plan.gpu.cards import CARDS, parse_gpus


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_card_is_known_to_the_runtime(card):
    assert 0.9 * card.memory_bytes < 1.1 * card.usable_bytes < 1.1 * card.memory_bytes
    assert card.peak_flops > card.fp32_flops / 1.5
    assert card.network_bandwidth < card.link_bandwidth < card.bandwidth


@pytest.mark.parametrize(
    ("text", "name", "gpus"),
    [("8xh100", "h100", 8), ("1x4090", "4090", 1), ("A100-40", "a100-40", 1)],
)
def test_names(text, name, gpus):
    cluster = parse_gpus(text)
    assert (cluster.card.name, cluster.gpus) == (name, gpus)
    assert str(cluster) == f"{gpus}x{name}"


@pytest.mark.parametrize("text", ["0xh100", "8x", "8 h100", "8xv100", "x4090"])
def test_other_names_are_errors(text):
    with pytest.raises(UserError, match="known: b200"):
        parse_gpus(text)


def test_groups_over_hosts_use_the_network():
    cluster = parse_gpus("16xh100")
    assert cluster.bandwidth(range(8)) == cluster.card.link_bandwidth
    assert cluster.bandwidth([0, 8]) == cluster.card.network_bandwidth
