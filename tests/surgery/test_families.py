"""Every causal-LM family of the installed transformers is cut exactly or refused, as FAMILIES.md says."""

import pytest

pytest.importorskip("torch")


from downcycle.surgery.depth_fields import FIELD_RULES
from downcycle.surgery.families import UNIFORM

import families
from tiny_models import FAMILIES, VARIANTS

pytestmark = pytest.mark.usefixtures("quiet")

STATED = families.read_table()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_a_cut_is_exact_or_refused(name, tmp_path):
    stated = STATED.get(name)
    if name in families.NOT_BUILT:
        with pytest.raises(Exception, match=families.NOT_BUILT[name]):
            families.make_parent(name, tmp_path)
        return
    found = families.verdicts(families.make_parent(name, tmp_path / "parent"), tmp_path)
    assert not [verdict.reason for verdict in found if verdict.status not in ("exact", "refused")]
    if stated and "not built" not in stated:
        assert [verdict.status for verdict in found] == stated


def test_decay_rates_that_the_files_do_not_hold_are_refused(tmp_path):
    """Transformers would compute them anew, from another number and depth."""
    parent = families.make_parent("minimax", tmp_path / "parent")
    path = parent.folder / "model.safetensors"
    kept = {name: tensor for name, tensor in families.load_file(path).items() if not name.endswith(("slope_rate", "_decay"))}
    families.save_file(kept, path, {"format": "pt"})
    verdict = families.check(parent, [0, 1, 2, 3], tmp_path / "child")
    assert verdict.status == "refused" and "slope_rate" in verdict.reason and "num_hidden_layers" in verdict.reason


def test_the_table_has_every_family():
    """Of the newest transformers: it may have families that the installed one lacks, and only those."""
    assert set(VARIANTS) <= set(STATED)
    assert set(FAMILIES) <= set(STATED), "python tests/families.py --write"


@pytest.mark.parametrize("name", sorted(UNIFORM & set(FAMILIES)))
def test_nothing_follows_depth_in_a_uniform_family(name):
    config = families.CONFIG_MAPPING[name]().to_dict()
    in_any = {"intermediate_size", "num_experts", "moe_topk", "scale_attn_by_inverse_layer_idx"}  # read from config.json alone
    assert not [field for field in FIELD_RULES if config.get(field) is not None and field not in in_any]
