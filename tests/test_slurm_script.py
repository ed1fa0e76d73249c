"""The batch script of a job: golden, for containers, with site settings; and whatever a user writes stays text in it."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from jobs import cluster, launch, options, slurm, snapshot, submit
from nepa_dist.config import ClusterConfig

GOLDEN = Path(__file__).parent / "golden" / "pretrain-vit_l-nodes-8.sh"
DIGEST = "5" * 64


class FakeCode(NamedTuple):
    digest: str = DIGEST


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder, no SLURM, and paths of a cluster in place of this machine's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/local/nowhere")
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    monkeypatch.setattr(submit, "read_code", lambda include: FakeCode())
    return tmp_path


def printed(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert submit.main([*words, "--print"]) == 0
    return capsys.readouterr().out


def test_print_of_the_headline_run_is_golden(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("pretrain", "vit_l", "--nodes", "8", "--run-dir", "/scratch/runs/pretrain-vit_l", capsys=capsys)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    assert list(elsewhere.iterdir()) == []


def test_resources_become_directives(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resources = "--partition gpu,long --account lab-1 --qos high --constraint a100&ib --exclude node[3,7-9] --mem 500G"
    more = ("--time", "1-00:00:00", "--cpus-per-gpu", "12", "--set", "cluster.gpu_type=h100")
    text = printed("pretrain", "vit_b", "--nodes", "2", *resources.split(), *more, capsys=capsys)
    for line in (
        "--partition=gpu,long",
        "--account=lab-1",
        "--qos=high",
        "--constraint='a100&ib'",
        "--exclude='node[3,7-9]'",
        "--mem=500G",
        "--time=1-00:00:00",
        "--cpus-per-task=12",
        "--gpus-per-node=h100:8",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "srun --kill-on-bad-exit=1 --open-mode=append --cpus-per-task=12" in text


def test_ranks_on_cpus_ask_for_no_gpus(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gpus-per-node" not in printed("pretrain", "vit_b", "--nodes", "2", "--set", "engine.device=cpu", capsys=capsys)


SITE = """\
cluster:
  modules: [cuda/13.0, nccl]
  source: /opt/site/gpu.sh
  environment: {NCCL_IB_HCA: mlx5, GREETING: "it's $HOME; `id`"}
  interface: ib0
  inherit: [LD_LIBRARY_PATH]
  secrets: [HF_TOKEN]
