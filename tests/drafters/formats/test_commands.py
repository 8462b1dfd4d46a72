"""What ``drafters import`` and ``drafters export`` take, and what they say of anything else."""

from __future__ import annotations

import json

import pytest

from buffer.backends import open_backend
from drafters.formats.checkpoint import FormatError, read_checkpoint
from drafters.formats.published import load_target_table, read_drafter
from drafters.initial import NewDrafter, made_drafter, publish_initial
from oracles.bundle_folders import write_bundle
from tests.drafters.formats.test_eagle3 import bundle_of, command, drafter_for
from tests.trainer.traffic import facts_of


@pytest.fixture(scope="module")
def bundle(target, tmp_path_factory):
    folder, model = target
    path = tmp_path_factory.mktemp("bundle") / "0"
    bundle_of(drafter_for(model), folder, path)
    return path


def test_a_version_of_each_drafter_of_a_run_is_exported(target, tmp_path):
    """By a number in the store, on any backend: the name of a folder would do on disks alone."""
    folder, model = target
    facts = facts_of(folder, model)
    backend = open_backend("log:", tmp_path / "run")
    for kind, line in (("eagle3", ""), ("mtp", "mtp")):
        publish_initial(backend.open_weights(line), *made_drafter(kind, facts, NewDrafter()))
    common = ("--format", "hf", "--set", f"target={folder}", "--set", f"run_dir={tmp_path / 'run'}")
    both = (*common, "--set", "drafter.beside=[{kind: mtp}]")

    of_kind = {
        kind: command("export", 0, "--to", tmp_path / f"out-{kind}", "--drafter", kind, *both)
        for kind in ("eagle3", "mtp")
    }
    unsaid = command("export", 0, "--to", tmp_path / "first", *both)

    for kind, done in {**of_kind, "eagle3 by itself": unsaid}.items():
        assert done.exit_code == 0, done.output
        assert f"version 0, {kind.partition(' ')[0]}, as hf" in done.output
    assert "num_nextn_predict_layers" in json.loads((tmp_path / "out-mtp/config.json").read_text())
    missing = command("export", 3, "--to", tmp_path / "o", *both)
    assert "has no version 3; it has [0]; for mtp say --drafter" in missing.output
    alone = command("export", 0, "--to", tmp_path / "o", "--drafter", "mtp", *common)
    assert alone.exit_code == 1
    assert "--drafter mtp: the settings' drafters that learn are eagle3" in alone.output


def test_whatever_is_not_a_published_drafter_is_named(target, bundle, tmp_path):
    to = ("--to", tmp_path / "out", "--set", f"target={target[0]}")
    (tmp_path / "one.txt").write_text("hello")

    missing = command("import", tmp_path / "none", *to)
    file = command("import", tmp_path / "one.txt", *to)

    for done, what in ((missing, "none is not there"), (file, "one.txt is a file")):
        assert done.exit_code == 1 and not (tmp_path / "out").exists()
        assert f"{tmp_path}/{what}; name the folder of a published drafter" in done.output
    assert f"{bundle} is a bundle already" in command("import", bundle, *to).output


@pytest.mark.parametrize("what", ["import", "export"])
def test_a_file_is_no_folder_to_write(target, bundle, tmp_path, what):
    (tmp_path / "file").touch()
    more = () if what == "import" else ("--format", "hf")

    done = command(
        what, bundle, "--to", tmp_path / "file", *more, "--set", f"target={target[0]}"
    )  # fmt: skip

    assert done.exit_code == 1
    assert f"--to {tmp_path / 'file'} is a file; name a new folder" in done.output


def test_a_folder_that_is_no_bundle_is_not_exported(target, tmp_path):
    """Nothing is served, so nothing is said of swaps and of the next version."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7/config.json").write_text("{}")
    to = ("--to", tmp_path / "out", "--format", "hf", "--set", f"target={target[0]}")

    done = command("export", tmp_path / "7", *to)

    assert done.exit_code == 1
    assert f"{tmp_path / '7'} is not a sound bundle: " in done.output
    assert "manifest.json" in done.output and "swapping" not in done.output


def test_a_layout_that_a_kind_lacks_is_named_with_those_that_it_has(target, tmp_path):
    folder, model = target
    facts = facts_of(folder, model)
    manifest, _ = made_drafter("draft_model", facts, NewDrafter())
    write_bundle(
        tmp_path / "0", "draft_model", manifest.drafter_config, facts.fingerprint,
        {"a": facts.lm_head_VH},
    )  # fmt: skip
    to = ("--to", tmp_path / "out", "--format", "speculators", "--set", f"target={folder}")

    done = command("export", tmp_path / "0", *to)

    assert done.exit_code == 1
    assert (
        "of kind 'draft_model' cannot be written as 'speculators'; its layouts: hf" in done.output
    )


def test_known_layouts_are_listed_one_by_one(target, bundle, tmp_path):
    folder = target[0]
    done = command(
        "export", bundle, "--to", tmp_path / "out", "--format", "hf", "--set", f"target={folder}"
    )
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))

    with pytest.raises(FormatError, match=r"LlamaForCausalLMEagle3; eagle3 of speculators; DFlash"):
        read_drafter(read_checkpoint(tmp_path / "out"), load_target_table("target", folder))
