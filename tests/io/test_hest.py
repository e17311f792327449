from __future__ import annotations
import numpy as np, pekasc as pk

def test_try(hest):
    f = hest(2)
    sdata = pk.io.read_hest(f.path, ["INT1", "INT2"])
    print(sdata, sdata["table"].obs.head(), sdata["table"].uns)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    a = pk.get.tiles(sdata).compute()
    pk.pp.tile(sdata, tile_px=112, mpp=1.0, patches=True, key_added="stored")
    b = pk.get.tiles(sdata, key="stored").compute()
    print(a.shape, (a.values != b.values).mean())
    assert np.array_equal(a, b)
