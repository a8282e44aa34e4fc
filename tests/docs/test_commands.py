"""Every command of the documentation works: it runs on tiny data, or is composed or parsed as its program does it.

Whoever writes a command that fits no rule sees `test_every_command` fail: add a rule, or a reason to `NOT_HERE`.
"""

import argparse
import importlib
import re
import shlex

import pytest
from packaging.requirements import Requirement

from pem_lightning.__main__ import JOBS, TOOLS
from pem_lightning.cli import errors
from pem_lightning.cli.overrides import key_of, literal_paths, parse, take_over
from pem_lightning.deploy import __main__ as deploy
from pem_lightning.installation import CONF
from pem_lightning.types import UserError
from tests.docs.pages import ROOT, commands, sessions
from tests.jobs import TINIEST, call, unchecked_shapes

NOT_HERE = {
    "docker build": "needs Docker; tests/test_wheel.py installs what the Dockerfile does",
    "sudo apt install": "changes the machine",
    "cmake": "needs ONNX Runtime's headers; tests/deploy/test_cpp.py builds the program",
    "magick": "a program that is not ours",
    "./build/segment": "what cmake builds",
    "trtexec": "needs TensorRT",
    "python server.py": "stands for a program of the reader's",
}
"""Commands by their beginning that are neither run nor parsed, and why."""

COCO_SAMPLE = "tests/data/reference/panoptic_quality/coco_sample"

RUN = {
    "python predict.py checkpoint=camvid input=street.jpg": (),
    "python predict.py checkpoint=... input=photo.jpg output=predictions": (),
    "python predict.py checkpoint=... input=large.tif inference.tile=[1024,1024]": (),
    "python predict.py checkpoint=PATH input=photos/ output=out": (),
    "python predict.py checkpoint=PATH input=clip.mp4 output=out show_fps=true": (),
    "python predict.py checkpoint=PATH input=photos/ output=out formats=[coco,labelme,cvat]": (),
    "python evaluate.py checkpoint=outputs/.../best.ckpt": (),
    "python evaluate.py checkpoint=... save_predictions=DIR": (),
    "python train.py": (*TINIEST, "recipe.max_steps=1"),
    "python train.py debug=fast": TINIEST,
    "python train.py recipe.ema_decay=0.9998": (*TINIEST, "recipe.max_steps=1"),
    "python train.py dataset=semantic_folder dataset.root=my_data": (
        *(o for o in TINIEST if not o.startswith("dataset.")),
        "dataset.num_workers=0",
        "weights=null",
        "recipe.max_steps=1",
    ),
    "python scripts/convert_checkpoint.py best.ckpt slim.pth": (),
    "python scripts/convert_checkpoint.py best.ckpt small.ckpt --int8": (),
}
"""Commands that run, seconds each, and what makes them small."""

CASES = [(place, command) for command, place in {command: place for place, command in reversed([*commands()])}.items()][
    ::-1
]
"""Places and commands, a command that stands in several places once."""


_COMPOSED: set[tuple[str, ...]] = set()
"""Jobs and overrides that have been composed, for commands that differ in names of files alone."""


def tiny(word):
    """An argument with a file that exists instead of a placeholder."""
    key, equals, value = word.partition("=")
    values = {"dataset": "cityscapes", "dataset.root": "data", "checkpoint": "best.ckpt", "resume": "last.ckpt"}
    if key == "checkpoint" and value != "camvid":
        return "checkpoint=best.ckpt"
    if key == "resume" and value not in ("last", "auto"):
        return "resume=last.ckpt"
    if value == "...":
        return f"{key}={values[key]}"
    return f"{key}{equals}{value.replace('tests/data', f'{ROOT}/tests/data')}"


def check_job(job, words):
    """Compose as the command line does, for every value of a sweep: a key or a choice that does not exist fails."""
    words = [tiny(word) for word in words if word not in ("...", "-m", "--multirun", "--help")]
    if "--cfg" in words:
        at = words.index("--cfg")
        assert words[at + 1] in ("job", "hydra", "all")
        del words[at : at + 2]
    assert not [word for word in words if word.startswith("-")]
    for overrides in single_jobs(job, words):
        if (key := (job, *overrides)) in _COMPOSED:
            continue
        try:
            taken, _ = take_over(job, literal_paths(overrides, False))
            errors.compose(job, taken)
        except UserError as error:
            if "needs an optional package" in str(error):
                pytest.skip(str(error))
            raise
        _COMPOSED.add(key)


def single_jobs(job, words):
    """The overrides with the first values of a sweep, then with every other choice of a config file."""
    parsed = parse(literal_paths(words, True), job)
    several = {o.key_or_group: [str(v) for v in o.sweep_string_iterator()] for o in parsed if o.is_sweep_override()}
    first = {key: f"{key}={values[0]}" for key, values in several.items()}
    yield [first.get(key_of(word), word) for word in words]
    for key, values in several.items():
        for value in values[1:] if (CONF / key).is_dir() else ():
            yield [{**first, key: f"{key}={value}"}.get(key_of(word), word) for word in words]


class ParsedError(Exception):
    """Stops a program after it has read its arguments."""


