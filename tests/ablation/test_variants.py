import pytest

from pem_lightning.ablation import read_runs
from pem_lightning.ablation.variants import setting_of, special_of, terms_of
from tests.ablation.conftest import write_run


def words(folder, *overrides):
    (run,) = read_runs([write_run(folder, *overrides, values=[1.0], steps=150)])
    return [term.words for term in terms_of(run)]


@pytest.mark.parametrize(
    ("by_name", "by_argument", "expected"),
    [
        ("ablation=prototype", "seed=5", []),
        ("ablation=no_masking", "network.masked=false", ["no masking"]),
        ("ablation=no_prototype", "network.attention=mean", ["no prototype"]),
        ("ablation=no_interaction", "network.interaction=false", ["no interaction"]),
        ("ablation=masked_cross_attention", "network.attention=dot_product", ["masked cross-attention"]),
        ("ablation=cross_attention", "ablation=[no_masking,masked_cross_attention]", ["cross-attention"]),
        ("ablation=no_csm", "network.csm=false", ["no CSM"]),
        ("ablation=no_deformable", "network.deformable=false", ["no deformable"]),
        ("ablation=fpn", "ablation=[no_csm,no_deformable]", ["FPN"]),
        ("ablation=msdeform", "ablation=[prototype,msdeform]", ["MSDeformAttn"]),
        ("ablation=no_deep_supervision", "network.auxiliary=never", ["no deep supervision"]),
        ("decoder_layers=1", "network.num_layers=1", ["1 layer"]),
        ("num_queries=50", "recipe.num_queries=50", ["50 queries"]),
        ("backbone=resnet18", "network.backbone=resnet18", ["resnet18"]),
    ],
)
def test_one_variant_has_one_name_however_it_was_asked_for(tmp_path, by_name, by_argument, expected):
    assert words(tmp_path / "a", by_name) == expected
    assert words(tmp_path / "b", by_argument) == expected


def test_combinations_are_named_by_family(tmp_path):
    overrides = ("decoder_layers=3", "ablation=[no_csm,no_masking]", "backbone=resnet50")
    assert words(tmp_path / "run", *overrides) == ["no masking", "no CSM", "3 layers", "resnet50"]


def test_other_changes_are_keys_and_values(tmp_path):
    found = words(
        tmp_path / "run",
        "recipe.optimizer.lr=3e-4",
        "criterion.dice_weight=2.0",
        "network.channels=128",
        "recipe.optimizer.betas=[0.9,0.95]",
        "+recipe.new='<b>'",
    )
    assert found == [
        *("channels=128", "criterion.dice_weight=2", "new=<b>", "optimizer.betas=[0.9, 0.95]", "optimizer.lr=0.0003"),
    ]


def test_pretrained_weights_make_a_variant(tmp_path):
    """Else they would be averaged with runs from random ones."""
    assert words(tmp_path / "run", "weights=torchvision/resnet50", "num_queries=50") == [
        *("50 queries", "weights=torchvision/resnet50"),
    ]


def test_what_does_not_decide_about_the_result_makes_no_variant(tmp_path):
    overrides = ("seed=7", "trainer=cpu", "logger=tensorboard", "callbacks.panels=null", "dataset.num_workers=0")
    more = ("dataset.root=elsewhere", "recipe.val_interval=10", "network.kernel=torch", "recipe.checkpoint_interval=9")
    hardware = ("recipe.micro_batch_size=2", "recipe.optimizer.fused=false")
    assert words(tmp_path / "run", *overrides, *more, *hardware) == []
    default, other = read_runs([write_run(tmp_path / "default"), tmp_path / "run"])
    assert setting_of(default) == setting_of(other)
    assert special_of(other) == []


@pytest.mark.parametrize(
    "override",
    [
        "recipe.max_steps=700",
        "trainer.max_steps=700",
        "recipe.global_batch_size=8",
        "recipe.train_transform.crop_size=[64,128]",
        "recipe.eval_transform.shortest_edge=64",
        "dataset.datamodule.num_train=8",
        "task.inference.overlap_threshold=0.5",
        "task=semantic",
        "inference.flip=true",
    ],
)
def test_runs_of_another_setting_are_not_compared(tmp_path, override):
    default, other = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", override)])
    assert setting_of(default) != setting_of(other)
    assert terms_of(other) == ()


def test_what_is_special_about_a_setting(tmp_path):
    overrides = ("dataset.datamodule.num_train=8", "inference.flip=true", "recipe.global_batch_size=8")
    (run,) = read_runs([write_run(tmp_path / "run", *overrides)])
    assert special_of(run) == ["dataset.num_train=8", "inference.flip=True"]


def test_a_data_set_that_conf_does_not_know_is_compared_with_the_default(tmp_path):
    folder = write_run(tmp_path / "run", "dataset.name=mine", "ablation=no_csm")
    path = folder / ".hydra" / "hydra.yaml"
    path.write_text(path.read_text().replace("dataset: synthetic", "dataset: mine"))
    (run,) = read_runs([folder])
    assert [term.words for term in terms_of(run)] == ["no CSM"]


def test_runs_from_before_an_argument_existed_have_its_default(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / ".hydra" / "config.yaml"
    text = path.read_text()
    for line in ("  csm: true\n", "  masked: true\n", "  attention: prototype\n", "  pixel_decoder: pem\n"):
        assert line in text
        text = text.replace(line, "")
    path.write_text(text)
    (run,) = read_runs([folder])
    assert terms_of(run) == ()


def test_runs_from_before_the_global_batch_size_are_compared(tmp_path):
    folder = write_run(tmp_path / "old")
    path = folder / ".hydra" / "config.yaml"
    text = path.read_text()
    assert text.count("global_batch_size") == 2
    text = text.replace("global_batch_size", "batch_size")
    for line in ("    fused: true\n", "  ema_decay: null\n", "  micro_batch_size: 16\n"):
        assert line in text
        text = text.replace(line, "")
    path.write_text(text)
    old, new = read_runs([folder, write_run(tmp_path / "new")])
    assert setting_of(old) == setting_of(new)
    assert (terms_of(old), special_of(old)) == ((), [])
