"""`shunted-lit cost` prints the FLOPs of each head group, and rejects wrong arguments."""

import pytest

from shunted_lit.cli import main
from shunted_lit.commands.cost import cost
from shunted_lit.export.measurement import Candidate


def test_table_has_a_row_per_head_group_and_the_networks_total(capsys):
    options = {"ratios": [8, 4, 2, 1], "num_heads": 4, "depth": 1}
    main(["cost", "neck", f"--options={options}", "--height=20", "--width=20"])
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.strip().startswith("block.0")]
    assert [row[:5] for row in rows] == [
        ["block.0", "8", "1", "400", "9"], ["block.0", "4", "1", "400", "25"],
        ["block.0", "2", "1", "400", "100"], ["block.0", "1", "1", "400", "400"],
    ]  # fmt: skip
    heads = sum(float(number) for row in rows for number in row[5:])
    total = Candidate("neck", shape=(1, 512, 20, 20), options=options).count_flops() / 1e6
    assert f"together {heads:.0f} of the network's {total:.0f} MFLOPs" in output


def test_a_neck_across_levels_has_a_row_per_level(capsys):
    """Queries of all levels meet the keys of each; the products of queries and keys, and of weights and values."""
    main(["cost", "pyramid", "--options={channels: [16, 24]}", "--height=9", "--width=4"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("block.0")]
    queries = 9 * 4 + 5 * 2
    assert [row[:5] for row in rows] == [
        ["block.0", "2", "1", f"{queries}", "10"],
        ["block.0", "1", "1", f"{queries}", "10"],
    ]
    assert {row[7] for row in rows} == {f"{4 * queries * 10 * 32 / 1e6:.1f}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shunted_u"], "`name` must be one of neck, pyramid, shunted_b, shunted_s, shunted_t, got 'shunted_u'"),
        (["neck", "--height=0"], "`height` must be at least 1, got 0"),
        (["neck", "--options={ratio: 2}"], "neck.* ratio"),
        (["pyramid"], "`options` must be keywords of pyramid, got {} .*missing 1 required .*'channels'"),
        (["pyramid", "--options={channels: [8, 8], ratio: [1, 2]}"], "the neck across levels has no keyword 'ratio'"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["cost", *arguments])


@pytest.mark.parametrize("options", [{"bogus": 1}, {"pretrained": True}])
def test_options_of_another_network_are_reported(options):
    with pytest.raises(ValueError, match=r"`options` must be keywords of shunted_t, got {'(bogus|pretrained)': "):
        cost("shunted_t", options)
