"""The ranks of a launch compare everything that decides what is in the file."""

from logitgen.config import Config
from logitgen.provenance import facts_of_launch, package_versions


def test_ranks_compare_every_setting_but_the_names_of_places() -> None:
    """A teacher or a dataset may lie in another folder on another machine; their content is compared later."""
    config = Config(teacher="m", dataset="d", output="o.h5", seed=7)
    facts = facts_of_launch(config)
    options = {name.removeprefix("--") for name in facts if name.startswith("--")}
    assert options == config.settings.keys() - {"teacher", "adapter", "dataset"} | {"max_bytes"}  # it decides top_k
    assert facts["--seed"] == "7"
    assert {name for name in facts if name.startswith("version of")} == {f"version of {n}" for n in package_versions()}
    assert "number of CPU threads" in facts
