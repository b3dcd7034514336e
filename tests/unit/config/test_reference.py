from stages.config.help import field_help
from stages.config.pipeline import PipelineConfig
from stages.config.reference import _paths, page
from tests.places import REPOSITORY


def test_the_page_is_what_the_classes_say():
    written = (REPOSITORY / "docs" / "CONFIGURATION.md").read_text()
    assert written == page(), "docs/CONFIGURATION.md is out of date; run `make reference`"


def test_a_field_stands_with_its_type_default_bounds_and_help():
    (row,) = [line for line in page().splitlines() if line.startswith("| `heldout_fraction` |")]
    assert row.startswith("| `heldout_fraction` | number | `0.02` | >= 0.0, < 1.0 | Share (0..1) held out")


def test_the_form_offers_the_stages_of_the_pipeline_alone():
    (row,) = [line for line in page().splitlines() if line.startswith("| `last_stage` |") and "skipped" in line][:1]
    assert "`curate`" in row
    assert "`respond`" not in row


def test_a_shared_class_names_every_place_where_it_is_set():
    (places,) = [line for line in page().splitlines() if line.startswith("Set at `pretrain.optimizer`")]
    assert "`sft.optimizer`" in places
    assert "`ppo.optimizer`" in places


def test_angle_brackets_survive_markdown():
    assert "such as &lt;EMAIL>" in page()
    assert "`execution.<stage>`" in page()


def test_every_setting_has_help():
    silent = [
        f"{cls.__name__}.{name}"
        for cls in _paths(PipelineConfig)
        for name, field in cls.model_fields.items()
        if not field_help(cls)[name]
        and not (isinstance(field.annotation, type) and field.annotation in _paths(PipelineConfig))
    ]
    assert silent == []