def check_tool(main, words, monkeypatch):
    """Start a program and stop it once argparse has read its arguments; it exits if it does not know one."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(self, args=None, namespace=None, original=original):
            raise ParsedError(vars(original(self, args, namespace)))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)
    with pytest.raises(ParsedError) as parsed:
        main(words)
    return parsed.value.args[0]


def check_python(words, monkeypatch):
    """`python FILE ...` and `python -m MODULE ...`."""
    name, *rest = words
    if name == "-m":
        name, *rest = rest
        if name == "pem_lightning":
            check_pem(rest, monkeypatch)
            return
        assert name == "scripts.benchmark"
        check_tool(importlib.import_module("scripts.benchmark.__main__").main, rest, monkeypatch)
        return
    assert (ROOT / name).is_file()
    stem = name.removesuffix(".py").removeprefix("scripts/")
    if stem in JOBS:
        check_job(stem, rest)
    elif stem.replace("_", "-") in TOOLS:
        check_pem([stem.replace("_", "-"), *rest], monkeypatch)
    else:
        main = importlib.import_module(f"scripts.{stem}").main
        check_tool(main, rest, monkeypatch)


def check_pem(words, monkeypatch):
    """`pem JOB ...` and `pem TOOL ...`."""
    if not words:
        return
    name, *rest = words
    if name in JOBS:
        check_job(name, rest)
        return
    main = importlib.import_module(f"pem_lightning.tools.{name.replace('-', '_')}").main
    parsed = check_tool(main, rest, monkeypatch)
    if name == "check-data":
        check_job("train", parsed["overrides"])


def check_make(words):
    """The targets are there and mention the variables; ARGS are those of a job where the target is one."""
    makefile = (ROOT / "Makefile").read_text()
    jobs = {"demo": "train", "app": "app"}
    targets = [word for word in words if "=" not in word]
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), target
    for word in set(words) - set(targets):
        name, _, value = word.partition("=")
        assert f"$({name})" in makefile, name
        if name == "ARGS" and targets[0] in jobs:
            check_job(jobs[targets[0]], shlex.split(value))


def check_pip(words):
    """Files, extras and requirements are those that exist, or could."""
    assert words.pop(0) == "install"
    setup = (ROOT / "setup.py").read_text()
    while words:
        word = words.pop(0)
        if word == "-r":
            assert (ROOT / words.pop(0)).is_file()
        elif word == "--index-url":
            assert words.pop(0).startswith("https://")
        elif word.startswith("."):
            assert all(f'"{extra}"' in setup for extra in re.findall(r"\w+", word))
        elif word != "--no-deps":
            Requirement(word)


def check(command, monkeypatch):
    program, *words = command
    program = program.removeprefix(".venv/bin/")
    if program == "python":
        check_python(words, monkeypatch)
    elif program == "pem":
        check_pem(words, monkeypatch)
    elif program == "pem-run":
        check_tool(deploy.run, words, monkeypatch)
    elif program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    elif command[:2] == ("docker", "run"):
        check_pem(words[words.index("pem-lightning") + 1 :], monkeypatch)
    elif program == "sbatch":
        check_job("train", words[words.index("scripts/slurm.sh") + 1 :])
    else:
        pytest.fail(f"no rule for {shlex.join(command)}")


@pytest.mark.parametrize(("place", "command"), CASES, ids=[f"{p} {shlex.join(c)[:60]}" for p, c in CASES])
def test_every_command(place, command, trained, monkeypatch):
    line = " ".join(command)
    if not any(line.startswith(beginning) for beginning in NOT_HERE):
        check(command, monkeypatch)


def test_what_a_command_prints(capsys):
    for (program, job, *words), output in sessions():
        assert program == "python"
        call(job.removesuffix(".py"), *words)
        assert capsys.readouterr().err == output


def test_a_wrong_command_is_noticed(trained, monkeypatch):
    for wrong in (
        "python train.py recipe.max_step=1",
        "pem predict checkpoint=camvid inpt=a.jpg",
        "pem check-data --wrk 1",
    ):
        with pytest.raises((UserError, SystemExit)):
            check(tuple(shlex.split(wrong)), monkeypatch)
    for wrong in ("make dmeo", "make web MODELL=a", "pip install -r requirements-exprt.txt", "python scripts/no.py"):
        with pytest.raises(AssertionError):
            check(tuple(shlex.split(wrong)), monkeypatch)
    with pytest.raises(pytest.fail.Exception, match="no rule"):
        check(("curl", "x"), monkeypatch)


def test_the_lists_are_of_commands_that_are_there():
    lines = [" ".join(command) for _, command in CASES]
    assert [line for line in RUN if line not in lines] == []
    assert [line for line in NOT_HERE if not any(one.startswith(line) for one in lines)] == []


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN)
def test_runs(line, trained):
    run(line.split(), *RUN[line])


@pytest.mark.slow
def test_the_sample_of_coco_as_it_stands(trained):
    lines = [
        command for place, command in CASES if place.startswith("docs/data.md") and "coco_sample" in " ".join(command)
    ]
    assert len(lines) == 3
    for command in lines:
        run(command, *(() if "predict.py" in command else ("dataset.num_workers=0",)))


def run(command, *more):
    _, file, *words = command
    words = [word if "coco_sample" in word and key_of(word) == "checkpoint" else tiny(word) for word in words]
    stem = file.removesuffix(".py")
    if stem in JOBS:
        with unchecked_shapes():
            assert call(stem, *more, *words) == 0
    else:
        tool = importlib.import_module(f"pem_lightning.tools.{stem.removeprefix('scripts/')}")
        assert tool.main(words) == 0