"""


def test_a_site_is_settings_and_no_code(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "site.yaml").write_text(SITE)
    text = printed("pretrain", "vit_b", "--nodes", "2", "--config", "site.yaml", capsys=capsys)
    for line in (
        ". /opt/site/gpu.sh",
        "module load cuda/13.0 nccl",
        "export NCCL_IB_HCA=mlx5",
        "export GREETING='it'\"'\"'s $HOME; `id`'",
        "export GLOO_SOCKET_IFNAME=ib0",
        "# and from ~/.config/nepa-dist/secrets on its node: HF_TOKEN",
    ):
        assert f"{line}\n" in text
    assert "SLURM_CONF, LD_LIBRARY_PATH; nothing else" in text


@pytest.mark.parametrize(
    ("runtime", "step"),
    [
        (
            "pyxis",
            "srun --kill-on-bad-exit=1 --open-mode=append --container-image=/data/nepa.sqsh "
            '--container-mounts=/scratch/r:/scratch/r,/data/i:/data/i,/data/a:/b --output="$run/logs/rank-%t.txt" \\\n'
            '  python -P -m jobs.runner "$run"\n',
        ),
        (
            "apptainer",
            'srun --kill-on-bad-exit=1 --open-mode=append --output="$run/logs/rank-%t.txt" \\\n'
            "  apptainer exec --nv --bind /scratch/r:/scratch/r --bind /data/i:/data/i --bind /data/a:/b /data/nepa.sqsh "
            'python -P -m jobs.runner "$run"\n',
        ),
    ],
)
def test_containers(elsewhere: Path, capsys: pytest.CaptureFixture[str], runtime: str, step: str) -> None:
    image = ("--set", "cluster.container=/data/nepa.sqsh", "--set", "cluster.container_mounts=[/data/i, '/data/a:/b']")
    where = ("--run-dir", "/scratch/r", "--set", f"cluster.container_runtime={runtime}")
    assert step in printed("pretrain", "vit_b", "--nodes", "2", *where, *image, capsys=capsys)


def test_stages_of_a_pipeline_depend_on_each_other(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("pipeline", "vit_b", "--cluster", "slurm", "--nodes", "finetune:4", "--name", "p", capsys=capsys)
    scripts = text.split("# ---- ")[1:]
    assert [script.split("\n")[0] for script in scripts] == ["pretrain", "finetune", "segment"]
    assert "--dependency" not in scripts[0]
    for script, before in zip(scripts[1:], ("pretrain", "finetune"), strict=True):
        assert f"#SBATCH --dependency=afterok:JOB-OF-{before}\n" in script
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    assert [re.findall("--nodes=(.*)", script)[0] for script in scripts] == ["1", "4", "1"]


def test_a_local_run_is_described_too(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("pretrain", "vit_tiny", "--data", "digits", "--gpus-per-node", "2", capsys=capsys)
    assert "2 processes of this machine" in text
    assert "WORLD_SIZE=2" in text


@pytest.mark.parametrize("command", ["pipeline vit_b", "sweep objective_digits"])
@pytest.mark.parametrize("name", ["a\n#SBATCH --wrap=x", "../up", "a/b", "-x", "a b", "\u202ea"])
def test_a_pipeline_or_sweep_has_a_name_like_a_run(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    words = [*command.split(), "--cluster", "slurm", f"--name={name}", "--skip-check", "paths", "--print"]
    assert submit.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("cannot name a run") == 1


def test_no_script_is_written_with_a_line_break_whatever_is_skipped(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check that would say so can be skipped, the rule cannot."""
    words = ["pretrain", "vit_b", "--nodes", "2", "--run-dir", "/scratch/a\n#SBATCH --wrap=x/run", "--print"]
    assert submit.main([*words, "--skip-check", "paths"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "control character or a line break" in captured.err


@pytest.mark.parametrize("command", ["pretrain vit_b", "pipeline vit_b", "sweep objective_digits"])
def test_code_that_cannot_be_taken_is_a_mistake(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(submit, "read_code", snapshot.read_code)
    assert submit.main([*command.split(), "--cluster", "slurm", "--include", "*.nothing", "--print"]) == 2
    assert "--include *.nothing: no such file" in capsys.readouterr().err


PIECES = (
    r"""$(touch hit)|`touch hit`|;touch hit;|'|"|\|&&touch hit&&|>hit|<x|$HOME|${IFS}| |  |#|#SBATCH --wrap=x|END|*|?|{a,b}|x"""
    "|~|!|!!|%A|%j|%|-|--array=9|=|é|画像|(|)|\U0001f600|\u202e|\u200b|\n|\ntouch hit\n|\n#SBATCH --array=9\n|\r|\t|\x1b"
    "|\x00|\udcff|:|,|[|]|\u2028|\u2029|\u2028#SBATCH --array=9\u2028|\x85|\v|\f|\ufeff|\u2066|\u00a0|\\n|$'\\n'|%0a"
)
FREE_TEXT = (
    "RECIPE",
    "--cluster",
    "--name",
    "--run-dir",
    "--run-dir FOLDER",
    "PIPELINE",
    "SWEEP",
    "--data",
    "--partition",
    "--account",
    "--qos",
    "--constraint",
    "--exclude",
    "--time",
    "--mem",
    "--engine",
    "--init",
    "--load",
    "--allow",
    "--include",
    "--skip-check",
    "--config",
    "--set cluster.source=",
    "--set cluster.container=",
    "--set cluster.python=",
    "--set cluster.interface=",
    "--set cluster.gpu_type=",
    "--set cluster.secrets_file=",
    "--set cluster.modules=",
    "--set cluster.container_mounts=",
    "--set cluster.environment.X=",
    "--set cluster.inherit=",
    "--set cluster.shared=",
    "--set cluster.secrets=",
    "--set init.path=",
    "--set data.cache_dir=",
    "--set ",
)


def hostile(count: int) -> list[tuple[str, str]]:
    """Options, each with a text that a shell, or sbatch, would take for more than text."""
    random_ = random.Random(7)
    pieces = [*PIECES.split("|"), "|touch hit", "x" * 5000]
    texts = ["".join(random_.choices(pieces, k=random_.randint(1, 6))) for _ in range(count)]
    return [(FREE_TEXT[number % len(FREE_TEXT)], text) for number, text in enumerate(texts)]


# In place of srun: keeps its words. In place of what comes before and after it: nothing.
STAND_IN = """\
srun() { printf '%s\\0' "$@" >"$CALLS"; }
scontrol() { :; }
sacct() { :; }
module() { printf '%s\\0' "$@" >"$CALLS.module"; }
begin() { :; }
end() { :; }
"""


def test_what_a_user_writes_is_never_executed_and_makes_no_directive(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2,000 texts through all options that take any: each is refused, or bash and sbatch read it as one word."""
    monkeypatch.setenv("PATH", os.defpath)
    usual = set(directives(printed("pretrain", "vit_b", "--nodes", "2", "--run-dir", "/scratch/x", capsys=capsys)))
    names = {line.split("=")[0] for line in usual} | {f"#SBATCH --{name}" for name in slurm_names()}
    work = tmp_path / "work"
    work.mkdir()
    scripts = []
    for option, text in hostile(2000):
        capsys.readouterr()
        try:
            code = submit.main([*command_line(option, text), "--skip-check", "paths", "--print"])
        except UnicodeEncodeError:  # of the terminal, for bytes that are no text
            continue
        except SystemExit:  # of the parser of options
            continue
        out = capsys.readouterr().out
        if code == 0:
            found = directives(out)
            assert {line.split("=")[0] for line in found} <= names, (option, text)
            assert len(found) <= len(usual) + 1
            scripts.append(out)
        else:
            assert code == 2
            assert out == ""
    assert 200 < len(scripts) < 1500
    check_that_nothing_is_executed(scripts, work)
    assert not list(tmp_path.rglob("hit"))


def command_line(option: str, text: str) -> list[str]:
    """Words of a command with a text in one place."""
    plain = text.replace("\0", "")  # no argument of a program can hold it; YAML can, as an escape
    if option == "PIPELINE":
        return ["pipeline", "vit_b", "--cluster", "slurm", f"--name={plain}"]
    if option == "SWEEP":
        return ["sweep", "objective_digits", "--cluster", "slurm", f"--name={plain}"]
    if option == "RECIPE":
        return ["pretrain", plain, "--nodes", "2"]
    if option == "--run-dir FOLDER":
        last = f"--run-dir=/scratch/{plain}/run"
    elif option.startswith("--set"):
        last = option.replace(" ", "=", 1) + value(option, text).replace("\0", "")
    else:
        last = f"{option}={plain}"
    return ["pretrain", "vit_b", "--nodes", "2", last]


def value(option: str, text: str) -> str:
    """As YAML, in a list where the setting is one."""
    import json

    quoted = json.dumps(text)
    return (
        text if option == "--set " else f"[{quoted}]" if re.search("modules|mounts|inherit|shared|secrets=", option) else quoted
    )


def directives(script: str) -> list[str]:
    """As sbatch reads them: up to the first line that is neither empty nor a comment."""
    lines = []
    for line in script.split("\n"):
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            lines.append(line)
    return lines


def slurm_names() -> tuple[str, ...]:
    return ("partition", "account", "qos", "constraint", "exclude", "time", "mem")


def check_that_nothing_is_executed(scripts: list[str], work: Path) -> None:
    """Run them all, with functions in place of the programs; files that are sourced do not exist."""
    whole = [f"cd {work}\n{STAND_IN}"]
    for script in scripts:
        whole.append(f"(\nSLURM_JOB_ID=1\n{script}\n)")
    environment = {"PATH": os.defpath, "CALLS": str(work.parent / "calls")}
    text = "\n".join(whole).encode("utf-8", "surrogateescape")
    done = subprocess.run(["bash"], input=text, env=environment, cwd=work, capture_output=True, timeout=120)
    harmless = (b"No such file or directory", b"File name too long", b"")
    assert [line for line in done.stderr.split(b"\n") if not line.endswith(harmless[:2]) and line] == []
    assert list(work.iterdir()) == []
    assert (work.parent / "calls").exists()


def test_sbatch_gets_a_small_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "SBATCH_PARTITION", "LD_LIBRARY_PATH", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "canary")
    found = slurm.submit_environment(ClusterConfig(inherit=("LD_LIBRARY_PATH",)))
    assert set(found) <= {*slurm.INHERITED, "LD_LIBRARY_PATH"}
    assert found["LD_LIBRARY_PATH"] == "canary"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("partition='a b'", "letters, digits"),
        ("time=3600", "quote it"),
        ("time='soon'", "minutes"),
        ("mem='1 G'", "a number with K, M, G or T"),
        ("environment={WANDB_API_KEY: x}", "looks like a secret"),
        ("environment={'A B': x}", "cannot name a variable"),
        ("inherit=['$(id)']", "cannot name a variable"),
        ("modules=['-x']", "begins with -"),
        ('container="a\\nb"', "control character"),
        ("signal_seconds=1", "greater than or equal to 10"),
    ],
)
def test_settings_of_a_site_have_a_form(setting: str, words: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["pretrain", "vit_b", "--nodes", "2", "--set", f"cluster.{setting}", "--print"]) == 2
    assert words in capsys.readouterr().err


def test_the_script_is_good_bash(elsewhere: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(printed("pretrain", "vit_b", "--nodes", "2", capsys=capsys))
    checker = Path(sys.prefix) / "bin" / "shellcheck"
    if not checker.exists():
        pytest.skip("shellcheck is not installed")
    options_ = ["--shell=bash", "--exclude=SC2034,SC2154,SC1091"]  # variables of the other file, which it cannot follow
    attempt = cluster.REPO_ROOT / "jobs" / "attempt.sh"
    done = subprocess.run([checker, *options_, script, attempt], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_resource_has_an_option() -> None:
    assert set(options._RESOURCES) <= set(ClusterConfig.model_fields)
    assert launch.CODE == snapshot.CODE
