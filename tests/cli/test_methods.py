import graftune as gt


def test_every_registered_method_is_listed(graftune):
    ended = graftune("methods")
    assert ended.code == 0, ended.err
    assert all(name in ended.out for name in gt.methods())
    listed = {one["name"] for one in graftune("methods", "--json").json}
    assert {"LoRA", "BitFit", "FullFineTuning"} <= listed


def test_a_method_is_explained_in_any_case(graftune):
    ended = graftune("methods", "LORA")
    assert "r = 8" in ended.out
    assert "Rank of the change" in ended.out
    settings = graftune("methods", "lora", "--json").json["settings"]
    assert {one["name"] for one in settings} >= {"r", "alpha", "dropout", "targets"}
    assert all(one["doc"] for one in settings)
    assert not any("Choice" in one["type"] or "|" in one["type"] for one in settings)


def test_an_unknown_method_names_the_nearest(graftune):
    ended = graftune("methods", "lorra")
    assert ended.code == 2
    assert 'Did you mean "LoRA"' in ended.err
