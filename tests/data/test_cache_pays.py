from dataclasses import replace

import pytest

from mmpeft.data.cache_pays import CacheCase, cache_pays

MIB, GIB = 1 << 20, 1 << 30
CASE = CacheCase(media=1000, shown=3000, found=False, bytes_each=MIB, limit_bytes=20 * GIB, free_bytes=100 * GIB)


@pytest.mark.parametrize(
    ("change", "pays", "said"),
    [
        ({}, True, "the stages show 1,000 different media 3,000 times; their features take 1,000 MiB"),
        ({"media": 0, "shown": 0}, False, "no sample has media"),
        ({"shown": 1000}, False, "no medium is shown twice, 1,000 of 1,000 once, so nothing would be read again"),
        ({"shown": 400}, False, "no medium is shown twice, 400 of 1,000 once"),
        ({"shown": 1000, "found": True}, True, "features of earlier runs are there"),
        ({"shown": 1001}, True, "1,000 different media 1,001 times"),
        ({"limit_bytes": 500 * MIB}, True, "of which data.cache.limit_bytes holds 50.0 %"),
        ({"free_bytes": 250 * MIB}, True, "of which the disk holds 25.0 %"),
        ({"limit_bytes": 50 * MIB}, False, "would take 1,000 MiB, and data.cache.limit_bytes has room for 50.0 MiB"),
        ({"free_bytes": -5}, False, "the disk has room for 0 B"),
        ({"bytes_each": 0}, True, "their features take 0 B"),
    ],
)
def test_it_pays_where_towers_would_run_again_and_features_have_room(change, pays, said):
    found, why = cache_pays(replace(CASE, **change))
    assert found is pays
    assert said in why
